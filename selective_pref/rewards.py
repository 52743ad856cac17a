"""What a response is worth: the fourth arrow.

In: a `Response`. Out: one number per response [B], at least float32, without β; gradient to the policy's log-probs.
A token counts by its weight, so a response that `select` has weighted is rewarded for its selected tokens only.
"""

from __future__ import annotations

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.response import Response, masked


def summed_log_ratio(response: Response) -> Array:
    """The selective alignment reward R(y), Eq. 8: Σ_i w_i · [log π_θ(y_i) − log π_ref(y_i)].

    With every weight 1 it is DPO's log-ratio (Eq. 3 without β and log Z). A response without tokens is worth 0. A
    non-finite log-prob inside the mask makes the reward non-finite even where the weight is 0.

    Args:
        response: per_token_logps [B T] with a reference.

    Returns:
        [B], at least float32, nats.

    Raises:
        ValueError: the reference is missing.
    """
    return _arrays.last_axis_sum(response.token_weights * response.log_ratios)


def mean_logp(response: Response) -> Array:
    """SimPO's length-normalised reward without β (Meng et al. 2024, Eq. 4): Σ_i w_i log π_θ(y_i) / Σ_i w_i.

    Its negative is the mean negative log-likelihood of supervised training. A response without tokens is worth 0.

    Args:
        response: per_token_logps [B T]; a reference is not read.

    Returns:
        [B], at least float32, nats per token.
    """
    xp = _arrays.namespace(response.per_token_logps)
    weights = response.token_weights
    total = _arrays.last_axis_sum(weights * masked(response.per_token_logps, response.mask))
    count = _arrays.last_axis_sum(weights)
    return total / xp.where(count == 0, xp.ones_like(count), count)
