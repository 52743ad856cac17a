"""What a run writes for its readers: a line per event, TensorBoard, a tracker, and a table at the end.

In: metrics, plain numbers. Out: files in the run's folder, which is locked meanwhile.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

import selective_pref_adapters.deepspeed_loop.checkpoints as checkpoints
from selective_pref_adapters.deepspeed_loop.state import Metrics
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.options import TrainConfig


class RunLog:
    """`metrics.jsonl` (a line per event, flushed), TensorBoard events, a tracker, `config.yaml` and `run.json`.

    A run that is resumed at `step` keeps the lines up to it and drops what came after it; None starts anew. `lines` is
    the same on every process; only the one that `writes` touches the disk.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, identity: dict[str, Any], step: int | None, *, writes: bool
    ) -> None:
        self.lines = [] if step is None else _lines_until(folder / "metrics.jsonl", step)
        self._file = self._board = self._tracker = None
        self._lock = -1
        dist.barrier()  # all have read, and found the folder as they expect it
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        checkpoints.sweep(folder / "checkpoints")
        write_whole(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        write_whole(folder / "run.json", json.dumps(identity, indent=1) + "\n")
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=None if step is None else step + 1)
        if config.tracker != "none":  # both know the same three calls
            self._tracker = importlib.import_module(config.tracker)
            self._tracker.init(project="selective-pref", name=folder.name, config=dataclasses.asdict(config))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish()
        if self._lock >= 0:
            os.close(self._lock)

    def write(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Adds one line; nothing where there are no metrics."""
        if not metrics:
            return
        self.lines.append({"step": step, "epoch": round(epoch, 6), **metrics})
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(self.lines[-1]) + "\n")
        self._file.flush()
        named = {name.replace("eval_", "eval/", 1): value for name, value in metrics.items()}
        for name, value in named.items():
            self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(named, step=step)


def _locked(folder: Path) -> int:
    """A handle that keeps other runs out of the folder until it is closed, or this process is gone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OSError(
            f"another run is writing to {folder}: wait for its end, or end its processes (a launcher that is killed "
            "leaves them behind)"
        ) from error
    return handle


def _lines_until(path: Path, step: int) -> list[Metrics]:
    """The lines of a log up to a step; a last line that a kill cut short is none."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    lines: list[Metrics] = [json.loads(line) for line in whole]
    return [line for line in lines if line["step"] <= step]


def print_summary(console: Console, config: TrainConfig, output_dir: Path, summary: dict[str, Any]) -> None:
    """The evaluation before and after, side by side."""
    before, after = summary["before"], summary["after"]
    sizes = f"{summary['steps']} steps, {summary['train_pairs']} pairs, {summary['eval_pairs']} held out"
    table = Table(title=f"{config.objective}: {sizes}")
    for column in ("held-out", "before", "after"):
        table.add_column(column, justify="left" if column == "held-out" else "right")
    for name in after:
        table.add_row(name.removeprefix("eval_"), f"{before[name]:.5g}", f"{after[name]:.5g}")
    if after:
        console.print(table)
    if config.objective == "selective_dpo" and after.get("eval_selection/rewards/margins", 0.0) < 0:
        console.print(
            "The selected margin is below 0: selection takes the tokens that most need the update, so that is normal. "
            "Judge the run by whether rewards/margins and rewards/accuracies rise; beside a stronger reference they "
            "start low too.",
            soft_wrap=True,
        )
    if summary["skipped_batches"] or summary["skipped_steps"]:
        console.print(
            f"not finite, and left out: {summary['skipped_batches']} batches, {summary['skipped_steps']} steps",
            soft_wrap=True,
        )
    console.print(f"model and logs: {output_dir}")
