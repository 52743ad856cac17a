"""Rewards of the two sides → one loss per pair: the last arrow, as functions that can be exchanged.

In: the rewards of the chosen and of the rejected responses [B], in nats and without β (`summed_log_ratio`,
`mean_log_ratio`, `mean_logp`), and β. Out: losses [B], at least float32, with gradients to both rewards. Responses,
tokens and selection are unknown here: `preference_loss` brings the two ends together, and whatever weights its
responses carry make any of these losses selective.

    >>> import numpy as np
    >>> chosen_rewards, rejected_rewards = np.array([3.0, -1.0]), np.array([1.0, 1.0])
    >>> hinge(chosen_rewards, rejected_rewards, beta=0.25)
    array([0.5, 1.5])

A loss of your own is any function of this form: (chosen_rewards, rejected_rewards, *, beta) → losses. Bind what else
it needs with `functools.partial`. The names are those of TRL's `loss_type`. In the formulas ρ_w and ρ_l are the two
rewards, m = β(ρ_w − ρ_l) is the margin, and softplus(x) = log(1 + e^x) = −log σ(−x).

A reward that is infinite or NaN makes the loss of its pair NaN: a broken log-prob must not pass for a perfect margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array

__all__ = [
    "PairLoss",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "discopop",
    "exo_pair",
    "hinge",
    "ipo",
    "nca_pair",
    "robust",
    "sigmoid",
    "sppo_hard",
]


PairLoss: TypeAlias = Callable[..., Array]
"""(chosen_rewards [B], rejected_rewards [B], *, beta) → losses [B]."""


def sigmoid(
    chosen_rewards: Array, rejected_rewards: Array, *, beta: float, gamma: float = 0.0, label_smoothing: float = 0.0
) -> Array:
    """DPO's loss (Rafailov et al. 2023, Eq. 7): softplus(−(m − γ)), that is −log σ(m − γ).

    With `mean_log_ratio` as reward it is TRL's "sigmoid_norm", with `mean_logp` SimPO (Meng et al. 2024, Eq. 6).

    Args:
        chosen_rewards, rejected_rewards: [B] each, real floating, without β.
        beta: above 0.
        gamma: target margin in units of β·reward, a finite number at least 0.
        label_smoothing: assumed share of flipped labels ε in [0, 0.5), conservative DPO: (1 − ε)·loss + ε·loss of
            the flipped pair. (TRL's "sigmoid" ignores the option.)

    Returns:
        Losses [B], at least float32.

    Raises:
        TypeError, ValueError: a number out of range, or rewards that are not two arrays [B] of one library.
    """
    check_gamma(gamma)
    check_label_smoothing(label_smoothing)
    margins = _finite(_margins(chosen_rewards, rejected_rewards, beta) - gamma)
    if label_smoothing == 0:
        return _softplus(-margins)
    return (1 - label_smoothing) * _softplus(-margins) + label_smoothing * _softplus(margins)


def hinge(chosen_rewards: Array, rejected_rewards: Array, *, beta: float) -> Array:
    """The hinge loss of SLiC-HF (Zhao et al. 2023) on DPO's margin, as in RSO (Liu et al. 2024): max(0, 1 − m).

    Args, Returns, Raises: as `sigmoid`.
    """
    short = 1 - _finite(_margins(chosen_rewards, rejected_rewards, beta))
    xp = _arrays.namespace(short)
    # A factor of 0, 1 or NaN: where the margin is NaN, so is the gradient.
    return short * xp.where(short <= 0, xp.zeros_like(short), xp.where(xp.isnan(short), short, xp.ones_like(short)))


def ipo(chosen_rewards: Array, rejected_rewards: Array, *, beta: float) -> Array:
    """IPO (Azar et al. 2023, Eq. 17): (ρ_w − ρ_l − 1/(2β))², with the paper's τ for β.

    Take `mean_log_ratio` as reward: the authors average over tokens, and so does TRL. With sums the target margin
    of 1/(2β) nats is for the whole response.

    Args, Returns, Raises: as `sigmoid`.
    """
    margins = _finite(_margins(chosen_rewards, rejected_rewards, 1.0))
    _arrays.check_positive("beta", beta)
    return (margins - 1 / (2 * beta)) ** 2


def robust(chosen_rewards: Array, rejected_rewards: Array, *, beta: float, label_smoothing: float) -> Array:
    """Robust DPO (Chowdhury et al. 2024): [(1 − ε)·softplus(−m) − ε·softplus(m)] / (1 − 2ε).

    The mean over labels of which a share ε is flipped at random is DPO's loss of the true labels; single losses may
    be negative.

    Args:
        chosen_rewards, rejected_rewards, beta: as in `sigmoid`.
        label_smoothing: the share ε of flipped labels, in [0, 0.5).

    Returns, Raises: as `sigmoid`.
    """
    check_label_smoothing(label_smoothing)
    margins = _finite(_margins(chosen_rewards, rejected_rewards, beta))
    clean, flipped = _softplus(-margins), _softplus(margins)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair(chosen_rewards: Array, rejected_rewards: Array, *, beta: float, label_smoothing: float) -> Array:
    """EXO for pairs (Ji et al. 2024, Eq. 16): KL from (σ(m), σ(−m)) to the label distribution (1 − ε, ε).

    σ(m)·[log σ(m) − log(1 − ε)] + σ(−m)·[log σ(−m) − log ε].

    Args:
        chosen_rewards, rejected_rewards, beta: as in `sigmoid`.
        label_smoothing: ε in (0, 0.5); the paper uses 1e-3. At 0 the loss would be infinite.

    Returns, Raises: as `sigmoid`.
    """
    check_label_smoothing(label_smoothing)
    if label_smoothing == 0:
        raise ValueError("label_smoothing of exo_pair must be above 0, where its loss is infinite; the paper uses 1e-3")
    margins = _finite(_margins(chosen_rewards, rejected_rewards, beta))
    log_chosen, log_rejected = -_softplus(-margins), -_softplus(margins)
    return _exp(log_chosen) * (log_chosen - math.log1p(-label_smoothing)) + _exp(log_rejected) * (
        log_rejected - math.log(label_smoothing)
    )


def nca_pair(chosen_rewards: Array, rejected_rewards: Array, *, beta: float) -> Array:
    """NCA for pairs (Chen et al. 2024, K = 2): softplus(−βρ_w) + ½·softplus(βρ_w) + ½·softplus(βρ_l).

    Args, Returns, Raises: as `sigmoid`.
    """
    chosen, rejected = _scaled(chosen_rewards, rejected_rewards, beta)
    return _softplus(-chosen) + 0.5 * _softplus(chosen) + 0.5 * _softplus(rejected)


def bco_pair(chosen_rewards: Array, rejected_rewards: Array, *, beta: float, delta: float | Array = 0.0) -> Array:
    """BCO for pairs (Jung et al. 2024): softplus(−(βρ_w − δ)) + softplus(βρ_l − δ).

    Args:
        chosen_rewards, rejected_rewards, beta: as in `sigmoid`.
        delta: the reward shift δ, in units of β·reward: a finite number, or an array without axes, whose value is
            not looked at and which gets no gradient. In the paper it is a running mean of ½(βρ_w + βρ_l), which the
            caller keeps; TRL 1.16 has no shift.

    Returns, Raises: as `sigmoid`.
    """
    chosen, rejected = _scaled(chosen_rewards, rejected_rewards, beta)
    if _arrays.is_scalar_array("delta", delta):
        delta = _arrays.detach(delta)
    else:
        _arrays.check_finite_number("delta", delta)
    return _softplus(delta - chosen) + _softplus(rejected - delta)


def sppo_hard(chosen_rewards: Array, rejected_rewards: Array, *, beta: float) -> Array:
    """SPPO with hard labels (Wu et al. 2024, Eq. 4.7, P = 1 and 0): (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))².

    Args, Returns, Raises: as `sigmoid`.
    """
    chosen, rejected = _scaled(chosen_rewards, rejected_rewards, 1.0)
    _arrays.check_positive("beta", beta)
    target = 0.5 / beta
    return (chosen - target) ** 2 + (rejected + target) ** 2


def aot_unpaired(chosen_rewards: Array, rejected_rewards: Array, *, beta: float, label_smoothing: float = 0.0) -> Array:
    """AOT, unpaired (Melnyk et al. 2024): `sigmoid` of the two sides' *sorted* rewards.

    Asks the distribution of chosen rewards to dominate that of the rejected ones: the k-th lowest of one side is
    compared with the k-th lowest of the other. So entry k of the result belongs to a rank, not to pair k, and depends
    on the whole call (the micro-batch). The paired form, which sorts policy and reference instead, is `aot_loss`.

    Args, Returns, Raises: as `sigmoid`; a reward that is not finite makes the loss of the last rank NaN.
    """
    check_rewards(chosen_rewards, rejected_rewards)
    xp = _arrays.namespace(chosen_rewards)
    # Made finite first: an infinite reward becomes NaN, and a NaN sorts last in every library.
    chosen, rejected = (xp.sort(_finite(_arrays.upcast(side))) for side in (chosen_rewards, rejected_rewards))
    return sigmoid(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def apo_zero(chosen_rewards: Array, rejected_rewards: Array, *, beta: float) -> Array:
    """APO-zero (D'Oosterlinck et al. 2024, Eq. 7): σ(−βρ_w) + σ(βρ_l): chosen up, rejected down.

    For chosen responses that are better than what the model says by itself.

    Args, Returns, Raises: as `sigmoid`.
    """
    chosen, rejected = _scaled(chosen_rewards, rejected_rewards, beta)
    return _sigma(-chosen) + _sigma(rejected)


def apo_down(chosen_rewards: Array, rejected_rewards: Array, *, beta: float) -> Array:
    """APO-down (D'Oosterlinck et al. 2024, Eq. 8): σ(βρ_w) + σ(−m): both down, the rejected one further.

    For chosen responses that are worse than what the model says by itself.

    Args, Returns, Raises: as `sigmoid`.
    """
    chosen, rejected = _scaled(chosen_rewards, rejected_rewards, beta)
    return _sigma(chosen) + _sigma(rejected - chosen)


def discopop(chosen_rewards: Array, rejected_rewards: Array, *, beta: float, tau: float = 0.05) -> Array:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, Eq. 5): σ(−m/τ)·softplus(−m) + σ(m/τ)·e^−m.

    Computed from logarithms, so that a large negative margin is 0·∞ nowhere.

    Args:
        chosen_rewards, rejected_rewards, beta: as in `sigmoid`.
        tau: temperature of the blend, in (0, 1]; the paper uses 0.05.

    Returns, Raises: as `sigmoid`.
    """
    _arrays.check_positive("tau", tau)
    if tau > 1:
        raise ValueError(f"tau must be in (0, 1]; got {tau!r}: above 1 the loss grows like e^−m")
    margins = _finite(_margins(chosen_rewards, rejected_rewards, beta))
    exponential = _exp(-margins - _softplus(-margins / tau))  # log σ(m/τ) = −softplus(−m/τ)
    return _sigma(-margins / tau) * _softplus(-margins) + exponential


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises unless `label_smoothing` is a number in [0, 0.5)."""
    _arrays.check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5); got {label_smoothing!r}")


def check_gamma(gamma: float) -> None:
    """Raises unless `gamma` is a finite number, at least 0."""
    _arrays.check_number("gamma", gamma)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be a finite number, at least 0; got {gamma!r}")


def check_rewards(chosen_rewards: Array, rejected_rewards: Array) -> None:
    """Raises unless the two are floating arrays [B] of one library, device and length."""
    for name, rewards in (("chosen_rewards", chosen_rewards), ("rejected_rewards", rejected_rewards)):
        _arrays.check_floating(name, rewards)
    if chosen_rewards.ndim != 1 or tuple(chosen_rewards.shape) != tuple(rejected_rewards.shape):
        raise ValueError(
            "chosen_rewards and rejected_rewards must both be [B]; got "
            f"{_arrays.describe(chosen_rewards)} and {_arrays.describe(rejected_rewards)}"
        )
    _arrays.check_same_home("rejected_rewards", rejected_rewards, "chosen_rewards", chosen_rewards)


def _margins(chosen_rewards: Array, rejected_rewards: Array, beta: float) -> Array:
    """m = β(ρ_w − ρ_l) [B], in at least float32."""
    _arrays.check_positive("beta", beta)
    check_rewards(chosen_rewards, rejected_rewards)
    return beta * (_arrays.upcast(chosen_rewards) - _arrays.upcast(rejected_rewards))


def _scaled(chosen_rewards: Array, rejected_rewards: Array, beta: float) -> tuple[Array, Array]:
    """(βρ_w, βρ_l), both NaN where one of the two is not finite: a side that is broken breaks its pair."""
    _arrays.check_positive("beta", beta)
    check_rewards(chosen_rewards, rejected_rewards)
    chosen, rejected = beta * _arrays.upcast(chosen_rewards), beta * _arrays.upcast(rejected_rewards)
    return chosen + 0.0 * (chosen + rejected), rejected + 0.0 * (chosen + rejected)


def _finite(array: Array) -> Array:
    """`array`, with NaN for an infinity. A margin of +∞ would be a perfect loss although a log-prob is broken."""
    return array + 0.0 * array


def _softplus(array: Array) -> Array:
    xp = _arrays.namespace(array)
    return xp.logaddexp(xp.zeros_like(array), array)


def _sigma(array: Array) -> Array:
    """σ(x), from its logarithm: exact for large |x|, gradients included."""
    return _exp(-_softplus(-array))


def _exp(array: Array) -> Array:
    return _arrays.namespace(array).exp(array)
