"""Pairs of responses → preference losses: rewards and a pair loss put together, and the calls that most people need.

In: chosen and rejected `Response`, everything else by keyword. Out: a `PreferenceLoss` with one unreduced loss per
pair and detached reports. A method is a sentence: DPO *is* `preference_loss` with the summed log-ratio as reward and
`pair_losses.sigmoid`; Selective-DPO *is* `dpo_loss` of responses that `select` weighted.

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
from functools import partial
from typing import TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.pair_losses import PairLoss, aot_unpaired, check_gamma, check_label_smoothing, sigmoid
from selective_pref.pools import Pool, SelectionRatio, select
from selective_pref.response import Response, check_pair, masked, required_reference
from selective_pref.rewards import Reward, mean_logp, summed_log_ratio
from selective_pref.scores import ScoreFunction
from selective_pref.selection import Ties


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferenceLoss:
    """What every loss of this library returns. Only `losses` (and `loss`) carry a gradient.

    In JAX it is a pytree, so that a jitted function may return it.

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
        pair_weights: [B], what `weigh_pairs` was given and `losses` are already multiplied by; else None.
    """

    losses: Array
    chosen_rewards: Array
    rejected_rewards: Array
    chosen_selected_rewards: Array
    rejected_selected_rewards: Array
    chosen: Response
    rejected: Response
    pair_weights: Array | None = None

    def __post_init__(self) -> None:
        _arrays.make_pytree(self, self.losses)

    @property
    def loss(self) -> Array:
        """The mean of `losses`: call `.backward()` on it."""
        return _arrays.namespace(self.losses).mean(self.losses)

    @property
    def chosen_weights(self) -> Array:
        """[B T_w]: what each chosen token counted for; in [0, 1] where `select` set them."""
        return self.chosen.token_weights

    @property
    def rejected_weights(self) -> Array:
        """[B T_l]: what each rejected token counted for; in [0, 1] where `select` set them."""
        return self.rejected.token_weights


Objective: TypeAlias = Callable[[Response, Response], PreferenceLoss]
"""What adapters train with: any callable (chosen, rejected) → PreferenceLoss."""


def preference_loss(
    chosen: Response,
    rejected: Response,
    *,
    pair_loss: PairLoss,
    beta: float,
    reward: Reward = summed_log_ratio,
) -> PreferenceLoss:
    """Any pair loss of any reward: pair_loss(reward(y_w), reward(y_l), beta=β).

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l]; their weights are honoured, so the loss of what `select`
            returns is selective.
        pair_loss: a function of `selective_pref.pair_losses`, with its other numbers bound by `functools.partial`, or
            one of your own: (chosen_rewards [B], rejected_rewards [B], *, beta) → losses [B].
        beta: above 0.
        reward: response → [B] without β: `summed_log_ratio` (DPO), `mean_log_ratio` (IPO, length-normalised DPO),
            `mean_logp` (SimPO), with a divergence bound or not, or your own.

    Returns:
        A `PreferenceLoss`; its rewards are β · reward, with every weight 1 and with the weights that the loss sees.

    Raises:
        TypeError, ValueError: responses that do not fit together, a missing reference, a number out of range, a pair
            loss that does not return one loss per pair.

    Example:
        >>> import numpy as np
        >>> from selective_pref import pair_losses
        >>> logps, mask = np.array([[-1.0, -3.0]]), np.ones((1, 2), dtype=bool)
        >>> chosen = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=logps - 1)
        >>> rejected = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=logps)
        >>> preference_loss(chosen, rejected, pair_loss=pair_losses.hinge, beta=0.25).losses
        array([0.5])
    """
    check_pair(chosen, rejected)
    _arrays.check_positive("beta", beta)
    for name, function, example in (("pair_loss", pair_loss, "pair_losses.sigmoid"), ("reward", reward, "mean_logp")):
        if not callable(function):
            raise TypeError(f"{name} must be a function, as selective_pref.{example} is one; got {function!r}")
    losses = pair_loss(reward(chosen), reward(rejected), beta=beta)
    _check_losses(losses, chosen)
    return make_report(losses, chosen, rejected, reward, beta)


def selective_dpo_loss(
    chosen: Response,
    rejected: Response,
    *,
    beta: float,
    selection_ratio: SelectionRatio,
    scores: ScoreFunction | tuple[Array, Array] | None = None,
    pool: Pool = "response",
    ties: Ties = "share",
    min_score: float | None = None,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Selective-DPO, Eq. 7: −log σ(β R(y_w) − β R(y_l)) with R the log-ratio of the selected tokens (Eq. 8).

    It is `dpo_loss(*select(chosen, rejected, ...))`. At `selection_ratio=1` it equals `dpo_loss`, bit by bit.

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l], with reference log-probs.
        beta: strength of the pull towards the reference, above 0; no default, since it is the number that matters
            (the paper uses 0.01).
        selection_ratio: share of tokens to keep, in (0, 1] (the paper uses 0.4), or one for each side; see `select`.
        scores, pool, ties, min_score: as in `select`.
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
    selected = select(
        chosen, rejected, selection_ratio=selection_ratio, scores=scores, pool=pool, ties=ties, min_score=min_score
    )
    return dpo_loss(*selected, beta=beta, label_smoothing=label_smoothing)


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
    check_label_smoothing(label_smoothing)
    return preference_loss(chosen, rejected, pair_loss=partial(sigmoid, label_smoothing=label_smoothing), beta=beta)


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
    check_gamma(gamma)
    check_label_smoothing(label_smoothing)
    pair_loss = partial(sigmoid, gamma=gamma, label_smoothing=label_smoothing)
    return preference_loss(chosen, rejected, pair_loss=pair_loss, beta=beta, reward=mean_logp)


def aot_loss(chosen: Response, rejected: Response, *, beta: float, label_smoothing: float = 0.0) -> PreferenceLoss:
    """AOT, paired (Melnyk et al. 2024): the sorted policy margins of the batch against its sorted reference margins.

    Policy margin: Σ w·log π_θ(y_w) − Σ w·log π_θ(y_l); reference margin likewise. The k-th lowest of one is compared
    with the k-th lowest of the other by the sigmoid loss. This is no function of the two log-ratios; the form that is
    (sorting chosen and rejected log-ratios) is `pair_losses.aot_unpaired`.

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l], with reference log-probs; their weights are honoured.
        beta, label_smoothing: as in `dpo_loss`.

    Returns:
        A `PreferenceLoss`; entry k of its losses belongs to a rank, not to pair k, and depends on the whole call. Its
        rewards are those of `dpo_loss`.

    Raises:
        TypeError, ValueError: as `dpo_loss`.
    """
    check_pair(chosen, rejected)
    policy = _weighted_sum(chosen, chosen.per_token_logps) - _weighted_sum(rejected, rejected.per_token_logps)
    reference = _weighted_sum(chosen, _reference(chosen)) - _weighted_sum(rejected, _reference(rejected))
    losses = aot_unpaired(policy, reference, beta=beta, label_smoothing=label_smoothing)
    return make_report(losses, chosen, rejected, summed_log_ratio, beta)


def sft_loss(chosen: Response, rejected: Response) -> PreferenceLoss:
    """The supervised baseline: −mean log π_θ(y_w), one value per pair; the rejected side is only reported.

    With weights from `select(..., scores=excess_loss_scores)` it is selective language modelling (Rho-1). As a term
    beside a preference loss (RPO, Pang et al. 2024, Eq. 1): `combine_losses`.

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l]; weights are honoured, a reference is not read. Where nothing
            is known of a rejected side, it may be [B 0].

    Returns:
        A `PreferenceLoss`; its rewards are the mean log-probs.

    Raises:
        TypeError, ValueError: responses that do not fit together.
    """
    check_pair(chosen, rejected)
    return make_report(-mean_logp(chosen), chosen, rejected, mean_logp, 1.0)


def token_sft_loss(chosen: Response, rejected: Response) -> PreferenceLoss:
    """`sft_loss` with every chosen *token* of the call counted alike, instead of every pair: TRL's "sft".

    The mean of its losses is −Σ w·log π_θ / Σ w over all chosen tokens of the call, so a loss depends on the lengths of
    the other pairs, and under gradient accumulation on the split into micro-batches.

    Args, Returns, Raises: as `sft_loss`.
    """
    check_pair(chosen, rejected)
    xp = _arrays.namespace(chosen.mask)
    tokens = xp.sum(chosen.token_weights)
    pairs_per_token = chosen.mask.shape[0] / xp.where(tokens == 0, 1.0, tokens)
    losses = -pairs_per_token * _weighted_sum(chosen, chosen.per_token_logps)
    return make_report(losses, chosen, rejected, mean_logp, 1.0)


def _check_losses(losses: Array, chosen: Response) -> None:
    _arrays.check_floating("what pair_loss returns", losses)
    if tuple(losses.shape) != (chosen.mask.shape[0],):
        raise ValueError(
            f"pair_loss must return one loss per pair, [B] = ({chosen.mask.shape[0]},); got {_arrays.describe(losses)}"
        )


def _reference(response: Response) -> Array:
    return _arrays.detach(required_reference(response))


def _weighted_sum(response: Response, logps: Array) -> Array:
    """Σ weight · log-prob over the tokens that count: [B]."""
    return _arrays.last_axis_sum(response.token_weights * masked(logps, response.mask))


def make_report(
    losses: Array, chosen: Response, rejected: Response, reward: Callable[[Response], Array], beta: float
) -> PreferenceLoss:
    """`losses` with what is reported beside them: β · reward of all tokens and of the weighted ones, detached."""
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
