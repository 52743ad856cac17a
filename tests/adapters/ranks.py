"""Functions that run in processes of their own, forked from a server that has imported everything once."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from selective_pref_adapters import heads
from selective_pref_adapters.cli import main
from selective_pref_adapters.deepspeed_loop import loop, sampling
from selective_pref_adapters.launching import together
from selective_pref_adapters.launching.together import LOCK, own_folder
from selective_pref_adapters.options import TrainConfig

PATIENCE = 250  # seconds after which a run counts as hanging
GRACE = 30  # seconds for the others to end by themselves, where one has failed
PRELOADED = ("deepspeed_loop", "hf_trainer", "trl_trainer", "fsdp")


def server() -> Any:
    """The start method that forks from a server with everything imported: a second a process, not ten."""
    context = multiprocessing.get_context("forkserver")
    names = [f"selective_pref_adapters.{name}" for name in PRELOADED]
    context.set_forkserver_preload(["peft", *names])  # silent where it fails
    return context


def start(function: Callable[..., None], *arguments: Any, log: Path | None = None) -> Any:
    """A process that runs `function`; the caller joins it. What it prints is added to the file `log`."""
    process = server().Process(target=_run, args=(log, function, arguments))
    process.start()
    return process


def _run(log: Path | None, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):  # that of libraries and of processes that this one starts, too
            os.dup2(file, stream)
    gc.freeze()  # see the hook in tests/conftest.py
    function(*arguments)


def run_ranks(
    function: Callable[..., None], *arguments: Any, world_size: int = 2, log: Path | None = None
) -> list[int]:
    """Exit codes of `world_size` processes that run `function(*arguments)` as a launcher would start them.

    The watchdog: whoever is left after PATIENCE, or GRACE after another one failed, is killed; its exit code says so.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(_as_rank, rank, world_size, port, function, arguments, log=log) for rank in range(world_size)]
    end = time.monotonic() + PATIENCE
    while (running := [process for process in processes if process.is_alive()]) and time.monotonic() < end:
        wait([process.sentinel for process in running], end - time.monotonic())
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run_script(script: Path, *arguments: Any) -> None:
    """What `python script arguments` would do, in this process, which ends with it."""
    sys.argv = [str(script), *map(str, arguments)]
    kept = runpy.run_path(str(script), run_name="__main__")
    sys.stdout.flush()
    os._exit(0 if kept else 1)  # without tidying up: see two_processes.py


def _as_rank(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),  # accelerate leaves another one in the process of the tests
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(*arguments)


def train_all(configs: list[TrainConfig]) -> None:
    """One run after the other."""
    for config in configs:
        loop.train(config)


def train_with_empty_rank(config: TrainConfig) -> None:
    """The second process holds pairs without completions only."""
    whole = loop.share_of

    def share_of(*arguments: Any) -> Any:
        batches = whole(*arguments)
        return [[sampling.FILLER] * len(batch) for batch in batches] if os.environ["RANK"] == "1" else batches

    loop.share_of = share_of
    try:
        loop.train(config)
    finally:
        loop.share_of = whole


def stop_at(call: int, rank: str = "0") -> None:
    """From now on, the process of that rank gets SIGTERM at the given call of `step_engine`, within the step."""
    calls = [0]
    whole = step_engine_of_the_loop

    def step_engine(engine: Any) -> float:
        calls[0] += 1
        if calls[0] == call and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(engine)

    loop.step_engine = step_engine


step_engine_of_the_loop = loop.step_engine


def count_shared() -> list[int]:
    """How many batches share their prompts from now on."""
    shared = [0]

    def lay_out(*args: Any, **options: Any) -> Any:
        found = lay_out_of_the_heads(*args, **options)
        shared[0] += found is not None
        return found

    heads.lay_out = lay_out
    return shared


lay_out_of_the_heads = heads.lay_out


def count_batches() -> list[int]:
    """How many batches are trained on from now on."""
    batches, whole = [0], loop.step_engine

    def step_engine(engine: Any) -> float:
        batches[0] += 1
        return whole(engine)

    loop.step_engine = step_engine
    return batches


def everything(folder: Path, configs: dict[str, TrainConfig]) -> None:
    """All that two processes are asked to do; results go to `folder`, one file a process."""
    seen: dict[str, Any] = {}
    for name, config in configs.items():
        if name == "empty rank":
            train_with_empty_rank(config)
            continue
        if name.endswith("stopped"):
            stop_at(3, rank="1")
        shared, batches = count_shared(), count_batches()
        result = loop.train(config)
        loop.step_engine = step_engine_of_the_loop
        seen[name] = {"metrics": result.metrics, "summary": result.summary, "stopped_at": result.stopped_at}
        seen[name] |= {"shares": shared[0] >= 4, "batches": batches[0]}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def run_cli(arguments: list[str]) -> None:
    """The command line; its status becomes the process's."""
    sys.exit(main(arguments))


def one_hangs(config: TrainConfig) -> None:
    """The second process waits in a step until the first has given up by itself."""
    ready, given_up = Path(config.output_dir).parent / "ready", Path(config.output_dir).parent / "given up"
    (ready / os.environ["RANK"]).mkdir(parents=True)
    while len(list(ready.iterdir())) < 2:  # on a busy machine one may start seconds before the other
        time.sleep(0.05)

    def wait_in_step(_: Any) -> Any:
        end = time.monotonic() + 60
        while not given_up.exists() and time.monotonic() < end:
            time.sleep(0.05)
        os._exit(3 if given_up.exists() else 1)

    if os.environ["RANK"] == "1":
        loop.step_engine = wait_in_step
    try:
        loop.train(config)
    except RuntimeError:
        given_up.touch()
        os._exit(17)


def see_one_folder(rank: int, port: int, folder: Path, results: Any) -> None:
    """What the two processes see of each case: the message of an error, or what they found."""
    together.PATIENCE = 0.5
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    cases: dict[str, tuple[Path, dict[str, Any]]] = {
        "one folder": (folder / "run", {"beta": 0.1}),
        "two folders": (folder / f"run-{rank}", {}),
        "other options": (folder / "run", {"beta": 0.1, "seed": rank}),
        "used": (folder / "used", {}),
    }
    seen: dict[str, str] = {}
    for name, (own, options) in cases.items():
        try:
            with own_folder(own, options):
                seen[name] = (own / LOCK).read_text()
                dist.barrier()  # the first process has not left yet
        except (ValueError, OSError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    results.put((rank, seen))
    dist.destroy_process_group()
