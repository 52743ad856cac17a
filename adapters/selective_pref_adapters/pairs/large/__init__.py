"""Token ids that are made once, kept on disk in Arrow, and read by every process: memory-mapped, not loaded.

    source → naming (what decides the ids) → folder (there already? else one process makes it) → table

In: a source of rows, a tokenizer, how rows are cut. Out: `TokenizedRows`, of which `PairTable`s are taken: sequences of
`TokenizedPair`s that hold none of them in memory. What is read back equals what `tokenize_pairs` makes of the rows.
"""

from selective_pref_adapters.pairs.large.folder import AUTO, OFF, default_folder, tokenized_rows
from selective_pref_adapters.pairs.large.naming import Making
from selective_pref_adapters.pairs.large.table import PairTable, TokenizedRows

__all__ = ["AUTO", "OFF", "Making", "PairTable", "TokenizedRows", "default_folder", "tokenized_rows"]
