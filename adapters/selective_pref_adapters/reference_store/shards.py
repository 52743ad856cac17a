"""One file of reference log-probs: how rows become bytes on disk, and how damage to them is found.

In: rows as (key → float32 values). Out: a safetensors file whose name is the digest of its header and index, and whose
rows each have a checksum. A file is there whole or not at all, is never changed, and values that do not fit their
checksum are not returned. Values are read from the file row by row, not mapped into memory: if another process
truncates the file, that row is lost, and the reading process is not killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from selective_pref_adapters.files import existing
from selective_pref_adapters.pairs.collate import KEY_BYTES

FORMAT = 1
"""Version of the files; another one is not read."""

KEYS = np.dtype((np.bytes_, KEY_BYTES))
"""Of an array of keys. One element taken out of it loses zeros at its end, so bytes are taken of a slice of one."""

SUFFIX = ".safetensors"
_CHECK_BYTES = 8
_READ_BYTES = 1 << 22  # of the values that are checked one after the other
_ABANDONED_AFTER_SECONDS = 3600  # a file that is being written is younger
_INDEX = ("keys", "offsets", "checksums")
_ABOUT = "selective-pref reference log-probs"


class StoreError(ValueError):
    """A store that cannot be used as asked. The message says what was found and what to do."""


class DamagedStoreError(StoreError):
    """A manifest or vocabulary that is gone or damaged; filling with the same reference writes it again."""


class StoreWriteError(OSError):
    """Rows could not be written (disk full, folder read-only). What was stored before is intact."""


class DamageError(Exception):
    """A shard that cannot be used; the message is the reason."""


class OtherFormatError(DamageError):
    """A whole shard, written by another version."""


@dataclass(frozen=True)
class Shard:
    """The index of a shard's file: everything but the values.

    Attributes:
        path: the file.
        bytes: its size.
        start: where the values begin in it.
        offsets: of each row's values, int64 [rows + 1].
    """

    path: Path
    bytes: int
    start: int
    _keys: bytes
    offsets: np.ndarray
    _checksums: bytes

    @classmethod
    def read(cls, path: Path, space: str) -> Shard:
        """The index of the file at `path`.

        Raises:
            DamageError: it is not whole, or not a shard of this space and format.
            FileNotFoundError: it is gone.
        """
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                start = 8 + int.from_bytes(_pread(file, 8, 0), "little")
                if size < 8 or start > size:
                    raise DamageError(f"truncated to {size} bytes")
                head = _pread(file, start, 0)
                header = _header(head)
                spans = {name: _span(header, name) for name in (*_INDEX, "values")}
                if size != start + max(last for _, last in spans.values()):
                    raise DamageError(f"truncated or extended to {size} bytes")
                parts = [_pread(file, last - first, start + first) for first, last in map(spans.__getitem__, _INDEX)]
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DamageError(f"cannot be read: {error.strerror}") from error
        if _index_digest(head, parts) + SUFFIX != path.name:
            raise DamageError("header and index do not have the digest that is its name")
        about = json.loads(header["__metadata__"][_ABOUT])
        if about["format"] != FORMAT:
            raise OtherFormatError(f"written in format {about['format']}; this version reads {FORMAT}")
        if about["space"] != space:
            raise DamageError(f"belongs to another reference ({about['space']})")
        offsets = np.frombuffer(parts[1], dtype="<i8")
        return cls(path, size, start + spans["values"][0], parts[0], offsets, parts[2])

    @property
    def keys(self) -> np.ndarray:
        """The keys of its rows: `KEYS` [rows]."""
        return np.frombuffer(self._keys, dtype=KEYS)

    @property
    def lengths(self) -> np.ndarray:
        """How many values each row has: int64 [rows]."""
        return np.diff(self.offsets)

    def values(self, file: Any, row: int) -> np.ndarray | None:
        """A row's float32 values, read from the open file; None where they do not have their checksum."""
        first, last = 4 * int(self.offsets[row]), 4 * int(self.offsets[row + 1])
        raw = _pread(file, last - first, self.start + first)
        return np.frombuffer(raw, dtype="<f4") if self._fits(row, raw) else None

    def intact(self, file: Any, rows: np.ndarray) -> np.ndarray:
        """Which of some rows, numbered in ascending order, have values that fit their checksums: bool [len(rows)]."""
        fit = np.zeros(len(rows), dtype=bool)
        offsets = 4 * self.offsets
        ends = offsets[rows + 1]
        at = 0
        while at < len(rows):  # a part of the file at a time
            first = int(offsets[rows[at]])
            until = max(int(ends.searchsorted(first + _READ_BYTES, "right")), at + 1)
            part = memoryview(_pread(file, int(ends[until - 1]) - first, self.start + first))
            some = rows[at:until]
            spans = zip(some.tolist(), (offsets[some] - first).tolist(), (ends[at:until] - first).tolist(), strict=True)
            fit[at:until] = [self._fits(row, part[begin:end]) for row, begin, end in spans]
            at = until
        return fit

    def _fits(self, row: int, raw: bytes | memoryview) -> bool:
        """Whether bytes have a row's checksum."""
        key = self._keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]
        return _checksum(key, raw) == self._checksums[row * _CHECK_BYTES : (row + 1) * _CHECK_BYTES]


def _pread(file: Any, size: int, start: int) -> bytes:
    """`size` bytes from `start` on; fewer only where the file ends. Leaves the position: forks may share the file."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(file.fileno(), size, start)):
        parts.append(part)
        size, start = size - len(part), start + len(part)
    return b"".join(parts)


def _header(head: bytes) -> dict[str, Any]:
    """The header of a safetensors file that begins with `head`."""
    try:
        header = json.loads(head[8:])
        for name in (*_INDEX, "values"):
            _span(header, name)
        json.loads(header["__metadata__"][_ABOUT])["format"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamageError("its header is not that of a shard") from error
    return header


def _span(header: dict[str, Any], name: str) -> tuple[int, int]:
    """Where a tensor begins and ends, counted from the end of the header."""
    first, last = header[name]["data_offsets"]
    if not 0 <= int(first) <= int(last):
        raise ValueError(name)
    return int(first), int(last)


def _index_digest(header: bytes, parts: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(header, digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


def shard_bytes(rows: Mapping[bytes, bytes], space: str) -> tuple[str, bytes]:
    """(name, content) of the file that holds these rows: key → values."""
    checksums = b"".join(_checksum(key, raw) for key, raw in rows.items())
    tensors = {
        "keys": np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "offsets": np.cumsum([0, *(len(raw) // 4 for raw in rows.values())], dtype="<i8"),
        "checksums": np.frombuffer(checksums, dtype=np.uint8).reshape(-1, _CHECK_BYTES),
        "values": np.frombuffer(b"".join(rows.values()), dtype="<f4"),
    }
    about = json.dumps(
        {"format": FORMAT, "space": space}
    )  # one entry, because safetensors writes several in an undefined order
    data = save(tensors, metadata={_ABOUT: about})
    start = 8 + int.from_bytes(data[:8], "little")
    spans = [_span(_header(data[:start]), name) for name in _INDEX]
    return _index_digest(data[:start], [data[start + first : start + last] for first, last in spans]) + SUFFIX, data


def _checksum(key: bytes, raw: bytes | memoryview) -> bytes:
    return hashlib.blake2b(raw, digest_size=_CHECK_BYTES, key=key).digest()


def check_writable(folder: Path) -> None:
    """Raises StoreWriteError where nothing can be written, or the folder cannot be made; leaves nothing behind."""
    with writing(folder):
        probe = existing(folder) / f".{secrets.token_hex(8)}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()


def is_abandoned(path: Path) -> bool:
    """Whether a file was written aside and is so old that its writer must have ended."""
    try:
        aside = path.name.startswith(".") and path.suffix == ".tmp"
        return aside and time.time() - path.stat().st_mtime > _ABANDONED_AFTER_SECONDS
    except FileNotFoundError:
        return False  # it has its own name now


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an OSError into a StoreWriteError that names the folder."""
    try:
        yield
    except StoreWriteError:
        raise
    except OSError as error:
        raise StoreWriteError(
            error.errno,
            f"cannot write to the reference store {folder}: {error.strerror or error}. What was stored before is "
            "intact: make room, or give a folder that can be written to, and run the same command again",
        ) from error
