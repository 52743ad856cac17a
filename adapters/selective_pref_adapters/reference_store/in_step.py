"""Batches of several processes, computed in step: each gathers its part of a sharded model for every forward.

In: the batches of this process, which may be more or fewer than those of the others. Out: what it computes from them,
after as many forwards as the process with the most batches needs. Where one process fails, all end together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from selective_pref_adapters.reference_store.shards import StoreError

Batch = TypeVar("Batch")
Computed = TypeVar("Computed")


class OutOfStepError(StoreError):
    """A forward failed on this process: the others wait inside of it, and end when this process does."""


def in_step(
    batches: Iterable[Batch], compute: Callable[[Batch], Computed], filler: Batch, device: torch.device
) -> Iterator[Computed]:
    """`compute` of each batch; of `filler`, whose result is dropped, while other processes still have batches.

    Every process must use it up or close it (`contextlib.closing`): one that fails in between tells the others so.

    Args:
        batches: of this process. Making one may raise: all processes then end.
        compute: a forward in which every process takes part.
        filler: what a process without a batch computes.
        device: one that the process group can send from.

    Raises:
        OutOfStepError: `compute` failed.
    """
    waiting = iter(batches)
    try:
        batch = next(waiting, None)
        while _go_on(device, more=batch is not None):
            try:
                computed = compute(filler if batch is None else batch)
            except Exception as error:
                raise OutOfStepError(f"computing log-probs failed: {type(error).__name__}: {error}") from error
            if batch is not None:
                yield computed
            batch = next(waiting, None)
    except OutOfStepError:
        raise
    except (Exception, GeneratorExit):
        _go_on(device, failed=True)
        raise


def _go_on(device: torch.device, *, more: bool = False, failed: bool = False) -> bool:
    """Whether some process has more to compute, and none has failed: the same answer on all of them."""
    flags = torch.tensor([more, failed], dtype=torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.tolist() == [1, 0]
