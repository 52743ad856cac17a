"""What a loss did, in numbers to log; and a loud stop when something is not finite.

In: a `PreferenceLoss`. Out: a dict of 0-d arrays that stay on the device (`diagnostics`), or an error with rows and
tokens (`check_finite`, which waits for the device; no loss does).
"""

from __future__ import annotations

from typing import Any

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.losses import PreferenceLoss
from selective_pref.response import Response, masked

_NAMED = 5  # how many rows, and tokens of a row, an error names


class NonFiniteError(FloatingPointError):
    """A log-prob, weight or score inside the mask is broken. The message names rows and tokens."""


def diagnostics(out: PreferenceLoss, *, chosen_only: bool = False) -> dict[str, Array]:
    """Metrics under TRL's names, those of the selected tokens under `selection/`; 0-d, detached, never `.item()`.

    Every value is a mean over the B pairs (fractions and thresholds over their 2B responses), so means of batches
    combine by weighting with B.

    `rewards/*`, `logps/*` are of the full sequences: `rewards/accuracies` is the share of pairs with a positive
    margin. `selection/rewards/*` are of the selected tokens: that margin is biased low by construction.
    `selection/fraction` is kept weight over tokens (it may exceed 1 where weights do); `selection/threshold` the lowest
    selected score (nats); `selection/tied_fraction` the share of tokens that stand on that score with at least one
    other; `selection/nonfinite_rows` and `selection/empty_rows` the share of responses with a broken value (see
    `check_finite`), or with no token at all: such a response counts 0 in the fraction and the threshold. Threshold and
    ties are there only for responses that `select` has scored; `pair_weight`, the mean of the weights, only where
    `weigh_pairs` was used: it is 0 for a batch whose loss was multiplied by 0.

    Args:
        out: what any loss returns.
        chosen_only: the batch has no rejected side (supervised training): only what the chosen side says, no margin,
            no accuracy; fractions and thresholds are over the B chosen responses.

    Returns:
        Name → 0-d array.

    Raises:
        Nothing: `check_finite` does.
    """
    xp = _arrays.namespace(out.losses)
    metrics = {"loss": _arrays.detach(out.loss)}
    if out.pair_weights is not None:
        metrics["pair_weight"] = xp.mean(out.pair_weights)
    for name, chosen, rejected in (
        ("rewards", out.chosen_rewards, out.rejected_rewards),
        ("selection/rewards", out.chosen_selected_rewards, out.rejected_selected_rewards),
    ):
        metrics[f"{name}/chosen"] = xp.mean(chosen)
        if chosen_only:
            continue
        metrics[f"{name}/rejected"] = xp.mean(rejected)
        metrics[f"{name}/margins"] = xp.mean(chosen - rejected)
        metrics[f"{name}/accuracies"] = xp.mean(xp.astype(chosen > rejected, chosen.dtype))
    sides = {"chosen": out.chosen} if chosen_only else {"chosen": out.chosen, "rejected": out.rejected}
    for name, side in sides.items():
        metrics[f"logps/{name}"] = xp.mean(_arrays.last_axis_sum(masked(side.per_token_logps, side.mask)))
    first, *others = (_per_row(side, xp) for side in sides.values())
    for name in first:
        if all(name in rows for rows in others):
            metrics[f"selection/{name}"] = xp.mean(xp.concat([first[name], *(rows[name] for rows in others)]))
    return metrics


def check_finite(*responses: Response) -> None:
    """Raises `NonFiniteError` where a log-prob, weight or score inside a mask is broken, naming rows and tokens.

    A log-prob or weight is broken by NaN or ±inf, a weight by being negative too, a score by NaN (an infinite score
    sorts first or last).

    Reads values back from the device: call it where you log anyway. Usually ``check_finite(chosen, rejected)``.

    Raises:
        NonFiniteError: with side (0 for the first response given), rows and token positions.
    """
    found = [
        f"response {number} ({name}): {_places(bad)}"
        for number, response in enumerate(responses)
        for name, bad in _non_finite(response)
        if bool(_arrays.namespace(bad).any(bad))
    ]
    if found:
        raise NonFiniteError(
            "non-finite values inside the mask: "
            + "; ".join(found)
            + ". The loss of these pairs is not finite either: look at the model's outputs for these tokens, "
            "or drop the rows"
        )


def _non_finite(response: Response) -> list[tuple[str, Array]]:
    """Where, inside the mask, a field holds what it must not: see `check_finite`."""
    xp = _arrays.namespace(response.mask)
    fields = {name: getattr(response, name) for name in ("per_token_logps", "ref_per_token_logps", "weights", "scores")}
    broken = {
        name: xp.isnan(array) if name == "scores" else ~xp.isfinite(array)
        for name, array in fields.items()
        if array is not None
    }
    if response.weights is not None:
        broken["negative weights"] = response.weights < 0  # NaN to every reward
    return [(name, response.mask & where) for name, where in broken.items()]


def _places(bad: Array) -> str:
    """`rows 0 (tokens 3, 4), 7 (tokens 0)` for a bool array [B T]."""
    rows, tokens = (_as_list(index) for index in _arrays.namespace(bad).nonzero(bad))
    by_row: dict[int, list[int]] = {}
    for row, token in zip(rows, tokens, strict=True):
        by_row.setdefault(row, []).append(token)
    named = [f"{row} (tokens {_first(tokens)})" for row, tokens in by_row.items()]
    return "rows " + _first(named)


def _as_list(index: Array) -> list[int]:
    """`tolist` is not in the standard, but one read-back instead of one per item."""
    return index.tolist() if hasattr(index, "tolist") else [int(index[i]) for i in range(index.shape[0])]


def _first(items: list[Any]) -> str:
    more = len(items) - _NAMED
    return ", ".join(str(item) for item in items[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _per_row(side: Response, xp: Any) -> dict[str, Array]:
    """Means over the rows of one side, each [B]."""
    weights = side.token_weights
    tokens = _arrays.last_axis_sum(xp.astype(side.mask, weights.dtype))
    at_least_one = xp.where(tokens == 0, xp.ones_like(tokens), tokens)
    bad = xp.any(xp.stack([where for _, where in _non_finite(side)]), axis=0)
    rows = {
        "fraction": _arrays.last_axis_sum(weights) / at_least_one,
        "empty_rows": xp.astype(tokens == 0, weights.dtype),
        "nonfinite_rows": xp.astype(xp.any(bad, axis=-1), weights.dtype),
    }
    if side.scores is not None and side.mask.shape[1] == 0:  # no score has a minimum
        rows["threshold"] = rows["tied_fraction"] = xp.zeros_like(tokens)
    elif side.scores is not None:
        scores = _arrays.upcast(side.scores)
        kept = side.mask & (weights > 0)
        lowest = xp.min(xp.where(kept, scores, xp.full_like(scores, xp.inf)), axis=-1, keepdims=True)
        tied = xp.astype(xp.count_nonzero(side.mask & (scores == lowest), axis=-1), weights.dtype)
        none = ~xp.any(kept, axis=-1)
        lowest = xp.squeeze(lowest, axis=-1)
        rows["threshold"] = xp.where(none, xp.zeros_like(lowest), lowest)
        rows["tied_fraction"] = xp.where((tied > 1) & ~none, tied, xp.zeros_like(tied)) / at_least_one
    return rows
