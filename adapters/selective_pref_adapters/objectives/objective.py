"""A method's name and numbers → an objective; a batch's log-probs → its losses. What all adapters do alike.

In: options as a configuration names them, and per-token log-probs [2B T] of a batch. Out: an `Objective`, any callable
(chosen, rejected) → PreferenceLoss, and what it says of the batch. This is the edge where a name becomes a callable:
there are no names of losses further in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from selective_pref import (
    Objective,
    PreferenceLoss,
    Response,
    ScoreFunction,
    SelectionRatio,
    alignment_scores,
    combine_losses,
    select,
    sft_loss,
    simpo_loss,
    weigh_pairs,
)
from selective_pref_adapters.batch import Batch, responses
from selective_pref_adapters.objectives.named_losses import NamedLoss, check_name, unread_numbers
from selective_pref_adapters.objectives.veto import TeacherVeto
from selective_pref_adapters.options import UNREAD, LossOptions, SelectionOptions

CHOSEN_ONLY = ("sft",)
"""Objectives that read the chosen side alone: no rejected one is computed, or needed."""


def make_objective(name: str, **numbers: Any) -> Objective:
    """The loss that a configuration names, with its numbers bound; those it does not read are ignored here.

    Args:
        name: "selective_dpo", "dpo", "simpo", "sft" or "teacher_veto". Distilled DPO is "dpo" with a stronger
            reference.
        numbers: fields of `LossOptions` that are not to have their defaults.

    Raises:
        ValueError: an unknown name, of the objective or of a loss. Numbers are checked when the objective is called:
            see `check_objective`.
    """
    check_name("objective", name, UNREAD)
    options = LossOptions(**numbers)
    losses: dict[str, Callable[[], Objective]] = {
        "selective_dpo": lambda: selective_objective(options, pair_loss(options)),
        "dpo": lambda: pair_loss(options),
        "simpo": lambda: partial(
            simpo_loss, beta=options.beta, gamma=options.gamma, label_smoothing=options.label_smoothing
        ),
        "sft": lambda: sft_loss,
        "teacher_veto": lambda: TeacherVeto(options.veto_threshold, options.veto_floor, options.veto_sides),
    }
    made = losses[name]()
    return made if options.sft_weight == 0 or name in ("selective_dpo", "sft") else WithSft(made, options.sft_weight)


def pair_loss(options: LossOptions) -> NamedLoss:
    """The sum of losses that `loss_type` names, of all tokens."""
    numbers = {option.name: getattr(options, option.name) for option in fields(NamedLoss)}
    return NamedLoss(**{**numbers, "loss_type": as_names(options.loss_type)})


def unread(name: str, loss_type: str | Sequence[str], f_divergence_type: str) -> list[str]:
    """The fields of `LossOptions` that an objective, with these losses, does not read: setting one is an error."""
    if name not in ("selective_dpo", "dpo"):
        return list(UNREAD[name])
    return [*UNREAD[name], *unread_numbers(as_names(loss_type), f_divergence_type)]


def as_names(loss_type: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)


def selective_objective(
    options: SelectionOptions,
    loss: Objective,
    *,
    selection_ratio: SelectionRatio | None = None,
    scores: ScoreFunction | None = None,
) -> Objective:
    """`loss` of the tokens that the options select, and their supervised term.

    Args:
        options: ratio, pool, ties, threshold, `sft_weight`.
        loss: any objective that honours token weights.
        selection_ratio: in place of the options', at a step of a warm-up.
        scores: what tokens are selected by; None for the alignment score.
    """
    selection: dict[str, Any] = {
        "selection_ratio": options.selection_ratio if selection_ratio is None else selection_ratio,
        "pool": options.selection_pool,
        "ties": options.selection_ties,
        "min_score": options.min_score,
        "scores": scores,
    }
    made = Selective(loss, selection)
    return made if options.sft_weight == 0 else WithSft(made, options.sft_weight)


@dataclass(frozen=True)
class Selective:
    """An objective of the selected tokens: ``loss(*select(chosen, rejected, **selection))``."""

    loss: Objective
    selection: Mapping[str, Any]

    def __call__(self, chosen: Response, rejected: Response, **scores: Any) -> PreferenceLoss:
        """The losses of a batch of pairs; `scores=` takes the place of the selection's own."""
        return self.loss(*select(chosen, rejected, **{**self.selection, **scores}))


@dataclass(frozen=True)
class WithSft:
    """An objective and, `weight` times, the supervised loss of the whole chosen response (RPO, Pang et al. 2024)."""

    loss: Callable[..., PreferenceLoss]
    weight: float

    def __call__(self, chosen: Response, rejected: Response, **scores: Any) -> PreferenceLoss:
        """The losses of a batch of pairs."""
        supervised = sft_loss(replace(chosen, weights=None), replace(rejected, weights=None))
        return combine_losses((1.0, self.loss(chosen, rejected, **scores)), (self.weight, supervised))


def selects(selection_ratio: SelectionRatio, min_score: float | None = None) -> bool:
    """Whether some tokens may be left out."""
    several = isinstance(selection_ratio, (tuple, list))
    return min_score is not None or any(ratio < 1 for ratio in (selection_ratio if several else [selection_ratio]))


def check_objective(objective: Objective, *, reference: bool = True) -> PreferenceLoss:
    """Calls `objective` on a pair of one token, so that an option out of range raises before anything is loaded."""
    one = torch.zeros(2, 1)
    sides = responses({"completion_mask": torch.ones(2, 2)}, one, one if reference else None)
    return objective(*sides, start=(one[:1], one[1:])) if isinstance(objective, TeacherVeto) else objective(*sides)


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
    *,
    pair_weights: Tensor | None = None,
    chosen_only: bool = False,
    pairs: Tensor | None = None,
) -> PreferenceLoss:
    """What `objective` says of a batch: the last arrows of every adapter.

    Args:
        objective: with a scoring reference it must take `scores=`, as `selective_dpo_loss` does.
        batch: in the trainers' layout, chosen rows first.
        per_token_logps: the policy's [2B T].
        ref_per_token_logps: of the reference that anchors the reward [2B T], or None for losses without one.
        scoring_ref_per_token_logps: of the reference that scores the tokens (Eq. 6) [2B T], where it is another; for
            `TeacherVeto`, of the policy's own start.
        pair_weights: what the losses are multiplied by [B], at least 0; None for 1. They are not made to have a mean
            of 1: a pair counts for the same whatever other pairs are in its batch.
        chosen_only: the batch has no rejected rows, and all arrays are [B T]; see `responses`.
        pairs: which pairs are read, bool [B] on the CPU; the losses are theirs alone. None, or none of them: all.
    """
    if pairs is not None and pairs.any() and not pairs.all():
        rows = pairs if chosen_only else pairs.repeat(2)
        batch = {"completion_mask": batch["completion_mask"][rows]}
        per_token_logps, ref_per_token_logps, scoring_ref_per_token_logps = (
            some if some is None else some[rows]
            for some in (per_token_logps, ref_per_token_logps, scoring_ref_per_token_logps)
        )
        pair_weights = None if pair_weights is None else pair_weights[pairs]
    if ref_per_token_logps is not None:
        ref_per_token_logps = without_rounding(ref_per_token_logps, per_token_logps)
    chosen, rejected = responses(batch, per_token_logps, ref_per_token_logps, chosen_only=chosen_only)
    if isinstance(objective, TeacherVeto):
        start = scoring_ref_per_token_logps
        out = objective(chosen, rejected, start=None if start is None else tuple(start.chunk(2)))
    elif scoring_ref_per_token_logps is None:
        out = objective(chosen, rejected)
    else:
        scoring = without_rounding(scoring_ref_per_token_logps, per_token_logps)
        scores = alignment_scores(*responses(batch, per_token_logps, scoring, chosen_only=chosen_only))
        out = objective(chosen, rejected, scores=scores)  # type: ignore[call-arg]
    return out if pair_weights is None else weigh_pairs(out, pair_weights, total=float(len(pair_weights)))


def logged_numbers(name: str, value: Any) -> dict[str, float]:
    """A number under its name; a pair of them, a ratio for each side, under two."""
    if not isinstance(value, (tuple, list)):
        return {name: value}
    return dict(zip((f"{name}/chosen", f"{name}/rejected"), value, strict=True))


def policy_weights(per_token_logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """WPO's weights [B]: how likely the policy finds a pair, compared with its own samples (Zhou et al. 2024, Eq. 2).

    exp of the mean over a response's tokens of log π(y_t) − log Σ_v π(v)², chosen times rejected; constants.

    Args:
        per_token_logps: the policy's [2B T].
        log_sum_sq_probs: of the same logits [2B T], see `LogitStatistics`.
        mask: which tokens count, bool [2B T].
    """
    ratios = torch.where(mask, per_token_logps.detach() - log_sum_sq_probs.detach(), 0.0)
    chosen, rejected = (ratios.sum(-1) / mask.sum(-1).clamp(min=1)).exp().chunk(2)
    return chosen * rejected


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
