"""Whole weights of a model of which each process holds a part: one tensor after another, whatever engine cut them.

In: a model that is whole, sharded by ZeRO-3, or made of DTensors (FSDP2). Out: its tensors by name, each whole for as
long as it is looked at, so that no process ever holds more than its part and one tensor.

Of a sharded model every process must ask, for the same tensors in the same order: they exchange their parts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds parts only of the weights: ZeRO-3, or DTensors as FSDP2 makes them."""
    return any(_is_part(parameter) for parameter in model.parameters())


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id") or isinstance(tensor, DTensor)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor that may be sharded; ZeRO-3 leaves an empty one in the place of a parameter."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


@contextmanager
def whole(tensor: Tensor) -> Iterator[Tensor]:
    """The whole of a tensor, without a gradient, on the device of its parts; for reading, and only inside."""
    if hasattr(tensor, "ds_id"):
        import deepspeed  # it has cut the tensor, so it is there

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach()
    elif isinstance(tensor, DTensor):
        yield tensor.detach().full_tensor()
    else:
        yield tensor.detach()


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of everything in a model's `state_dict`, sorted by name; a tensor is whole until the next one.

    What a quantised layer notes about itself, which is no tensor, is handed out as it is.
    """
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(value, Tensor):
            yield name, value
            continue
        with whole(value) as tensor:
            yield name, tensor


def same_weights(policy: nn.Module, reference: nn.Module | None) -> bool:
    """Whether the reference is, weight for weight, the policy; the same on every process.

    Ends at the first parameter that differs, so it takes long only where the models are the same.
    """
    if reference is None:
        return False
    ours, theirs = dict(policy.named_parameters()), dict(reference.named_parameters())
    if ours.keys() != theirs.keys() or any(not _alike(ours[name], theirs[name]) for name in ours):
        return False
    return all(_equal(ours[name], theirs[name]) for name in ours)


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    return whole_shape(ours) == whole_shape(theirs) and ours.dtype == theirs.dtype


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Where one is sharded, what the first process sees: others may not have loaded the one that is not (FSDP2)."""
    with whole(ours) as first, whole(theirs) as second:
        here = not first.is_meta and not second.is_meta
        equal = here and torch.equal(first, second.to(first.device))
        if not _is_part(ours) and not _is_part(theirs):
            return equal
        answer = torch.tensor(int(equal), device=second.device if _is_part(theirs) else first.device)
    dist.broadcast(answer, src=0)
    return bool(answer)


_M_MMAP_THRESHOLD, _LARGE = -3, 4 << 20


def give_freed_memory_back() -> None:
    """Has the C library return a large block to the system as soon as it is freed; only glibc is asked.

    Else its threshold rises to 32 MiB with the first such block that is freed. ZeRO-3 gathers and frees whole
    parameters all the time, between them it keeps small parts, and the holes add up to more than the model.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
