"""The laws, as functions of a `Subject` that yield counterexamples: what `selective_pref.testing` runs.

Each walks over the same pairs in every run, from small to large, so the first counterexample is a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from selective_pref._subject import (
    Pair,
    Side,
    Subject,
    WrongKindError,
    gradients_of,
    numpy_of,
    rows_of,
    size_of,
    text_of,
)
from selective_pref.losses import dpo_loss
from selective_pref.response import Response

np: Any = numpy  # arrays are untyped here, as everywhere in the core

BETAS, RATIOS = (0.1, 0.5, 2.0), (0.4, 0.07, 0.75)


def _examples(grid: bool = False) -> Iterator[Pair]:
    """Pairs from small to large, ragged, with prompts, padding and holes; `grid`: multiples of 1/8, which tie."""
    rng = np.random.default_rng(0)
    for pairs, widths in ((1, (1, 1)), (1, (2, 1)), (1, (3, 2)), (2, (4, 4)), (3, (6, 5)), (2, (11, 7)), (2, (5, 12))):
        sides: list[Side] = []
        for width in widths:
            policy, ref = (-4 * rng.random((pairs, width)) for _ in range(2))
            policy[rng.random(policy.shape) < 0.2] = 0.0  # a log-prob of exactly 0 is one like any other
            mask = rng.random((pairs, width)) < 0.8 if pairs > 2 else np.ones((pairs, width), dtype=bool)
            mask[np.arange(pairs), rng.integers(width, size=pairs)] = True
            policy, ref = (np.round(8 * array) / 8 if grid else array for array in (policy, ref))
            sides.append(Side(np.where(mask, policy, 0.0), np.where(mask, ref, 0.0), mask))
        yield Pair(*sides)


def _settings(subject: Subject) -> Iterator[tuple[float, float]]:
    for beta, ratio in zip(BETAS, RATIOS, strict=True):
        yield beta, ratio if subject.selective else 1.0


def _value(subject: Subject) -> Iterator[str]:
    for grid in (False, True):
        for pair in _examples(grid):
            for beta, ratio in _settings(subject):
                found, expected = subject.losses(pair, beta, ratio), subject.expected(pair, beta, ratio)[0]
                if subject.differ(found, expected):
                    yield f"{pair}; {subject.numbers(beta, ratio)}: {text_of(found)}, not {text_of(expected)}"


def _step_0(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        same = Pair(*(side._replace(ref=side.policy) for side in pair))
        for beta, ratio in _settings(subject):
            if subject.differ(found := subject.losses(same, beta, ratio), math.log(2)):
                yield f"{same}: {text_of(found)}, not log 2 = 0.6931"


def _ratio_1(subject: Subject) -> Iterator[str]:
    for pair in _examples() if subject.selective else ():
        found = subject.losses(pair, 0.5, 1.0)
        sides = (Response(per_token_logps=s.policy, ref_per_token_logps=s.ref, mask=s.mask) for s in pair)
        if subject.differ(found, expected := dpo_loss(*sides, beta=0.5).losses):
            yield f"{pair}: {text_of(found)} at ratio 1, not {text_of(expected)}"


def _counted(subject: Subject, spread: float) -> Iterator[str]:
    """Every chosen token has log-ratio −1, or nearly: the margin over β counts the kept ones."""
    for ratio, n in ((0.4, 3), (0.4, 4), (0.5, 5), (0.4, 11), (0.01, 1), (0.4, 26), (0.07, 100)):
        tokens = -1 - spread * np.arange(n)[None, :] / n
        one = np.ones((1, 1), dtype=bool)
        chosen = Side(tokens - 1, np.full((1, n), -1.0), np.ones((1, n), dtype=bool))
        pair = Pair(chosen, Side(np.zeros((1, 1)), np.zeros((1, 1)), one))
        kept, wanted = float(-subject.margins(pair, 0.05, ratio)[0] / 0.05), math.ceil(round(ratio * n, 9))
        if not abs(kept - wanted) < 0.5:
            what = "of equal score" if spread == 0 else "of different scores"
            yield f"Of {n} tokens {what} {kept:.1f} are kept at ratio {ratio}, not {wanted}"


def _share(subject: Subject) -> Iterator[str]:
    yield from _counted(subject, 1e-3) if subject.selective else ()


def _ties(subject: Subject) -> Iterator[str]:
    yield from _counted(subject, 0.0) if subject.selective else ()


def _padding(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        for left, right in ((0, 2), (3, 0)):
            around = ((0, 0), (left, right))
            padded = Pair(*(Side(*(np.pad(field, around) for field in side)) for side in pair))
            if subject.differ(found := subject.losses(padded), before := subject.losses(pair)):
                yield f"{pair}: {text_of(before)}, but {text_of(found)} with {left} cells before and {right} behind"


def _masked(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        padded = Pair(*(Side(*(np.pad(field, ((0, 0), (1, 1))) for field in side)) for side in pair))
        before = subject.losses(padded)
        for garbage in (-7.0, np.nan, -np.inf):
            dirty = Pair(
                *(Side(np.where(s.mask, s.policy, garbage), np.where(s.mask, s.ref, garbage), s.mask) for s in padded)
            )
            if subject.differ(found := subject.losses(dirty), before):
                yield f"{dirty}: {text_of(found)}, but {text_of(before)} with 0 in place of {garbage}"
            gradients = gradients_of(subject, dirty, 0.5, 0.4)
            for gradient, side in zip(gradients or (), dirty, strict=False):
                if np.any(gradient[~side.mask] != 0):
                    yield f"{dirty}: a gradient {text_of(gradient)} off the mask"


def _order(subject: Subject) -> Iterator[str]:
    rng = np.random.default_rng(1)
    for pair in _examples():
        orders = [rng.permutation(side.mask.shape[1]) for side in pair]
        moved = Pair(*(Side(*(x[:, o] for x in side)) for side, o in zip(pair, orders, strict=True)))
        if subject.differ(found := subject.losses(moved), before := subject.losses(pair)):
            yield f"{pair}: {text_of(before)}, but {text_of(found)} with the tokens in another order"


def _pairs(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        alone = np.concatenate([subject.losses(rows_of(pair, [i])) for i in range(size_of(pair))])
        together, turned = subject.raw(pair), subject.raw(rows_of(pair, list(range(size_of(pair)))[::-1]))
        if together.ndim == 0:
            alone, turned = np.mean(alone), turned
        else:
            turned = turned[::-1]
        if subject.differ(together, alone) or subject.differ(turned, together):
            yield f"{pair}: {text_of(together)} together, {text_of(alone)} one by one"


def _shift(subject: Subject) -> Iterator[str]:
    rng = np.random.default_rng(2)
    for pair in _examples():
        moves = [np.where(side.mask, rng.integers(-16, 17, side.mask.shape) / 8, 0.0) for side in pair]
        shifted = Pair(*(Side(s.policy + m, s.ref + m, s.mask) for s, m in zip(pair, moves, strict=True)))
        if subject.differ(found := subject.losses(shifted), before := subject.losses(pair)):
            added = " and ".join(map(text_of, moves))
            yield f"{pair}: {text_of(before)}, but {text_of(found)} with {added} added to policy and reference"


def _raised(pair: Pair, side: int, places: Any, by: Any) -> Pair:
    """The pair with the policy's log-probs of one side changed at some places."""
    policy = np.where(places, pair[side].policy + by, pair[side].policy)
    sides = [pair.chosen, pair.rejected]
    sides[side] = sides[side]._replace(policy=policy)
    return Pair(*sides)


def _direction(subject: Subject) -> Iterator[str]:
    rng = np.random.default_rng(3)
    for pair in _examples(grid=True):
        before = subject.losses(pair)
        for side, name in enumerate(("chosen", "rejected")):
            by = rng.integers(0, 9, pair[side].mask.shape) / 8
            change = subject.losses(_raised(pair, side, pair[side].mask, by)) - before
            wrong = change if side == 0 else -change
            if np.any(~(wrong <= subject.tolerance * (1 + np.abs(before)))):
                yield f"{pair}: {text_of(before)}, {text_of(change)} more with the {name} policy up by {text_of(by)}"


def _every_token(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        before = subject.losses(pair, 0.5, 1.0)
        for side, name in enumerate(("chosen", "rejected")):
            for row, column in np.argwhere(pair[side].mask):
                place = np.zeros(pair[side].mask.shape, dtype=bool)
                place[row, column] = True
                change = subject.losses(_raised(pair, side, place, -0.5), 0.5, 1.0)[row] - before[row]
                if not (change if side == 0 else -change) > subject.tolerance:
                    yield f"{pair}: with token {column} of {name} row {row} down by 0.5 the loss is {change:.4g} more"


def _sum(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        if any(side.mask.shape[1] % 2 or not side.mask.all() for side in pair):
            continue
        twice = Pair(*(Side(*(np.repeat(field, 2, axis=1) for field in side)) for side in pair))
        if subject.differ(found := subject.margins(twice, 0.1, 0.5), 2 * (before := subject.margins(pair, 0.1, 0.5))):
            yield f"{pair}: margin {text_of(before)}, and {text_of(found)} with every token twice"


def _beta(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        once, twice = subject.margins(pair, 0.1), subject.margins(pair, 0.2)
        if subject.differ(twice, 2 * once):
            yield f"{pair}: margin {text_of(once)} at β = 0.1 and {text_of(twice)} at 0.2"


def _swap(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        for ratio in (1.0, 0.4) if subject.selective else (1.0,):
            both = sum(np.exp(-subject.losses(p, 0.5, ratio)) for p in (pair, Pair(pair.rejected, pair.chosen)))
            over = np.any(~(both <= 1 + subject.tolerance))
            if over or (ratio == 1 and subject.differ(both, 1.0)):
                yield f"{pair}: e^−loss of both orders adds up to {text_of(both)}" + (
                    f" at ratio {ratio}" * subject.selective
                )


def _convex(subject: Subject) -> Iterator[str]:
    rng = np.random.default_rng(4)
    for pair in _examples():
        for _ in range(3):
            moves = [np.where(side.mask, rng.normal(0, 2, side.mask.shape), 0.0) for side in pair]
            there, middle = (
                Pair(*(s._replace(policy=s.policy + x * m) for s, m in zip(pair, moves, strict=True))) for x in (1, 0.5)
            )
            a, b, c = (subject.losses(p, 0.5, 0.4) for p in (pair, there, middle))
            slack = subject.tolerance * (1 + np.abs(a) + np.abs(b))
            length = sum(np.abs(m).sum(-1) for m in moves)
            if np.any(~(c <= (a + b) / 2 + slack)):
                yield f"{pair}: {text_of(a)}; {there}: {text_of(b)}; half-way {text_of(c)}, above their mean"
            if np.any(~(np.abs(a - b) <= 0.5 * length + slack)):
                yield f"{pair}: {text_of(a)}; {there}: {text_of(b)}, steeper than β = 0.5 per nat"


def _not_finite(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        for number, field in ((0, "policy"), (1, "ref")):
            for broken in (np.nan, -np.inf):
                values = getattr(pair[number], field).copy()
                values[0, np.argmax(pair[number].mask[0])] = broken
                sides = [pair.chosen, pair.rejected]
                sides[number] = sides[number]._replace(**{field: values})
                try:
                    found = subject.losses(dirty := Pair(*sides))
                except WrongKindError:
                    raise
                except Exception:
                    continue  # an error is as loud
                if np.isfinite(found[0]):
                    yield f"{dirty}: {text_of(found)}, as if nothing were broken"


def _missing(subject: Subject) -> Iterator[str]:
    pair = next(_examples())
    sides = [Response(per_token_logps=r.per_token_logps, mask=r.mask) for r in map(subject.response, pair)]
    try:
        found = subject.call(sides, 0.5, 0.4)
    except WrongKindError:
        raise
    except Exception:
        return
    yield f"Without ref_per_token_logps it returns {text_of(numpy_of(found))}"


def _inputs(subject: Subject) -> Iterator[str]:
    for pair in _examples(grid=True):
        sides = [subject.response(side) for side in pair]
        first = numpy_of(subject.call(sides, 0.5, 0.4)).copy()
        for response, side in zip(sides, pair, strict=True):
            after = (response.per_token_logps, response.ref_per_token_logps, response.mask)
            if any(subject.differ(numpy_of(array), field) for array, field in zip(after, side, strict=True)):
                yield f"{pair}: an array that was passed in has changed"
        if not np.array_equal(first, again := numpy_of(subject.call(sides, 0.5, 0.4)), equal_nan=True):
            yield f"{pair}: {text_of(first)}, then {text_of(again)} of the same call"


def _gradient(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        for beta, ratio in _settings(subject):
            found = gradients_of(subject, pair, beta, ratio)
            for gradient, wanted in zip(found or (), subject.expected(pair, beta, ratio)[1:], strict=False):
                if subject.differ(gradient, wanted) or np.any(gradient[wanted == 0] != 0):
                    yield f"{pair}; {subject.numbers(beta, ratio)}: gradient {text_of(gradient)}, not {text_of(wanted)}"


def _constant(subject: Subject) -> Iterator[str]:
    for pair in _examples():
        for gradient in (gradients_of(subject, pair, 0.5, 0.4) or [])[2:]:
            if np.any(gradient != 0):
                yield f"{pair}: gradient {text_of(gradient)} to the reference"


LAWS: dict[str, tuple[str, Callable[[Subject], Iterator[str]]]] = {
    "value": ("the loss is −log σ(β·(R(y_w) − R(y_l))), R the sum of the (selected) log-ratios", _value),
    "step 0": ("where policy and reference agree the loss is log 2, at every β and ratio", _step_0),
    "ratio 1": ("at ratio 1 it is DPO", _ratio_1),
    "share": ("of n tokens of a response ceil(ratio · n) are kept", _share),
    "ties": ("tokens of equal score do not enlarge the share", _ties),
    "padding": ("cells off the mask may be added anywhere", _padding),
    "masked content": ("what stands off the mask is not read, whatever it is", _masked),
    "order": ("the order of the tokens does not matter", _order),
    "pairs": ("a pair's loss does not depend on the other pairs; a batch's is their mean", _pairs),
    "shift": ("adding a number to policy and reference of a token changes nothing", _shift),
    "direction": ("raising a chosen log-prob never raises the loss, a rejected one never lowers it", _direction),
    "every token": (
        "every token inside the mask counts, the first, the last and log-probs of 0 too (at ratio 1)",
        _every_token,
    ),
    "sum": ("a reward is a sum over tokens: with every token twice, margins double", _sum),
    "beta": ("the margin is proportional to β, and β does not change the selection", _beta),
    "swap": ("e^−loss of a pair and of the pair with its sides exchanged is at most 1, and 1 at ratio 1", _swap),
    "convex": ("the loss is convex in the policy's log-probs, and changes by at most β per nat", _convex),
    "not finite": ("a NaN or an infinity inside the mask is not hidden", _not_finite),
    "reference": ("a missing reference is an error", _missing),
    "inputs": ("arrays that are passed in stay as they are, and the same call gives the same losses", _inputs),
    "gradient": ("the gradient is ∓β·σ(−margin)·weight, and 0 where the weight is (torch and JAX)", _gradient),
    "constant reference": ("no gradient reaches the reference (torch and JAX)", _constant),
}
"""Name of a law → what it says, and its counterexamples."""
