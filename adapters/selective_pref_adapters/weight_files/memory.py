"""How much room the memory of this process has for weights."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import torch.distributed as dist


def memory_of_machine() -> float:
    """Bytes of this host, or of its container, and of all devices that this process sees."""
    devices = range(torch.cuda.device_count())  # asked for properties, none of which takes memory for this process
    room = sum(torch.cuda.get_device_properties(one).total_memory for one in devices)
    return _host(float(psutil.virtual_memory().total)) + room


def _host(room: float) -> float:
    """At most what a container may use; "max" is no limit."""
    with suppress(OSError, ValueError):
        return min(room, float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return room


def room_for_weights(*, offloaded: bool) -> tuple[float, str]:
    """(bytes that the process with the least has for weights, where); of all processes, each of which must ask."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if torch.cuda.is_available() and not offloaded:
        room, where = float(torch.cuda.mem_get_info()[0]), "on its device"
    else:
        room, where = _host(float(psutil.virtual_memory().available)), "on its host"
        room /= int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes == 1:
        return room, where
    rooms: list[float] = [0.0] * processes
    dist.all_gather_object(rooms, room)
    return min(rooms), where
