"""Pairs of responses → preference losses: the last arrow, and the calls that most people need.

In: chosen and rejected `Response`, everything else by keyword. Out: a `PreferenceLoss` with one unreduced loss per
pair and detached reports. A method is a sentence: Selective-DPO *is* `dpo_loss` of responses that `select` weighted.

    >>> import numpy as np
    >>> def side(policy, ref):
    ...     mask = np.ones((1, 2), dtype=bool)
    ...     return Response(per_token_logps=np.array([policy]), mask=mask, ref_per_token_logps=np.array([ref]))
    >>> chosen, rejected = side([-1.0, -3.0], [-2.0, -1.0]), side([-1.0, -2.0], [-3.0, -2.0])
    >>> out = selective_dpo_loss(chosen, rejected, beta=0.1, selection_ratio=0.5)
    >>> out.chosen_weights, out.rejected_weights
    (array([[0., 1.]]), array([[1., 0.]]))
    >>> float(out.loss) == float(np.logaddexp(0, -0.1 * (-2.0 - 2.0)))
    True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.response import Response, check_pair, required_reference
from selective_pref.rewards import mean_logp, summed_log_ratio
from selective_pref.scores import ScoreFunction, alignment_scores
from selective_pref.selection import Ties, check_ratio, top_fraction_weights

Pool: TypeAlias = Literal["response", "pair", "batch"]
"""Which tokens compete for the same budget: those of one response, of one pair, or of this call."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferenceLoss:
    """What every loss of this library returns. Only `losses` (and `loss`) carry a gradient.

    Attributes:
        losses: [B], one per pair, unreduced. Non-finite where a log-prob that the loss reads, inside the pair's masks,
            is not finite. (What it does not read, `check_finite` finds.)
        chosen_rewards: [B], β included, of the *full* sequences. Judge a run by whether this margin rises.
        rejected_rewards: [B], likewise.
        chosen_selected_rewards: [B], β included, of the weighted tokens: what the loss sees. This margin is biased
            low by the selection itself and may stay below 0 in a good run.
        rejected_selected_rewards: [B], likewise.
        chosen: the response that the loss was computed from, detached, with its weights.
        rejected: likewise.
    """

    losses: Array
    chosen_rewards: Array
    rejected_rewards: Array
    chosen_selected_rewards: Array
    rejected_selected_rewards: Array
    chosen: Response
    rejected: Response

    @property
    def loss(self) -> Array:
        """The mean of `losses`: call `.backward()` on it."""
        return _arrays.namespace(self.losses).mean(self.losses)

    @property
    def chosen_weights(self) -> Array:
        """[B T_w]: what each chosen token counted for, in [0, 1]."""
        return self.chosen.token_weights

    @property
    def rejected_weights(self) -> Array:
        """[B T_l]: what each rejected token counted for, in [0, 1]."""
        return self.rejected.token_weights


Objective: TypeAlias = Callable[[Response, Response], PreferenceLoss]
"""What adapters train with: any callable (chosen, rejected) → PreferenceLoss."""


def select(
    chosen: Response,
    rejected: Response,
    *,
    selection_ratio: float,
    scores: ScoreFunction | tuple[Array, Array] | None = None,
    pool: Pool = "response",
    ties: Ties = "share",
) -> tuple[Response, Response]:
    """The two responses with their weights set to the top share of tokens; any loss of them is then selective.

    Args:
        chosen, rejected: the pair, with T of their own each. Weights they already carry are replaced.
        selection_ratio: share of tokens to keep, in (0, 1]; K = ceil(selection_ratio · n) exactly.
        scores: None for the alignment score (Eq. 6); or a function (chosen, rejected) → scores of both; or the two
            score arrays [B T_w] and [B T_l] themselves. Higher is kept first; no gradient reaches them.
        pool: "response" keeps the top K of each response; "pair" of the two responses together; "batch" of all
            responses of this call, which under gradient accumulation or data parallelism is the micro-batch.
        ties: "share", "first" or "all": see `top_fraction_weights`.

    Returns:
        (chosen, rejected) with `weights` and `scores` set, detached.

    Raises:
        TypeError, ValueError: a bad ratio, pool, ties or scores; responses that do not fit together; a missing
            reference where the alignment score needs one.
    """
    check_pair(chosen, rejected)
    check_ratio(selection_ratio)
    if scores is None or callable(scores):
        chosen_scores, rejected_scores = (scores or alignment_scores)(chosen, rejected)
    elif isinstance(scores, (tuple, list)) and len(scores) == 2:
        chosen_scores, rejected_scores = scores
    else:
        raise TypeError(
            "scores must be None, a function (chosen, rejected) -> two arrays, or a pair of arrays [B T_w] and "
            f"[B T_l]; got {type(scores).__name__}"
        )
    chosen = replace(chosen, weights=None, scores=_arrays.detach(chosen_scores))
    rejected = replace(rejected, weights=None, scores=_arrays.detach(rejected_scores))
    chosen_weights, rejected_weights = _pooled_weights(chosen, rejected, selection_ratio, pool, ties)
    return replace(chosen, weights=chosen_weights), replace(rejected, weights=rejected_weights)


def selective_dpo_loss(
    chosen: Response,
    rejected: Response,
    *,
    beta: float,
    selection_ratio: float,
    scores: ScoreFunction | tuple[Array, Array] | None = None,
    pool: Pool = "response",
    ties: Ties = "share",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Selective-DPO, Eq. 7: −log σ(β R(y_w) − β R(y_l)) with R the log-ratio of the selected tokens (Eq. 8).

    It is `dpo_loss(*select(chosen, rejected, ...))`. At `selection_ratio=1` it equals `dpo_loss`, bit by bit.

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l], with reference log-probs.
        beta: strength of the pull towards the reference, above 0; no default, since it is the number that matters
            (the paper uses 0.01).
        selection_ratio: share of tokens to keep, in (0, 1] (the paper uses 0.4).
        scores, pool, ties: as in `select`.
        label_smoothing: as in `dpo_loss`.

    Returns:
        A `PreferenceLoss`; gradients flow to the policy's log-probs of the selected tokens only.

    Raises:
        TypeError, ValueError: as `select` and `dpo_loss`.

    Example:
        >>> import numpy as np
        >>> logps, mask = np.zeros((1, 5)), np.ones((1, 5), dtype=bool)
        >>> same = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=logps)
        >>> float(selective_dpo_loss(same, same, beta=0.01, selection_ratio=0.4).loss) == float(np.log(2))
        True
    """
    chosen, rejected = select(chosen, rejected, selection_ratio=selection_ratio, scores=scores, pool=pool, ties=ties)
    return dpo_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def dpo_loss(chosen: Response, rejected: Response, *, beta: float, label_smoothing: float = 0.0) -> PreferenceLoss:
    """DPO, Eq. 4 (Rafailov et al. 2023, Eq. 7): −log σ(β·log-ratio(y_w) − β·log-ratio(y_l)).

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l], with reference log-probs; their weights are honoured.
        beta: above 0.
        label_smoothing: assumed share of flipped labels ε in [0, 0.5), conservative DPO: (1 − ε)·loss + ε·loss of
            the flipped pair.

    Returns:
        A `PreferenceLoss`.

    Raises:
        TypeError, ValueError: responses that do not fit together, a missing reference, β or ε out of range.
    """
    check_pair(chosen, rejected)
    _arrays.check_positive("beta", beta)
    _check_label_smoothing(label_smoothing)
    required_reference(chosen)
    required_reference(rejected)
    margins = beta * (summed_log_ratio(chosen) - summed_log_ratio(rejected))
    return _report(_bradley_terry(margins, label_smoothing), chosen, rejected, summed_log_ratio, beta)


def simpo_loss(
    chosen: Response, rejected: Response, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """SimPO (Meng et al. 2024, Eq. 6): −log σ(β·mean log π_θ(y_w) − β·mean log π_θ(y_l) − γ). Reference-free.

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l]; their weights are honoured (a weighted mean).
        beta: above 0; SimPO's are larger than DPO's, 2 to 10.
        gamma: target margin in units of the reward (SimPO's code names γ/β instead), a finite number at least 0.
        label_smoothing: ε in [0, 0.5), as in `dpo_loss`.

    Returns:
        A `PreferenceLoss`; its rewards are β · mean log-prob, without γ.

    Raises:
        TypeError, ValueError: responses that do not fit together, β, γ or ε out of range.
    """
    check_pair(chosen, rejected)
    _arrays.check_positive("beta", beta)
    _arrays.check_number("gamma", gamma)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number, at least 0; got {gamma!r}")
    _check_label_smoothing(label_smoothing)
    margins = beta * (mean_logp(chosen) - mean_logp(rejected)) - gamma
    return _report(_bradley_terry(margins, label_smoothing), chosen, rejected, mean_logp, beta)


def sft_loss(chosen: Response, rejected: Response) -> PreferenceLoss:
    """The supervised baseline: −mean log π_θ(y_w), one value per pair; the rejected side is only reported.

    With weights from `select(..., scores=excess_loss_scores)` it is selective language modelling (Rho-1). As a
    term beside a preference loss: ``out.losses + alpha * sft_loss(chosen, rejected).losses``.

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l]; weights are honoured, a reference is not read.

    Returns:
        A `PreferenceLoss`; its rewards are the mean log-probs.

    Raises:
        TypeError, ValueError: responses that do not fit together.
    """
    check_pair(chosen, rejected)
    return _report(-mean_logp(chosen), chosen, rejected, mean_logp, 1.0)


def _bradley_terry(margins: Array, label_smoothing: float) -> Array:
    """−log σ(margin), label-smoothed: (1 − ε)·softplus(−m) + ε·softplus(m), Eq. 2.

    A margin of +∞ would be a perfect loss of 0 although a log-prob is broken, so 0·margin turns it into NaN.
    """
    xp = _arrays.namespace(margins)
    margins = margins + 0.0 * margins
    zero = xp.zeros_like(margins)
    losses = xp.logaddexp(zero, -margins)
    if label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses + label_smoothing * xp.logaddexp(zero, margins)


def _report(
    losses: Array, chosen: Response, rejected: Response, reward: Callable[[Response], Array], beta: float
) -> PreferenceLoss:
    chosen, rejected = _detached(chosen), _detached(rejected)
    return PreferenceLoss(
        losses=losses,
        chosen_rewards=beta * reward(replace(chosen, weights=None)),
        rejected_rewards=beta * reward(replace(rejected, weights=None)),
        chosen_selected_rewards=beta * reward(chosen),
        rejected_selected_rewards=beta * reward(rejected),
        chosen=chosen,
        rejected=rejected,
    )


def _detached(response: Response) -> Response:
    def cut(array: Array | None) -> Array | None:
        return None if array is None else _arrays.detach(array)

    return Response(
        per_token_logps=cut(response.per_token_logps),
        mask=response.mask,
        ref_per_token_logps=cut(response.ref_per_token_logps),
        weights=cut(response.weights),
        scores=cut(response.scores),
    )


def _pooled_weights(
    chosen: Response, rejected: Response, selection_ratio: float, pool: Pool, ties: Ties
) -> tuple[Array, Array]:
    """Weights of both sides: the tokens of a pool stand in one row."""
    if pool not in ("response", "pair", "batch"):
        raise ValueError(f"pool must be 'response', 'pair' or 'batch'; got {pool!r}")
    (rows, width), other_width = chosen.mask.shape, rejected.mask.shape[1]
    if pool == "response" and width != other_width:
        return (
            top_fraction_weights(chosen.scores, chosen.mask, selection_ratio, ties=ties),
            top_fraction_weights(rejected.scores, rejected.mask, selection_ratio, ties=ties),
        )
    xp, axis = _arrays.namespace(chosen.mask), 0 if pool == "response" else 1
    scores = xp.concat([_arrays.upcast(chosen.scores), _arrays.upcast(rejected.scores)], axis=axis)
    mask = xp.concat([chosen.mask, rejected.mask], axis=axis)
    row = (1, rows * (width + other_width)) if pool == "batch" else mask.shape
    weights = top_fraction_weights(xp.reshape(scores, row), xp.reshape(mask, row), selection_ratio, ties=ties)
    weights = xp.reshape(weights, mask.shape)
    if pool == "response":
        return weights[:rows, :], weights[rows:, :]
    return weights[:, :width], weights[:, width:]


def _check_label_smoothing(label_smoothing: float) -> None:
    _arrays.check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5); got {label_smoothing!r}")
