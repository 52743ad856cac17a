"""The store of per-token reference log-probs, and what fills it.

In: rows (token ids and completion mask) and a reference. Out: the reference's float32 log-probs of those rows, computed
once, for every run that reads them.

    rows        one side of a pair, and its key
    store       rows are looked up in a batch, counted, checked
    fill        log-probs of rows that are lacking are computed, by a model here (`local`) or a server (`served/`)
    writer      new rows become shards
    prune       many small shards become few large ones
    index       all shards of a folder: which one holds a row
    shards      one file: how rows become bytes, and how damage is found
    identity    digests of weights, adapters, configuration and vocabulary: whose log-probs they are
    spaces      the folder of one reference, and the files that hold its identity
    command     `selective-pref score`
"""

from __future__ import annotations

from selective_pref_adapters.reference_store.fill import (
    Comparison,
    FillReport,
    compare_rows,
    fill_rows,
    fill_store,
)
from selective_pref_adapters.reference_store.identity import model_identity, reference_space
from selective_pref_adapters.reference_store.prune import PruneReport, prune
from selective_pref_adapters.reference_store.rows import LogpSource, Row, RowLogps, row_key, rows_of_pairs
from selective_pref_adapters.reference_store.shards import DamagedStoreError, StoreError, StoreWriteError
from selective_pref_adapters.reference_store.spaces import Space
from selective_pref_adapters.reference_store.store import MissingRowsError, ReferenceStore, StoreStat
from selective_pref_adapters.reference_store.writer import StoreWriter

__all__ = [
    "Comparison",
    "DamagedStoreError",
    "FillReport",
    "LogpSource",
    "MissingRowsError",
    "PruneReport",
    "ReferenceStore",
    "Row",
    "RowLogps",
    "Space",
    "StoreError",
    "StoreStat",
    "StoreWriteError",
    "StoreWriter",
    "compare_rows",
    "fill_rows",
    "fill_store",
    "model_identity",
    "prune",
    "reference_space",
    "row_key",
    "rows_of_pairs",
]
