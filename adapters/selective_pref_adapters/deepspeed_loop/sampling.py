"""Which pairs make a step, and which of them this process gets.

In: pairs, a seed, a step number, a rank. Out: batches. Nothing here has a state: what a step reads depends on its
number and the seed alone, so a resumed run needs no more than the number, and a step holds the same pairs on one
process as on a hundred, if the global batch is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import TokenizedPair

FILLER = TokenizedPair(chosen_ids=[0, 0], rejected_ids=[0, 0], chosen_prompt_length=2, rejected_prompt_length=2)
"""A pair without a completion: it takes part in every pass and counts for nothing."""


def pairs_per_step(config: TrainConfig, world_size: int) -> int:
    """Pairs of one optimiser step over all processes.

    Raises:
        ValueError: `global_batch_size` is given and cannot be divided into whole batches of every process.
    """
    at_once = config.batch_size * world_size
    if config.global_batch_size is None:
        return at_once * config.gradient_accumulation_steps
    if config.gradient_accumulation_steps != 1:
        raise ValueError("global_batch_size decides gradient_accumulation_steps: give one of them")
    if config.global_batch_size < 1 or config.global_batch_size % at_once:
        fits = max(1, round(config.global_batch_size / at_once)) * at_once
        raise ValueError(
            f"global_batch_size {config.global_batch_size} is no multiple of {at_once} (batch_size {config.batch_size} "
            f"× {world_size} processes): the nearest that fits is {fits}"
        )
    return config.global_batch_size


def number_of_steps(config: TrainConfig, pairs: int, per_step: int) -> int:
    """Optimiser steps of the run; what is left of the last epoch and fills no whole step is dropped."""
    if config.max_steps is not None:
        return config.max_steps
    steps = math.floor(pairs * config.epochs / per_step)
    if steps < 1:
        raise ValueError(
            f"too few pairs: {pairs} × {config.epochs:g} epochs fill no step of {per_step} pairs (batch_size "
            f"{config.batch_size} × processes × accumulation)"
        )
    return steps


def make_order(
    lengths: Sequence[int] | np.ndarray, per_step: int, seed: int, by_length: bool = False
) -> Callable[[int], list[int]]:
    """Step number (from 1) → the indices of its pairs: epoch after epoch, each in its own order, no gap between them.

    A function of step and seed alone, so that a resumed run goes on where it was. With `by_length`, an epoch's order
    is sorted in stretches of 50 steps, and the steps of the epoch are shuffled: the pairs of a step, and what
    processes hold at the same time, are then of like length.
    """
    count, lengths = len(lengths), np.asarray(lengths)

    @lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epoch):
            torch.randperm(count, generator=generator)
        order = torch.randperm(count, generator=generator).numpy()
        if not by_length:
            return order
        first = -epoch * count % per_step  # what the last step of the epoch before still takes
        whole = (count - first) // per_step * per_step
        middle = order[first : first + whole].copy()
        for start in range(0, whole, 50 * per_step):
            stretch = middle[start : start + 50 * per_step]
            stretch[:] = stretch[np.argsort(-lengths[stretch].astype(np.int64), kind="stable")]
        steps = middle.reshape(-1, per_step)
        shuffled = steps[torch.randperm(len(steps), generator=torch.Generator().manual_seed(epoch)).numpy()]
        return np.concatenate([order[:first], shuffled.reshape(-1), order[first + whole :]])

    def order_of(step: int) -> list[int]:
        positions = range((step - 1) * per_step, step * per_step)
        return [int(epoch_order(position // count)[position % count]) for position in positions]

    return order_of


def share_of(
    pairs: Sequence[TokenizedPair], indices: Sequence[int], size: int, rank: int, world_size: int
) -> list[list[TokenizedPair]]:
    """This process's batches of a step: neighbours of the order go to different processes at the same time.

    Which pairs make a step does not depend on the number of processes, as long as their global batch is the same.
    """
    starts = range(rank * size, len(indices), size * world_size)
    return [[pairs[index] for index in indices[start : start + size]] for start in starts]


def evaluation_batches(
    pairs: Sequence[TokenizedPair], size: int, rank: int, world_size: int
) -> Iterator[tuple[list[TokenizedPair], int]]:
    """This process's held-out pairs in batches, each with the number of pairs that count.

    All processes get equally many batches of equally many pairs, where necessary with a FILLER at the end: sharded
    weights are gathered by all of them together.
    """
    own = pairs[rank::world_size]
    rows = math.ceil(len(pairs) / world_size)
    first = pairs[0]
    filler = FILLER if first.rejected_ids else FILLER.chosen_only()
    filler = filler if first.weight is None else replace(filler, weight=1.0)
    for start in range(0, rows, size):
        batch = list(own[start : start + size])
        yield [*batch, *[filler] * (min(size, rows - start) - len(batch))], len(batch)


def pair_length(pair: TokenizedPair) -> int:
    """Tokens of the longer side."""
    return max(len(pair.chosen_ids), len(pair.rejected_ids))


def places(pairs: Sequence[TokenizedPair]) -> list[str]:
    """Where each pair came from."""
    return [pair.place for pair in pairs]
