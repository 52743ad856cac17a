"""The cache on the disk: an entry for each source, tokenizer and way of cutting, made once and read by all.

    FOLDER/9a41…/            named by the digest of all that decides the ids (`naming`)
      pairs.arrow            the fields of `TokenizedPair`, a line for each row
      about.arrow            what is known of each row beside its ids
      entry.json             written last: notes, counts, sizes of the files, what the name is the digest of
    FOLDER/9a41….lock        held by the process that makes the entry; the others wait for it, and then read

An entry is written under another name, flushed, and renamed when it is whole. Nothing of it is ever changed: a process
that reads it is not disturbed by any other. Two processes that make the same one, as on two machines whose file system
has no locks, both end with the same content, and one of them is kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from selective_pref_adapters.files import existing, sync, write_whole
from selective_pref_adapters.pairs.files import raw_rows
from selective_pref_adapters.pairs.large.making import ABOUT, PAIRS, Block, blocks
from selective_pref_adapters.pairs.large.naming import Making, content_of, name_of
from selective_pref_adapters.pairs.large.table import TokenizedRows
from selective_pref_adapters.pairs.rendering import Tokenizer
from selective_pref_adapters.pairs.rows import SKIP, RowError
from selective_pref_adapters.pairs.tokenize import check_truncation

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The cache is in `default_folder()`."""
OFF = "off"
"""There is no cache: every process makes the ids, and holds them in memory."""

_PAIRS, _ABOUT, _ENTRY = "pairs.arrow", "about.arrow", "entry.json"
_KNOWN = pa.schema([*ABOUT, pa.field("prompt", pa.int64()), pa.field("prompt_hash", pa.uint64())])


def default_folder() -> Path:
    """`selective_pref` in the cache of the `datasets` library (`HF_DATASETS_CACHE`)."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "selective_pref"


def tokenized_rows(
    source: str | Path,
    tokenizer: Tokenizer,
    making: Making,
    *,
    cache: str | Path = AUTO,
    workers: int = 1,
    skip_malformed: bool = False,
    progress: bool = False,
) -> TokenizedRows:
    """The token ids of a source's rows: from the cache, where they are, else made and kept there.

    Args:
        source: as in `read_rows`.
        tokenizer: a Hugging Face tokenizer.
        making: how rows are read and cut.
        cache: the folder of the cache, `AUTO` or `OFF`.
        workers: processes that tokenise, where that is to be done.
        skip_malformed: leave out, and count, rows that are no preference pairs, instead of raising at the first.
        progress: show a bar.

    Raises:
        FileNotFoundError, RowError, ValueError: as `read_rows` and `tokenize_pairs`; or `workers` is below 1, or the
            source has changed while it was read.
        OSError: the cache's folder cannot be written to. Nothing is left there that could be read later.
    """
    check_truncation(making.max_length, making.truncation_mode)
    if workers < 1:
        raise ValueError(f"data_workers, the processes that tokenise, must be at least 1; got {workers}")
    make = _Maker(source, tokenizer, making, workers, skip_malformed, progress)
    if cache == OFF:
        return _checked(make.in_memory(), source, skip_malformed)
    folder = default_folder() if cache == AUTO else Path(cache)
    name, identity = name_of(source, tokenizer, making)
    entry = folder / name
    rows = _opened(entry, making)
    if rows is None:
        with _alone(folder, name):
            rows = _opened(entry, making)
            if rows is None:
                make.on_disk(folder, name, identity)
                rows = _opened(entry, making)
    if rows is None:
        raise OSError(f"the data cache {entry} cannot be read although it was just written: {_REMEDY}")
    return _checked(rows, source, skip_malformed)


_REMEDY = "make room, give another folder (--data-cache FOLDER), or go without (--data-cache off)"


def _checked(rows: TokenizedRows, source: str | Path, skip_malformed: bool) -> TokenizedRows:
    """The rows, unless there are malformed ones that are not to be skipped, or none at all."""
    if rows.unread and not skip_malformed:
        raise RowError(f"{rows.first_unread}. {SKIP}")
    if not len(rows):
        raise ValueError(_no_rows(source, rows.unread, rows.first_unread))
    return rows


def _no_rows(source: str | Path, unread: int, example: str) -> str:
    return f"{source} holds no rows" + (f" but {unread} malformed ones: {example}" if unread else "")


# --- reading ---------------------------------------------------------------------------------------------------------


def _opened(entry: Path, making: Making) -> TokenizedRows | None:
    """The rows of an entry; None where there is none, or files of it are missing or cut off."""
    from datasets import Dataset

    try:
        known = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
        if any((entry / name).stat().st_size != size for name, size in known["files"].items()):
            return None
        data = Dataset.from_file(str(entry / _PAIRS))
        about = Dataset.from_file(str(entry / _ABOUT), in_memory=True).data.table
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return None
    return _rows(data, about, making, known["notes"], known["unread"], known["first_unread"])


def _rows(
    data: Any, about: pa.Table, making: Making, notes: list[str], unread: int, first_unread: str
) -> TokenizedRows:
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


# --- making ----------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """While no other process of this machine makes the entry; of all machines, where the file system has locks."""
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
    except NotImplementedError:  # the entry is given its name as a whole, so no harm is done
        logger.warning("%s is on a file system without locks: every process that finds no ids makes them", folder)
    except OSError as error:
        raise OSError(f"the data cache {folder} cannot be written to: {error}. Remedy: {_REMEDY}") from error
    try:
        yield
    finally:
        lock.release()


class _Maker:
    """Makes the ids of a source's rows."""

    def __init__(
        self, source: str | Path, tokenizer: Tokenizer, making: Making, workers: int, skip: bool, progress: bool
    ) -> None:
        self.source, self.tokenizer, self.making = source, tokenizer, making
        self.workers, self.skip, self.progress = workers, skip, progress
        self.notes: list[str] = []
        self.schemas: Counter[str] = Counter()
        self.unread = 0
        self.first_unread = ""

    def in_memory(self) -> TokenizedRows:
        """Without a cache."""
        from datasets import Dataset
        from datasets.table import InMemoryTable

        tables = [PAIRS.empty_table()]
        prompts = [pa.array([], pa.large_binary())]
        about = self._through(lambda block: (tables.append(block.pairs), prompts.append(block.prompts)))
        known = _with_prompts(about, pa.chunked_array(prompts))
        data = Dataset(InMemoryTable(pa.concat_tables(tables)))
        return _rows(data, known, self.making, self._all_notes(), self.unread, self.first_unread)

    def on_disk(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        """Writes the entry. Whatever ends it, nothing is left under the entry's name unless it is whole."""
        of_this_host = f".{name}.{socket.gethostname()}"
        aside, entry = folder / f"{of_this_host}.{os.getpid()}.tmp", folder / name
        for left in folder.glob(f"{of_this_host}.*.tmp"):
            if left == aside or not _runs(int(left.suffixes[-2][1:])):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
        try:
            aside.mkdir()
            files = self._write(aside)
            if content_of(self.source) != identity["source"]:
                raise ValueError(f"{self.source} has changed while it was read: start again when it is whole")
            about = {"notes": self._all_notes(), "unread": self.unread, "first_unread": self.first_unread}
            about |= {"files": files, "identity": identity, "rows_of": str(self.source)}
            write_whole(aside / _ENTRY, json.dumps(about, indent=1, default=str) + "\n")
            if entry.exists() and _opened(entry, self.making) is None:
                shutil.rmtree(entry)  # files are missing or cut off
            aside.rename(entry)
            sync(folder)
        except (OSError, pa.ArrowInvalid) as error:
            if not _is_whole(entry) and not isinstance(error, FileNotFoundError):
                free = shutil.disk_usage(existing(folder)).free
                raise OSError(
                    f"the data cache {folder} could not be written: {error} ({free / 1e9:.3f} GB free). Nothing of it "
                    f"is left: {_REMEDY}"
                ) from error
            if not _is_whole(entry):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write(self, aside: Path) -> dict[str, int]:
        """The two tables; returns their sizes."""
        from datasets import Features
        from datasets.arrow_writer import ArrowWriter

        spill = aside / "prompts.arrow"
        writer = ArrowWriter(features=Features.from_arrow_schema(PAIRS), path=str(aside / _PAIRS))
        writer.write_table(PAIRS.empty_table())
        texts = pa.schema({"prompt": pa.large_binary()})
        try:
            with pa.OSFile(str(spill), "wb") as file, pa.ipc.new_stream(file, texts) as prompts:

                def keep(block: Block) -> None:
                    if len(block.pairs):
                        writer.write_table(block.pairs)
                        prompts.write_table(pa.table([block.prompts], schema=texts))

                about = self._through(keep)
        finally:
            writer.finalize()
        with pa.memory_map(str(spill)) as file:
            about = _with_prompts(about, pa.ipc.open_stream(file).read_all()["prompt"])
        spill.unlink()
        known = ArrowWriter(features=Features.from_arrow_schema(_KNOWN), path=str(aside / _ABOUT))
        known.write_table(about)
        known.finalize()
        for name in (_PAIRS, _ABOUT):
            sync(aside / name)
        return {name: (aside / name).stat().st_size for name in (_PAIRS, _ABOUT)}

    def _through(self, keep: Callable[[Block], Any]) -> pa.Table:
        """Hands every block over, and returns what is known of all rows.

        Raises:
            RowError: a row is no pair, or refused by the chat template, and none are to be skipped.
            ValueError: there are no rows.
        """
        tables = [ABOUT.empty_table()]
        rows = raw_rows(self.source, self.notes)
        with tqdm(desc="tokenizing", unit="pair", disable=not self.progress, leave=False) as bar:
            for block in blocks(rows, self.tokenizer, self.making, self.workers):
                wrong = [*block.unread, *filter(None, [block.refused()])]
                if wrong and not self.skip:
                    raise RowError(f"{wrong[0]}. {SKIP}", wrong[0].kind)
                self.first_unread = self.first_unread or (str(block.unread[0]) if block.unread else "")
                self.unread += len(block.unread)
                self.schemas.update(block.schemas)
                tables.append(block.about)
                keep(block)
                bar.update(len(block.about))
        about = pa.concat_tables(tables)
        if not len(about):
            raise ValueError(_no_rows(self.source, self.unread, self.first_unread))
        return about

    def _all_notes(self) -> list[str]:
        read = ", ".join(f"{schema} rows: {count}" for schema, count in self.schemas.most_common())
        return [*self.notes, f"{Path(self.source).name}: {read}"]


def _runs(process: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _is_whole(entry: Path) -> bool:
    return (entry / _ENTRY).is_file()


def _with_prompts(about: pa.Table, prompts: pa.ChunkedArray) -> pa.Table:
    """With the number of each row's prompt, by the order of their texts, and its hash."""
    import xxhash

    ranks = pc.rank(prompts, tiebreaker="dense").to_numpy().astype(np.int64) - 1
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(text.as_py()) for text in prompts), np.uint64, len(prompts))
    columns = [*about.columns, pa.array(ranks), pa.array(hashes)]
    return pa.table(columns, schema=_KNOWN)
