"""What a response is worth: the fourth arrow.

In: a `Response`. Out: one number per response [B], at least float32, without β; gradient to the policy's log-probs.
A token counts by its weight, so a response that `select` has weighted is rewarded for its selected tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.divergences import Divergence
from selective_pref.response import Response, masked

Reward: TypeAlias = Callable[[Response], Array]
"""A response → what it is worth [B], without β. It honours `Response.token_weights`."""


def summed_log_ratio(response: Response, *, divergence: Divergence | None = None) -> Array:
    """The selective alignment reward R(y), Eq. 8: Σ_i w_i · [log π_θ(y_i) − log π_ref(y_i)].

    With every weight 1 it is DPO's log-ratio (Eq. 3 without β and log Z). A response without tokens is worth 0. A
    non-finite log-prob inside the mask makes the reward non-finite even where the weight is 0.

    Args:
        response: per_token_logps [B T] with a reference.
        divergence: f-DPO's transform of the sum, of `selective_pref.divergences`; None for DPO's reverse KL.

    Returns:
        [B], at least float32, nats.

    Raises:
        ValueError: the reference is missing.
    """
    total = _arrays.last_axis_sum(response.token_weights * response.log_ratios)
    return total if divergence is None else divergence(total)


def mean_log_ratio(response: Response, *, divergence: Divergence | None = None) -> Array:
    """`summed_log_ratio`, transformed or not, over the weight of the tokens: Σ_i w_i · log-ratio_i / Σ_i w_i.

    The reward of IPO and of length-normalised DPO (TRL's "sigmoid_norm"). A response without tokens is worth 0.

    Args:
        response, divergence: as in `summed_log_ratio`.

    Returns:
        [B], at least float32, nats per token.

    Raises:
        ValueError: the reference is missing.
    """
    return summed_log_ratio(response, divergence=divergence) / _token_count(response)


def mean_logp(response: Response) -> Array:
    """SimPO's length-normalised reward without β (Meng et al. 2024, Eq. 4): Σ_i w_i log π_θ(y_i) / Σ_i w_i.

    Its negative is the mean negative log-likelihood of supervised training. A response without tokens is worth 0.

    Args:
        response: per_token_logps [B T]; a reference is not read.

    Returns:
        [B], at least float32, nats per token.
    """
    total = _arrays.last_axis_sum(response.token_weights * masked(response.per_token_logps, response.mask))
    return total / _token_count(response)


def _token_count(response: Response) -> Array:
    """Σ_i w_i of each response [B], and 1 where that is 0."""
    count = _arrays.last_axis_sum(response.token_weights)
    return _arrays.namespace(count).where(count == 0, 1.0, count)
