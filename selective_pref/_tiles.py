"""How a vocabulary is walked tile by tile: what the functions that never hold N × V logits have in common (torch).

In: hidden states, a head's weight, how logits come from their product. Out: the columns of each tile, matrix products
in the wanted precision, and the elementwise work on a tile, compiled where the device is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

BUFFER = 4 * 1024 * 1024  # elements of one tile of logits: 16 MiB in float32
TILE = (1024, 8192)  # narrower tiles starve the matrix product, wider ones fall out of the cache
CUDA_BUFFER = 32 * 1024 * 1024  # 128 MiB in float32
CUDA_TILE = (1024, 65_536)  # a GPU has no such cache, and each tile costs it a dozen launches


@dataclass(frozen=True, kw_only=True)
class Head:
    """What stands between hidden · weightᵀ and the logits, and how the vocabulary is walked."""

    logit_scale: float
    softcap: float | None
    temperature: float
    tile: int | None
    keep_logits: bool = False
    statistics: bool = False

    def tiles(self, rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
        """Columns of the vocabulary, so many at a time that a tile of `rows` rows fills the buffer of the device."""
        buffer, (low, high) = (CUDA_BUFFER, CUDA_TILE) if device.type == "cuda" else (BUFFER, TILE)
        fitting = buffer // max(rows, 1)
        width = self.tile or min(high, max(low, fitting - fitting % low))  # products of odd widths are slow
        for start in range(0, vocabulary, width):
            yield slice(start, min(start + width, vocabulary))

    def logits_(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """From products to logits, in place. With `keep_logits` the forward pass has done this already."""
        if bias is not None:
            z += bias
        if self.softcap is not None:
            z.mul_(self.logit_scale / self.softcap).tanh_()
            return z.mul_(self.softcap / self.temperature)
        factor = self.logit_scale / self.temperature
        return z if factor == 1 else z.mul_(factor)

    def chain_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """From the gradient of the logits to that of the products, in place."""
        if logits is not None:  # soft-capped: d tanh = 1 − tanh²
            assert self.softcap is not None
            gradient.mul_(logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1))
        factor = self.logit_scale / self.temperature
        return gradient if factor == 1 else gradient.mul_(factor)


def make_head(
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab_tile: int | None,
    keep_logits: bool = False,
    statistics: bool = False,
) -> Head:
    """The checked options of a public function as a `Head`. ValueError for one out of range."""
    if vocab_tile is not None and (not isinstance(vocab_tile, int) or vocab_tile < 1):
        raise ValueError(f"vocab_tile must be a whole number of columns, at least 1, or None; got {vocab_tile!r}")
    return Head(
        logit_scale=_nonzero("logit_scale", logit_scale),
        softcap=None if softcap is None else _positive("softcap", softcap),
        temperature=_positive("temperature", temperature),
        tile=vocab_tile,
        keep_logits=keep_logits,
        statistics=statistics,
    )


def elementwise(function: Callable[..., Any], z: Tensor) -> Callable[..., Any]:
    """`function`, or its compiled form where a tile on this device is worth it."""
    return _compiled(function) if compiles(z) else function


def compiles(z: Tensor) -> bool:
    """Whether elementwise work on this tile is compiled."""
    return z.is_cuda and has_triton()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)  # pyright: ignore[reportUnknownMemberType]


def precision(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(of statistics, sums and results; of the factors of matrix products).

    CUDA multiplies low precision with wide sums, and autocast says which. A CPU is given wide factors, tile by tile.
    """
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if not hidden.is_cuda:
        return wide, wide
    if torch.is_autocast_enabled("cuda"):
        return wide, torch.get_autocast_dtype("cuda")
    return wide, hidden.dtype if hidden.dtype == weight.dtype else wide


def columns(buffer: Tensor | None, tile: slice) -> Tensor:
    """The start of the buffer as a contiguous [rows, columns of the tile]."""
    assert buffer is not None
    width = tile.stop - tile.start
    return buffer.view(-1)[: len(buffer) * width].view(len(buffer), width)


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left · right, summed and kept in `out`'s precision."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right, in `total`'s precision. (addmm_ would do the same, unseen by FlopCounterMode.)"""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def check_heads(device: torch.device, like: str, **arrays: Tensor | None) -> None:
    """Raises unless every array is floating and on the device of the argument named `like`."""
    for name, array in arrays.items():
        if array is None:
            continue
        if not array.is_floating_point():
            raise TypeError(f"{name} must have a real floating dtype; got {array.dtype}")
        if array.device != device:
            raise ValueError(f"{name} must be on the device of {like}, {device}; got {array.device}")


def check_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "", width: str = "D") -> None:
    """Raises unless hidden [… D], weight [V D] and bias [V] fit together; messages name them with `prefix`."""
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden must be [… {width}] and {prefix}weight [V {width}]; got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [V] = {tuple(weight.shape[:1])}; got {tuple(bias.shape)}")


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
    return float(value)


def _nonzero(name: str, value: float) -> float:
    if value == 0 or not abs(value) < float("inf"):
        raise ValueError(f"{name} must be a finite number other than 0; got {value!r}")
    return float(value)
