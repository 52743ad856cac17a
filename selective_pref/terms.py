"""Losses of pairs put together: sums of losses, and pairs that count for more than others.

In: a `PreferenceLoss`, or several of the same pairs. Out: another one, whose `loss` is what to differentiate.

    >>> import numpy as np
    >>> from selective_pref import Response, dpo_loss, sft_loss
    >>> logps, mask = np.array([[-1.0, -3.0]]), np.ones((1, 2), dtype=bool)
    >>> same = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=logps)
    >>> out = combine_losses((1.0, dpo_loss(same, same, beta=0.1)), (0.5, sft_loss(same, same)))
    >>> float(out.loss) == float(np.log(2) + 0.5 * 2.0)
    True
"""

from __future__ import annotations

import math
from dataclasses import replace

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.losses import PreferenceLoss


def combine_losses(*terms: tuple[float, PreferenceLoss]) -> PreferenceLoss:
    """Σ weight · losses of several losses of the same pairs; what is reported (rewards, weights) is the first one's.

    RPO (Pang et al. 2024, Eq. 1) is ``combine_losses((1.0, dpo), (alpha, sft_loss(chosen, rejected)))``. Give the
    supervised term the responses as they were before `select` to train it on every token, or the selected ones to train
    it on those. MPO (Wang et al. 2024) is a sum of "sigmoid", "bco_pair" and "sft".

    Args:
        terms: pairs (weight, loss): a finite number at least 0, and a `PreferenceLoss` of the same B pairs.

    Returns:
        A `PreferenceLoss`.

    Raises:
        TypeError, ValueError: no term, a weight out of range, or losses of different length, library or device.
    """
    if not terms:
        raise ValueError("combine_losses needs at least one term (weight, PreferenceLoss); got none")
    for term in terms:
        if not isinstance(term, tuple) or len(term) != 2 or not isinstance(term[1], PreferenceLoss):
            raise TypeError(f"a term must be a tuple (weight, PreferenceLoss); got {type(term).__name__}")
    first = terms[0][1]
    for weight, term in terms:
        _arrays.check_number("the weight of a term", weight)
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of a term must be a finite number, at least 0; got {weight!r}")
        _check_same_pairs("a term's losses", term.losses, first)
    losses = terms[0][0] * first.losses
    for weight, term in terms[1:]:
        losses = losses + weight * term.losses
    return replace(first, losses=losses)


def weigh_pairs(out: PreferenceLoss, pair_weights: Array, *, total: float | Array | None = None) -> PreferenceLoss:
    """The loss as a weighted mean over pairs: `loss` becomes Σ weight · loss / total.

    Every entry of `losses` is multiplied by B · weight / total, so that their plain mean is that. A batch whose weights
    are all 0 has loss 0 and gradient 0 (`diagnostics` then reports a `pair_weight` of 0): to refuse it would wait for
    the device. A negative, infinite or NaN weight makes the loss of its pair NaN, and a pair whose loss is not finite
    stays so at weight 0.

    Args:
        out: losses of B pairs. (Not of `aot_loss` and `aot_unpaired`, whose losses belong to ranks and not to pairs.)
        pair_weights: real floating [B], at least 0; treated as constants.
        total: what the sum is divided by; None for the sum of these weights. With one pair per micro-batch a weight
            would cancel against its own sum: pass the weights' sum over the whole optimiser step, divided by the number
            of micro-batches whose losses are averaged; or B, where the weights' mean over the data set is 1. A number
            above 0, or an array without axes.

    Returns:
        A `PreferenceLoss` with `losses` multiplied and `pair_weights` set.

    Raises:
        TypeError, ValueError: weights that are not floating [B] of the losses' library and device; a total out of
            range.
    """
    _arrays.check_floating("pair_weights", pair_weights)
    _check_same_pairs("pair_weights", pair_weights, out)
    xp = _arrays.namespace(out.losses)
    weights = xp.astype(_arrays.detach(pair_weights), out.losses.dtype)
    weights = xp.where((weights < 0) | ~xp.isfinite(weights), xp.nan, weights)
    if total is None:
        total = xp.sum(weights)
    elif _arrays.is_scalar_array("total", total):
        total = xp.astype(_arrays.detach(total), weights.dtype)
    else:
        _arrays.check_positive("total", total)
        total = total * xp.ones_like(weights[0])
    share = out.losses.shape[0] * weights / xp.where(total == 0, 1.0, total)
    return replace(out, losses=share * out.losses, pair_weights=weights)


def _check_same_pairs(name: str, array: Array, out: PreferenceLoss) -> None:
    if tuple(array.shape) != tuple(out.losses.shape):
        raise ValueError(f"{name} must be [B] = {tuple(out.losses.shape)}; got {_arrays.describe(array)}")
    _arrays.check_same_home(name, array, "losses", out.losses)
