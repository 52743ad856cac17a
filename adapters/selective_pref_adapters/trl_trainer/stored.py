"""Stored reference log-probs for `SelectiveDPOTrainer`: which rows it will read, and how they reach the loss.

In: a data set as TRL has prepared it, and the collator that cuts its rows. Out: their token ids, by which a
`ReferenceStore` finds them; batches with the stored log-probs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, Features

from selective_pref_adapters.batch import REF_LOGPS, to_bits
from selective_pref_adapters.pairs import TokenizedPair, uncounted_spans
from selective_pref_adapters.pairs.large import PairTable
from selective_pref_adapters.pairs.large.making import OF_IDS, PAIRS, known_of_ids
from selective_pref_adapters.pairs.large.naming import code_digest
from selective_pref_adapters.reference_store.store import ReferenceStore
from selective_pref_adapters.trl_trainer.data import PairCollator

_ROWS_AT_ONCE = 128
_COLUMNS = pa.schema([*PAIRS, *OF_IDS])


@dataclass(frozen=True, kw_only=True)
class WithStoredReference:
    """A collator that adds the stored log-probs of a batch, as int32 bits: trainers cast floats, and leave integers."""

    collator: Any
    store: ReferenceStore
    key: str = REF_LOGPS

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collated batch with the log-probs [2B T] under `key`."""
        batch = self.collator(examples)
        return {**batch, self.key: to_bits(self.store.lookup(batch))}


def bare(collator: Any) -> Any:
    """A collator without the stored log-probs that are added to its batches."""
    while isinstance(collator, WithStoredReference):
        collator = collator.collator
    return collator


def check_stored_dataset(dataset: Any) -> None:
    """Raises unless the data set can be read before training, as stored reference log-probs need."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`precompute_ref_log_probs=True` and `reference_store` are not supported with {type(dataset).__name__}: "
            "log-probs are computed, or looked up, before training. Give a datasets.Dataset, or a ref_model and leave "
            "both out"
        )


def pairs_of(dataset: Any, collator: Any, name: str, *, workers: int | None = None) -> PairTable:
    """The token ids of every row as the collator will cut them, on the disk where the data set is.

    The first process makes them. Where the collator is this library's own they are found again in the cache of
    `datasets`, as long as data set, settings and code are the same.

    Args:
        dataset: as TRL has prepared it.
        collator: without stored log-probs.
        name: what the data set is called in error messages.
        workers: processes that make them.

    Raises:
        ValueError: the data set cannot be read twice.
    """
    check_stored_dataset(dataset)
    with PartialState().main_process_first():
        made = dataset.map(
            _cut,
            batched=True,
            batch_size=_ROWS_AT_ONCE,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=Features.from_arrow_schema(_COLUMNS),
            num_proc=workers,
            load_from_cache_file=None if type(collator) is PairCollator else False,  # the code of others may change
            desc=f"Cutting {name} dataset",
            fn_kwargs={"collator": collator, "name": name, "code": _code()},
        )
    return PairTable(made.select_columns(PAIRS.names), made.data.table, np.arange(len(made)))


def _code() -> list[str]:
    """What decides how rows are cut, beside a collator's settings."""
    here = hashlib.blake2b(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    return [code_digest(), here.hexdigest(), importlib.metadata.version("trl")]


def _cut(
    batch: dict[str, list[Any]], indices: list[int], *, collator: Any, name: str, code: Any
) -> dict[str, list[Any]]:
    """A batch of rows as `Dataset.map` hands it over, as pairs. `code` only makes the cache's key."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    collated = collator(rows)
    attended = collated["attention_mask"] != 0
    sides = [
        _side(ids[at].tolist(), (counts[at] != 0).tolist())
        for ids, at, counts in zip(collated["input_ids"], attended, collated["completion_mask"], strict=True)
    ]
    out: dict[str, list[Any]] = {column: [] for column in _COLUMNS.names}
    for number, row in enumerate(rows):
        both = zip(("chosen", "rejected"), (sides[number], sides[number + len(rows)]), strict=True)
        fields = {f"{side}_{what}": value for side, known in both for what, value in known.items()}
        pair = TokenizedPair(**fields, place=row.get("place", f"{name}, row {indices[number]}"))
        for column, value in {**vars(pair), **known_of_ids(pair)}.items():
            out[column].append(value)
    return out


def _side(ids: list[int], counts: list[bool]) -> dict[str, Any]:
    start = counts.index(True) if True in counts else len(counts)
    return {"ids": ids, "prompt_length": start, "uncounted": uncounted_spans(counts, start)}
