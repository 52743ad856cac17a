"""What the numbers must be: loops over Python floats, written from the paper and sharing no code with the library.

A batch is two sides of rectangular lists [B][T]. Cells off the mask hold anything and are never looked at. Weights come
back as lists of the same shape, 0.0 off the mask.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

Rows = list[list[float]]


class Side(NamedTuple):
    """Log-probs of the policy and of the reference, and the mask, [B][T] each."""

    policy: Rows
    ref: Rows
    mask: list[list[bool]]


class Batch(NamedTuple):
    """B pairs."""

    chosen: Side
    rejected: Side


def keep_count(ratio: object, tokens: int) -> int:
    """K = ceil(ratio · n), the ratio read as the decimal it prints as."""
    return math.ceil(Fraction(Decimal(str(ratio))) * tokens)


def alignment_scores(batch: Batch) -> tuple[Rows, Rows]:
    """Eq. 6: ref − policy of the chosen tokens, policy − ref of the rejected ones."""
    return _differences(batch.chosen, +1), _differences(batch.rejected, -1)


def excess_loss_scores(batch: Batch) -> tuple[Rows, Rows]:
    """Rho-1: ref − policy on both sides."""
    return _differences(batch.chosen, +1), _differences(batch.rejected, +1)


def _differences(side: Side, sign: int) -> Rows:
    return [
        [sign * (ref - policy) if here else 0.0 for policy, ref, here in zip(*row, strict=True)]
        for row in zip(side.policy, side.ref, side.mask, strict=True)
    ]


def top_weights(scores: list[float], ratio: object, ties: str) -> list[float]:
    """Weights of one pool, from the scores of its n tokens: each token asks who stands before it."""
    keep = keep_count(ratio, len(scores))
    weights = []
    for place, score in enumerate(scores):
        higher = sum(other > score for other in scores)
        equal = sum(other == score for other in scores)
        earlier = sum(other == score for other in scores[:place])
        if ties == "share":
            weights.append(min(1.0, max(0.0, (keep - higher) / equal)))
        elif ties == "first":
            weights.append(float(higher + earlier < keep))
        elif ties == "all":
            weights.append(float(higher < keep))
        else:
            raise ValueError(ties)
    return weights


def quantile_rule(scores: list[float], ratio: object) -> list[float]:
    """The released rule: score ≥ quantile(1 − ratio), linear interpolation, in exact arithmetic."""
    ordered = sorted(Fraction(score) for score in scores)
    if not ordered:
        return []
    position = (1 - Fraction(Decimal(str(ratio)))) * (len(ordered) - 1)
    low = math.floor(position)
    high = math.ceil(position)
    threshold = ordered[low] + (position - low) * (ordered[high] - ordered[low])
    return [float(Fraction(score) >= threshold) for score in scores]


def select(
    batch: Batch, ratio: object, pool: str = "response", ties: str = "share", scores: tuple[Rows, Rows] | None = None
) -> tuple[Rows, Rows]:
    """Weights of both sides, with the alignment score unless others are given."""
    scores = scores or alignment_scores(batch)
    weights = tuple([[0.0] * len(row) for row in side.mask] for side in batch)
    cells = [
        (number, row, column)
        for row in range(len(batch.chosen.mask))
        for number, side in enumerate(batch)
        for column, here in enumerate(side.mask[row])
        if here
    ]
    pools: dict[object, list[tuple[int, int, int]]] = {}
    for number, row, column in cells:
        key = {"response": (number, row), "pair": row, "batch": None}[pool]
        pools.setdefault(key, []).append((number, row, column))
    for members in pools.values():
        chosen_for = top_weights([scores[n][r][c] for n, r, c in members], ratio, ties)
        for (n, r, c), weight in zip(members, chosen_for, strict=True):
            weights[n][r][c] = weight
    return weights


def full(batch: Batch) -> tuple[Rows, Rows]:
    """Weight 1 for every token that counts."""
    return tuple([[float(here) for here in row] for row in side.mask] for side in batch)


def summed_log_ratio(side: Side, weights: Rows) -> list[float]:
    """Eq. 8: Σ weight · (policy − ref) over the tokens that count."""
    return [
        math.fsum(w * (p - q) for p, q, here, w in zip(*row, strict=True) if here)
        for row in zip(side.policy, side.ref, side.mask, weights, strict=True)
    ]


def mean_logp(side: Side, weights: Rows) -> list[float]:
    """Weighted mean of the policy's log-probs; 0 where nothing has weight."""
    means = []
    for policy, mask, row in zip(side.policy, side.mask, weights, strict=True):
        total = math.fsum(w for here, w in zip(mask, row, strict=True) if here)
        value = math.fsum(w * p for p, here, w in zip(policy, mask, row, strict=True) if here)
        means.append(value / total if total else 0.0)
    return means


def sigmoid(x: float) -> float:
    """1 / (1 + e^−x)."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def margins(family: str, batch: Batch, weights: tuple[Rows, Rows], beta: float, gamma: float) -> list[float]:
    """What σ is applied to: β(R(y_w) − R(y_l)) of Eq. 7, or SimPO's β·Δ − γ."""
    reward, gamma = (summed_log_ratio, 0.0) if family == "dpo" else (mean_logp, gamma)
    pairs = zip(reward(batch.chosen, weights[0]), reward(batch.rejected, weights[1]), strict=True)
    return [beta * (chosen - rejected) - gamma for chosen, rejected in pairs]


def losses(
    family: str,
    batch: Batch,
    weights: tuple[Rows, Rows],
    *,
    beta: float = 1.0,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> list[float]:
    """One loss per pair: "dpo" (Eq. 4 and 7), "simpo" or "sft"."""
    if family == "sft":
        return [-mean for mean in mean_logp(batch.chosen, weights[0])]
    return [
        (1 - label_smoothing) * softplus(-m) + label_smoothing * softplus(m)
        for m in margins(family, batch, weights, beta, gamma)
    ]


def gradients(
    family: str,
    batch: Batch,
    weights: tuple[Rows, Rows],
    *,
    beta: float = 1.0,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Rows, Rows]:
    """d(sum of losses) / d(policy log-probs) of both sides, by hand."""
    rows = len(batch.chosen.mask)
    if family == "sft":
        slopes = [-1.0] * rows  # d loss / d mean log-prob of the chosen side
        signs = (1, 0)
    else:
        slopes = [
            beta * (label_smoothing * sigmoid(m) - (1 - label_smoothing) * sigmoid(-m))
            for m in margins(family, batch, weights, beta, gamma)
        ]
        signs = (1, -1)
    both = []
    for side, side_weights, sign in zip(batch, weights, signs, strict=True):
        grads = []
        for mask, row, slope in zip(side.mask, side_weights, slopes, strict=True):
            share = 1.0
            if family != "dpo":
                share = math.fsum(w for here, w in zip(mask, row, strict=True) if here) or 1.0
            grads.append([sign * slope * w / share if here else 0.0 for here, w in zip(mask, row, strict=True)])
        both.append(grads)
    return both[0], both[1]


def log_softmax(logits: list[float]) -> list[float]:
    """Log-probs of one position's logits."""
    peak = max(logits)
    normaliser = peak + math.log(math.fsum(math.exp(x - peak) for x in logits))
    return [x - normaliser for x in logits]
