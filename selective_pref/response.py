"""One side of a preference pair: what every method of this library starts from.

In: per-token log-probs of the policy (and of a reference), a mask of the tokens that count. Out: a checked,
frozen `Response`. Scores, weights, rewards and losses are functions of it.

    >>> import numpy as np
    >>> chosen = Response(
    ...     per_token_logps=np.array([[-1.0, -2.0, 0.0]]),
    ...     mask=np.array([[True, True, False]]),
    ...     ref_per_token_logps=np.array([[-1.5, -0.5, 0.0]]),
    ... )
    >>> chosen.log_ratios
    array([[ 0.5, -1.5,  0. ]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selective_pref import _arrays
from selective_pref._arrays import Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Response:
    """Per-token log-probs of B responses, with what is needed to score, select and reward them.

    Dims: B pairs, T token positions after the shift (entry t is the log-prob of the token it stands for, given
    what precedes that token). Natural logs, nats. Frozen: `dataclasses.replace` makes a changed copy. In JAX it is a
    pytree: a jitted function may take it and return it.

    Attributes:
        per_token_logps: log π_θ(y_t | x, y_<t), real floating [B T]. The only field gradients flow into.
        mask: bool [B T], True where the token counts. Prompt and padding are False; whatever stands there,
            NaN and ±inf included, changes neither value nor gradient.
        ref_per_token_logps: log π_ref of the same tokens, real floating [B T], or None for methods without a
            reference (SimPO, SFT). Treated as a constant.
        weights: what each token counts for, real floating [B T], finite and at least 0; None means 1 on the whole
            mask. `select` sets weights in [0, 1]; a method with importance weights of its own may go above 1.
            Treated as a constant; values are read only where `mask` is True. Values are not checked here, which
            would wait for the device: a negative, infinite or NaN weight makes the loss of its pair NaN, and
            `check_finite` says where it is.
        scores: what the weights were chosen by, real floating [B T], or None. Only reported, never used in a loss.

    Raises:
        TypeError: a field is no array, its dtype is wrong, or arrays of two libraries are mixed.
        ValueError: a shape is not [B T] or differs from `per_token_logps`, B is 0, or devices differ.
    """

    per_token_logps: Array
    mask: Array
    ref_per_token_logps: Array | None = None
    weights: Array | None = None
    scores: Array | None = None

    def __post_init__(self) -> None:
        logps = self.per_token_logps
        _arrays.check_floating("per_token_logps", logps)
        if logps.ndim != 2:
            raise ValueError(f"per_token_logps must be [B T]; got {_arrays.describe(logps)}")
        if logps.shape[0] == 0:
            raise ValueError(
                f"an empty batch has no loss: per_token_logps must have at least one row; got {_arrays.describe(logps)}"
            )
        _check_mask(self.mask, logps)
        for name in ("ref_per_token_logps", "weights", "scores"):
            array = getattr(self, name)
            if array is not None:
                _arrays.check_floating(name, array)
                check_like(name, array, logps)
        _arrays.make_pytree(self, logps)

    @property
    def log_ratios(self) -> Array:
        """log π_θ − log π_ref per token, 0 off the mask: at least float32 [B T], no β. Gradient to the policy only."""
        return masked(self.per_token_logps, self.mask) - masked(_arrays.detach(required_reference(self)), self.mask)

    @property
    def token_weights(self) -> Array:
        """What a token counts for: `weights`, or 1 where they are None. At least float32 [B T], detached.

        0 off the mask, NaN for a negative weight.
        """
        xp = _arrays.namespace(self.mask)
        if self.weights is None:
            return xp.astype(self.mask, _arrays.upcast(self.per_token_logps[:1, :0]).dtype)
        weights = masked(_arrays.detach(self.weights), self.mask)
        return xp.where(weights < 0, xp.nan, weights)

    @classmethod
    def from_stacked(
        cls, *, per_token_logps: Array, mask: Array, ref_per_token_logps: Array | None = None
    ) -> tuple[Response, Response]:
        """(chosen, rejected) from arrays [2B T] with the B chosen rows first: the trainers' layout.

        Raises:
            ValueError: the number of rows is odd, or as for `Response`.
        """
        both = cls(per_token_logps=per_token_logps, mask=mask, ref_per_token_logps=ref_per_token_logps)
        rows = both.per_token_logps.shape[0]
        if rows % 2:
            raise ValueError(
                f"stacked arrays must be [2B T], chosen rows first; got {_arrays.describe(per_token_logps)}, an odd "
                "number of rows"
            )
        return both._rows(slice(None, rows // 2)), both._rows(slice(rows // 2, None))

    @classmethod
    def from_packed(
        cls,
        *,
        per_token_logps: Array,
        lengths: Sequence[int],
        mask: Array | None = None,
        ref_per_token_logps: Array | None = None,
    ) -> tuple[Response, Response]:
        """(chosen, rejected) from arrays [N] that hold 2B sequences end to end, the B chosen ones first.

        Args:
            per_token_logps: real floating [N], already shifted.
            lengths: the 2B sequence lengths, Python integers (so that no shape depends on a device value), which
                add up to N. A length may be 0.
            mask: bool [N], True where the token counts; None for all. The first token of a packed sequence has no
                predecessor of its own: leave it out here unless it was dropped before.
            ref_per_token_logps: real floating [N], or None.

        Raises:
            TypeError: as for `Response`, or lengths that are no integers.
            ValueError: lengths that are odd in number, negative, or do not add up to N; or as for `Response`.
        """
        _arrays.check_floating("per_token_logps", per_token_logps)
        if per_token_logps.ndim != 1:
            raise ValueError(f"packed per_token_logps must be [N]; got {_arrays.describe(per_token_logps)}")
        _check_lengths(lengths, per_token_logps.shape[0])
        xp = _arrays.namespace(per_token_logps)
        if mask is None:
            mask = xp.ones_like(per_token_logps, dtype=xp.bool)
        _check_mask(mask, per_token_logps, "[N]")
        if ref_per_token_logps is not None:
            _arrays.check_floating("ref_per_token_logps", ref_per_token_logps)
            check_like("ref_per_token_logps", ref_per_token_logps, per_token_logps, "[N]")

        def padded(side: Sequence[int], start: int) -> Response:
            where = xp.asarray(
                _padded_positions(side, start), dtype=xp.int32, device=_arrays.compat.device(per_token_logps)
            )
            shape = (len(side), max(side))
            inside = xp.reshape(where >= 0, shape)

            def take(flat: Array) -> Array:
                if not flat.shape[0]:
                    return xp.zeros(shape, dtype=flat.dtype, device=_arrays.compat.device(flat))
                return xp.reshape(xp.take(flat, xp.where(where >= 0, where, 0), axis=0), shape)

            return cls(
                per_token_logps=take(per_token_logps),
                mask=take(mask) & inside,
                ref_per_token_logps=None if ref_per_token_logps is None else take(ref_per_token_logps),
            )

        half = len(lengths) // 2
        return padded(lengths[:half], 0), padded(lengths[half:], sum(lengths[:half]))

    def _rows(self, rows: slice) -> Response:
        ref = self.ref_per_token_logps
        return Response(
            per_token_logps=self.per_token_logps[rows, :],
            mask=self.mask[rows, :],
            ref_per_token_logps=None if ref is None else ref[rows, :],
        )


def masked(array: Array, mask: Array) -> Array:
    """`array` in at least float32 where `mask` is True, 0 elsewhere; no gradient flows to what is left out."""
    xp = _arrays.namespace(array)
    wide = _arrays.upcast(array)
    return xp.where(mask, wide, xp.zeros_like(wide))


def required_reference(response: Response) -> Array:
    """The reference log-probs, or a ValueError: a missing reference is never read as "reference-free"."""
    if response.ref_per_token_logps is None:
        raise ValueError(
            "ref_per_token_logps is missing: this loss compares the policy with a reference. Pass the reference "
            "model's per-token log-probs of the same tokens, or use a reference-free loss (simpo_loss, sft_loss)"
        )
    return response.ref_per_token_logps


def check_pair(chosen: Response, rejected: Response) -> None:
    """Raises unless the two responses can stand in one pair: same B, array library and device; T may differ."""
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(response, Response):
            raise TypeError(f"{name} must be a Response; got {type(response).__name__}")
    ours, theirs = chosen.per_token_logps, rejected.per_token_logps
    _arrays.check_same_home("chosen", ours, "rejected", theirs)
    if ours.shape[0] != theirs.shape[0]:
        raise ValueError(
            f"chosen and rejected must hold the same number of pairs B; got per_token_logps {_arrays.describe(ours)} "
            f"and {_arrays.describe(theirs)}"
        )


def _check_mask(mask: Array, logps: Array, dims: str = "[B T]") -> None:
    _arrays.check_array("mask", mask)
    xp = _arrays.namespace(mask)
    if not xp.isdtype(mask.dtype, "bool"):
        raise TypeError(
            f"mask must be bool {dims} like per_token_logps {tuple(logps.shape)}; got {_arrays.describe(mask)}: "
            "compare it first (mask = attention_mask == 1)"
        )
    check_like("mask", mask, logps, dims)


def check_like(name: str, array: Array, logps: Array, dims: str = "[B T]") -> None:
    """Raises unless `array` has the shape, library and device of the log-probs."""
    if tuple(array.shape) != tuple(logps.shape):
        raise ValueError(
            f"{name} must be {dims} like per_token_logps {tuple(logps.shape)}; got {_arrays.describe(array)}"
        )
    _arrays.check_same_home(name, array, "per_token_logps", logps)


def _check_lengths(lengths: Sequence[int], total: int) -> None:
    for length in lengths:
        if not isinstance(length, int):
            raise TypeError(f"lengths must be Python integers (call .tolist() once); got {type(length).__name__}")
    if len(lengths) == 0 or len(lengths) % 2:
        raise ValueError(f"lengths must name 2B sequences, chosen first; got {len(lengths)}")
    if min(lengths) < 0 or sum(lengths) != total:
        raise ValueError(f"lengths must be at least 0 and add up to N = {total}; got {list(lengths)}")


def _padded_positions(lengths: Sequence[int], start: int) -> list[int]:
    """Row by row, where each cell of the padded [B max(lengths)] array stands in the packed one; -1 for padding."""
    width = max(lengths)
    positions: list[int] = []
    for length in lengths:
        positions += [*range(start, start + length), *[-1] * (width - length)]
        start += length
    return positions
