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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from selective_pref_adapters.reference_store.shards import (
    KEYS,
    SUFFIX,
    DamageError,
    OtherFormatError,
    Shard,
    StoreError,
)

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
        # Rows are numbered shard after shard. Copies of one stand beside each other, in this order.
        self._starts = np.zeros(1, dtype=np.int64)  # the number of each shard's first row, and how many there are
        self._keys = np.zeros(0, dtype=KEYS)  # sorted
        self._rows = np.zeros(0, dtype=np.int64)  # the number of the row at each place of `_keys`
        self._lost: set[int] = set()  # numbers of rows that are damaged, or whose file is gone
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
        return True

    def _sort(self) -> None:
        """Takes the keys of new shards in."""
        if len(self._starts) == len(self._shards) + 1:
            return
        keys = [shard.keys for shard in self._shards]
        self._starts = np.cumsum([0, *map(len, keys)])
        together = np.concatenate(keys)
        self._rows = np.argsort(together, kind="stable")
        self._keys = together[self._rows]

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
            for number in self._copies(key):
                shard, file, row = self._found(number)
                try:
                    values = shard.values(self._file(file), row)
                    if values is not None and count in (None, len(values)):
                        return values
                    self._report(shard.path.name, f"the values of row {row} do not have their checksum")
                except FileNotFoundError:  # removed, or merged into another, which the next refresh finds
                    pass
                except OSError as error:
                    self._report(shard.path.name, f"cannot be read: {error.strerror}")
                self._lost.add(number)
        return None

    def _copies(self, key: bytes) -> Iterator[int]:
        """The numbers of the rows with that key, but for those that are lost."""
        self._sort()
        wanted = np.frombuffer(key, dtype=KEYS)
        for number in self._rows[slice(*(int(self._keys.searchsorted(wanted, side)[0]) for side in ("left", "right")))]:
            if int(number) not in self._lost:
                yield int(number)

    def _found(self, number: int) -> tuple[Shard, int, int]:
        """(the shard of a row, its number, the row's number in it)."""
        file = int(self._starts.searchsorted(number, "right")) - 1
        return self._shards[file], file, number - int(self._starts[file])

    def holds(self, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Which rows are stored, intact, with so many values each: `values` of many, without their values.

        Each file is read once, from its beginning to its end.

        Args:
            keys: `KEYS` [N].
            counts: how many values each must have, int [N].

        Returns:
            bool [N]; True where the count is 0.
        """
        with self._lock:
            held = counts == 0
            places = self._places(keys)
            there = np.flatnonzero(~held & (places >= 0))
            numbers = self._rows[places[there]]
            order = np.argsort(numbers)
            there, numbers = there[order], numbers[order]
            for file, start in enumerate(self._starts[:-1]):
                some = slice(*numbers.searchsorted((start, self._starts[file + 1])))
                shard, rows, asked = self._shards[file], numbers[some] - start, there[some]
                with suppress(OSError):
                    held[asked] = shard.intact(self._file(file), rows) & (shard.lengths[rows] == counts[asked])
            for row in there[~held[there]]:  # damaged, gone, or lost before: perhaps there is a copy
                held[row] = self.values(keys[row : row + 1].tobytes(), int(counts[row])) is not None
        return held

    def knows(self, keys: np.ndarray) -> np.ndarray:
        """Which keys, `KEYS` [N], stand in the index of a shard, whatever its values are: bool [N]."""
        with self._lock:
            return self._places(keys) >= 0

    def _places(self, keys: np.ndarray) -> np.ndarray:
        """The first place of each key in `_keys`; -1 where it is not there: int64 [N]."""
        self._sort()
        if not len(self._keys):
            return np.full(len(keys), -1)
        places = np.minimum(self._keys.searchsorted(keys), len(self._keys) - 1)
        return np.where(self._keys[places] == keys, places, -1)

    def stored(self) -> tuple[np.ndarray, np.ndarray]:
        """The keys of all rows, shard after shard, `KEYS` [N], and how many values each has, int64 [N]."""
        with self._lock:
            self._sort()
            _, first = np.unique(self._keys, return_index=True)
            numbers = np.sort(self._rows[first])
            keys = np.concatenate([np.zeros(0, dtype=KEYS), *(shard.keys for shard in self._shards)])
            lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(shard.lengths for shard in self._shards)])
        return keys[numbers], lengths[numbers]

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
