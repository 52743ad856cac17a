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


_LIMBS = 8  # how many of them `ratio_digits` holds: 24 decimals


def top_fraction_weights(
    scores: Array,
    mask: Array,
    selection_ratio: float | Array,
    *,
    ties: Ties = "share",
    min_score: float | None = None,
) -> Array:
    """Keeps the top K = ceil(selection_ratio · n) of each row's n unmasked tokens (the paper's top k %, Eq. 8).

    K is exact: the ratio is read as the decimal it prints as, in integer arithmetic, so 0.07 of 100 tokens is 7 on
    every device. K ≥ 1 where n ≥ 1.

    Args:
        scores: real floating [B T]; higher is kept first. ±inf is legal: it sorts last or first.
        mask: bool [B T], True where a token may be kept.
        selection_ratio: share of tokens to keep, in (0, 1]. At 1 the weights equal the mask. Under a compiler, a ratio
            that changes from step to step is given as the array of `ratio_digits`.
        ties: "share" splits what is left of K equally among the tokens at the threshold, so that the weights
            add up to K and no token is favoured by its position; "first" keeps the lowest index (a hard 0/1 mask);
            "all" keeps every token at the threshold (more than K).
        min_score: a finite number τ, or None. Of the K tokens only those with a score above τ keep their weight, so
            the budget need not be filled; with `selection_ratio=1` the threshold alone decides.

    Returns:
        Weights [B T], at least float32. A NaN score inside the mask gets a NaN weight, and so may others of its row:
        there is no top of such a row, and no loss built on it may look healthy.

    Raises:
        TypeError: scores not floating, mask not bool, ratio not a number, mixed libraries.
        ValueError: shapes or devices that differ, a ratio outside (0, 1], an unknown `ties`, a τ that is not finite.
    """
    if min_score is not None:
        _arrays.check_finite_number("min_score", min_score)
        weights = top_fraction_weights(scores, mask, selection_ratio, ties=ties)
        return _arrays.namespace(scores).where(_arrays.upcast(scores) <= min_score, 0.0, weights)  # a NaN score stays
    if ties not in ("share", "first", "all"):
        raise ValueError(f"ties must be 'share', 'first' or 'all'; got {ties!r}")
    xp, scores = _checked(scores, mask, selection_ratio)
    if scores.shape[1] == 0:
        return xp.zeros_like(scores)
    ratio = _digits(selection_ratio)
    keep = _ceil(ratio, _count(mask, xp))
    keep_in_full_row = None if _is_array(selection_ratio) else _ceil(ratio, scores.shape[1])
    threshold, unordered = _kth_largest(scores, mask, keep, keep_in_full_row, xp)
    above, kept = mask & (scores > threshold), mask & ~(scores < threshold)  # kept: NaN too
    if ties == "all":
        return xp.where(kept, xp.where(unordered, xp.nan, xp.ones_like(threshold)), 0.0)
    above_count = _count(above, xp)
    if ties == "first":
        place = _arrays.running_count(kept & ~above)
        kept = above | (kept & (place <= keep - above_count)) | (mask & xp.isnan(scores))
        return xp.where(kept, xp.where(unordered, xp.nan, xp.ones_like(threshold)), 0.0)
    left = xp.astype(keep - above_count, scores.dtype)
    tied = xp.astype(_count(kept, xp) - above_count, scores.dtype)
    share = xp.where(unordered, xp.nan, left / xp.where(tied == 0, 1.0, tied))
    return xp.where(above, 1.0, xp.where(kept, share, 0.0))


def quantile_weights(scores: Array, mask: Array, selection_ratio: float | Array) -> Array:
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
    ratio, count = _digits(selection_ratio), _count(mask, xp)
    keep = _floor(ratio, xp.where(count == 0, 0, count - 1)) + 1
    keep_in_full_row = None if _is_array(selection_ratio) else _floor(ratio, scores.shape[1] - 1) + 1
    threshold, unordered = _kth_largest(scores, mask, keep, keep_in_full_row, xp)
    return xp.where(mask & ~(scores < threshold), xp.where(unordered, xp.nan, xp.ones_like(threshold)), 0.0)


def ratio_digits(selection_ratio: float, *, like: Array) -> Array:
    """The ratio's decimals as an array, so that a compiled function can take another ratio in every step.

    A Python number is a constant of compiled code: each new ratio compiles it again, and torch.compile stops after
    eight. The array is an input like any other, and the counts K are the same, exactly. Call this *outside* the
    compiled function and pass the result as `selection_ratio`.

    Args:
        selection_ratio: a number in (0, 1] of at most 24 decimals.
        like: an array of the library, and on the device, of the scores.

    Returns:
        Integers [9]: the whole part, then the decimals, three by three.

    Raises:
        TypeError, ValueError: no number in (0, 1], or more decimals than that.

    Example:
        >>> import numpy as np
        >>> ratio_digits(0.1234, like=np.zeros(1))
        array([  0, 123, 400,   0,   0,   0,   0,   0,   0], dtype=int32)
    """
    if _is_array(selection_ratio):
        raise TypeError(f"selection_ratio must be a number; got {_arrays.describe(selection_ratio)}")
    check_ratio(selection_ratio)
    whole, limbs = _digits(selection_ratio)
    if len(limbs) > _LIMBS:
        raise ValueError(
            f"selection_ratio must have at most {3 * _LIMBS} decimals here; got {selection_ratio!r}: round it"
        )
    xp = _arrays.namespace(like)
    digits = [whole, *limbs, *[0] * (_LIMBS - len(limbs))]
    return xp.asarray(digits, dtype=xp.int32, device=_arrays.compat.device(like))


def check_ratio(selection_ratio: Any) -> None:
    """Raises TypeError or ValueError unless `selection_ratio` is a number in (0, 1], or has the form of its digits."""
    if _is_array(selection_ratio):
        if tuple(selection_ratio.shape) != (_LIMBS + 1,) or not _arrays.namespace(selection_ratio).isdtype(
            selection_ratio.dtype, "integral"
        ):
            raise TypeError(
                "selection_ratio must be a number, or the integer array [9] that ratio_digits returns; got "
                f"{_arrays.describe(selection_ratio)}"
            )
        return
    if not isinstance(selection_ratio, Decimal):
        _arrays.check_number("selection_ratio", selection_ratio)
    if selection_ratio != selection_ratio or not 0 < selection_ratio <= 1:  # Decimal NaN cannot be ordered
        raise ValueError(
            f"selection_ratio must be in (0, 1], the share of tokens that is kept; got {selection_ratio!r}"
            + (" (a percentage? 40 % is 0.4)" if 1 < float(selection_ratio) <= 100 else "")
        )


def _is_array(selection_ratio: Any) -> bool:
    """Whether it is an array with axes. (To array libraries a NumPy scalar is an array, too; here it is a number.)"""
    if isinstance(selection_ratio, (float, int, Decimal)):  # no array; the question below is one that dynamo cannot ask
        return False
    return _arrays.compat.is_array_api_obj(selection_ratio) and selection_ratio.ndim > 0


def _checked(scores: Array, mask: Array, selection_ratio: float | Array) -> tuple[Any, Array]:
    """The namespace, and the scores detached and in at least float32."""
    check_ratio(selection_ratio)
    _arrays.check_floating("scores", scores)
    _arrays.check_array("mask", mask)
    xp = _arrays.namespace(scores)
    _arrays.check_same_home("mask", mask, "scores", scores)
    if _is_array(selection_ratio):
        _arrays.check_same_home("selection_ratio", selection_ratio, "scores", scores)
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


def _kth_largest(scores: Array, mask: Array, k: Array, k_in_full_row: int | None, xp: Any) -> tuple[Array, Array]:
    """The k-th largest unmasked score of each row, and whether its unmasked scores hold a NaN: both [B 1].

    Where the ratio is an array, no rank is known before the values are (None), and the rows are sorted. Else a
    selection algorithm is faster, which wants one rank, while the ranks k [B 1] differ. So as many masked cells as
    a row's k falls short of the k of a row without masked cells are filled with +inf, the others with −inf: the
    wanted score then has rank `k_in_full_row` in every row. (There are always enough masked cells, since k grows by
    at most one per token.) In a row without tokens the result means nothing.
    """
    gap = ~mask
    if k_in_full_row is None:
        filled = xp.where(gap, -xp.inf, scores)
        place = xp.arange(scores.shape[1], 0, -1, dtype=k.dtype, device=_arrays.compat.device(scores))
        here = xp.where(
            place == k, xp.sort(filled, axis=-1), -xp.inf
        )  # (take_along_axis would compile each width anew)
        return xp.max(here, axis=-1, keepdims=True), xp.isnan(xp.max(filled, axis=-1, keepdims=True))
    place = _arrays.running_count(gap)
    filled = xp.where(gap & (place <= k_in_full_row - k), xp.inf, xp.where(gap, -xp.inf, scores))
    return _arrays.kth_largest(filled, k_in_full_row), xp.isnan(xp.max(filled, axis=-1, keepdims=True))


_Digits: TypeAlias = tuple[Any, list[Any]]
"""The whole part of a ratio and its decimals, three by three: integers, or integer arrays without axes."""


def _ceil(ratio: _Digits, count: Any) -> Any:
    """ceil(ratio · count), exactly; `count` is an integer or an array of them."""
    whole, limbs = ratio
    return -_floor((-whole, [-limb for limb in limbs]), count)


def _floor(ratio: _Digits, count: Any) -> Any:
    """floor(ratio · count), exactly: long multiplication, the last decimals first; a floor of floors is a floor."""
    whole, limbs = ratio
    carry: Any = 0
    for limb in reversed(limbs):
        carry = (count * limb + carry) // _LIMB
    return count * whole + carry


def _digits(ratio: Any) -> _Digits:
    """The digits of `ratio` as printed: 0.07 → (0, [70]), 0.1234 → (0, [123, 400]), 1.0 → (1, [])."""
    if _is_array(ratio):
        return ratio[0], [ratio[place] for place in range(1, _LIMBS + 1)]
    if isinstance(ratio, float):
        # The same number again. Under torch.compile this makes a float argument a constant (one compilation per
        # value), which its symbolic floats, having no digits to print, would not be.
        numerator, denominator = ratio.as_integer_ratio()
        ratio = numerator / denominator
    mantissa, _, exponent = str(ratio).lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if int(whole or 0) and not exponent:
        return 1, []
    digits = "0" * (-int(exponent or 0) - len(whole)) + whole + decimals if exponent else decimals
    digits = digits.rstrip("0")
    return 0, [int(digits[i : i + 3].ljust(3, "0")) for i in range(0, len(digits), 3)]
