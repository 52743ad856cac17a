"""Which tokens count, and for how much: the third arrow. Knows scores, masks and a ratio; nothing of preferences.

In: scores [B T], mask [B T], the ratio of tokens to keep. Out: weights [B T] in [0, 1], 0 off the mask. Each row is
one pool. Comparisons carry no gradient, so none reaches the scores; no value is read back from the device.

    >>> import numpy as np
    >>> scores = np.array([[0.1, 0.9, 0.5, 0.5, 0.0]])
    >>> top_fraction_weights(scores, np.ones((1, 5), dtype=bool), 0.4)
    array([[0. , 1. , 0.5, 0.5, 0. ]])
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Literal, TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array

Ties: TypeAlias = Literal["share", "first", "all"]
"""What happens to tokens whose score equals the threshold; see `top_fraction_weights`."""

_LIMB = 1000  # decimal digits are taken three at a time: a product with a token count then fits 32-bit integers


def top_fraction_weights(scores: Array, mask: Array, selection_ratio: float, *, ties: Ties = "share") -> Array:
    """Keeps the top K = ceil(selection_ratio · n) of each row's n unmasked tokens (the paper's top k %, Eq. 8).

    K is exact: the ratio is read as the decimal it prints as, in integer arithmetic, so 0.07 of 100 tokens is 7 on
    every device. K ≥ 1 where n ≥ 1.

    Args:
        scores: real floating [B T]; higher is kept first. ±inf is legal: it sorts last or first.
        mask: bool [B T], True where a token may be kept.
        selection_ratio: share of tokens to keep, in (0, 1]. At 1 the weights equal the mask.
        ties: "share" splits what is left of K equally among the tokens at the threshold, so that the weights
            add up to K and no token is favoured by its position; "first" keeps the lowest index (a hard 0/1 mask);
            "all" keeps every token at the threshold (more than K).

    Returns:
        Weights [B T], at least float32. A NaN score inside the mask gets a NaN weight, and so may others of its row:
        there is no top of such a row, and no loss built on it may look healthy.

    Raises:
        TypeError: scores not floating, mask not bool, ratio not a number, mixed libraries.
        ValueError: shapes or devices that differ, a ratio outside (0, 1], an unknown `ties`.
    """
    if ties not in ("share", "first", "all"):
        raise ValueError(f"ties must be 'share', 'first' or 'all'; got {ties!r}")
    xp, scores = _checked(scores, mask, selection_ratio)
    if scores.shape[1] == 0:
        return xp.zeros_like(scores)
    limbs = _decimal_limbs(selection_ratio)
    keep = _ceil(limbs, _count(mask, xp))
    threshold, unordered = _kth_largest(scores, mask, keep, _ceil(limbs, scores.shape[1]), xp)
    above, kept = mask & (scores > threshold), mask & ~(scores < threshold)  # kept: NaN too
    if ties == "all":
        return xp.where(kept, xp.where(unordered, xp.nan, xp.ones_like(threshold)), 0.0)
    above_count = _count(above, xp)
    if ties == "first":
        place = xp.cumulative_sum(xp.astype(kept & ~above, xp.int32), axis=-1, dtype=xp.int32)
        kept = above | (kept & (place <= keep - above_count)) | (mask & xp.isnan(scores))
        return xp.where(kept, xp.where(unordered, xp.nan, xp.ones_like(threshold)), 0.0)
    left = xp.astype(keep - above_count, scores.dtype)
    tied = xp.astype(_count(kept, xp) - above_count, scores.dtype)
    share = xp.where(unordered, xp.nan, left / xp.where(tied == 0, 1.0, tied))
    return xp.where(above, 1.0, xp.where(kept, share, 0.0))


def quantile_weights(scores: Array, mask: Array, selection_ratio: float) -> Array:
    """The rule of the authors' released code: keep ``score >= quantile(1 − selection_ratio)``, ties kept.

    With linear interpolation the tokens at or above that quantile are the floor(ratio · (n − 1)) + 1 highest and
    everything tied with the last of them: 1 of 3, 2 of 4, 5 of 11 at ratio 0.4. It is computed as that count, in
    exact arithmetic; `torch.quantile` in float32 keeps one token fewer at some n (first n = 26). For comparison
    only: where all scores are equal it keeps every token.

    Args, Returns, Raises: as `top_fraction_weights`.
    """
    xp, scores = _checked(scores, mask, selection_ratio)
    if scores.shape[1] == 0:
        return xp.zeros_like(scores)
    limbs, count = _decimal_limbs(selection_ratio), _count(mask, xp)
    keep = _floor(limbs, xp.where(count == 0, 0, count - 1)) + 1
    threshold, unordered = _kth_largest(scores, mask, keep, _floor(limbs, scores.shape[1] - 1) + 1, xp)
    return xp.where(mask & ~(scores < threshold), xp.where(unordered, xp.nan, xp.ones_like(threshold)), 0.0)


def check_ratio(selection_ratio: float) -> None:
    """Raises TypeError or ValueError unless `selection_ratio` is a number in (0, 1]."""
    if not isinstance(selection_ratio, Decimal):
        _arrays.check_number("selection_ratio", selection_ratio)
    if selection_ratio != selection_ratio or not 0 < selection_ratio <= 1:  # Decimal NaN cannot be ordered
        raise ValueError(
            f"selection_ratio must be in (0, 1], the share of tokens that is kept; got {selection_ratio!r}"
            + (" (a percentage? 40 % is 0.4)" if 1 < float(selection_ratio) <= 100 else "")
        )


def _checked(scores: Array, mask: Array, selection_ratio: float) -> tuple[Any, Array]:
    """The namespace, and the scores detached and in at least float32."""
    check_ratio(selection_ratio)
    _arrays.check_floating("scores", scores)
    _arrays.check_array("mask", mask)
    xp = _arrays.namespace(scores)
    _arrays.check_same_home("mask", mask, "scores", scores)
    if scores.ndim != 2 or tuple(mask.shape) != tuple(scores.shape):
        raise ValueError(
            f"scores and mask must both be [B T]; got {_arrays.describe(scores)} and {_arrays.describe(mask)}"
        )
    if not xp.isdtype(mask.dtype, "bool"):
        raise TypeError(f"mask must be bool [B T] like scores {tuple(scores.shape)}; got {_arrays.describe(mask)}")
    return xp, _arrays.detach(_arrays.upcast(scores))


def _count(mask: Array, xp: Any) -> Array:
    """How many are True in each row: integer [B 1]."""
    count = xp.count_nonzero(mask, axis=-1, keepdims=True)
    if mask.shape[1] * _LIMB > xp.iinfo(count.dtype).max:
        raise ValueError(
            f"a pool of {mask.shape[1]} tokens is too large for {count.dtype} counts: use a smaller pool "
            "(pool='response' or 'pair'), or switch 64-bit integers on (JAX: jax_enable_x64)"
        )
    return count


def _kth_largest(scores: Array, mask: Array, k: Array, k_in_full_row: int, xp: Any) -> tuple[Array, Array]:
    """The k-th largest unmasked score of each row, and whether its unmasked scores hold a NaN: both [B 1].

    The ranks k [B 1] differ from row to row, but a selection algorithm wants one rank. So as many masked cells as
    a row's k falls short of the k of a row without masked cells are filled with +inf, the others with −inf: the
    wanted score then has rank `k_in_full_row` in every row. (There are always enough masked cells, since k grows by
    at most one per token.) In a row without tokens the result means nothing.
    """
    gap = ~mask
    place = xp.cumulative_sum(xp.astype(gap, xp.int32), axis=-1, dtype=xp.int32)
    filled = xp.where(gap & (place <= k_in_full_row - k), xp.inf, xp.where(gap, -xp.inf, scores))
    return _arrays.kth_largest(filled, k_in_full_row), xp.isnan(xp.max(filled, axis=-1, keepdims=True))


def _ceil(limbs: list[int], count: Any) -> Any:
    """ceil(ratio · count), exactly; `count` is an integer or an array of them."""
    return -_floor([-limb for limb in limbs], count) if limbs else count


def _floor(limbs: list[int], count: Any) -> Any:
    """floor(ratio · count), exactly: long multiplication, the last decimals first; a floor of floors is a floor."""
    if not limbs:
        return count
    *first, last = limbs
    whole = count * last // _LIMB
    for limb in reversed(first):
        whole = (count * limb + whole) // _LIMB
    return whole


def _decimal_limbs(ratio: float) -> list[int]:
    """The decimals of `ratio` as printed, three by three: 0.07 → [70], 0.1234 → [123, 400], 1.0 → []."""
    if isinstance(ratio, float):
        # The same number again. Under torch.compile this makes a float argument a constant (one compilation per
        # value), which its symbolic floats, having no digits to print, would not be.
        numerator, denominator = ratio.as_integer_ratio()
        ratio = numerator / denominator
    mantissa, _, exponent = str(ratio).lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if int(whole or 0) and not exponent:
        return []
    digits = "0" * (-int(exponent or 0) - len(whole)) + whole + decimals if exponent else decimals
    digits = digits.rstrip("0")
    return [int(digits[i : i + 3].ljust(3, "0")) for i in range(0, len(digits), 3)]
