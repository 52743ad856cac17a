"""The processes of a run: they find one another, each on its device, and leave.

In: the place of this process in the environment (see `launching`). Out: a process group.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints a line on stdout when it has to guess
import deepspeed

from selective_pref_adapters.launching.launcher import check_address
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
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():  # else DeepSpeed would look for MPI
        os.environ.setdefault(name, value)
    if config.zero_stage == 3:
        give_freed_memory_back()
    if torch.cuda.is_available():  # before the first exchange: else all processes of a host would use device 0 for it
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at every start
    if not dist.is_initialized():
        check_address()
    try:
        deepspeed.init_distributed(
            "nccl" if torch.cuda.is_available() else "gloo",
            verbose=False,
            timeout=timedelta(minutes=config.process_timeout_minutes),
        )
    except RuntimeError as error:  # torch has several kinds of it
        place = {name: os.environ[name] for name in alone}
        raise OSError(
            f"process {place['RANK']} of {place['WORLD_SIZE']}, on {socket.gethostname()}, found not all of the others "
            f"at {place['MASTER_ADDR']}:{place['MASTER_PORT']} within {config.process_timeout_minutes:g} minutes: see "
            "whether all were started, with the same address and port, and whether the hosts reach one another there "
            f"(GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface). {str(error).splitlines()[0]}"
        ) from error
    return dist.get_rank(), dist.get_world_size()


def leave_processes() -> None:
    """Leaves the process group; for the end of a program, since no other run can follow in it."""
    if dist.get_world_size() > 1:
        dist.destroy_process_group()
