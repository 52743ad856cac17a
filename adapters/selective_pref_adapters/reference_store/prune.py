"""Tidying up a space: few large shards of intact rows in place of many small ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from selective_pref_adapters.files import sync
from selective_pref_adapters.reference_store.rows import Row, as_rows
from selective_pref_adapters.reference_store.shards import is_abandoned, writing
from selective_pref_adapters.reference_store.store import ReferenceStore, StoreStat
from selective_pref_adapters.reference_store.writer import SHARD_BYTES


class PruneReport(NamedTuple):
    """What a space held before `prune`, and what it holds afterwards."""

    before: StoreStat
    after: StoreStat


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
    index = store.index
    old = {*index.sizes(), *(store.folder / name for name in index.unreadable)}
    writer = store.writer(shard_bytes=shard_bytes, flush_seconds=math.inf)
    keys, _ = index.stored()
    kept = keys if keep is None else keys[np.isin(keys, as_rows(keep).keys)]
    for key in map(bytes, kept[:, None].view(np.uint8)):
        if (values := index.values(key)) is not None:
            writer.add_values(key, values)
    writer.flush()
    with writing(store.folder):
        abandoned = [path for path in store.folder.iterdir() if is_abandoned(path)]
        for path in {*old, *abandoned} - writer.shards:
            path.unlink(missing_ok=True)
        sync(store.folder)
    return PruneReport(before, ReferenceStore(store.folder, store.space).stat())
