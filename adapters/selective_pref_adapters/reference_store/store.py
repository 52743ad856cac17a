"""Reference log-probs that were paid for once: a content-addressed store of per-token values on disk.

In: rows (token ids, completion mask) with the float32 log-probs that a reference gave to their completion tokens. Out:
the same numbers for any batch that holds those rows, however it is ordered, padded or split.

    STORE/                      a folder; one sub-folder, a *space*, for each reference
      3f0c…/                    named by the digest of the reference's identity (`Space`); made with its first row
        manifest.json           that identity, for people
        vocabulary.json.gz      its tokenizer's tokens
        fillings.json           how long the rows that were scored might be, for error messages
        9a41….safetensors       shards: keys, offsets, checksums and values of rows

A row's key is the digest of its attended token ids and its completion mask. β, ratio, seed, batch size, order, output
folder and learning rate are in no name, so changing them finds every row; other ids, masks, weights, adapters, dtypes
or scoring code find none.

Nothing here is believed unchecked. A shard is named by the digest of its header and index, and every row carries a
checksum of its values that is compared each time they are read. Damage loses exactly the rows it touches: they count as
missing, a log line says so, and scoring again writes them anew. Shards are written aside, flushed and renamed, never
changed, and never shared between writers, so a killed writer or several at once leave whole shards only.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selective_pref_adapters.batch import Batch
from selective_pref_adapters.files import sync, write_whole
from selective_pref_adapters.pairs import TokenizedPair, Tokenizer, differing_token
from selective_pref_adapters.reference_store.shards import (
    KEY_BYTES,
    SUFFIX,
    DamagedStoreError,
    DamageError,
    OtherFormatError,
    Shard,
    StoreError,
    StoreWriteError,
    check_writable,
    is_abandoned,
    shard_bytes,
    writing,
)
from selective_pref_adapters.reference_store.spaces import (
    FILL,
    MANIFEST,
    Space,
    holds_rows,
    own_vocabulary,
    read_fillings,
    read_manifest,
    read_spaces,
    read_vocabulary,
    write_space,
)

__all__ = [
    "DamagedStoreError",
    "MissingRowsError",
    "PruneReport",
    "ReferenceStore",
    "Row",
    "Space",
    "StoreError",
    "StoreStat",
    "StoreWriteError",
    "StoreWriter",
    "prune",
    "row_key",
    "rows_of_pairs",
]

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
"""Values of one shard."""
FLUSH_SECONDS = 30.0
"""How long a row may wait to be written: what a kill costs at most."""

_OPEN_FILES = 128


class MissingRowsError(StoreError):
    """Rows that were asked for and are not stored. The message counts and names them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side of a pair: what a reference is asked to score.

    Attributes:
        ids: its attended token ids, int32 [L].
        mask: True on completion tokens, bool [L].
        place: where it came from (`file.jsonl:17, chosen`), for error messages.
    """

    ids: np.ndarray
    mask: np.ndarray
    place: str = "?"

    @cached_property
    def key(self) -> bytes:
        """The digest of ids and mask, 16 bytes."""
        return row_key(self.ids, self.mask)

    @property
    def values(self) -> int:
        """How many log-probs it has: one for each completion token but the row's first (nothing precedes that one)."""
        return int(self.mask[1:].sum())


def row_key(ids: np.ndarray, mask: np.ndarray) -> bytes:
    """The 16-byte digest of attended token ids [L] and completion mask [L]."""
    digest = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=KEY_BYTES, person=b"row")
    digest.update(np.ascontiguousarray(ids, dtype="<i4"))
    digest.update(np.ascontiguousarray(mask, dtype=np.bool_))
    return digest.digest()


def rows_of_pairs(pairs: Iterable[TokenizedPair]) -> list[Row]:
    """Both sides of every pair, chosen then rejected, pair after pair."""
    rows = []
    for pair in pairs:
        for side, ids, prompt_length in (
            ("chosen", pair.chosen_ids, pair.chosen_prompt_length),
            ("rejected", pair.rejected_ids, pair.rejected_prompt_length),
        ):
            mask = np.arange(len(ids)) >= prompt_length
            rows.append(Row(ids=np.asarray(ids, dtype=np.int32), mask=mask, place=f"{pair.place}, {side}"))
    return rows


# --- the store -------------------------------------------------------------------------------------------------------


@dataclass
class StoreStat:
    """What a space holds and how it was used.

    Attributes:
        rows: rows that can be looked up.
        values: log-probs in them.
        shards: files whose index could be read.
        bytes: their size.
        damaged: name → reason of shards, or of rows in shards, that are not believed.
        hits, misses: rows that `lookup` of this process found and did not find.
    """

    rows: int
    values: int
    bytes: int
    shards: int
    damaged: dict[str, str]
    hits: int
    misses: int


class ReferenceStore:
    """The rows of one reference, one space of a store. `open` reads it; `create` is for who writes the first row, too.

    Reading needs no right to write, and works in forked and spawned data-loader workers. A row that another process
    writes later is found: a miss looks at the folder again before it counts.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        self.folder = folder
        self.space = space
        self.damaged: dict[str, str] = {}
        self.unreadable: set[str] = set()
        self.hits = 0
        self.misses = 0
        self._shards: list[Shard] = []
        self._seen: dict[str, tuple[int, int, int]] = {}  # name → which file was looked at
        self._where: dict[bytes, tuple[int, int]] = {}  # key → (shard, row in it)
        self._elsewhere: dict[bytes, list[tuple[int, int]]] = {}  # further copies, for when the first is damaged
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.RLock()
        self.refresh()

    @classmethod
    def open(cls, path: str | Path, space: str | None = None) -> ReferenceStore:
        """The space of that name (a unique beginning of it, or a unique label) in the store at `path`.

        A space without rows, as a run leaves it that was interrupted before its first, counts as none.

        Args:
            path: the store's folder.
            space: None where the store holds exactly one.

        Raises:
            StoreError: there is no such store or space, more than one fits, its manifest is gone, damaged or of
                another version.
        """
        path = Path(path)
        if space is None and (path / MANIFEST).is_file():  # the folder of a space itself
            path, space = path.parent, path.resolve().name
        found, unusable = read_spaces(path)
        fits = [s for s in found if space is None or s.name.startswith(space) or s.label == space]
        if len(fits) == 1 and not (space is None and unusable):
            return cls(path / fits[0].name, fits[0])
        listed = "".join(f"\n  {s.name} ({s.label})" for s in found)
        listed += "".join(f"\n  {name}: {reason}" for name, reason in unusable.items())
        if not listed:
            raise StoreError(f"the reference store {path} is empty.{FILL}")
        wanted = "Give the name of one as space" if space is None else f"None of them alone fits {space!r}"
        if differ := _differences(fits):
            wanted += f" (they differ in {differ})"
        raise StoreError(f"the reference store {path} holds{listed}\n{wanted}")

    @classmethod
    def create(cls, path: str | Path, space: Space) -> ReferenceStore:
        """The space in the store at `path`. If it is absent it is made with its first row, and until then there is
        nothing of it on the disk; a manifest that is damaged is written again.

        Raises:
            StoreWriteError: the folder cannot be written to.
        """
        folder = Path(path) / space.name
        if not holds_rows(folder):
            check_writable(folder)
            return cls(folder, space)
        store = cls(folder, space)
        store.write_identity()
        return store

    def write_identity(self) -> None:
        """Makes the folder and the files that say whose rows are in it, unless they are there and whole.

        Raises:
            StoreWriteError: they cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                read_vocabulary(self.folder, read_manifest(self.folder))
            except DamagedStoreError:
                if self.space.vocabulary is None:
                    raise
                write_space(self.folder, self.space)

    def refresh(self) -> int:
        """Takes in shards that were written since; returns how many.

        Raises:
            StoreError: the folder cannot be read.
        """
        with self._lock:
            before, gone = len(self._shards), set[str]()
            while True:
                try:
                    with os.scandir(self.folder) as entries:
                        names = sorted(entry.name for entry in entries if entry.name.endswith(SUFFIX))
                except FileNotFoundError:
                    names = []  # no row was written yet
                except OSError as error:
                    raise StoreError(f"the space {self.folder} cannot be read: {error.strerror}") from error
                lost = {name for name in names if not self._take(name)} - gone
                if not lost:
                    return len(self._shards) - before
                gone |= lost  # merged into another since the folder was read: which one, the next look tells

    def _take(self, name: str) -> bool:
        """Reads a shard's index, if it is new, and remembers where its rows are; False where the file is gone."""
        path = self.folder / name
        try:
            stat = path.stat()
            stamp = stat.st_ino, stat.st_mtime_ns, stat.st_size
            if self._seen.get(name) == stamp:
                return True
            self._seen[name] = stamp  # a damaged file may be replaced by its rebuilt self: same content, same name
            shard = Shard.read(path, self.space.name)
        except FileNotFoundError:
            self._seen.pop(name, None)
            return False
        except DamageError as error:
            if not isinstance(error, OtherFormatError):
                self.unreadable.add(name)
            self._report(name, str(error))
            return True
        self.unreadable.discard(name)
        self.damaged.pop(name, None)
        self._shards.append(shard)
        number = len(self._shards) - 1
        for row, key in enumerate(shard.keys()):
            if self._where.setdefault(key, (number, row)) != (number, row):
                self._elsewhere.setdefault(key, []).append((number, row))
        return True

    def lookup(self, batch: Batch) -> torch.Tensor:
        """The stored log-probs of a batch, [2B T] float32 on its device, 0 where no completion token stands.

        Entry t belongs to the token at t + 1, as in `model_per_token_logps`.

        Args:
            batch: `input_ids`, `attention_mask`, `completion_mask`, each [2B T+1]; padding may stand on either side.

        Raises:
            MissingRowsError: rows are not stored; the message counts and names them.
        """
        ids, attended, completion = (
            batch[name].detach().to("cpu").numpy() for name in ("input_ids", "attention_mask", "completion_mask")
        )
        places = [np.flatnonzero(row) for row in attended]
        rows = [Row(ids=i[at], mask=c[at] != 0) for i, c, at in zip(ids, completion, places, strict=True)]
        found = self.values_of(rows)
        lacking = [number for number, values in enumerate(found) if values is None]
        if lacking:
            raise MissingRowsError(self._lacking(len(lacking), rows, [f"row {n} ({_shown(rows[n])})" for n in lacking]))
        out = np.zeros((ids.shape[0], max(ids.shape[1] - 1, 0)), dtype=np.float32)
        for number, (row, values) in enumerate(zip(rows, found, strict=True)):
            out[number, places[number][1:][row.mask[1:]] - 1] = values
        return torch.from_numpy(out).to(batch["input_ids"].device)

    def values_of(self, rows: Sequence[Row]) -> list[np.ndarray | None]:
        """The float32 log-probs of each row's completion tokens, in order; None for a row that is not stored."""
        with self._lock:
            found = [self._read(row) for row in rows]
            if any(values is None for values in found) and self.refresh():
                found = [self._read(row) if got is None else got for row, got in zip(rows, found, strict=True)]
        missed = sum(values is None for values in found)
        self.misses += missed
        self.hits += len(found) - missed
        return found

    def missing_rows(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that are not stored, or not intact, each once."""
        unique = {row.key: row for row in rows}
        with self._lock:
            self.refresh()
            return [row for row in unique.values() if self._read(row) is None]

    def missing(self, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """The pairs of which a side is not stored, or not intact."""
        rows = rows_of_pairs(pairs)
        lacking = {row.key for row in self.missing_rows(rows)}
        return [p for n, p in enumerate(pairs) if rows[2 * n].key in lacking or rows[2 * n + 1].key in lacking]

    def has(self, row: Row) -> bool:
        """Whether a row is stored and intact, as far as this process has looked."""
        with self._lock:
            return self._read(row) is not None

    def check(self, pairs: Sequence[TokenizedPair]) -> None:
        """Raises MissingRowsError unless both sides of every pair are stored: ask before the first step."""
        lacking = self.missing(pairs)
        if lacking:
            rows = rows_of_pairs(pairs)
            raise MissingRowsError(self._lacking(len(lacking), rows, [pair.place for pair in lacking], "pairs"))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises unless every token of `tokenizer` has the same id in the reference's vocabulary.

        A larger or padded vocabulary of the reference is fine, and so is a pad token behind all others.

        Raises:
            StoreError: names the first token that differs.
        """
        difference = differing_token(own_vocabulary(tokenizer), self.vocabulary)
        if difference is not None:
            raise StoreError(
                f"the stored reference {self.space.label!r} tokenizes differently: {difference}. Per-token log-probs "
                "of different tokens cannot be compared: use a reference that shares the tokenizer"
            )

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token → id of the reference's tokenizer."""
        if self.space.vocabulary is not None:
            return self.space.vocabulary
        return read_vocabulary(self.folder, self.space)

    def writer(self, **options: Any) -> StoreWriter:
        """A writer of new rows to this space; any number of them may be at work, in any number of processes."""
        return StoreWriter(self, **options)

    def stat(self) -> StoreStat:
        """Counts of what the space holds and of what was asked of it; reads and checks every row."""
        with self._lock:
            self.refresh()
            lengths = [len(values) for key in list(self._where) if (values := self._values(key)) is not None]
        return StoreStat(
            rows=len(lengths),
            values=sum(lengths),
            bytes=sum(shard.bytes for shard in self._shards),
            shards=len(self._shards),
            damaged=dict(self.damaged),
            hits=self.hits,
            misses=self.misses,
        )

    def close(self) -> None:
        """Closes the shards' files; a later lookup opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _files=OrderedDict(), _lock=threading.RLock())

    def _read(self, row: Row) -> np.ndarray | None:
        """The values of one row, compared with their checksum; None where they are not stored or not intact."""
        if row.values == 0:
            return np.zeros(0, dtype=np.float32)  # nothing to know
        return self._values(row.key, row.values)

    def _values(self, key: bytes, count: int | None = None) -> np.ndarray | None:
        """The values under a key (which must be `count`), from the first intact copy."""
        while (where := self._where.get(key)) is not None:
            number, index = where
            shard = self._shards[number]
            try:
                values = shard.values(self._file(number), index)
                if values is not None and count in (None, len(values)):
                    return values
                self._report(shard.path.name, f"the values of row {index} do not have their checksum")
            except FileNotFoundError:  # removed, or merged into another, which the next refresh finds
                pass
            except OSError as error:
                self._report(shard.path.name, f"cannot be read: {error.strerror}")
            others = self._elsewhere.get(key)
            if others:
                self._where[key] = others.pop(0)
            else:
                del self._where[key]
        return None

    def _file(self, number: int) -> Any:
        if number not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[number] = self._shards[number].path.open("rb", buffering=0)
        self._files.move_to_end(number)
        return self._files[number]

    def _report(self, name: str, reason: str) -> None:
        if name not in self.damaged:
            logger.warning("shard %s of %s is damaged: %s. What it lost counts as missing", name, self.folder, reason)
        self.damaged[name] = reason

    def _lacking(self, count: int, rows: Sequence[Row], names: list[str], kind: str = "rows") -> str:
        total = len(rows) // 2 if kind == "pairs" else len(rows)
        shown = "; ".join(names[:3]) + (f"; and {count - 3} more" if count > 3 else "")
        damage = f" Damaged shards: {', '.join(self.damaged)}." if self.damaged else ""
        return (
            f"{count} of {total} {kind} are not in the store {self.folder} (reference {self.space.label!r}): {shown}."
            f"{damage} {self.lengths(rows)} A row is found by its exact token ids and completion mask: max_length, "
            f"truncation, template and tokenizer must be those that the store was filled with.{FILL} --max-length N "
            "--truncation-mode MODE, as in training"
        )

    def lengths(self, rows: Sequence[Row]) -> str:
        """Two sentences that let a reader see whether rows are lacking because they were cut at other lengths."""
        lengths = [len(row.ids) for row in rows]
        longest = max(lengths, default=0)
        alike = lengths.count(longest)
        said = f"The longest row that was asked for has {longest} tokens."
        if alike > 1:
            said = f"{alike} rows that were asked for have {longest} tokens and none has more: is max_length {longest}?"
        fillings = [f"max_length {n['max_length']} ({n['truncation_mode']})" for n in read_fillings(self.folder)]
        return f"{said} The store was filled with {' and '.join(fillings)}." if fillings else said


def _differences(found: Sequence[Space]) -> str:
    """The names in the identities of spaces whose values are not the same in all of them."""
    names = sorted({name for space in found for name in space.identity})
    return ", ".join(n for n in names if any(s.identity.get(n) != found[0].identity.get(n) for s in found))


def _shown(row: Row) -> str:
    return f"{len(row.ids)} tokens, {int(row.mask.sum())} of the completion, ids {row.ids[:4].tolist()}…"


# --- writing ---------------------------------------------------------------------------------------------------------


class StoreWriter:
    """Collects rows and writes them as shards: when enough have come, when enough time has passed, and at the end.

    A context manager. What was added before an error is written, too; only a kill loses what was not written yet.

    Args:
        store: where to.
        shard_bytes: a shard is written when its values reach this size.
        flush_seconds: or when its first row has waited this long.

    Raises:
        StoreWriteError: the folder cannot be written to (better said now than after an hour of scoring).
    """

    def __init__(
        self, store: ReferenceStore, *, shard_bytes: int = SHARD_BYTES, flush_seconds: float = FLUSH_SECONDS
    ) -> None:
        self.store = store
        self.shard_bytes = shard_bytes
        self.flush_seconds = flush_seconds
        self.shards: set[Path] = set()
        self._rows: dict[bytes, bytes] = {}
        self._bytes = 0
        self._since = 0.0
        check_writable(store.folder)

    def add(self, row: Row, values: np.ndarray) -> None:
        """Takes in a row's float32 log-probs, one for each of its completion tokens after the first position.

        Raises:
            ValueError: their number or dtype is wrong, or one is not finite.
            StoreWriteError: a shard was due and could not be written.
        """
        if values.dtype != np.float32 or values.shape != (row.values,):
            raise ValueError(
                f"{row.place}: expected {row.values} float32 log-probs; got {values.dtype} of shape {values.shape}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{row.place}: a log-prob that is not finite cannot be stored")
        self.add_values(row.key, values)

    def add_values(self, key: bytes, values: np.ndarray) -> None:
        """`add` by key."""
        if not self._rows:
            self._since = time.monotonic()
        self._rows[key] = values.astype("<f4", copy=False).tobytes()
        self._bytes += values.nbytes
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected as one shard; nothing where there is nothing."""
        if not self._rows:
            return
        name, data = shard_bytes(self._rows, self.store.space.name)
        if not self.shards:
            self.store.write_identity()
        with writing(self.store.folder):
            write_whole(self.store.folder / name, data)
        self.shards.add(self.store.folder / name)
        self._rows, self._bytes = {}, 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


# --- tidying up ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What `prune` did to a space.

    Attributes:
        rows: rows that are left.
        removed_rows: intact rows that were not to be kept.
        shards, bytes: files and their size afterwards.
        shards_before, bytes_before: and before.
    """

    rows: int
    removed_rows: int
    shards: int
    bytes: int
    shards_before: int
    bytes_before: int


def prune(store: ReferenceStore, keep: Iterable[Row] | None = None, *, shard_bytes: int = SHARD_BYTES) -> PruneReport:
    """Writes a space anew without damage, copies, leftovers of killed writers and, with `keep`, without other rows.

    Small shards become few large ones. Everything that is kept is written before anything is removed: a kill loses
    nothing, others may read and write meanwhile, and the disk must have room for both. Whole shards of another format
    are left alone.

    Args:
        store: the space.
        keep: the only rows to keep; None for all.
        shard_bytes: the size of the new shards.

    Raises:
        StoreWriteError: the folder cannot be written to; nothing was removed.
    """
    before = store.stat()  # reads everything, so that all damage is known
    wanted = set(store._where) if keep is None else {row.key for row in keep}
    old = {shard.path for shard in store._shards} | {store.folder / name for name in store.unreadable}
    writer = store.writer(shard_bytes=shard_bytes, flush_seconds=math.inf)
    for key in [key for key in store._where if key in wanted]:
        values = store._values(key)
        if values is not None:
            writer.add_values(key, values)
    writer.flush()
    with writing(store.folder):
        abandoned = [path for path in store.folder.iterdir() if is_abandoned(path)]
        for path in {*old, *abandoned} - writer.shards:
            path.unlink(missing_ok=True)
        sync(store.folder)
    after = ReferenceStore(store.folder, store.space).stat()
    return PruneReport(
        rows=after.rows,
        removed_rows=before.rows - after.rows,
        shards=after.shards,
        bytes=after.bytes,
        shards_before=before.shards,
        bytes_before=before.bytes,
    )
