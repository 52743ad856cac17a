"""Reference log-probs that were paid for once: a content-addressed store of per-token values on disk.

In: rows (token ids, completion mask) with the float32 log-probs that a reference gave to their completion tokens. Out:
the same numbers for any batch that holds those rows, however it is ordered, padded or split.

    STORE/                      a folder; one sub-folder, a *space*, for each reference
      3f0c…/                    named by the digest of the reference's identity (`Space`)
        manifest.json           that identity, for people
        vocabulary.json.gz      its tokenizer's tokens
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

import gzip
import hashlib
import json
import logging
import os
import secrets
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from selective_pref_adapters.batch import Batch
from selective_pref_adapters.pairs import TokenizedPair, Tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the files; another one is not read."""

_MANIFEST, _VOCABULARY, _SHARD = "manifest.json", "vocabulary.json.gz", ".safetensors"
_KEY, _CHECK = 16, 8  # bytes of a row's key, and of the checksum of its values
_OPEN_FILES = 128


class StoreError(ValueError):
    """A store that cannot be used as asked. The message says what was found and what to do."""


class MissingRowsError(StoreError):
    """Rows that were asked for and are not stored. The message counts and names them."""


class DamagedStoreError(StoreError):
    """A manifest or vocabulary that is gone or damaged; scoring with the same reference writes it again."""


class StoreWriteError(OSError):
    """Rows could not be written (disk full, folder read-only). What was stored before is intact."""


# --- what is stored --------------------------------------------------------------------------------------------------


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
    digest = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=_KEY, person=b"row")
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


@dataclass(frozen=True, kw_only=True)
class Space:
    """The identity of a reference: whatever decides the numbers that it gives. Two equal spaces share their rows.

    Attributes:
        identity: names and values that decide, as JSON holds them; see `scoring.reference_space`.
        vocabulary: token → id of the reference's tokenizer; None for a space that was read from disk (the store
            reads it where it is needed).
        label: what people call the reference; decides nothing.
    """

    identity: dict[str, Any]
    vocabulary: dict[str, int] | None = field(default=None, repr=False)
    label: str = "reference"

    @cached_property
    def name(self) -> str:
        """The digest of the identity: 32 hexadecimal digits, the folder's name."""
        return digest_of_json(self.identity)

    def __post_init__(self) -> None:
        if self.vocabulary is not None and self.identity.get("vocabulary") != vocabulary_digest(self.vocabulary):
            raise StoreError(f"the vocabulary of {self.label!r} is not the one that its identity names")


def vocabulary_digest(vocabulary: dict[str, int]) -> str:
    """The digest of every token and its id: 32 hexadecimal digits."""
    return digest_of_json(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))


def digest_of_json(value: Any) -> str:
    """The digest of anything that JSON holds, whatever the order of its names: 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


# --- the store -------------------------------------------------------------------------------------------------------


@dataclass
class StoreStat:
    """What a space holds and how it was used.

    Attributes:
        rows: rows that can be looked up.
        values: log-probs in them.
        bytes: on disk, shards only.
        shards: files that hold them.
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
    """The rows of one reference, one space of a store. `open` reads it; `create` makes it where it is absent.

    Reading needs no right to write, and works in forked and spawned data-loader workers. A row that another process
    writes later is found: a miss looks at the folder again before it counts.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        self.folder = folder
        self.space = space
        self.damaged: dict[str, str] = {}
        self.hits = 0
        self.misses = 0
        self._shards: list[_Shard] = []
        self._seen: set[str] = set()
        self._where: dict[bytes, tuple[int, int]] = {}  # key → (shard, row in it)
        self._elsewhere: dict[bytes, list[tuple[int, int]]] = {}  # further copies, for when the first is damaged
        self._files: OrderedDict[int, Any] = OrderedDict()
        self.refresh()

    @classmethod
    def open(cls, path: str | Path, space: str | None = None) -> ReferenceStore:
        """The space of that name (a unique beginning of it, or a unique label) in the store at `path`.

        Args:
            path: the store's folder.
            space: None where the store holds exactly one.

        Raises:
            StoreError: there is no such store or space, more than one fits, its manifest is gone, damaged or of
                another version.
        """
        path = Path(path)
        found = spaces(path)
        fits = [s for s in found if space is None or s.name.startswith(space) or s.label == space]
        if len(fits) == 1:
            return cls(path / fits[0].name, fits[0])
        wanted = "a space" if space is None else f"space {space!r}"
        listed = "; it holds " + ", ".join(f"{s.name} ({s.label})" for s in found) if found else ""
        lost = _without_manifest(path)
        if lost:
            listed += (
                f"; {', '.join(lost)} has shards but no {_MANIFEST}: `selective-pref score` with the same reference "
                "writes it again and keeps the shards"
            )
        if not fits:
            raise StoreError(f"{path} holds no {wanted.removeprefix('a ')}{listed}{_FILL if not listed else ''}")
        raise StoreError(f"{path} holds more than one reference{listed}. Say which: give space")

    @classmethod
    def create(cls, path: str | Path, space: Space) -> ReferenceStore:
        """The space in the store at `path`, made if it is absent; its manifest is written again if it is damaged.

        Raises:
            StoreWriteError: the folder cannot be written to.
        """
        folder = Path(path) / space.name
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                _read_vocabulary(folder, _read_manifest(folder)[0])
            except DamagedStoreError:
                _write_space(folder, space)
        return cls(folder, space)

    def refresh(self) -> int:
        """Takes in shards that were written since; returns how many."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(_SHARD))
        except OSError as error:
            raise StoreError(f"the space {self.folder} cannot be read: {error.strerror}") from error
        new = [name for name in names if name not in self._seen and not name.startswith(".")]
        taken = 0
        for name in new:
            self._seen.add(name)
            try:
                shard = _Shard.read(self.folder / name, self.space.name)
            except FileNotFoundError:
                self._seen.discard(name)  # merged into another meanwhile
                continue
            except _DamageError as error:
                self._report(name, str(error))
                continue
            self._shards.append(shard)
            number = len(self._shards) - 1
            for row, key in enumerate(shard.keys()):
                if self._where.setdefault(key, (number, row)) != (number, row):
                    self._elsewhere.setdefault(key, []).append((number, row))
            taken += 1
        return taken

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
            raise MissingRowsError(
                self._lacking(len(lacking), len(rows), [f"row {n} ({_shown(rows[n])})" for n in lacking])
            )
        out = np.zeros((ids.shape[0], max(ids.shape[1] - 1, 0)), dtype=np.float32)
        for number, (row, values) in enumerate(zip(rows, found, strict=True)):
            out[number, places[number][1:][row.mask[1:]] - 1] = values
        return torch.from_numpy(out).to(batch["input_ids"].device)

    def values_of(self, rows: Sequence[Row]) -> list[np.ndarray | None]:
        """The float32 log-probs of each row's completion tokens, in order; None for a row that is not stored."""
        found = [self._read(row) for row in rows]
        if any(values is None for values in found) and self.refresh():
            found = [self._read(row) if values is None else values for row, values in zip(rows, found, strict=True)]
        missed = sum(values is None for values in found)
        self.misses += missed
        self.hits += len(found) - missed
        return found

    def missing_rows(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that are not stored, or not intact, each once."""
        self.refresh()
        unique = {row.key: row for row in rows}
        return [row for row in unique.values() if self._read(row) is None]

    def missing(self, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """The pairs of which a side is not stored, or not intact."""
        rows = rows_of_pairs(pairs)
        lacking = {row.key for row in self.missing_rows(rows)}
        return [p for n, p in enumerate(pairs) if rows[2 * n].key in lacking or rows[2 * n + 1].key in lacking]

    def check(self, pairs: Sequence[TokenizedPair]) -> None:
        """Raises MissingRowsError unless both sides of every pair are stored: ask before the first step."""
        lacking = self.missing(pairs)
        if lacking:
            raise MissingRowsError(self._lacking(len(lacking), len(pairs), [pair.place for pair in lacking], "pairs"))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises unless every token of `tokenizer` has the same id in the reference's vocabulary.

        A larger or padded vocabulary of the reference is fine.

        Raises:
            StoreError: names the first token that differs.
        """
        theirs = self.vocabulary
        by_id = {token_id: token for token, token_id in theirs.items()}
        for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if theirs.get(token) != token_id:
                other = by_id.get(token_id)
                raise StoreError(
                    f"the stored reference {self.space.label!r} tokenizes differently: id {token_id} is {token!r} for "
                    f"the policy and {'no token' if other is None else repr(other)} for the reference. Per-token "
                    "log-probs of different tokens cannot be compared: use a reference that shares the tokenizer"
                )

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token → id of the reference's tokenizer."""
        if self.space.vocabulary is not None:
            return self.space.vocabulary
        return _read_vocabulary(self.folder, self.space.identity)

    def writer(self, **options: Any) -> StoreWriter:
        """A writer of new rows to this space; any number of them may be at work, in any number of processes."""
        return StoreWriter(self, **options)

    def stat(self) -> StoreStat:
        """Counts of what the space holds and of what was asked of it."""
        self.refresh()
        return StoreStat(
            rows=len(self._where),
            values=sum(self._shards[shard].length(row) for shard, row in self._where.values()),
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
        return {**vars(self), "_files": OrderedDict()}

    def _read(self, row: Row) -> np.ndarray | None:
        """The values of one row, compared with their checksum; None where they are not stored or not intact."""
        if row.values == 0:
            return np.zeros(0, dtype=np.float32)  # nothing to know
        while (where := self._where.get(row.key)) is not None:
            number, index = where
            shard = self._shards[number]
            try:
                raw = shard.raw(self._file(number), index)
                if len(raw) == 4 * row.values and _checksum(row.key, raw) == shard.checksum(index):
                    return np.frombuffer(raw, dtype="<f4")
                self._report(shard.path.name, f"the values of row {index} do not have their checksum")
            except FileNotFoundError:  # removed, or merged into another, which the next refresh finds
                pass
            except OSError as error:
                self._report(shard.path.name, f"cannot be read: {error.strerror}")
            others = self._elsewhere.get(row.key)
            if others:
                self._where[row.key] = others.pop(0)
            else:
                del self._where[row.key]
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

    def _lacking(self, count: int, total: int, names: list[str], kind: str = "rows") -> str:
        shown = "; ".join(names[:3]) + (f"; and {count - 3} more" if count > 3 else "")
        damage = f" Damaged shards: {', '.join(self.damaged)}." if self.damaged else ""
        return (
            f"{count} of {total} {kind} are not in the store {self.folder} (reference {self.space.label!r}): {shown}."
            f"{damage} A row is found by its exact token ids and completion mask: truncation, template and tokenizer "
            f"must be those that the store was filled with.{_FILL}"
        )


_FILL = " Fill it: selective-pref score --ref-model MODEL --pairs PAIRS --store STORE"


def spaces(path: str | Path) -> list[Space]:
    """The spaces of a store, in order of their labels.

    Raises:
        StoreError: `path` is no folder, or a manifest is damaged or of another version.
    """
    path = Path(path)
    if not path.is_dir():
        raise StoreError(f"no reference store at {path}: expected a folder.{_FILL}")
    found = []
    for folder in sorted(path.iterdir()):
        if (folder / _MANIFEST).is_file():
            identity, label = _read_manifest(folder)
            found.append(Space(identity=identity, label=label))
    return sorted(found, key=lambda space: (space.label, space.name))


def _shown(row: Row) -> str:
    return f"{len(row.ids)} tokens, {int(row.mask.sum())} of the completion, ids {row.ids[:4].tolist()}…"


def _without_manifest(path: Path) -> list[str]:
    return [
        folder.name
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not (folder / _MANIFEST).is_file() and any(folder.glob(f"*{_SHARD}"))
    ]


# --- writing ---------------------------------------------------------------------------------------------------------


class StoreWriter:
    """Collects rows and writes them as shards: when enough have come, when enough time has passed, and at the end.

    A context manager. What was added before an error is written, too; only a kill loses what was not written yet.

    Args:
        store: where to.
        shard_bytes: a shard is written when its values reach this size.
        flush_seconds: or when its first row has waited this long.
    """

    def __init__(self, store: ReferenceStore, *, shard_bytes: int = 64 << 20, flush_seconds: float = 30.0) -> None:
        self.store = store
        self.shard_bytes = shard_bytes
        self.flush_seconds = flush_seconds
        self.written = 0
        self._rows: dict[bytes, bytes] = {}
        self._bytes = 0
        self._since = 0.0
        _probe(store.folder)  # better now than after an hour of scoring

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
        if not self._rows:
            self._since = time.monotonic()
        self._rows[row.key] = values.astype("<f4", copy=False).tobytes()
        self._bytes += values.nbytes
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected as one shard; nothing where there is nothing."""
        if not self._rows:
            return
        name, data = _shard_bytes(self._rows, self.store.space.name)
        with _writing(self.store.folder):
            _write_whole(self.store.folder / name, data)
        self.written += len(self._rows)
        self._rows, self._bytes = {}, 0
        self.store.refresh()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def _shard_bytes(rows: dict[bytes, bytes], space: str) -> tuple[str, bytes]:
    """(name, content) of the file that holds these rows: key → values."""
    keys = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, _KEY)
    lengths = [len(raw) // 4 for raw in rows.values()]
    tensors = {
        "keys": keys,
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"),
        "checksums": np.frombuffer(b"".join(_checksum(k, raw) for k, raw in rows.items()), dtype=np.uint8).reshape(
            -1, _CHECK
        ),
        "values": np.frombuffer(b"".join(rows.values()), dtype="<f4"),
    }
    data = save(tensors, metadata={"format": str(FORMAT), "space": space})
    header, start = _header(data)
    return _index_digest(data[:start], [_part(data, start, header, name) for name in _INDEX]) + _SHARD, data


def _checksum(key: bytes, raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=_CHECK, key=key).digest()


def _write_space(folder: Path, space: Space) -> None:
    tokens = json.dumps(space.vocabulary, ensure_ascii=True, sort_keys=True).encode("ascii")
    _write_whole(folder / _VOCABULARY, gzip.compress(tokens, mtime=0))
    manifest = {"format": FORMAT, "label": space.label, "identity": space.identity}
    _write_whole(folder / _MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode("ascii"))


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all, also after a power cut."""
    aside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _probe(folder: Path) -> None:
    """Raises StoreWriteError where nothing can be written."""
    with _writing(folder):
        probe = folder / f".{secrets.token_hex(8)}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()


class _writing:  # noqa: N801 - reads as a sentence: with _writing(folder)
    """Turns an OSError into a StoreWriteError that names the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            raise StoreWriteError(
                error.errno,
                f"cannot write to the reference store {self.folder}: {error.strerror or error}. What was stored "
                "before is intact: make room or give a folder that can be written to, and run the command again",
            ) from error


# --- reading ---------------------------------------------------------------------------------------------------------


class _DamageError(Exception):
    """A shard that is not believed; the message is the reason."""


_INDEX = ("keys", "offsets", "checksums")


@dataclass(frozen=True)
class _Shard:
    """The index of a shard's file: everything but the values."""

    path: Path
    bytes: int
    start: int  # where the values begin in the file
    _keys: bytes
    offsets: np.ndarray
    _checksums: bytes

    @classmethod
    def read(cls, path: Path, space: str) -> _Shard:
        """Raises _DamageError, or FileNotFoundError."""
        try:
            size = path.stat().st_size
            with path.open("rb", buffering=0) as file:
                lead = file.read(8)
                length = int.from_bytes(lead, "little")
                if len(lead) < 8 or length > size - 8:
                    raise _DamageError(f"truncated: {size} bytes")
                header, start = _header(lead + file.read(length))
                if size != start + max(_span(header, name)[1] for name in (*_INDEX, "values")):
                    raise _DamageError(f"truncated or extended: {size} bytes")
                parts = [_part_of_file(file, start, header, name) for name in _INDEX]
                values = _span(header, "values")
                file.seek(0)
                digest = _index_digest(file.read(start), parts)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _DamageError(f"cannot be read: {error.strerror}") from error
        if digest + _SHARD != path.name:
            raise _DamageError("header or index do not have the checksum that is its name")
        metadata = header["__metadata__"]
        if metadata.get("format") != str(FORMAT):
            raise _DamageError(f"written in format {metadata.get('format')}; this version reads {FORMAT}")
        if metadata.get("space") != space:
            raise _DamageError(f"belongs to the space {metadata.get('space')}")
        return cls(path, size, start + values[0], parts[0], np.frombuffer(parts[1], dtype="<i8"), parts[2])

    def keys(self) -> list[bytes]:
        """The keys of its rows."""
        return [self._keys[at : at + _KEY] for at in range(0, len(self._keys), _KEY)]

    def length(self, row: int) -> int:
        """How many values a row has."""
        return int(self.offsets[row + 1] - self.offsets[row])

    def checksum(self, row: int) -> bytes:
        """The checksum that a row's values must have."""
        return self._checksums[row * _CHECK : (row + 1) * _CHECK]

    def raw(self, file: Any, row: int) -> bytes:
        """The bytes of a row's values; fewer where the file has become shorter."""
        return os.pread(file.fileno(), 4 * self.length(row), self.start + 4 * int(self.offsets[row]))


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """(header of a safetensors file, where its tensors begin)."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        for name in (*_INDEX, "values"):
            _span(header, name)
        header["__metadata__"].get("format")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _DamageError("its header is no safetensors header of a shard") from error
    return header, 8 + length


def _span(header: dict[str, Any], name: str) -> tuple[int, int]:
    first, last = header[name]["data_offsets"]
    if not 0 <= int(first) <= int(last):
        raise ValueError(name)
    return int(first), int(last)


def _part(data: bytes, start: int, header: dict[str, Any], name: str) -> bytes:
    first, last = _span(header, name)
    return data[start + first : start + last]


def _part_of_file(file: Any, start: int, header: dict[str, Any], name: str) -> bytes:
    first, last = _span(header, name)
    part = os.pread(file.fileno(), last - first, start + first)
    if len(part) < last - first:
        raise _DamageError("truncated in its index")
    return part


def _index_digest(header: bytes, parts: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(header, digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """(identity, label)."""
    again = "`selective-pref score` with the same reference writes it again and keeps the shards"
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        version, identity, label = manifest["format"], manifest["identity"], str(manifest["label"])
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{folder} has no {_MANIFEST}: {again}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedStoreError(f"{folder / _MANIFEST} is damaged: {again}") from error
    if version != FORMAT:
        raise StoreError(
            f"{folder / _MANIFEST} is of format {version}; this version reads {FORMAT}: use the version of "
            "selective-pref that wrote it, or score into another folder"
        )
    if digest_of_json(identity) != folder.name:
        raise DamagedStoreError(f"{folder / _MANIFEST} does not belong to its folder: {again}")
    return identity, label


def _read_vocabulary(folder: Path, identity: dict[str, Any]) -> dict[str, int]:
    again = "`selective-pref score` with the same reference writes it again and keeps the shards"
    try:
        vocabulary = json.loads(gzip.decompress((folder / _VOCABULARY).read_bytes()))
        intact = vocabulary_digest(vocabulary) == identity.get("vocabulary")
    except (OSError, EOFError, zlib.error, ValueError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{folder / _VOCABULARY} is gone or damaged: {again}") from error
    if not intact:
        raise DamagedStoreError(f"{folder / _VOCABULARY} does not have the digest that {_MANIFEST} names: {again}")
    return vocabulary
