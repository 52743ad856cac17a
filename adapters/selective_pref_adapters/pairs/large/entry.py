"""One entry of the cache as it is read.

In: its folder. Out: `TokenizedRows`, or None where files are missing or cut off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from selective_pref_adapters.pairs.large.making import ABOUT
from selective_pref_adapters.pairs.large.naming import Making
from selective_pref_adapters.pairs.large.table import TokenizedRows

PAIRS_FILE, ABOUT_FILE, ENTRY_FILE = "pairs.arrow", "about.arrow", "entry.json"
KNOWN = pa.schema([*ABOUT, pa.field("prompt", pa.int64()), pa.field("prompt_hash", pa.uint64())])
"""`ABOUT` with the number of each row's prompt, by the order of their texts, and its hash."""


def opened(entry: Path, making: Making) -> TokenizedRows | None:
    """The rows of an entry; None where there is none, or files of it are missing or cut off."""
    from datasets import Dataset

    try:
        known = json.loads((entry / ENTRY_FILE).read_text(encoding="utf-8"))
        if any((entry / name).stat().st_size != size for name, size in known["files"].items()):
            return None
        data = Dataset.from_file(str(entry / PAIRS_FILE))
        about = Dataset.from_file(str(entry / ABOUT_FILE), in_memory=True).data.table
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return None
    return rows_of_tables(data, about, making, known["notes"], known["unread"], known["first_unread"])


def rows_of_tables(
    data: Any, about: pa.Table, making: Making, notes: list[str], unread: int, first_unread: str
) -> TokenizedRows:
    """The rows of the two tables."""
    return TokenizedRows(
        data=data,
        about=about.select(ABOUT.names).combine_chunks(),
        prompt=about["prompt"].to_numpy(),
        prompt_hashes=about["prompt_hash"].to_numpy(),
        making=making,
        notes=list(notes),
        unread=unread,
        first_unread=first_unread,
    )


def is_whole(entry: Path) -> bool:
    """Whether an entry was written to its end."""
    return (entry / ENTRY_FILE).is_file()
