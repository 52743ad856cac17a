"""A method's name and numbers → an objective; a batch's log-probs → its losses. What all adapters do alike.

In: options as a configuration names them, and per-token log-probs [2B T] of a batch. Out: an `Objective`, any callable
(chosen, rejected) → PreferenceLoss, and what it says of the batch. This is the edge where a name becomes a callable:
there are no names of losses further in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from selective_pref import (
    Objective,
    Pool,
    PreferenceLoss,
    Ties,
    alignment_scores,
    dpo_loss,
    selective_dpo_loss,
    sft_loss,
    simpo_loss,
)
from selective_pref_adapters.batch import Batch, responses

NEEDS_REFERENCE = ("selective_dpo", "dpo")
"""Objectives that compare the policy with a reference; the others read none."""


def make_objective(
    name: str,
    *,
    beta: float,
    selection_ratio: float = 1.0,
    selection_pool: Pool = "response",
    selection_ties: Ties = "share",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> Objective:
    """The loss that a configuration names, with its numbers bound; those it does not read are ignored here.

    Args:
        name: "selective_dpo", "dpo", "simpo" or "sft". Distilled DPO is "dpo" with a stronger reference.
        beta, selection_ratio, selection_pool, selection_ties, gamma, label_smoothing: as in `selective_pref`.

    Raises:
        ValueError: an unknown name. The numbers are checked when the objective is called: see `check_objective`.
    """
    objectives: dict[str, Objective] = {
        "selective_dpo": partial(
            selective_dpo_loss,
            beta=beta,
            selection_ratio=selection_ratio,
            pool=selection_pool,
            ties=selection_ties,
            label_smoothing=label_smoothing,
        ),
        "dpo": partial(dpo_loss, beta=beta, label_smoothing=label_smoothing),
        "simpo": partial(simpo_loss, beta=beta, gamma=gamma, label_smoothing=label_smoothing),
        "sft": sft_loss,
    }
    if name not in objectives:
        raise ValueError(f"objective must be one of {sorted(objectives)}; got {name!r}")
    return objectives[name]


def check_objective(objective: Objective, *, reference: bool = True) -> PreferenceLoss:
    """Calls `objective` on a pair of one token, so that an option out of range raises before anything is loaded."""
    one = torch.zeros(2, 1)
    return objective(*responses({"completion_mask": torch.ones(2, 2)}, one, one if reference else None))


def needs_reference(objective: Objective) -> bool:
    """Whether an objective fails without reference log-probs; it must not fail with them."""
    check_objective(objective)
    try:
        check_objective(objective, reference=False)
    except (ValueError, TypeError, AttributeError):
        return True
    return False


ROUNDING_ULPS = 128
"""How many units in the last place a log-prob may move when the same model reads the same tokens in another batch.

Measured in float32: up to 25 between a row alone and the same row in a batch (models of 0.26 and 10 million
parameters, two processors). 128 of them are 1.5e-5 nats at a log-prob of 1, and 1.5e-4 at 10.
"""


def without_rounding(ref_per_token_logps: Tensor, per_token_logps: Tensor) -> Tensor:
    """The reference's log-probs, with the policy's own value where the two differ by rounding alone: [2B T].

    A stored log-prob was computed in another batch, perhaps on another processor. Where policy and reference are one
    model, what is left of their difference is rounding, and selection (Eq. 6) would keep the tokens with the luckiest
    last bits. So differences of up to `ROUNDING_ULPS` · ε · max(1, |log π|) are ties, ε being the coarser of the two
    dtypes' machine epsilons. What is NaN or infinite stays as it is.

    Args:
        ref_per_token_logps: the reference's [2B T].
        per_token_logps: the policy's [2B T]; no gradient flows through it here.
    """
    policy = per_token_logps.detach()
    epsilon = max(torch.finfo(policy.dtype).eps, torch.finfo(ref_per_token_logps.dtype).eps)
    rounding = ROUNDING_ULPS * epsilon * policy.abs().clamp(min=1)
    same = (ref_per_token_logps - policy).abs() <= rounding
    return torch.where(same, policy.to(ref_per_token_logps.dtype), ref_per_token_logps)


def loss_of_batch(
    objective: Objective,
    batch: Batch,
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor | None = None,
    scoring_ref_per_token_logps: Tensor | None = None,
) -> PreferenceLoss:
    """What `objective` says of a batch: the last arrows of every adapter.

    Args:
        objective: with a scoring reference it must take `scores=`, as `selective_dpo_loss` does.
        batch: in the trainers' layout, chosen rows first.
        per_token_logps: the policy's [2B T].
        ref_per_token_logps: of the reference that anchors the reward [2B T], or None for losses without one.
        scoring_ref_per_token_logps: of the reference that scores the tokens (Eq. 6) [2B T], where it is another.
    """
    if ref_per_token_logps is not None:
        ref_per_token_logps = without_rounding(ref_per_token_logps, per_token_logps)
    chosen, rejected = responses(batch, per_token_logps, ref_per_token_logps)
    if scoring_ref_per_token_logps is None:
        return objective(chosen, rejected)
    scoring = without_rounding(scoring_ref_per_token_logps, per_token_logps)
    scores = alignment_scores(*responses(batch, per_token_logps, scoring))
    return objective(chosen, rejected, scores=scores)  # type: ignore[call-arg]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A number that moves from `start` to `end` over `steps` optimiser steps and then stays: a ratio, or β.

    ``Schedule(start=1.0, end=0.4, steps=100)`` is a warm-up from DPO to Selective-DPO.

    Attributes:
        start: the value at step 0.
        end: the value from step `steps` on.
        steps: how long it takes; 0 for `end` from the beginning.
        shape: "linear", "cosine" (slow at both ends) or "constant" (`start` until `steps`, then `end`).
    """

    start: float
    end: float
    steps: int = 0
    shape: Literal["linear", "cosine", "constant"] = "linear"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps of a schedule must be at least 0; got {self.steps}")
        if self.shape not in ("linear", "cosine", "constant"):
            raise ValueError(f"shape of a schedule must be 'linear', 'cosine' or 'constant'; got {self.shape!r}")

    def __call__(self, step: int) -> float:
        """The value at optimiser step `step`, to six decimals (a ratio is read as the decimal it prints as)."""
        if step >= self.steps:
            return self.end
        if self.shape == "constant":
            return self.start
        done = step / self.steps
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return round(self.start + (self.end - self.start) * done, 6)
