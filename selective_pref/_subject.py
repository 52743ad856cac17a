"""A loss under examination: calls it with NumPy arrays in whatever library it wants, and says what it should return.

In: a loss, and how its arrays are made. Out: a `Subject`, which gives losses, margins and gradients as NumPy arrays,
and those that this library computes for the same pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.losses import PreferenceLoss, dpo_loss, selective_dpo_loss
from selective_pref.response import Response

np: Any = numpy  # arrays are untyped here, as everywhere in the core

_WANTED = """a loss with the signature

    loss(chosen, rejected, *, beta{ratio}) -> losses

where chosen and rejected have the fields of selective_pref.Response, per_token_logps, ref_per_token_logps and mask
([B T_w] and [B T_l], as as_array makes them), and losses is an array: one number per pair [B], or their mean []; or
it is a PreferenceLoss. Wrap yours:

    def loss(chosen, rejected, *, beta{ratio}):
        return my_loss(chosen.per_token_logps, chosen.ref_per_token_logps, chosen.mask, rejected.per_token_logps, ...)
"""


class WrongKindError(TypeError):
    """The loss is no function of the wanted signature."""


class Side(NamedTuple):
    """Log-probs of policy and reference, and the mask: NumPy arrays [B T]."""

    policy: Any
    ref: Any
    mask: Any


class Pair(NamedTuple):
    """B pairs."""

    chosen: Side
    rejected: Side

    def __str__(self) -> str:
        def text(side: Side) -> str:
            return f"policy {text_of(side.policy)}, ref {text_of(side.ref)}" + (
                "" if side.mask.all() else f", mask {side.mask.astype(int).tolist()}"
            )

        return f"chosen {text(self.chosen)}; rejected {text(self.rejected)}"


class Subject:
    """A loss under examination, as a function of NumPy arrays."""

    def __init__(self, loss: Any, selective: bool, as_array: Callable[[Any], Array]) -> None:
        self.wanted = _WANTED.format(ratio=", selection_ratio" if selective else "")
        if not callable(loss):
            raise WrongKindError(f"assert_conforms wants {self.wanted}\ngot {type(loss).__name__} {loss!r}")
        self.loss, self.selective, self.as_array = loss, selective, as_array
        try:
            inspect.signature(loss).bind(None, None, **self.numbers(0.1, 0.5))
        except ValueError:  # a builtin that has no signature
            pass
        except TypeError as error:
            raise WrongKindError(f"assert_conforms wants {self.wanted}\ngot {name_of(loss)}: {error}") from error
        if not callable(as_array) or not _arrays.compat.is_array_api_obj(made := as_array(np.zeros((1, 1)))):
            raise TypeError(
                "as_array must be a function from a NumPy array to one of your library, such as torch.from_numpy; got "
                f"{name_of(as_array)}"
            )
        self.tolerance = float(_arrays.namespace(made).finfo(made.dtype).eps) ** 0.6

    def numbers(self, beta: float, ratio: float) -> dict[str, float]:
        return {"beta": beta, **({"selection_ratio": ratio} if self.selective else {})}

    def response(self, side: Side, policy: Array | None = None, ref: Array | None = None) -> Response:
        return Response(
            per_token_logps=self.as_array(side.policy.copy()) if policy is None else policy,
            ref_per_token_logps=self.as_array(side.ref.copy()) if ref is None else ref,
            mask=self.as_array(side.mask.copy()),
        )

    def call(self, sides: Sequence[Response], beta: float, ratio: float) -> Array:
        """What the loss returns for (chosen, rejected): [B], or their mean []."""
        out = self.loss(*sides, **self.numbers(beta, ratio))
        losses: Any = out.losses if isinstance(out, PreferenceLoss) else out
        if not hasattr(losses, "ndim") or not hasattr(losses, "dtype"):
            raise WrongKindError(f"assert_conforms wants {self.wanted}\ngot a function that returns {name_of(losses)}")
        if losses.ndim and tuple(losses.shape) != tuple(sides[0].mask.shape[:1]):
            raise WrongKindError(
                f"assert_conforms wants {self.wanted}\ngot a function that returns {_arrays.describe(losses)} for "
                f"{sides[0].mask.shape[0]} pairs"
            )
        return losses

    def raw(self, pair: Pair, beta: float = 0.5, ratio: float = 0.4) -> Any:
        """The same as a NumPy array."""
        return numpy_of(self.call([self.response(side) for side in pair], beta, ratio))

    def losses(self, pair: Pair, beta: float = 0.5, ratio: float = 0.4) -> Any:
        """One loss per pair [B]; of a function that returns their mean, pair by pair."""
        found = self.raw(pair, beta, ratio)
        return (
            found if found.ndim else np.stack([self.raw(rows_of(pair, [i]), beta, ratio) for i in range(size_of(pair))])
        )

    def margins(self, pair: Pair, beta: float = 0.5, ratio: float = 0.4) -> Any:
        """β(R(y_w) − R(y_l)), which the loss −log σ(margin) says."""
        return -np.log(np.expm1(self.losses(pair, beta, ratio)))

    def expected(self, pair: Pair, beta: float, ratio: float) -> tuple[Any, Any, Any]:
        """(losses [B], their gradients to the policy [B T_w] and [B T_l]) by this library, in NumPy's float64."""
        sides = [Response(per_token_logps=side.policy, ref_per_token_logps=side.ref, mask=side.mask) for side in pair]
        loss = selective_dpo_loss if self.selective else dpo_loss
        out = loss(*sides, **self.numbers(beta, ratio))
        slopes = -beta * -np.expm1(-out.losses)[:, None]  # −β·σ(−margin)
        return out.losses, slopes * out.chosen_weights, -slopes * out.rejected_weights

    def differ(self, one: Any, other: Any) -> bool:
        """Whether two arrays are not the same up to rounding."""
        return not np.allclose(one, other, rtol=self.tolerance, atol=self.tolerance)


def gradients_of(subject: Subject, pair: Pair, beta: float, ratio: float) -> list[Any] | None:
    """d Σ losses / d of the policy and of the reference, both sides, by torch or JAX; None in other libraries."""
    arrays = [subject.as_array(field.copy()) for field in (*(s.policy for s in pair), *(s.ref for s in pair))]

    def total(*leaves: Array) -> Array:
        sides = [subject.response(side, leaves[i], leaves[i + 2]) for i, side in enumerate(pair)]
        losses: Any = subject.call(sides, beta, ratio)
        return losses.sum() if losses.ndim else losses * size_of(pair)

    if hasattr(arrays[0], "requires_grad_"):
        leaves: list[Any] = [array.requires_grad_() for array in arrays]
        result: Any = total(*leaves)
        if result.requires_grad:
            result.backward()
        return [np.zeros(a.shape) if a.grad is None else numpy_of(a.grad) for a in leaves]
    if _arrays.compat.is_jax_array(arrays[0]):
        import jax

        library: Any = jax
        return [numpy_of(gradient) for gradient in library.grad(total, argnums=(0, 1, 2, 3))(*arrays)]
    return None


def numpy_of(array: Array) -> Any:
    array = _arrays.detach(array)
    values = np.asarray(array.cpu() if hasattr(array, "cpu") else array)
    return values if values.dtype == bool else values.astype(np.float64)


def rows_of(pair: Pair, rows: list[int]) -> Pair:
    return Pair(*(Side(*(field[rows] for field in side)) for side in pair))


def size_of(pair: Pair) -> int:
    return int(pair.chosen.mask.shape[0])


def text_of(values: Any) -> str:
    return str(np.round(values, 4).tolist())


def name_of(value: object) -> str:
    return f"{getattr(value, '__name__', None) or type(value).__name__}"
