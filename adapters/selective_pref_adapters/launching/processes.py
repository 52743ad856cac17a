"""The processes of a run meet, each within a limit of time, and part at the end.

In: the place of this process in the environment (see `launcher`). Out: torch's process group is there, or an error that
says where the others were looked for; at the end of the program it is left before the interpreter goes.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""The place of a process that no launcher has started."""
REST = 0.5
"""Seconds for which the interpreter is left to gloo's threads at the end; they need a thousandth of it."""
SLACK = 20.0
"""Seconds that torch has to say by itself that the limit has passed."""


def place_alone(environ: MutableMapping[str, str] = os.environ) -> None:
    """Gives this process a place where no launcher did: DeepSpeed would look for MPI else."""
    for name, value in ALONE.items():
        environ.setdefault(name, value)


@contextmanager
def meeting(minutes: float, *errors: type[Exception]) -> Iterator[None]:
    """Inside, the processes of a run find one another, and a group that was made is left at the end of the program.

    torch's own limit does not hold where something else listens at the address of the first process, and never
    answers. This process then ends with the message and exit status 1.

    Args:
        minutes: how long they may take.
        errors: what means that they have not, besides torch's own errors of processes.

    Raises:
        OSError: they did not find one another.
    """
    patience = threading.Timer(60 * minutes + SLACK, _end, [minutes])
    patience.daemon = True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        patience.start()
    try:
        yield
    except (dist.DistError, *errors) as error:
        raise OSError(f"{_apart(minutes)}. {str(error).splitlines()[0]}") from error
    finally:
        patience.cancel()
    leave_at_exit()


def _apart(minutes: float) -> str:
    rank, _, size, address, port = (os.environ.get(name, value) for name, value in ALONE.items())
    return (
        f"process {rank} of {size}, on {socket.gethostname()}, found not all of the others at {address}:{port} within "
        f"{minutes:g} minutes: see whether all were started, with the same address and port, whether something else "
        "listens there, and whether the hosts reach one another (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the "
        "network interface)"
    )


def _end(minutes: float) -> None:
    """Ends the process from another thread, since its own is inside torch."""
    print(f"selective-pref: {_apart(minutes)}", file=sys.stderr, flush=True)
    os._exit(1)


def leave_at_exit() -> None:
    """Has a group of CPU processes (gloo) come to rest when the program ends, well or not.

    A thread of gloo lets go of the tensors of an exchange when it is over, and has to wait for the interpreter to do
    so. If that is going by then, Python ends the thread, and C++ the process: "terminate called without an active
    exception", exit status -6, after everything was done. Destroying the group is not enough, since engines hold it.
    """
    atexit.unregister(_leave_gloo)
    atexit.register(_leave_gloo, _is_gloo() and dist.get_world_size() > 1)


def _is_gloo() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo"


def _leave_gloo(several: bool) -> None:
    if _is_gloo():
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
    time.sleep(REST if several else 0)  # also where the group was destroyed before


def end_program(status: int) -> NoReturn:
    """Ends the program with an exit status; one of several processes without the interpreter's own clean-up.

    What was registered with `atexit` is done, and what was printed is written. Threads of torch and gloo that still run
    while the interpreter goes would sometimes abort the process, after all was saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def leave_processes() -> None:
    """Leaves the process group, if there are several processes; for the end of a program that went well.

    No other run can follow in it. It waits for the others: what they still exchange must not break off.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()
