"""A data set's column `weight`: rows whose losses count for more, or less, than others'.

In: rows with a weight, a number at least 0. Out: batches with their weights, by which the losses are multiplied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from selective_pref.fused import LogitStatistics
from selective_pref_adapters.batch import PAIR_WEIGHTS, Batch, from_bits, to_bits
from selective_pref_adapters.objectives import policy_weights
from selective_pref_adapters.objectives.named_losses import (
    check_pair_weights,
    check_pairs_can_be_weighted,
    weights_line,
)
from selective_pref_adapters.pairs import checked_weight

logger = logging.getLogger(__name__)

WEIGHT_COLUMN = "weight"


@dataclass(frozen=True, kw_only=True)
class WithPairWeights:
    """A collator that adds the rows' weights, as int32 bits: trainers cast floats, and leave integers."""

    collator: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collated batch with `PAIR_WEIGHTS` [B]; 1 for a row without a weight."""
        weights = [checked_weight(example.get(WEIGHT_COLUMN, 1.0), "a row of a batch") for example in examples]
        return {**self.collator(examples), PAIR_WEIGHTS: to_bits(torch.tensor(weights))}


def with_pair_weights(collator: Any, loss_type: Sequence[str], datasets: Sequence[Any]) -> Any:
    """The collator, adding the rows' weights if they have any.

    Args:
        collator: makes the batches.
        loss_type: the losses that are to be multiplied.
        datasets: for training first, then those for evaluation. Of a stream, each row is looked at when it is read.

    Raises:
        ValueError: a weight that is no number, is negative or not finite; weights that are all 0, or that only some
            rows have; losses that belong to no single pair.
    """
    weighted = [WEIGHT_COLUMN in _columns(dataset) for dataset in datasets]
    if not any(weighted):
        return collator
    check_pairs_can_be_weighted(loss_type)
    for number, dataset in enumerate(datasets):
        if weighted[number] and isinstance(dataset, Dataset):
            _check(loss_type, dataset, "eval" if number else "train")
    return WithPairWeights(collator=collator)


def _columns(dataset: Any) -> Iterable[str]:
    """Names of the columns; of a stream that does not know them, as its first row has them."""
    names = getattr(dataset, "column_names", None)
    return names or (next(iter(dataset), {}) if isinstance(dataset, IterableDataset) else [])


def _check(loss_type: Sequence[str], dataset: Dataset, name: str) -> None:
    weights = [
        None if weight is None else checked_weight(weight, f"{name}, row {number}")
        for number, weight in enumerate(dataset[WEIGHT_COLUMN])
    ]
    check_pair_weights(weights, loss_type, name)
    for line in weights_line(weights):
        logger.info("%s: %s", name, line)


def batch_weights(inputs: Batch, per_token_logps: Tensor, statistics: LogitStatistics | None) -> Tensor | None:
    """What the losses of a batch are multiplied by [B]: the rows' weights, WPO's, or both; None for neither.

    Args:
        inputs: the batch.
        per_token_logps: the policy's [2B T].
        statistics: of the policy's logits, for WPO's weights; None without them.
    """
    weights = from_bits(inputs[PAIR_WEIGHTS]) if PAIR_WEIGHTS in inputs else None
    if statistics is None:
        return weights
    found = policy_weights(per_token_logps, statistics.log_sum_sq_probs, inputs["completion_mask"][:, 1:] != 0)
    return found if weights is None else weights * found
