"""New rows into a space's folder.

In: rows with their log-probs. Out: shards. Each is written aside, flushed to the disk and renamed; it is never changed,
and no two writers share one. So a writer that is killed, and several at once, leave whole shards only.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from selective_pref_adapters.files import write_whole
from selective_pref_adapters.reference_store.rows import Row
from selective_pref_adapters.reference_store.shards import check_writable, shard_bytes, writing
from selective_pref_adapters.reference_store.spaces import Space, write_identity

SHARD_BYTES = 64 << 20
"""Values of one shard."""
FLUSH_SECONDS = 30.0
"""How long a row may wait to be written: what a kill costs at most."""


class StoreWriter:
    """Collects rows and writes them as shards: when enough have come, when enough time has passed, and at the end.

    A context manager. What was added before an error is written, too; only a kill loses what was not written yet.

    Args:
        folder: of the space; made with the first shard.
        space: whose rows they are.
        shard_bytes: a shard is written when its values reach this size.
        flush_seconds: or when its first row has waited this long.

    Raises:
        StoreWriteError: the folder cannot be written to. This is tried at once: before anything is computed.
    """

    def __init__(
        self, folder: Path, space: Space, *, shard_bytes: int = SHARD_BYTES, flush_seconds: float = FLUSH_SECONDS
    ) -> None:
        self.folder = folder
        self.space = space
        self.shard_bytes = shard_bytes
        self.flush_seconds = flush_seconds
        self.shards: set[Path] = set()
        self._rows: dict[bytes, bytes] = {}
        self._bytes = 0
        self._since = 0.0
        check_writable(folder)

    def add(self, row: Row, values: np.ndarray) -> None:
        """Takes in a row's float32 log-probs, one per completion token after the row's first position.

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
        name, data = shard_bytes(self._rows, self.space.name)
        if not self.shards:
            write_identity(self.folder, self.space)
        with writing(self.folder):
            write_whole(self.folder / name, data)
        self.shards.add(self.folder / name)
        self._rows, self._bytes = {}, 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
