"""A data set's column `weight`: rows whose losses count for more, or less, than others'.

In: rows with a weight, a number at least 0. Out: batches with their weights, by which the losses are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from selective_pref_adapters.batch import PAIR_WEIGHTS, to_bits
from selective_pref_adapters.named_losses import check_pairs_can_be_weighted

WEIGHT_COLUMN = "weight"


@dataclass(frozen=True, kw_only=True)
class WithPairWeights:
    """A collator that adds the rows' weights, as int32 bits: trainers cast floats, and leave integers."""

    collator: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collated batch with `PAIR_WEIGHTS` [B]; 1 for a row without a weight."""
        weights = torch.tensor([float(example.get(WEIGHT_COLUMN, 1.0)) for example in examples])
        return {**self.collator(examples), PAIR_WEIGHTS: to_bits(weights)}


def are_weighted(dataset: Any) -> bool:
    """Whether the rows of a data set have weights."""
    return WEIGHT_COLUMN in (getattr(dataset, "column_names", None) or [])


def check_weights(loss_type: Sequence[str], dataset: Any) -> None:
    """Raises ValueError at a weight that is none, or where nothing would be learnt.

    Args:
        loss_type: the losses that are to be multiplied.
        dataset: the training rows. Of a stream, only batches can be looked at: there a bad weight makes a loss that is
            not finite.
    """
    check_pairs_can_be_weighted(loss_type)
    if not isinstance(dataset, Dataset) or not are_weighted(dataset):
        return
    weights = dataset[WEIGHT_COLUMN]
    for row, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"weight of row {row} must be a finite number, at least 0; got {weight!r}")
    if not any(weights):
        raise ValueError("every weight is 0, so no row would be learnt from: leave the column out, or scale it")
