"""Which tokens of a pair are selected: the second and third arrow for both sides at once.

In: chosen and rejected `Response`, a ratio, scores (the alignment score, unless others are given). Out: the two
responses with their weights set, from which every reward, and so every loss, reads its tokens.

    >>> import numpy as np
    >>> mask = np.ones((1, 4), dtype=bool)
    >>> chosen = Response(per_token_logps=np.array([[-3.0, -1.0, -2.0, -1.0]]), mask=mask)
    >>> scores = (np.array([[2.0, -1.0, 1.0, 0.5]]), np.array([[0.0, 3.0, 0.0, 0.0]]))
    >>> select(chosen, chosen, selection_ratio=(0.5, 0.25), scores=scores)[0].weights
    array([[1., 0., 1., 0.]])
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.response import Response, check_pair
from selective_pref.scores import ScoreFunction, alignment_scores
from selective_pref.selection import Ties, check_ratio, top_fraction_weights

SelectionRatio: TypeAlias = float | tuple[float, float] | Array
"""The share of tokens that is kept: one number, (chosen, rejected), or either as arrays of `ratio_digits`."""

Pool: TypeAlias = Literal["response", "pair", "batch"]
"""Which tokens compete for the same budget: those of one response, of one pair, or of this call."""


def select(
    chosen: Response,
    rejected: Response,
    *,
    selection_ratio: SelectionRatio,
    scores: ScoreFunction | tuple[Array, Array] | None = None,
    pool: Pool = "response",
    ties: Ties = "share",
    min_score: float | None = None,
) -> tuple[Response, Response]:
    """The two responses with their weights set to the top share of tokens; any loss of them is then selective.

    Args:
        chosen, rejected: the pair, with T of their own each. Weights they already carry are replaced.
        selection_ratio: share of tokens to keep, in (0, 1]; K = ceil(selection_ratio · n) exactly. A tuple
            (chosen, rejected) has a share for each side, in pool "response" only. Where it changes from step to step
            under a compiler: an array of `ratio_digits`, or a tuple of two.
        scores: None for the alignment score (Eq. 6); or a function (chosen, rejected) → scores of both; or the two
            score arrays [B T_w] and [B T_l] themselves. Higher is kept first; no gradient reaches them.
        pool: "response" keeps the top K of each response; "pair" of the two responses together; "batch" of all
            responses of this call, which under gradient accumulation or data parallelism is the micro-batch.
        ties: "share", "first" or "all": see `top_fraction_weights`.
        min_score: a finite number τ (nats, for the alignment score) or None: tokens whose score is not above τ get
            weight 0, so that a share need not fill its quota with tokens that want no update.
            ``selection_ratio=1, min_score=0.0`` is the threshold alone.

    Returns:
        (chosen, rejected) with `weights` and `scores` set, detached.

    Raises:
        TypeError, ValueError: a bad ratio, pool, ties, τ or scores; two ratios where a pool spans both sides; responses
            that do not fit together; a missing reference where the alignment score needs one.
    """
    check_pair(chosen, rejected)
    if pool not in ("response", "pair", "batch"):
        raise ValueError(f"pool must be 'response', 'pair' or 'batch'; got {pool!r}")
    ratios = _ratios(selection_ratio, pool)
    options = {"ties": ties, "min_score": min_score}
    if scores is None or callable(scores):
        scores = (scores or alignment_scores)(chosen, rejected)
    if isinstance(scores, (tuple, list)) and len(scores) == 2:
        chosen_scores, rejected_scores = scores
    else:
        raise TypeError(
            "scores must be None, a function (chosen, rejected) -> two arrays, or a pair of arrays [B T_w] and "
            f"[B T_l]; got {type(scores).__name__}"
        )
    chosen = replace(chosen, weights=None, scores=_arrays.detach(chosen_scores))
    rejected = replace(rejected, weights=None, scores=_arrays.detach(rejected_scores))
    chosen_weights, rejected_weights = _pooled_weights(chosen, rejected, ratios, pool, options)
    return replace(chosen, weights=chosen_weights), replace(rejected, weights=rejected_weights)


def _pooled_weights(
    chosen: Response, rejected: Response, ratios: list[Any], pool: Pool, options: dict[str, Any]
) -> tuple[Array, Array]:
    """Weights of both sides: the tokens of a pool stand in one row."""
    (rows, width), other_width = chosen.mask.shape, rejected.mask.shape[1]
    if len(ratios) == 2 or (pool == "response" and width != other_width):
        return (
            top_fraction_weights(chosen.scores, chosen.mask, ratios[0], **options),
            top_fraction_weights(rejected.scores, rejected.mask, ratios[-1], **options),
        )
    xp, axis = _arrays.namespace(chosen.mask), 0 if pool == "response" else 1
    scores = xp.concat([_arrays.upcast(chosen.scores), _arrays.upcast(rejected.scores)], axis=axis)
    mask = xp.concat([chosen.mask, rejected.mask], axis=axis)
    row = (1, rows * (width + other_width)) if pool == "batch" else mask.shape
    weights = top_fraction_weights(xp.reshape(scores, row), xp.reshape(mask, row), ratios[0], **options)
    weights = xp.reshape(weights, mask.shape)
    if pool == "response":
        return weights[:rows, :], weights[rows:, :]
    return weights[:, :width], weights[:, width:]


def _ratios(selection_ratio: Any, pool: Pool) -> list[Any]:
    """One ratio for both sides, or two."""
    several = isinstance(selection_ratio, (tuple, list))
    ratios: list[Any] = [*selection_ratio] if several else [selection_ratio]
    if several and len(ratios) != 2:
        raise ValueError(
            f"selection_ratio must be a number or a pair of numbers (chosen, rejected); got {selection_ratio!r}"
        )
    if len(ratios) == 2 and pool != "response":
        raise ValueError(
            f"two selection ratios need pool='response'; got {selection_ratio!r} with pool={pool!r}, in which tokens "
            "of both sides compete for one budget"
        )
    for ratio in ratios:
        check_ratio(ratio)
    return ratios
