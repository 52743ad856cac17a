"""One entry of the cache as it is made: on the disk, or in memory where there is to be no cache.

In: a source of rows, a tokenizer. Out: the entry's folder, whole or not there; or `TokenizedRows`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from selective_pref_adapters.files import existing, sync, write_whole
from selective_pref_adapters.pairs.files import raw_rows
from selective_pref_adapters.pairs.large.entry import (
    ABOUT_FILE,
    ENTRY_FILE,
    KNOWN,
    PAIRS_FILE,
    is_whole,
    opened,
    rows_of_tables,
)
from selective_pref_adapters.pairs.large.making import ABOUT, PAIRS, Block, blocks
from selective_pref_adapters.pairs.large.naming import Making, content_of
from selective_pref_adapters.pairs.large.table import TokenizedRows
from selective_pref_adapters.pairs.rendering import Tokenizer
from selective_pref_adapters.pairs.rows import SKIP, RowError

REMEDY = "make room, give another folder (--data-cache FOLDER), or go without (--data-cache off)"
"""What helps where a cache cannot be written."""


class Maker:
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
        return rows_of_tables(data, known, self.making, self._all_notes(), self.unread, self.first_unread)

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
            write_whole(aside / ENTRY_FILE, json.dumps(about, indent=1, default=str) + "\n")
            if entry.exists() and opened(entry, self.making) is None:
                shutil.rmtree(entry)  # files are missing or cut off
            aside.rename(entry)
            sync(folder)
        except (OSError, pa.ArrowInvalid) as error:
            if not is_whole(entry) and not isinstance(error, FileNotFoundError):
                free = shutil.disk_usage(existing(folder)).free
                raise OSError(
                    f"the data cache {folder} could not be written: {error} ({free / 1e9:.3f} GB free). Nothing of it "
                    f"is left: {REMEDY}"
                ) from error
            if not is_whole(entry):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write(self, aside: Path) -> dict[str, int]:
        """The two tables; returns their sizes."""
        from datasets import Features
        from datasets.arrow_writer import ArrowWriter

        spill = aside / "prompts.arrow"
        writer = ArrowWriter(features=Features.from_arrow_schema(PAIRS), path=str(aside / PAIRS_FILE))
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
        known = ArrowWriter(features=Features.from_arrow_schema(KNOWN), path=str(aside / ABOUT_FILE))
        known.write_table(about)
        known.finalize()
        for name in (PAIRS_FILE, ABOUT_FILE):
            sync(aside / name)
        return {name: (aside / name).stat().st_size for name in (PAIRS_FILE, ABOUT_FILE)}

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
            raise ValueError(no_rows(self.source, self.unread, self.first_unread))
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


def _with_prompts(about: pa.Table, prompts: pa.ChunkedArray) -> pa.Table:
    """With the number of each row's prompt, by the order of their texts, and its hash."""
    import xxhash

    ranks = pc.rank(prompts, tiebreaker="dense").to_numpy().astype(np.int64) - 1
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(text.as_py()) for text in prompts), np.uint64, len(prompts))
    columns = [*about.columns, pa.array(ranks), pa.array(hashes)]
    return pa.table(columns, schema=KNOWN)


def no_rows(source: str | Path, unread: int, example: str) -> str:
    """What is said of a source without rows."""
    return f"{source} holds no rows" + (f" but {unread} malformed ones: {example}" if unread else "")
