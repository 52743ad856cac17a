"""That the processes of a run are one run: the same options, one folder that all of them see, which no other run uses.

In: the output folder and the options, in every process. Out: the folder locked for this run, or an error in every
process; nothing has been loaded by then.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

LOCK = "_in_use.lock"
"""The file that is locked, in the folder. It holds a number that is drawn for each run, and who made it. A name that
begins with _ is one that a trainer does not send to the hub."""
PATIENCE = 60.0
"""Seconds until a file that one host has made must be seen by the others; network file systems look seldom."""


@contextmanager
def own_folder(folder: Path, options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, no other run can use the folder; it is made where it is absent. Every process must call it.

    The lock goes with its process, however that ends. An empty folder is not left behind.

    Args:
        folder: where the run writes.
        options: of the run, that must be the same in every process.

    Raises:
        OSError: another run uses the folder, or it cannot be made; on every process.
        ValueError: not all processes see the same folder, or have the same options; on every process.
    """
    handle, token, failure = -1, "", None
    if _rank() == 0:
        token = f"{secrets.token_hex(8)} process {os.getpid()} of {socket.gethostname()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _locked(folder, token)
        except OSError as error:
            failure = error
    try:
        told, token = _from_first((None if failure is None else str(failure), token))
        if told is not None:
            raise failure or OSError(told)
        _check_same(folder, token, options)
        yield
    finally:
        if handle >= 0:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)
            with suppress(OSError):  # it holds something, as it should
                folder.rmdir()


def _locked(folder: Path, token: str) -> int:
    """A handle that locks the folder until it is closed or this process ends."""
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(handle, 200, 0).decode(errors="replace").partition(" ")[2]
            os.close(handle)
            raise OSError(
                f"another run is writing to {folder} ({owner or 'unknown'}): wait for its end, or end its processes (a "
                "launcher that is killed leaves them behind)"
            ) from error
        except OSError as error:
            logger.warning("%s: its file system has no locks (%s): nobody will notice two runs in it", folder, error)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                break
        os.close(handle)  # the run before removed it in between
    os.ftruncate(handle, 0)
    os.pwrite(handle, token.encode(), 0)
    os.fsync(handle)
    return handle


def _check_same(folder: Path, token: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError, on every process, where one sees another folder or has other options."""
    seen, until = _holds(folder, token), time.monotonic() + PATIENCE
    while not seen and time.monotonic() < until:
        time.sleep(0.2)
        seen = _holds(folder, token)
    for rank, (host, there, theirs) in enumerate(everywhere := _from_all((socket.gethostname(), seen, dict(options)))):
        if not there:
            raise ValueError(
                f"process {rank} on {host} does not see the output folder {folder} of the first process, on "
                f"{everywhere[0][0]}: it must be one folder for all hosts, on a file system that they share"
            )
        ours = everywhere[0][2]
        differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if differ:
            listed = "; ".join(f"{name} is {ours.get(name)!r} and {theirs.get(name)!r}" for name in differ)
            raise ValueError(
                f"process 0 on {everywhere[0][0]} and process {rank} on {host} were started with different options: "
                f"{listed}. Start the same command on every host"
            )


def _holds(folder: Path, token: str) -> bool:
    try:
        return (folder / LOCK).read_text(encoding="utf-8") == token
    except OSError:
        return False


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _from_first(value: Any) -> Any:
    """The first process's value, on all processes."""
    return _from_all(value)[0]


def _from_all(value: Any) -> list[Any]:
    """Every process's value, on all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
