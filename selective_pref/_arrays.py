"""The few places where array libraries differ, and the checks at the public door.

In: arrays of any library that follows the array API standard. Out: their namespace, wider dtypes,
detached copies, or an error that names what was got. Everything here reads metadata only: no value of
an array is looked at, so nothing waits for a device.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from numbers import Real
from typing import Any, TypeAlias

import array_api_compat

compat: Any = array_api_compat  # its own annotations name libraries that are not installed

Array: TypeAlias = Any
"""An array of any library that follows the array API standard: torch, NumPy, JAX, …"""


def namespace(array: Array) -> Any:
    """The array API namespace (``xp``) that `array` belongs to."""
    if compat.is_torch_array(array):  # `array_namespace` makes a set of modules, which torch.compile < 2.13 cannot
        import array_api_compat.torch

        return array_api_compat.torch
    return compat.array_namespace(array)


def upcast(array: Array) -> Array:
    """`array` in at least float32: bf16 and fp16 are widened, float32 and float64 come back as they are."""
    xp = namespace(array)
    wide = xp.result_type(array.dtype, xp.float32)
    return array if wide == array.dtype else xp.astype(array, wide)


def detach(array: Array) -> Array:
    """`array` cut from the gradient graph; the values are shared, not copied."""
    if hasattr(array, "detach"):  # torch
        return array.detach()
    if compat.is_jax_array(array):
        from jax import lax  # a JAX array is in hand, so JAX is loaded already

        return lax.stop_gradient(array)
    return array


_pytrees: set[type] = set()


def make_pytree(owner: object, array: Array) -> None:
    """Tells JAX that the dataclass of `owner` is a tree of arrays, once, where `array` is JAX's (so JAX is loaded).

    Transformations of JAX put tracers, None or other placeholders into such a tree, so it is put together again
    without the checks of `__init__`.
    """
    kind: Any = owner.__class__
    if not compat.is_jax_array(array) or kind in _pytrees:
        return
    import jax

    tree_util: Any = jax.tree_util
    names = [field.name for field in dataclasses.fields(kind)]

    def flatten(tree: Any) -> tuple[list[Any], None]:
        return [getattr(tree, name) for name in names], None

    def flatten_with_keys(tree: Any) -> tuple[list[Any], None]:
        return [(tree_util.GetAttrKey(name), getattr(tree, name)) for name in names], None

    def unflatten(_: None, leaves: list[Any]) -> Any:
        tree: Any = object.__new__(kind)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(tree, name, leaf)
        return tree

    _pytrees.add(kind)
    tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)


def last_axis_sum(array: Array) -> Array:
    """Sum over the token axis: [B T] → [B]."""
    return namespace(array).sum(array, axis=-1)


def running_count(mask: Array) -> Array:
    """How many entries of its row are true, up to and with each one: [B T] bool → [B T] int32."""
    xp = namespace(mask)
    ones = xp.astype(mask, xp.int32)
    if compat.is_torch_array(mask):  # the compatible `cumulative_sum` asks for the namespace again, see there
        return ones.cumsum(-1, dtype=xp.int32)
    return xp.cumulative_sum(ones, axis=-1, dtype=xp.int32)


def kth_largest(array: Array, k: int) -> Array:
    """The k-th largest value of each row, [B T] → [B 1]; 1 ≤ k ≤ T, the same k in every row.

    The standard has no selection algorithm, only `sort`; what a library has of its own is several times faster.
    """
    xp, place = namespace(array), array.shape[-1] - k
    if hasattr(xp, "topk"):  # torch
        return xp.min(xp.topk(array, k, dim=-1, sorted=False).values, axis=-1, keepdims=True)
    ordered = xp.partition(array, place, axis=-1) if hasattr(xp, "partition") else xp.sort(array, axis=-1)
    return ordered[:, place : place + 1]


def describe(array: Array) -> str:
    """`float32 (2, 7)`: dtype and shape, for error messages."""
    return f"{str(array.dtype).removeprefix('torch.')} {tuple(array.shape)}"


def check_array(name: str, array: Array) -> None:
    """Raises TypeError unless `array` is an array of a supported library."""
    if not compat.is_array_api_obj(array):
        raise TypeError(
            f"{name} must be an array of a library that follows the array API standard (torch, NumPy, JAX); "
            f"got {type(array).__name__}"
        )


def check_floating(name: str, array: Array) -> None:
    """Raises TypeError unless `array` is an array with a real floating dtype."""
    check_array(name, array)
    if not namespace(array).isdtype(array.dtype, "real floating"):
        raise TypeError(f"{name} must have a real floating dtype; got {describe(array)}")


def check_same_home(name: str, array: Array, other_name: str, other: Array) -> None:
    """Raises unless both arrays belong to one library (TypeError) and one device (ValueError)."""
    if type(array) is not type(other) and namespace(array) is not namespace(other):
        raise TypeError(
            f"{name} and {other_name} must be arrays of one library; got {_type_name(array)} and {_type_name(other)}: "
            "convert one of them first"
        )
    device, other_device = compat.device(array), compat.device(other)
    if device != other_device and device is not None and other_device is not None:  # JAX tracers have none
        raise ValueError(
            f"{name} and {other_name} must be on one device; got {device} and {other_device}: move one of them first"
        )


def _type_name(array: Array) -> str:
    return f"{type(array).__module__}.{type(array).__name__}"


def check_number(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a Python or NumPy float or integer (no array, tracer, Decimal or Fraction)."""
    if isinstance(value, (bool, Fraction)) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name} must be a number, a float or an int; got {type(value).__name__} {value!r}")


def is_scalar_array(name: str, value: Any) -> bool:
    """Whether `value` is a floating array without axes (True) or no array (False). Raises for any other array."""
    if isinstance(value, (float, int)) or not compat.is_array_api_obj(value):
        return False
    check_floating(name, value)
    if value.ndim != 0:
        raise ValueError(f"{name} must be a number or an array without axes; got {describe(value)}")
    return True


def check_finite_number(name: str, value: float) -> None:
    """Raises unless `value` is a finite number."""
    check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number; got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raises unless `value` is a finite number above 0."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
