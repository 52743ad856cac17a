"""Stored reference log-probs for `SelectiveDPOTrainer`: which rows it will read, and how they reach the loss.

In: a data set as TRL has prepared it, and the collator that cuts its rows. Out: their token ids, by which a
`ReferenceStore` finds them; batches with the stored log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from selective_pref_adapters.batch import REF_LOGPS, to_bits
from selective_pref_adapters.pairs import TokenizedPair, uncounted_spans
from selective_pref_adapters.reference_store.store import ReferenceStore


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


def pairs_of(dataset: Any, collator: Any, name: str) -> list[TokenizedPair]:
    """The token ids of every row as the collator will cut them.

    Raises:
        ValueError: the data set cannot be read twice.
    """
    return list(each_pair(dataset, collator, name))


def each_pair(dataset: Any, collator: Any, name: str) -> Iterator[TokenizedPair]:
    """As `pairs_of`, one pair after the other."""
    check_stored_dataset(dataset)
    for number, example in enumerate(dataset):
        batch = collator([example])
        sides = []
        for row in range(2):
            attended = batch["attention_mask"][row] != 0
            counts = (batch["completion_mask"][row][attended] != 0).tolist()
            start = counts.index(True) if True in counts else len(counts)
            sides.append((batch["input_ids"][row][attended].tolist(), start, uncounted_spans(counts, start)))
        (chosen_ids, chosen_start, chosen_uncounted), (rejected_ids, rejected_start, rejected_uncounted) = sides
        yield TokenizedPair(
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            chosen_prompt_length=chosen_start,
            rejected_prompt_length=rejected_start,
            chosen_uncounted=chosen_uncounted,
            rejected_uncounted=rejected_uncounted,
            place=example.get("place", f"{name}, row {number}"),
        )
