"""More rows than memory should hold: token ids that are made once and kept on disk in Arrow, or rows as a stream.

    source → naming (what decides the ids) → folder (there already? else one process makes it) → table
    source → streaming

In: a source of rows, a tokenizer, how rows are cut. Out: `TokenizedRows`, of which `PairTable`s are taken: sequences of
`TokenizedPair`s that hold none of them in memory. What is read back equals what `tokenize_pairs` makes of the rows.
"""

from selective_pref_adapters.pairs.large.folder import AUTO, OFF, default_folder, tokenized_rows
from selective_pref_adapters.pairs.large.naming import Making
from selective_pref_adapters.pairs.large.streaming import PairStream, stream_of, streamed_pairs
from selective_pref_adapters.pairs.large.table import PairTable, TokenizedRows, joined, malformed_note, no_pairs

__all__ = [
    "AUTO",
    "OFF",
    "Making",
    "PairStream",
    "PairTable",
    "TokenizedRows",
    "default_folder",
    "joined",
    "malformed_note",
    "no_pairs",
    "stream_of",
    "streamed_pairs",
    "tokenized_rows",
]
