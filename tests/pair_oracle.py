"""What the pair losses must be: value and slopes of one pair, in Python floats, written from the papers.

Like `oracle`, whose rewards they are given, these share no code with the library. β is in the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import oracle
from oracle import Batch, Rows, sigmoid, softplus

SMOOTHING, EXO_SMOOTHING, DELTA, TAU, ALPHA = 0.1, 1e-3, 0.3, 0.05, 0.5


class Value(NamedTuple):
    """A loss, and its derivatives with respect to the chosen and the rejected reward (without β)."""

    loss: float
    chosen: float
    rejected: float


def _of_margin(loss: Callable[[float], float], slope: Callable[[float], float]) -> Callable[..., Value]:
    """A loss of m = β(ρ_w − ρ_l) alone."""

    def value(chosen: float, rejected: float, beta: float) -> Value:
        m = beta * (chosen - rejected)
        return Value(loss(m), beta * slope(m), -beta * slope(m))

    return value


def _smoothed(m: float, e: float = SMOOTHING) -> float:
    return (1 - e) * softplus(-m) + e * softplus(m)


def _smoothed_slope(m: float, e: float = SMOOTHING) -> float:
    return e * sigmoid(m) - (1 - e) * sigmoid(-m)


def _robust(m: float, e: float = SMOOTHING) -> float:
    return ((1 - e) * softplus(-m) - e * softplus(m)) / (1 - 2 * e)


def _robust_slope(m: float, e: float = SMOOTHING) -> float:
    return -((1 - e) * sigmoid(-m) + e * sigmoid(m)) / (1 - 2 * e)


def _exo(m: float, e: float = EXO_SMOOTHING) -> float:
    q = sigmoid(m), sigmoid(-m)
    return q[0] * (-softplus(-m) - math.log(1 - e)) + q[1] * (-softplus(m) - math.log(e))


def _exo_slope(m: float, e: float = EXO_SMOOTHING) -> float:
    return sigmoid(m) * sigmoid(-m) * (m - math.log((1 - e) / e))


def _discopop(m: float) -> float:
    blend = sigmoid(m / TAU)
    return (1 - blend) * softplus(-m) + (blend * math.exp(-m) if blend else 0.0)


def _discopop_slope(m: float) -> float:
    blend = sigmoid(m / TAU)
    moving = blend * (1 - blend) / TAU * (math.exp(-m) - softplus(-m)) if blend else 0.0
    return moving - (1 - blend) * sigmoid(-m) - (blend * math.exp(-m) if blend else 0.0)


def _ipo(w: float, r: float, beta: float) -> Value:
    off = w - r - 1 / (2 * beta)
    return Value(off**2, 2 * off, -2 * off)


def _nca(w: float, r: float, beta: float) -> Value:
    w, r = beta * w, beta * r
    loss = softplus(-w) + softplus(w) / 2 + softplus(r) / 2
    return Value(loss, beta * (sigmoid(w) / 2 - sigmoid(-w)), beta * sigmoid(r) / 2)


def _bco(w: float, r: float, beta: float) -> Value:
    w, r = beta * w - DELTA, beta * r - DELTA
    return Value(softplus(-w) + softplus(r), -beta * sigmoid(-w), beta * sigmoid(r))


def _sppo(w: float, r: float, beta: float) -> Value:
    w, r = w - 1 / (2 * beta), r + 1 / (2 * beta)
    return Value(w**2 + r**2, 2 * w, 2 * r)


def _slope_of_sigmoid(x: float) -> float:
    return sigmoid(x) * sigmoid(-x)


def _apo_zero(w: float, r: float, beta: float) -> Value:
    w, r = beta * w, beta * r
    return Value(1 - sigmoid(w) + sigmoid(r), -beta * _slope_of_sigmoid(w), beta * _slope_of_sigmoid(r))


def _apo_down(w: float, r: float, beta: float) -> Value:
    w, r = beta * w, beta * r
    away = beta * _slope_of_sigmoid(w - r)
    return Value(sigmoid(w) + 1 - sigmoid(w - r), beta * _slope_of_sigmoid(w) - away, away)


SIGMOID = _of_margin(lambda m: softplus(-m), lambda m: -sigmoid(-m))
OF_ONE_PAIR: dict[str, Callable[..., Value]] = {
    "sigmoid": SIGMOID,
    "sigmoid_smoothed": _of_margin(_smoothed, _smoothed_slope),
    "sigmoid_norm": SIGMOID,
    "hinge": _of_margin(lambda m: max(0.0, 1 - m), lambda m: -1.0 if m < 1 else 0.0),
    "ipo": _ipo,
    "robust": _of_margin(_robust, _robust_slope),
    "exo_pair": _of_margin(_exo, _exo_slope),
    "nca_pair": _nca,
    "bco_pair": _bco,
    "sppo_hard": _sppo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _of_margin(_discopop, _discopop_slope),
    "forward_kl": SIGMOID,
    "js_divergence": SIGMOID,
    "alpha_divergence": SIGMOID,
}
DIVERGENCES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {  # f′(e^x), and its slope in x
    "forward_kl": (lambda x: 1 - math.exp(-x), lambda x: math.exp(-x)),
    "js_divergence": (lambda x: math.log(2) - softplus(-x), lambda x: sigmoid(-x)),
    "alpha_divergence": (
        lambda x: (math.exp((ALPHA - 1) * x) - 1) / (ALPHA - 1),
        lambda x: math.exp((ALPHA - 1) * x),
    ),
}
MEAN = ("ipo", "sigmoid_norm")


def values(name: str, batch: Batch, weights: tuple[Rows, Rows], beta: float) -> tuple[list[float], Rows, Rows]:
    """Losses [B], and the gradient of their sum with respect to the policy's log-probs of both sides."""
    sides = list(zip(batch, weights, strict=True))
    tokens = [[math.fsum(row) for row in side_weights] for side_weights in weights]
    if name in ("sft", "token_sft"):
        losses, slopes = _supervised(name, batch, weights)
        per_token = [[-1.0 / n if n else 0.0 for n in tokens[0]], [0.0] * len(losses)]
        if name == "token_sft":
            per_token[0] = slopes
        return losses, *_spread(weights, per_token)
    rewards = [oracle.summed_log_ratio(*side) for side in sides]
    inner = [[1.0] * len(side) for side in rewards]  # d reward / d sum of the log-ratios
    if name in DIVERGENCES:
        transform, slope = DIVERGENCES[name]
        inner = [[slope(x) for x in side] for side in rewards]
        rewards = [[transform(x) for x in side] for side in rewards]
    if name in MEAN:
        inner = [[1 / n if n else 1.0 for n in side] for side in tokens]
        rewards = [[x * d for x, d in zip(*both, strict=True)] for both in zip(rewards, inner, strict=True)]
    if name in ("aot", "aot_unpaired"):
        losses, *outer = _of_ranks(name, batch, weights, rewards, beta)
    else:
        found = [OF_ONE_PAIR[name](w, r, beta) for w, r in zip(*rewards, strict=True)]
        losses, *outer = (list(column) for column in zip(*found, strict=True))
    return losses, *_spread(weights, [[a * b for a, b in zip(*x, strict=True)] for x in zip(outer, inner, strict=True)])


def _spread(weights: tuple[Rows, Rows], slopes: list[list[float]]) -> list[Rows]:
    """d loss / d log-prob = d loss / d reward · weight."""
    return [
        [[slope * w for w in row] for row, slope in zip(rows, side, strict=True)]
        for rows, side in zip(weights, slopes, strict=True)
    ]


def _supervised(name: str, batch: Batch, weights: tuple[Rows, Rows]) -> tuple[list[float], list[float]]:
    if name == "sft":
        return [-mean for mean in oracle.mean_logp(batch.chosen, weights[0])], []
    rows = len(batch.chosen.mask)
    everything = math.fsum(w for row in weights[0] for w in row) or 1.0
    sums = _sums(batch.chosen.policy, batch.chosen.mask, weights[0])
    return [-rows * x / everything for x in sums], [-rows / everything] * rows


def _sums(logps: Rows, mask: list[list[bool]], weights: Rows) -> list[float]:
    return [
        math.fsum(w * p for p, here, w in zip(*row, strict=True) if here)
        for row in zip(logps, mask, weights, strict=True)
    ]


def _of_ranks(
    name: str, batch: Batch, weights: tuple[Rows, Rows], rewards: list[list[float]], beta: float
) -> tuple[list[float], list[float], list[float]]:
    """The k-th lowest against the k-th lowest; Python's sort is stable, as the library's is."""
    one, two = rewards
    if name == "aot":
        one, two = (_differences(batch, weights, field) for field in ("policy", "ref"))
    order = [sorted(range(len(side)), key=side.__getitem__) for side in (one, two)]
    losses, first, second = [], [0.0] * len(one), [0.0] * len(one)
    for i, j in zip(*order, strict=True):
        m = beta * (one[i] - two[j])
        losses.append(softplus(-m))
        first[i], second[j] = -beta * sigmoid(-m), beta * sigmoid(-m)
    return (losses, first, [-x for x in first]) if name == "aot" else (losses, first, second)


def _differences(batch: Batch, weights: tuple[Rows, Rows], field: str) -> list[float]:
    """Weighted log-probs of the chosen side minus those of the rejected one, of policy or reference."""
    sums = [_sums(getattr(side, field), side.mask, rows) for side, rows in zip(batch, weights, strict=True)]
    return [chosen - rejected for chosen, rejected in zip(*sums, strict=True)]
