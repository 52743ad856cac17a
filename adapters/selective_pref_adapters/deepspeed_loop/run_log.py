"""What a run writes for its readers: a line per event, pictures, TensorBoard, a tracker, and a table at the end.

In: metrics, plain numbers. Out: files in the run's folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

import selective_pref_adapters.deepspeed_loop.checkpoints as checkpoints
from selective_pref_adapters.deepspeed_loop.state import LoggedMetrics, Metrics, finite_or_none
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.monitoring import verdict
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.seeing.pictures import remove_selections_after, write_pairs
from selective_pref_adapters.seeing.shown import ShownPair
from selective_pref_adapters.seeing.trackers import can_draw, track_selection


class RunLog:
    """`metrics.jsonl` (a line per event, flushed), TensorBoard events, a tracker, `config.yaml` and `run.json`.

    A run that is resumed at `step` keeps lines and pictures up to that step and drops later ones; None starts a new
    log. Every process holds the same `lines`; only the one with `writes` writes them.

    Raises:
        ValueError: the tracker cannot be started. No file has been written by then.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, identity: dict[str, Any], step: int | None, *, writes: bool
    ) -> None:
        self.lines = [] if step is None else lines_until(folder / "metrics.jsonl", step)
        self.writes = writes
        self._folder = folder
        self._file = self._board = self._tracker = None
        dist.barrier()  # every process has read the old log before the first one changes it
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._tracker = None if config.tracker == "none" else _started(config, folder.name)
        checkpoints.sweep(folder / "checkpoints")
        remove_selections_after(folder, -1 if step is None else step)
        write_whole(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        write_whole(folder / "run.json", json.dumps(identity, indent=1) + "\n")
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=None if step is None else step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish()

    def write(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Adds one line; nothing where there are no metrics."""
        if not metrics:
            return
        self.lines.append({"step": step, "epoch": round(epoch, 6), **finite_or_none(metrics)})
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(self.lines[-1], allow_nan=False) + "\n")
        self._file.flush()
        named = {name.replace("eval_", "eval/", 1): value for name, value in metrics.items() if math.isfinite(value)}
        for name, value in named.items():
            self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(named, step=step)

    def write_selection(self, step: int, pairs: Sequence[ShownPair]) -> None:
        """Keeps the selection of the fixed pairs: files in the run's folder, and images where matplotlib is there."""
        write_pairs(pairs, self._folder, step)
        if can_draw():
            track_selection(pairs, step, board=self._board, tracker=self._tracker)


def _started(config: TrainConfig, name: str) -> Any:
    """The tracker's module, with a run begun: W&B and trackio have the same `init`, `log` and `finish`."""
    tracker: Any = importlib.import_module(config.tracker)
    try:
        tracker.init(project="selective-pref", name=name, config=dataclasses.asdict(config))
    except Exception as error:  # each tracker has errors of its own: no login, no network, no permission
        raise ValueError(
            f"tracker {config.tracker} cannot be started: {error}. Log in to it, or leave --tracker out"
        ) from error
    return tracker


def lines_until(path: Path, step: float) -> list[LoggedMetrics]:
    """The lines of a log up to a step, without a last line that was cut short when the run was killed."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    lines: list[LoggedMetrics] = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is damaged: {error}. Remove that line to go on without it") from error
    return [line for line in lines if (at := line["step"]) is not None and at <= step]


def write_summary(config: TrainConfig, output_dir: Path, summary: dict[str, Any], lines: list[LoggedMetrics]) -> None:
    """`summary.json`; on the screen the evaluation before and after, and whether the run went the right way."""
    write_whole(output_dir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    console = Console()
    before, after = summary["before"], summary["after"]
    sizes = f"{summary['steps']} steps, {summary['train_pairs']} pairs, {summary['eval_pairs']} held out"
    table = Table(title=f"{config.objective}: {sizes}")
    for column in ("held-out", "before", "after"):
        table.add_column(column, justify="left" if column == "held-out" else "right")
    for name in after:
        cells = [values.get(name) for values in (before, after)]
        table.add_row(name.removeprefix("eval_"), *("-" if cell is None else f"{cell:.5g}" for cell in cells))
    if after:
        console.print(table)
    ratio = config.selection_ratio if config.objective == "selective_dpo" else 1.0
    sentences = verdict(lines, selection_ratio=ratio).sentences
    selected = after.get("eval_selection/rewards/margins")
    if config.objective == "selective_dpo" and selected is not None and selected < 0:
        sentences.append(
            "The margin of the selected tokens is below 0. That alone says nothing: the selection takes the tokens "
            "that most need the update, so it is usual in a run that goes well, too. Judge a run by the full margin "
            "and accuracy."
        )
    if summary["skipped_batches"] or summary["skipped_steps"]:
        sentences.append(
            f"not finite, and left out: {summary['skipped_batches']} batches, {summary['skipped_steps']} steps"
        )
    for sentence in [*sentences, f"model and logs: {output_dir}"]:
        console.print(sentence, soft_wrap=True, highlight=False)
