"""All shards of one folder as a mapping: the key of a row → its log-probs.

In: the folder of a space. Out: float32 values under a key, each time compared with their checksum. Damage loses exactly
the rows it touches: a log line names the shard, a further intact copy is used if there is one, and otherwise the row
counts as missing.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selective_pref_adapters.reference_store.shards import SUFFIX, DamageError, OtherFormatError, Shard, StoreError

logger = logging.getLogger(__name__)

_OPEN_FILES = 128


class ShardIndex:
    """Which shard holds which row. Works in forked and spawned processes, and in several threads.

    Attributes:
        folder: of the space.
        damaged: name → reason of shards that are, or hold rows that are, damaged or of another format.
        unreadable: names of the shards of which nothing can be read.
    """

    def __init__(self, folder: Path, space_name: str) -> None:
        self.folder = folder
        self.damaged: dict[str, str] = {}
        self.unreadable: set[str] = set()
        self._space_name = space_name
        self._shards: list[Shard] = []
        self._seen: dict[str, tuple[int, int, int]] = {}  # file name → inode, time and size when it was read
        self._where: dict[bytes, tuple[int, int]] = {}  # key → (index of its shard, index of the row in it)
        self._copies: dict[bytes, list[tuple[int, int]]] = {}  # further copies, for when the first is damaged
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.RLock()

    def refresh(self) -> int:
        """Reads the index of shards that were written since the last time; returns how many.

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
                vanished = {name for name in names if not self._add(name)} - gone
                if not vanished:
                    return len(self._shards) - before
                gone |= vanished  # `prune` merged these into a shard that this listing may lack: list again

    def _add(self, name: str) -> bool:
        """Reads a shard's index, if it is new, and notes where its rows are; False where the file is gone."""
        path = self.folder / name
        try:
            stat = path.stat()
            stamp = stat.st_ino, stat.st_mtime_ns, stat.st_size
            if self._seen.get(name) == stamp:
                return True
            self._seen[name] = stamp  # a damaged shard that is written again has the same content, so the same name
            shard = Shard.read(path, self._space_name)
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
                self._copies.setdefault(key, []).append((number, row))
        return True

    def find(self, wanted: Sequence[tuple[bytes, int]]) -> list[np.ndarray | None]:
        """The values under each key, None where there are none. Looks for new shards before it says so.

        Args:
            wanted: (key, how many values the row must have).
        """
        with self._lock:
            found = [self.values(key, count) for key, count in wanted]
            if any(values is None for values in found) and self.refresh():
                found = [self.values(*want) if got is None else got for want, got in zip(wanted, found, strict=True)]
        return found

    def values(self, key: bytes, count: int | None = None) -> np.ndarray | None:
        """The values under a key (`count` of them, where that is known), from the first intact copy; None if none."""
        if count == 0:
            return np.zeros(0, dtype=np.float32)  # a row without log-probs is never stored, and never missing
        with self._lock:
            while (where := self._where.get(key)) is not None:
                number, row = where
                shard = self._shards[number]
                try:
                    values = shard.values(self._file(number), row)
                    if values is not None and count in (None, len(values)):
                        return values
                    self._report(shard.path.name, f"the values of row {row} do not have their checksum")
                except FileNotFoundError:  # removed, or merged into another, which the next refresh finds
                    pass
                except OSError as error:
                    self._report(shard.path.name, f"cannot be read: {error.strerror}")
                if copies := self._copies.get(key):
                    self._where[key] = copies.pop(0)
                else:
                    del self._where[key]
        return None

    def stored_keys(self) -> list[bytes]:
        """The keys of all rows, shard after shard."""
        return list(self._where)

    def sizes(self) -> dict[Path, int]:
        """The shards whose index could be read → their size in bytes."""
        return {shard.path: shard.bytes for shard in self._shards}

    def close(self) -> None:
        """Closes the shards' files; a later lookup opens them again."""
        while self._files:
            self._files.popitem()[1].close()

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

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _files=OrderedDict(), _lock=threading.RLock())
