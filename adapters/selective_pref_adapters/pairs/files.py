"""Files, folders and hub ids → raw rows, each with its place. What the columns mean is not looked at here.

In: `.jsonl`, `.json`, `.parquet`, `.csv`, each also `.gz` or `.zst` and in any case; a folder of such files, or one
written by `Dataset.save_to_disk`; a hub id. A folder or hub id may name a split: `folder:test`. Out: (place, row), or
(place, RowError) for a line that cannot be read, so that whoever asks decides whether to stop.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from selective_pref_adapters.pairs.rows import RowError

RawRow: TypeAlias = "tuple[str, Any]"
"""(place, what the row holds or a RowError)."""

KINDS = (".jsonl", ".json", ".parquet", ".csv")
_PACKED = (".gz", ".zst")
_EXPECTED = f"{', '.join(KINDS)} (also {' or '.join(_PACKED)}), a folder of them or of save_to_disk, or a hub id"
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}


def raw_rows(source: str | Path, notes: list[str]) -> Generator[RawRow, None, None]:
    """Everything that stands at `source`, in order; `notes` gets a line for each choice that was made.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a kind of file that is not known, or one that cannot be read.
    """
    path, split = located(source)
    if not path.exists():
        yield from _of_hub(str(source))
    elif path.is_file():
        if split is not None:
            raise ValueError(f"{path} is one file and has no splits: leave ':{split}' out")
        yield from rows_of_file(path, path.name)
    elif is_saved_dataset(path):
        yield from _of_saved_dataset(path, split)
    else:
        for file in files_of(path, split, notes):
            yield from rows_of_file(file, str(file.relative_to(path)))


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json", "dataset_info.json"))


def kind_of(path: Path) -> tuple[str, str]:
    """(`.jsonl`, `.json`, `.parquet`, `.csv` or "", `.gz`, `.zst` or "") of a file name, whatever its case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _PACKED else ""
    return (suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""), packed


def located(source: str | Path) -> tuple[Path, str | None]:
    """(path, split): what follows the last colon is a split where the whole is no path and the rest is one."""
    path = Path(source)
    before, colon, split = str(source).rpartition(":")
    if colon and not path.exists() and Path(before).exists():
        return Path(before), split
    return path, None


# --- folders and the hub ---------------------------------------------------------------------------------------------


def files_of(folder: Path, split: str | None, notes: list[str]) -> list[Path]:
    """The files of a folder's split, by their names; without one, all but those of the test and validation splits."""
    there = sorted(f for f in folder.rglob("*") if f.is_file() and not _is_hidden(f.relative_to(folder)))
    splits = {file: _split_of(file.relative_to(folder)) for file in there if kind_of(file)[0]}
    if not splits:
        raise ValueError(
            f"{folder} is neither a folder written by Dataset.save_to_disk nor one of {', '.join(KINDS)} files"
        )
    if split is not None:
        read = [file for file, of in splits.items() if of == _canonical(split)]
        if not read:
            raise ValueError(f"{folder} has no files of a split {split!r}; splits by file names: {_names(splits)}")
    else:
        read = [file for file, of in splits.items() if of in ("train", "")] or list(splits)
    if len(there) > 1:
        left = [str(file.relative_to(folder)) for file in there if file not in read]
        named = ", ".join(str(file.relative_to(folder)) for file in read)
        notes.append(f"{folder.name}: read {named}" + (f"; not read: {', '.join(left)}" if left else ""))
    return read


def is_local(source: str | Path) -> bool:
    """Whether a file or folder stands at `source`, which may name a split."""
    return located(source)[0].exists()


def splits_of(source: str | Path) -> set[str]:
    """The names of the splits that a local folder holds; empty for a file, or where nothing names one."""
    path, split = located(source)
    if split is not None or not path.is_dir():
        return set()
    if is_saved_dataset(path):
        return set(_load_saved(path)) if (path / "dataset_dict.json").is_file() else set()
    return {_split_of(file.relative_to(path)) for file in path.rglob("*") if kind_of(file)[0]} - {""}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_of(path: Path) -> str:
    """Which split a file belongs to by a word of its name or of its folders; "" for none."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            for split, words in _SPLITS.items():
                if word in words:
                    return split
    return ""


def _canonical(split: str) -> str:
    return next((name for name, words in _SPLITS.items() if split.lower() in words), split)


def _names(splits: dict[Path, str]) -> str:
    return str(sorted({of for of in splits.values() if of})) if any(splits.values()) else "none"


def _load_saved(folder: Path) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a folder written by Dataset.save_to_disk") from error


def _of_saved_dataset(folder: Path, split: str | None) -> Iterator[RawRow]:
    from datasets import DatasetDict

    dataset = _load_saved(folder)
    if isinstance(dataset, DatasetDict):
        if (split or "train") not in dataset:
            raise ValueError(f"{folder} holds the splits {sorted(dataset)}: name one, as {folder}:{sorted(dataset)[0]}")
        dataset = dataset[split or "train"]
    elif split is not None:
        raise ValueError(f"{folder} is one data set without splits: leave ':{split}' out")
    for number, row in enumerate(dataset):
        yield f"{folder.name}, row {number}", row


def _of_hub(source: str) -> Iterator[RawRow]:
    """The rows of `owner/name` or `owner/name:split` (by default: train) on the Hugging Face hub."""
    name, _, split = source.partition(":")
    for number, row in enumerate(hub_dataset(source)):
        yield f"{name}:{split or 'train'}, row {number}", row


def hub_dataset(source: str, streaming: bool = False) -> Any:
    """What the hub gives under `owner/name` or `owner/name:split`: a `datasets.Dataset` or `IterableDataset`."""
    name, _, split = source.partition(":")
    absent = f"no preference pairs at {source}: expected {_EXPECTED} (owner/name:split)"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or kind_of(Path(name))[0]:
        raise FileNotFoundError(absent)
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(name, split=split or "train", streaming=streaming)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{absent}. The hub does not give it either: {error}") from error
    except DatasetGenerationError as error:
        raise ValueError(
            f"{source}: the files of this data set cannot be read as one table: {error.__cause__ or error}. Download "
            f"them (hf download --repo-type dataset {name} --local-dir FOLDER) and give the folder, which is read row "
            "by row"
        ) from error


# --- one file --------------------------------------------------------------------------------------------------------


def rows_of_file(path: Path, name: str) -> Iterator[RawRow]:
    """The rows of one file, which is called `name` in their places; raises ValueError where it cannot be read."""
    kind, packed = kind_of(path)
    if not kind:
        raise ValueError(f"cannot read {path}: expected {_EXPECTED}")
    readers = {".jsonl": _json_lines, ".json": _json_file, ".parquet": _parquet, ".csv": _csv}
    try:
        with _opened(path, packed) as file:
            yield from readers[kind](file, name)
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"{path} cannot be read as a {kind}{packed} file: {error}") from error


def _opened(path: Path, packed: str) -> Any:
    if packed == ".gz":
        return gzip.open(path, "rb")
    if packed == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _json_lines(file: Any, name: str) -> Iterator[RawRow]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"{name}:{number}", _json(line, f"{name}:{number}")


def _json_file(file: Any, name: str) -> Iterator[RawRow]:
    """A list of rows, a row per line, or an object that holds one list of rows."""
    text = file.read()
    first, _, rest = text.strip().partition(b"\n")
    if rest.strip() and isinstance(_json(first, name), dict):
        yield from _json_lines(io.BytesIO(text), name)
        return
    whole = _json(text, name)
    if isinstance(whole, RowError):
        yield name, whole
        return
    rows = _list_in(whole, name)
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def _list_in(whole: Any, name: str) -> list[Any]:
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        if any(word in column for column in whole for word in ("chosen", "rejected", "preferred", "completion")):
            return [whole]
        lists = [column for column, value in whole.items() if isinstance(value, list)]
        if len(lists) == 1:
            return whole[lists[0]]
        found = f"an object with the lists {sorted(lists)}" if lists else f"an object with {sorted(whole)}"
    else:
        found = type(whole).__name__
    raise RowError(
        f"{name}: expected a list of rows, one row per line, or an object that holds one list; got {found}. Write the "
        "rows to be read to a file of their own"
    )


def _json(text: bytes, place: str) -> Any:
    """What the text says, or a RowError."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return RowError(f"{place}: not valid JSON: {error}", "not valid JSON")


def _parquet(file: Any, name: str) -> Iterator[RawRow]:
    from pyarrow import ArrowException, BufferReader, parquet

    try:
        number = 0
        unpacked = isinstance(getattr(file, "raw", None), io.FileIO)  # it is then read part by part
        whole = parquet.ParquetFile(file if unpacked else BufferReader(file.read()))
        for batch in whole.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{name}, row {number}", row
                number += 1
    except ArrowException as error:
        raise ValueError(f"{name} is not a readable Parquet file: {error}") from error


def _csv(file: Any, name: str) -> Iterator[RawRow]:
    """Rows under a header line; the place is the line on which a row ends, as a quoted cell may hold line breaks."""
    csv.field_size_limit(1 << 30)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    lines = csv.DictReader(text, restkey=_TOO_MANY, strict=True)
    while True:
        try:
            row = next(lines, None)
        except (csv.Error, UnicodeDecodeError) as error:  # what follows may be cut anywhere
            raise ValueError(f"{name}:{lines.line_num}: not readable as CSV in UTF-8: {error}") from error
        if row is None:
            return
        place = f"{name}:{lines.line_num}"
        if _TOO_MANY in row or None in row.values():
            wanted = ", ".join(lines.fieldnames or [])
            yield place, RowError(f"{place}: expected a cell for each column of the header ({wanted}); got {row}"[:400])
        else:
            yield place, row


_TOO_MANY = "cells beyond the last column"
