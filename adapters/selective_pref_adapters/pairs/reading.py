"""A file, folder or hub id → preference rows, and what a reader should know about how they were read.

In: where rows stand. Out: `PreferenceRow`s; notes of what was read by which schema, and of what was not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from selective_pref_adapters.pairs.files import raw_rows
from selective_pref_adapters.pairs.rows import SKIP, PreferenceRow, RowError
from selective_pref_adapters.pairs.schemas import Columns, preference_row


def scan_rows(
    source: str | Path,
    *,
    columns: Columns | None = None,
    notes: list[str] | None = None,
    chosen_only: bool = False,
) -> Iterator[PreferenceRow | RowError]:
    """Every row of a source, or in its place the error that says why it is none. Arguments as in `read_rows`."""
    for place, value in raw_rows(source, [] if notes is None else notes):
        if isinstance(value, RowError):
            yield value
            continue
        try:
            yield preference_row(value, place, columns, chosen_only=chosen_only)
        except RowError as error:
            yield error


def read_rows(
    source: str | Path,
    malformed: list[str] | None = None,
    *,
    columns: Columns | None = None,
    notes: list[str] | None = None,
    chosen_only: bool = False,
) -> list[PreferenceRow]:
    """The preference rows of a file, a folder or a data set of the hub.

    Args:
        source: a `.jsonl`, `.json`, `.parquet` or `.csv` file, also packed as `.gz` or `.zst`; a folder written by
            `Dataset.save_to_disk`; a folder of such files, read in the order of their names; `owner/name` of the hub.
            Folders and hub ids may name a split, as `folder:test`; without one, test and validation are left out.
        malformed: None to raise at the first malformed row; or a list that collects the messages of such rows, which
            are then left out.
        columns: see `preference_row`.
        notes: a list that collects what was read by which schema, and what was not read.
        chosen_only: for supervised training, see `preference_row`.

    Raises:
        FileNotFoundError: nothing is at `source`.
        RowError: a row is not a preference pair, or a line is not JSON; the message says which.
        ValueError: the kind of file is not known, it cannot be read, or it holds no (well-formed) row.
    """
    rows: list[PreferenceRow] = []
    wrong = 0
    for row in scan_rows(source, columns=columns, notes=notes, chosen_only=chosen_only):
        if isinstance(row, PreferenceRow):
            rows.append(row)
        elif malformed is None:
            raise RowError(f"{row}. {SKIP}", row.kind) from row
        else:
            malformed.append(str(row))
            wrong += 1
    if not rows:
        raise ValueError(
            f"{source} holds no rows" + (f" but {wrong} malformed ones: {malformed[-1]}" if malformed else "")
        )
    if notes is not None:
        notes += schema_lines(source, rows)
    return rows


def schema_lines(source: str | Path, rows: list[PreferenceRow]) -> list[str]:
    """One line: how many rows were read by which schema."""
    counts = Counter(row.schema for row in rows).most_common()
    return [f"{Path(source).name}: " + ", ".join(f"{schema} rows: {count}" for schema, count in counts)]
