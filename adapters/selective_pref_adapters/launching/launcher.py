"""What launched this process: its rank, the number of processes, where the first one listens.

In: the environment. Out: the variables that torch reads (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
`MASTER_PORT`), checked, and made from those of srun or mpirun where these alone started the process. Imports nothing
but the standard library: what is wrong is said before anything else is imported.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and DeepSpeed's launcher set, and torch and DeepSpeed read."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The processes that a scheduler or mpirun started, and which of them this one is."""

    starter: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None
    """Of the first one's host, where that is known."""
    port: int


def join_launcher(environ: MutableMapping[str, str] = os.environ) -> None:
    """Puts this process's place among the processes of its run into the environment, or says what is wrong with it.

    Nothing changes where torchrun, deepspeed or accelerate started the process, and where nothing did: it is alone.

    Raises:
        ValueError: a part of the place is missing or out of range, two launchers disagree, or a launcher was asked for
            several processes and has started one.
    """
    tasks = _tasks(environ)
    if tasks is not None and not any(name in environ for name in PLACE[:3]):
        _check_known(environ, tasks)
        environ.update(
            RANK=str(tasks.rank),
            WORLD_SIZE=str(tasks.size),
            LOCAL_RANK=str(tasks.local_rank),
            LOCAL_WORLD_SIZE=str(tasks.local_size),
        )
        environ.setdefault("MASTER_ADDR", tasks.address or "")
        environ.setdefault("MASTER_PORT", str(tasks.port))
    elif any(name in environ for name in PLACE[:3]):
        _check_place(environ)
        _check_one_launcher(environ, tasks)
    else:
        _check_alone(environ)


def _check_place(environ: Mapping[str, str]) -> None:
    missing = [name for name in PLACE if not environ.get(name)]
    if missing:
        there = ", ".join(f"{name}={environ[name]}" for name in PLACE if environ.get(name))
        raise ValueError(
            f"the environment has {there}, but not {', '.join(missing)}: expected all of {', '.join(PLACE)}, as "
            "torchrun sets them, or none of RANK, WORLD_SIZE and LOCAL_RANK for a single process"
        )
    rank, size, local_rank = (_number(environ, name) for name in PLACE[:3])
    local_size = _number(environ, "LOCAL_WORLD_SIZE") if environ.get("LOCAL_WORLD_SIZE") else size
    for name, value, limit, of in (
        ("RANK", rank, size, "WORLD_SIZE"),
        ("LOCAL_RANK", local_rank, local_size, "LOCAL_WORLD_SIZE" if local_size != size else "WORLD_SIZE"),
        ("MASTER_PORT", _number(environ, "MASTER_PORT"), 65_536, "65536"),
    ):
        if not 0 <= value < limit:
            raise ValueError(f"{name} is {value}: expected 0 or more and less than {of}, {limit}")


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name} must be a whole number; got {environ[name]!r}") from None


def _check_one_launcher(environ: Mapping[str, str], tasks: Tasks | None) -> None:
    """Raises ValueError where two launchers started this process, and do not fit one into the other."""
    torchrun, deepspeed = "TORCHELASTIC_RUN_ID" in environ, "CROSS_SIZE" in environ
    if torchrun and deepspeed:
        raise ValueError(
            "two launchers at once: this process has the environment of torchrun (TORCHELASTIC_RUN_ID) and that of "
            "deepspeed (CROSS_SIZE), one started by the other. Start selective-pref with one of them"
        )
    if tasks is None:
        return
    place = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if torchrun or deepspeed:
        name, variable = ("torchrun", "GROUP_WORLD_SIZE") if torchrun else ("deepspeed", "CROSS_SIZE")
        hosts = environ.get(variable, "1")
        if hosts != str(tasks.size):
            raise ValueError(
                f"two launchers at once: {tasks.starter} started {tasks.size} tasks, and the {name} of this one knows "
                f"of {hosts}: each task would do the whole run. Start one {name} on each host, with the number of "
                "hosts (srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES ...), or the processes themselves by "
                f"{tasks.starter}, without {name}"
            )
    elif place != (tasks.rank, tasks.size):
        raise ValueError(
            f"two launchers at once: {tasks.starter} started this process as {tasks.rank} of {tasks.size}, and RANK "
            f"and WORLD_SIZE say {place[0]} of {place[1]}. Unset RANK, WORLD_SIZE and LOCAL_RANK, or have "
            f"{tasks.starter} start one task"
        )


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raises ValueError where several processes were asked for, and this one was started alone."""
    if "ACCELERATE_MIXED_PRECISION" in environ and {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise ValueError(
            "accelerate launch was asked for several processes, and has started one: on CPUs it starts more only "
            "through mpirun (--mpirun_hostfile). Use torchrun --nproc-per-node N"
        )
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ and _is_several(environ.get("SLURM_NTASKS")):
        raise ValueError(
            f"this is the script of a Slurm job of {environ['SLURM_NTASKS']} tasks, and runs once, on its first host: "
            "put srun in front of the command (srun --ntasks 1 for one process)"
        )


def _check_known(environ: Mapping[str, str], tasks: Tasks) -> None:
    if not 0 <= tasks.rank < tasks.size:
        raise ValueError(f"{tasks.starter} says that this is task {tasks.rank} of {tasks.size}: expected less")
    if tasks.address is None and not environ.get("MASTER_ADDR"):
        raise ValueError(
            f"{tasks.starter} started {tasks.size} processes on several hosts and does not say where the first is: set "
            "MASTER_ADDR to its address, for all of them (mpirun -x MASTER_ADDR=...)"
        )


def check_address(environ: Mapping[str, str] = os.environ) -> None:
    """Looks at what the processes find one another by. To be called once, before they do.

    Raises:
        OSError: the address of the first process is that of no host, or, in the first process, its port is in use.
    """
    if int(environ.get("WORLD_SIZE", "1")) == 1:
        return
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(
            f"MASTER_ADDR {address!r} is the address of no host here ({error}): expected that of the first process, as "
            "every host of the run knows it"
        ) from error
    listens = environ["RANK"] == "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not listens or not port:  # torchrun itself listens where it is the launcher
        return
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise OSError(
            f"port {port} of this host cannot be opened ({os.strerror(error.errno)}): another run may use it. Choose "
            "another: deepspeed --master_port, or MASTER_PORT for srun and mpirun"
        ) from error


# --- schedulers ------------------------------------------------------------------------------------------------------


def _tasks(environ: Mapping[str, str]) -> Tasks | None:
    """The tasks of mpirun, else those of a step of Slurm; None where there is one task or none.

    mpirun comes first: inside a Slurm job the tasks of its step are mpirun's own, one a host.
    """
    if _is_several(environ.get("OMPI_COMM_WORLD_SIZE")):
        size, local_size = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
        return Tasks(
            starter="mpirun",
            rank=_number(environ, "OMPI_COMM_WORLD_RANK"),
            size=size,
            local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
            local_size=local_size,
            address="127.0.0.1" if local_size == size else None,
            port=29_500,
        )
    if _is_several(environ.get("SLURM_STEP_NUM_TASKS")):
        job, step = (int(re.sub(r"\D", "", environ.get(name, "")) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        counts = list(_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", "")))
        host = _number(environ, "SLURM_NODEID") if environ.get("SLURM_NODEID") else 0
        size = _number(environ, "SLURM_STEP_NUM_TASKS")
        return Tasks(
            starter="srun",
            rank=_number(environ, "SLURM_PROCID"),
            size=size,
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_size=counts[host] if host < len(counts) else size,
            address=first_host(environ.get("SLURM_STEP_NODELIST", "")) or None,
            port=15_000 + (31 * job + step) % 10_000,  # not one that systems hand out by themselves
        )
    return None


def _is_several(count: str | None) -> bool:
    return count is not None and count.isdigit() and int(count) > 1


def first_host(hosts: str) -> str:
    """The first name of Slurm's short form: "gpu[07-09,12],cpu1" → "gpu07"."""
    name = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in name.groups()) if name else ""


def _counts(short: str) -> Iterator[int]:
    """Slurm's "8(x2),4" → 8, 8, 4."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", short):
        yield from [int(count)] * int(times or 1)
