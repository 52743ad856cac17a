"""The store of per-token reference log-probs, and who fills it.

In: rows (token ids and completion mask) and a reference. Out: the reference's float32 log-probs of those rows, paid for
once, for every run that reads them.

    identity    whose log-probs they are: digests of weights, adapters, configuration and vocabulary → a `Space`
    fill        a local model scores the rows that are lacking
    served      a server does, over HTTP
    store       rows are looked up in a batch, counted, checked
    shards, spaces    the files: log-probs, and the identity they belong to
    command     `selective-pref score`
"""

from __future__ import annotations

from selective_pref_adapters.reference_store.fill import (
    Comparison,
    Scored,
    Scorer,
    ScoringReport,
    compare_rows,
    fill_rows,
    fill_store,
)
from selective_pref_adapters.reference_store.identity import model_identity, reference_space
from selective_pref_adapters.reference_store.shards import DamagedStoreError, StoreError, StoreWriteError
from selective_pref_adapters.reference_store.spaces import Space
from selective_pref_adapters.reference_store.store import (
    MissingRowsError,
    PruneReport,
    ReferenceStore,
    Row,
    StoreStat,
    StoreWriter,
    prune,
    row_key,
    rows_of_pairs,
)

__all__ = [
    "Comparison",
    "DamagedStoreError",
    "MissingRowsError",
    "PruneReport",
    "ReferenceStore",
    "Row",
    "Scored",
    "Scorer",
    "ScoringReport",
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
