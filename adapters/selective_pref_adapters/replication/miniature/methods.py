"""The methods that are compared: each a loss of what a step sees, in the vocabulary of the core.

In: log-probs of the policy and of the world's models for the tokens of a batch. Out: losses [B]. A method is a row of a
table; its learning rate is tuned for it like for every other, and is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from selective_pref import (
    Response,
    VetoSides,
    alignment_scores,
    dpo_loss,
    select,
    selective_dpo_loss,
    sft_loss,
    simpo_loss,
    teacher_veto_loss,
)

BETA, RATIO = 0.01, 0.4
"""The paper's."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a step sees of its B pairs.

    Attributes:
        logps: the policy's log-probs of the tokens [2B T], with a gradient.
        mask: which are tokens of an answer, bool [2B T].
        given: the same log-probs of "student", "weak", "teacher" and "stranger", constants.
        decisive: which tokens decide, bool [2B T].
        all_logps: log π of every word at every position [2B T V], with a gradient.
        teacher_logps: the strong reference's [2B T V]; None for methods that do not read it.
        noise: uniform numbers of this step [2B T].
    """

    logps: Tensor
    mask: Tensor
    given: dict[str, Tensor]
    decisive: Tensor
    all_logps: Tensor
    teacher_logps: Tensor | None
    noise: Tensor

    def pair(self, reference: str | None = None) -> tuple[Response, Response]:
        """(chosen, rejected) beside a reference of the world."""
        given = None if reference is None else self.given[reference]
        return Response.from_stacked(per_token_logps=self.logps, mask=self.mask, ref_per_token_logps=given)


Losses: TypeAlias = Callable[[Seen], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row.

    Attributes:
        key: its name in files.
        title: its name in tables.
        losses: from what a step sees to losses [B].
        reads_distributions: whether it needs every word's log-prob of the strong reference, at every step.
    """

    key: str
    title: str
    losses: Losses
    reads_distributions: bool = False


def dpo(reference: str, beta: float = BETA) -> Losses:
    """Every token; the reference weighs the pairs alone."""
    return lambda seen: dpo_loss(*seen.pair(reference), beta=beta).losses


def selective(reference: str, ratio: float | tuple[float, float] = RATIO, beta: float = BETA) -> Losses:
    """Selective-DPO, Eq. 7."""
    return lambda seen: selective_dpo_loss(*seen.pair(reference), beta=beta, selection_ratio=ratio).losses


def above(threshold: float, *, moving: bool = False) -> Losses:
    """Every token whose score beside the strong reference T is above a threshold, without a share.

    `moving` adds to the score T − π, which moves with the policy, the fixed one, T − S with S the start (both with the
    sign of the side).
    """

    def losses(seen: Seen) -> Tensor:
        pair = seen.pair("teacher")
        scores = alignment_scores(*pair)
        if moving:
            start = Response.from_stacked(
                per_token_logps=seen.given["student"], mask=seen.mask, ref_per_token_logps=seen.given["teacher"]
            )
            fixed = alignment_scores(*start)
            scores = (scores[0] + fixed[0], scores[1] + fixed[1])
        kept = select(*pair, selection_ratio=1, scores=scores, min_score=threshold)
        return dpo_loss(*kept, beta=BETA).losses

    return losses


def scored_by(scores: Callable[[Seen, tuple[Response, Response]], tuple[Tensor, Tensor]]) -> Losses:
    """Selective-DPO beside the strong reference, with tokens chosen by other scores than Eq. 6."""

    def losses(seen: Seen) -> Tensor:
        pair = seen.pair("teacher")
        return selective_dpo_loss(*pair, beta=BETA, selection_ratio=RATIO, scores=scores(seen, pair)).losses

    return losses


def _random(seen: Seen, _: tuple[Response, Response]) -> tuple[Tensor, Tensor]:
    chosen, rejected = seen.noise.chunk(2)
    return chosen, rejected


def _wrong_way(_: Seen, pair: tuple[Response, Response]) -> tuple[Tensor, Tensor]:
    chosen, rejected = alignment_scores(*pair)
    return -chosen, -rejected


def oracle(seen: Seen) -> Tensor:
    """DPO of the decisive tokens alone, which nobody knows outside of a made-up language."""
    sides = (
        replace(side, weights=decisive.to(seen.logps.dtype))
        for side, decisive in zip(seen.pair("teacher"), seen.decisive.chunk(2), strict=True)
    )
    return dpo_loss(*sides, beta=BETA).losses


def distillation(temperature: float) -> Losses:
    """KL from the strong reference's distribution, at a temperature, to the policy's: summed over both answers."""

    def losses(seen: Seen) -> Tensor:
        if seen.teacher_logps is None:
            raise ValueError("distillation reads the distributions of the strong reference")
        teacher = (seen.teacher_logps / temperature).log_softmax(-1)
        per_token = (teacher.exp() * (teacher - seen.all_logps)).sum(-1)
        return torch.where(seen.mask, per_token, 0.0).sum(-1).unflatten(0, (2, -1)).sum(0)

    return losses


def veto(floor: float = 2.0, sides: VetoSides = "both", teacher: str = "teacher") -> Losses:
    """The teacher's veto, with τ = 1 nat."""

    def losses(seen: Seen) -> Tensor:
        chosen, rejected = seen.given["student"].chunk(2)
        pair = seen.pair(teacher)
        return teacher_veto_loss(*pair, start_per_token_logps=(chosen, rejected), floor=floor, sides=sides).losses

    return losses


DPO = Method(key="dpo", title="DPO", losses=dpo("student"))
SELECTIVE = Method(key="selective_strong", title="Selective-DPO, strong reference", losses=selective("teacher"))
TABLE_1 = (
    DPO,
    Method(key="distilled_dpo", title="distilled DPO", losses=dpo("teacher")),
    Method(key="simpo", title="SimPO", losses=lambda seen: simpo_loss(*seen.pair(), beta=2.0, gamma=1.0).losses),
    Method(key="selective_weak", title="Selective-DPO, weak reference", losses=selective("weak")),
    SELECTIVE,
)
CONTROLS = (
    Method(key="selective_own", title="Selective-DPO, own start as reference", losses=selective("student")),
    Method(key="random", title="40 % at random", losses=scored_by(_random)),
    Method(key="wrong_way", title="the 40 % with the lowest score", losses=scored_by(_wrong_way)),
    Method(key="oracle", title="the tokens that decide", losses=oracle),
    Method(key="sft", title="SFT on the chosen side", losses=lambda seen: sft_loss(*seen.pair()).losses),
    Method(key="distillation", title="full distillation", losses=distillation(1.0), reads_distributions=True),
    Method(
        key="distillation_sharp",
        title="full distillation, temperature 0.7",
        losses=distillation(0.7),
        reads_distributions=True,
    ),
)
BEYOND = (
    Method(key="above_0", title="score above 0, no share", losses=above(0.0)),
    Method(key="two_ratios", title="40 % of the chosen, 10 % of the rejected", losses=selective("teacher", (0.4, 0.1))),
    Method(key="fixed_and_moving", title="(T − π) + (T − S) above 0.1", losses=above(0.1, moving=True)),
    Method(key="veto", title="teacher's veto", losses=veto()),
    Method(key="veto_5", title="teacher's veto, floor 5", losses=veto(floor=5.0)),
    Method(key="veto_labelled", title="teacher's veto, by label", losses=veto(sides="labelled")),
)
RATIOS = tuple(
    replace(SELECTIVE, title="40 %")
    if percent == 100 * RATIO
    else Method(key=f"ratio_{percent}", title=f"{percent} %", losses=selective("teacher", percent / 100))
    for percent in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
)
BETAS = (
    replace(DPO, title=f"DPO, β = {BETA:g}"),
    replace(SELECTIVE, title=f"Selective-DPO, β = {BETA:g}"),
    *(
        Method(key=f"{name}_beta_{beta:g}", title=f"{title}, β = {beta:g}", losses=losses(beta))
        for beta in (0.1, 1.0, 10.0)
        for name, title, losses in (
            ("dpo", "DPO", lambda beta: dpo("student", beta)),
            ("selective", "Selective-DPO", lambda beta: selective("teacher", beta=beta)),
        )
    ),
)
STRANGER = (
    Method(key="selective_stranger", title="Selective-DPO, teacher of another style", losses=selective("stranger")),
    Method(key="veto_stranger", title="teacher's veto, teacher of another style", losses=veto(teacher="stranger")),
)
_ALL = (*TABLE_1, *CONTROLS, *BEYOND, *RATIOS, *BETAS, *STRANGER)
METHODS = {key: next(one for one in _ALL if one.key == key) for key in dict.fromkeys(one.key for one in _ALL)}
"""By their keys; a method that stands in two tables has its title in the first one."""

GIVEN = {
    "student": "SFT: the start",
    "weak": "weak reference: the start after DPO",
    "teacher": "strong reference",
    "stranger": "teacher of another style",
}
"""The models of a world, by their keys: rows without a run."""
