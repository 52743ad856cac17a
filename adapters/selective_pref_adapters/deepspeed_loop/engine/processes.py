"""The processes of a run find one another, each on its device.

In: the place of this process in the environment (see `launching`). Out: a process group.
"""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints a line on stdout when it has to guess
import deepspeed

from selective_pref_adapters.launching.launcher import check_address
from selective_pref_adapters.launching.processes import meeting, place_alone
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.sharded import give_freed_memory_back


def start_processes(config: TrainConfig) -> tuple[int, int]:
    """(rank of this process, number of processes). Without a launcher there is one.

    Raises:
        OSError: they did not find one another.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    place_alone()
    if config.zero_stage == 3:
        give_freed_memory_back()
    if torch.cuda.is_available():  # before the first exchange: else all processes of a host would use device 0 for it
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at every start
    if not dist.is_initialized():
        check_address()
    with meeting(config.process_timeout_minutes, RuntimeError):  # torch has several kinds of it
        deepspeed.init_distributed(
            "nccl" if torch.cuda.is_available() else "gloo",
            verbose=False,
            timeout=timedelta(minutes=config.process_timeout_minutes),
        )
    return dist.get_rank(), dist.get_world_size()
