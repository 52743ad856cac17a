"""What a log-ratio is worth when policy and reference are held together by another divergence than the reverse KL.

In: sequence log-ratios x = log π_θ(y) − log π_ref(y) [B]. Out: rewards without β [B]: f′(e^x) for the f-divergence
that regularises the policy (f-DPO: Wang et al. 2024, "Beyond Reverse KL"). The reverse KL, whose
f′ is the logarithm, gives DPO's reward, x itself. Give one of these to a reward, and the reward to a loss:

    >>> import numpy as np
    >>> from functools import partial
    >>> from selective_pref import Response, divergences, pair_losses, preference_loss, summed_log_ratio
    >>> logps, mask = np.array([[-1.0, -2.0]]), np.ones((1, 2), dtype=bool)
    >>> one = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=logps - 1)
    >>> two = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=logps)
    >>> reward = partial(summed_log_ratio, divergence=divergences.forward_kl)
    >>> out = preference_loss(one, two, pair_loss=pair_losses.sigmoid, beta=1.0, reward=reward)
    >>> float(out.chosen_rewards[0]) == -float(np.expm1(-2.0))
    True

Only losses of the *difference* of two rewards may use them (sigmoid, hinge, ipo, exo_pair, robust, discopop): the
term log Z(x) cancels there alone. An exponential that overflows makes the loss of its pair non-finite; TRL cuts the
exponent of the α-divergence at 80 instead, beyond which a pair has no gradient and nothing says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array

__all__ = ["Divergence", "alpha_divergence", "forward_kl", "js_divergence", "reverse_kl"]

Divergence: TypeAlias = Callable[[Array], Array]
"""Log-ratios x [B] → f′(e^x) [B]."""


def reverse_kl(log_ratios: Array) -> Array:
    """DPO's own: f′(u) = log u (up to a constant, which cancels), so x itself.

    Args:
        log_ratios: x [B], real floating, nats.

    Returns:
        Rewards without β [B], at least float32; NaN where x is not finite.

    Raises:
        TypeError: x is no floating array.
    """
    return _checked(log_ratios)


def forward_kl(log_ratios: Array) -> Array:
    """Forward KL: f′(u) = 1 − 1/u, so 1 − e^−x.

    Args, Returns, Raises: as `reverse_kl`.
    """
    x = _checked(log_ratios)
    return -_arrays.namespace(x).expm1(-x)


def js_divergence(log_ratios: Array) -> Array:
    """Jensen-Shannon: f′(u) = log(2u / (1 + u)), so log 2 + log σ(x).

    Args, Returns, Raises: as `reverse_kl`.
    """
    x = _checked(log_ratios)
    xp = _arrays.namespace(x)
    return math.log(2) - xp.logaddexp(xp.zeros_like(x), -x)


def alpha_divergence(log_ratios: Array, *, alpha: float) -> Array:
    """α-divergence in TRL's parametrisation: f′(u) = (u^(α−1) − 1) / (α − 1), so (e^((α−1)x) − 1) / (α − 1).

    The paper's α is 1 − `alpha`. At 1 it is the reverse KL, at 0 the forward KL.

    Args:
        log_ratios: as `reverse_kl`.
        alpha: a finite number; TRL's `f_alpha_divergence_coef`, by default 0.5 there. Bind it with
            `functools.partial(alpha_divergence, alpha=0.5)`.

    Returns, Raises: as `reverse_kl`; TypeError or ValueError for another `alpha`.
    """
    _arrays.check_finite_number("alpha", alpha)
    x = _checked(log_ratios)
    if alpha == 1:
        return x
    return _arrays.namespace(x).expm1((alpha - 1) * x) / (alpha - 1)


def _checked(log_ratios: Array) -> Array:
    """In at least float32, with NaN for an infinity, which some of these functions would map to a finite reward."""
    _arrays.check_floating("log_ratios", log_ratios)
    wide = _arrays.upcast(log_ratios)
    return wide + 0.0 * wide
