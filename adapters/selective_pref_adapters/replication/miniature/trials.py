"""One run of one method in one world, from start to measurements.

In: a world, a method, a learning rate. Out: what was measured before, along the way and after. The run is a plain loop
in torch: AdamW, a short warm-up, then a constant rate, so that one run is measured at 1x and at 3x the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selective_pref import Response, alignment_scores, select
from selective_pref_adapters.replication.miniature.judging import auc, sample_answers, success_rate
from selective_pref_adapters.replication.miniature.language import is_well_formed
from selective_pref_adapters.replication.miniature.methods import RATIO, Method, Seen
from selective_pref_adapters.replication.miniature.worlds import (
    SWAPPED_LABELS,
    Texts,
    World,
    answers_of,
    dense_logps,
    of_the_tokens,
    order_of_pairs,
    take,
)

WARM_UP = 10  # steps


@dataclass(frozen=True, kw_only=True)
class Run:
    """What distinguishes runs of a method in a world.

    Attributes:
        rate: AdamW's learning rate.
        times: at which multiples of the world's steps it is measured, ascending; the last one ends it.
        swapped: the share of pairs whose labels are exchanged.
        pairs: how many pairs it trains on, from the first; None for all.
    """

    rate: float
    times: Sequence[float] = (1,)
    swapped: float = SWAPPED_LABELS
    pairs: int | None = None


def train(world: World, method: Method, run: Run, start: dict[str, float] | None = None) -> dict[str, Any]:
    """Trains the world's student and measures it.

    Args:
        world, method, run: what is run.
        start: what `measure` says of the student, where that is known; it is the same for all runs of a world.

    Returns:
        {"diverged": whether a loss was not finite (the run ends there), "measured": a record for each of `run.times`,
        and for 0}, as JSON has it.
    """
    policy, texts = world.model("student"), world.train
    teacher = world.model("teacher") if method.reads_distributions else None
    steps = [round(time * world.scale.steps) for time in run.times]
    count = min(run.pairs or len(texts), len(texts))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(world.seed)
    before = _held_out(world, world.model("student"))
    measured = [{"times": 0, **(start or measure(world, policy, before))}]
    for step, pairs in enumerate(order_of_pairs(count, steps[-1], world.seed), start=1):
        optimizer.param_groups[0]["lr"] = run.rate * min(1.0, step / WARM_UP)
        policy.train()
        loss = method.losses(_seen(policy, teacher, texts, texts.rows(pairs, run.swapped), generator)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            return {"diverged": True, "measured": measured}
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            measured.append({"times": run.times[steps.index(step)], **measure(world, policy.eval(), before)})
    return {"diverged": False, "measured": measured}


def measure_given(world: World) -> dict[str, dict[str, float]]:
    """What `measure` says of every model of a world; and, of another one than the start, "vetoed".

    That is the share of the answers' tokens of the held-out pairs that the model finds at least τ = 1 nat less likely
    than the start does: what the teacher's veto forbids if the model is the teacher.
    """
    before = _held_out(world, world.model("student"))
    found = {}
    for name, logps in world.held_out.logps.items():
        found[name] = measure(world, world.model(name), before)
        vetoed = (logps - world.held_out.logps["student"] <= -1.0) & answers_of(world.held_out.batch)
        found[name]["vetoed"] = float(vetoed.sum() / answers_of(world.held_out.batch).sum())
    return found


def measure(world: World, policy: Any, before: Tensor) -> dict[str, float]:
    """What is measured of a policy, on prompts and pairs that no run has seen.

    Args:
        world: where prompts and pairs are from.
        policy: in evaluation mode.
        before: log π of every word at the positions of the held-out pairs, under the start: [2N T V].

    Returns:
        success: share of sampled answers with all four digits right; well_formed: with the form of an answer.
        entropy: of the next word; kl: from policy to start (both in nats, means over the chosen answers' tokens that do
        not decide). accuracy: share of held-out pairs whose chosen answer has the higher log-ratio to the start.
        precision/chosen, precision/rejected: share of the tokens that Eq. 6 selects beside the strong reference that
        decide; base/…: the share of all tokens that do; auc/…: the chance that a token that decides has a higher score
        than one that does not.
    """
    texts = world.held_out
    answers = sample_answers(policy, world.tokenizer, world.prompts, world.seed)
    now = _held_out(world, policy)
    inside = answers_of(texts.batch)
    chosen = inside[: len(texts)] & ~texts.decisive[: len(texts)]
    words = now[: len(texts)][chosen]
    logps = of_the_tokens(now, texts.batch)
    ratios = (logps - texts.logps["student"]).sum(-1)
    found: dict[str, float] = {
        "success": success_rate(world.language, world.prompts, answers),
        "well_formed": sum(map(is_well_formed, answers)) / len(answers),
        "entropy": -(words.exp() * words).sum(-1).mean().item(),
        "kl": (words.exp() * (words - before[: len(texts)][chosen])).sum(-1).mean().item(),
        "accuracy": (ratios[: len(texts)] > ratios[len(texts) :]).float().mean().item(),
    }
    pair = Response.from_stacked(per_token_logps=logps, mask=inside, ref_per_token_logps=texts.logps["teacher"])
    selected = select(*pair, selection_ratio=RATIO)
    for side, scores, response, decisive in zip(
        ("chosen", "rejected"), alignment_scores(*pair), selected, texts.decisive.chunk(2), strict=True
    ):
        weights = response.token_weights
        found[f"precision/{side}"] = float((weights * decisive).sum() / weights.sum())
        found[f"base/{side}"] = float(decisive.sum() / response.mask.sum())
        found[f"auc/{side}"] = auc(scores[decisive], scores[response.mask & ~decisive])
    return found


@torch.no_grad()
def _held_out(world: World, model: Any) -> Tensor:
    return dense_logps(model, world.held_out.batch)


def _seen(policy: Any, teacher: Any, texts: Texts, rows: Tensor, generator: torch.Generator) -> Seen:
    batch = take(texts.batch, rows)
    all_logps = dense_logps(policy, batch)
    with torch.no_grad():
        distributions = None if teacher is None else dense_logps(teacher, batch)
    logps = of_the_tokens(all_logps, batch)
    return Seen(
        logps=logps,
        mask=answers_of(batch),
        given={name: given[rows] for name, given in texts.logps.items()},
        decisive=texts.decisive[rows],
        all_logps=all_logps,
        teacher_logps=distributions,
        noise=torch.rand(logps.shape, generator=generator),
    )
