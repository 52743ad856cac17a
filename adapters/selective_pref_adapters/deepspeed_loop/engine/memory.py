"""The memory of this process: how much room there is for weights, and that what is freed goes back to the system."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from selective_pref_adapters.options import TrainConfig

_M_MMAP_THRESHOLD, _LARGE = -3, 4 << 20


def give_freed_memory_back() -> None:
    """Has the C library return a large block to the system as soon as it is freed; only glibc is asked.

    Else its threshold rises to 32 MiB with the first such block that is freed. ZeRO-3 gathers and frees whole
    parameters all the time, between them it keeps small parts, and the holes add up to more than the model.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def room_for_weights(config: TrainConfig) -> tuple[float, str]:
    """(bytes that the process with the least has for weights, where)."""
    if torch.cuda.is_available() and not config.offload_parameters:
        room, where = float(torch.cuda.mem_get_info()[0]), "on its device"
    else:
        room, where = float(psutil.virtual_memory().available), "on its host"
        with suppress(OSError, ValueError):  # a container's limit; "max" is none
            room = min(room, float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
        room /= int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    rooms: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(rooms, room)
    return min(rooms), where
