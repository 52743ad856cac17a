"""Everything `selective-pref rows` depends on, as one dataclass. Imports no framework: `--help` is quick.

A field's name is the flag, its docstring the help.
"""

from __future__ import annotations

from dataclasses import dataclass

from selective_pref_adapters.train_config import Truncation


@dataclass(kw_only=True)
class RowsConfig:
    """Which rows are looked at, with whose tokenizer, and cut to which length."""

    pairs: str
    """Preference rows: a .jsonl, .json, .parquet or .csv file, a folder, or a hub id (NAME:SPLIT)."""
    tokenizer: str
    """The policy: a folder or hub id with a tokenizer."""
    rows: int = 3
    """How many rows to show, from the first one on; the summary is over all."""
    columns: str | None = None
    """Which columns hold what, where the rows' schema is not recognised: prompt=question,chosen=good,rejected=bad."""
    max_length: int | None = None
    """Tokens of prompt + completion, as in training. Default: what the model can read, at most 4096."""
    truncation_mode: Truncation = "keep_start"
    """keep_start cuts the end of what is too long, keep_end the start; as in training."""
    json: bool = False
    """Write one JSON object instead of text: everything that is shown, with all ids."""
