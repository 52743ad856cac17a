"""Going on with a run: what makes it the same run, its checkpoints, and the signal that asks it to stop."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import selective_pref_adapters.deepspeed_loop.checkpoints as checkpoints
from selective_pref_adapters.deepspeed_loop.engine import load_engine
from selective_pref_adapters.deepspeed_loop.run_log import lines_until
from selective_pref_adapters.deepspeed_loop.state import (
    LoggedMetrics,
    Progress,
    TrainResult,
    finite_or_none,
    random_states,
    restore_random_states,
)
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.options import MAY_CHANGE_ON_RESUME, TrainConfig
from selective_pref_adapters.pairs.large import PairStream, PairTable
from selective_pref_adapters.reference_store.identity import model_identity
from selective_pref_adapters.references import Reference, RunningReference, StoredReference


def identity_of(
    config: TrainConfig,
    world_size: int,
    train_pairs: PairTable | PairStream,
    eval_pairs: PairTable,
    references: Mapping[str, Reference | None],
) -> dict[str, Any]:
    """What shapes a run: options, number of processes, what the data, the stores and the references' weights are.

    A running reference is known by the digest of its weights, which takes about a second for each GB: its folder may
    hold other ones when the run is resumed. The policy's folder is not read again then, so its weights do not count.
    """

    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE_ON_RESUME}
    sources: dict[str, str] = {}
    for name, reference in references.items():
        if isinstance(reference, StoredReference):
            sources[f"{name.replace(' ', '_')}_space"] = reference.store.space.name
        if isinstance(reference, RunningReference):
            sources[f"{name.replace(' ', '_')}_weights"] = model_identity(reference.model)["weights"]
    named = {"training_data": train_pairs, "evaluation_data": eval_pairs}
    data = {
        name: pairs.known_by() if isinstance(pairs, PairStream) else f"{len(pairs)} pairs, {pairs.digest()}"
        for name, pairs in named.items()
    }
    return {**options, **sources, "processes": world_size, **data}


FIXED = ("dtype", "zero_stage", "offload_optimizer", "offload_parameters", "processes")
"""What the layout of a checkpoint's files depends on: a change of these is refused even with `force_resume`."""


def check_same_run(checkpoint: Path | None, folder: Path, identity: dict[str, Any], config: TrainConfig) -> list[str]:
    """The differences between this run and the one to be resumed, one sentence each; none where nothing is resumed.

    Raises:
        ValueError: there are differences without `force_resume`, or one that the checkpoint's files do not allow.
    """
    recorded = (checkpoint or folder) / "run.json"
    if config.resume is None or not recorded.exists():
        return []
    theirs = _read_json(recorded)
    ours = json.loads(json.dumps(identity))
    changed = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    listed = [f"{name} was {theirs.get(name)!r}, is now {ours.get(name)!r}" for name in changed]
    if changed and not config.force_resume:
        raise ValueError(
            f"{recorded.parent} belongs to another run: {'; '.join(listed)}. Give the options that it was started "
            "with, start a new run in another output_dir, or take the change with --force-resume"
        )
    fixed = [line for name, line in zip(changed, listed, strict=True) if name in FIXED]
    if checkpoint is not None and fixed:
        raise ValueError(
            f"{checkpoint} cannot be read otherwise than it was written: {'; '.join(fixed)}. Resume it as it was, or "
            "finish that run and start a new one from its saved model"
        )
    return [f"resumed with a difference: {line}" for line in listed]


def checkpoint_to_resume(config: TrainConfig, output_dir: Path) -> Path | None:
    """The checkpoint that the configuration asks for, if there is one; the same on every process.

    Raises:
        ValueError: a checkpoint was named that is absent or incomplete, or processes see different ones.
    """
    found = None
    if config.resume == "auto":
        found = checkpoints.newest_complete(output_dir / "checkpoints")
    elif config.resume is not None:
        found = Path(config.resume)
        if not checkpoints.is_complete(found):
            raise ValueError(f"resume: {found} is no complete checkpoint (expected 'auto' or .../checkpoints/step-...)")
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, None if found is None else checkpoints.step_of(found))
    if len(set(steps)) > 1:
        raise ValueError(f"processes see different checkpoints (steps {steps}): output_dir must be one shared folder")
    return found


def finished_run(output_dir: Path, steps: int, checkpoint: Path | None) -> TrainResult | None:
    """What a finished run of at least `steps` steps left in this folder; None where steps are left to do.

    Raises:
        ValueError: a finished run is to do more steps, but kept no checkpoint to go on from.
    """
    if not (output_dir / "summary.json").exists():
        return None
    summary = _read_json(output_dir / "summary.json")
    if summary["steps"] < steps:
        if checkpoint is None:
            raise ValueError(
                f"the run in {output_dir} is finished after {summary['steps']} steps and kept no checkpoint, so it "
                f"cannot go on to {steps}: start a new run with the saved model as --model"
            )
        return None
    return TrainResult(
        output_dir=output_dir, metrics=lines_until(output_dir / "metrics.jsonl", math.inf), summary=summary
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Remove it to go on without what it holds") from error


def unreadable_note(folder: Path, checkpoint: Path | None) -> list[str]:
    """A sentence where checkpoints newer than the one that is resumed are there, but are not complete.

    Raises:
        ValueError: no checkpoint is complete, and the run is not finished: it would begin anew, and lose its log.
    """
    unreadable = [path for path in checkpoints.incomplete(folder / "checkpoints") if not path.name.startswith(".")]
    names = ", ".join(path.name for path in unreadable if checkpoint is None or path.name > checkpoint.name)
    if not names:
        return []
    reason = f"{names} in {folder / 'checkpoints'} cannot be read: files are missing or cut off"
    if checkpoint is not None:
        return [f"{reason}. The run goes on from {checkpoint.name}"]
    if not (folder / "summary.json").exists():
        raise ValueError(f"{reason}. No other checkpoint is there: begin anew in another output_dir")
    return [reason]


def save_checkpoint(engine: Any, folder: Path, progress: Progress, identity: dict[str, Any], keep: int) -> None:
    """Writes everything that a resumed run needs; every process must call it.

    Model, optimiser and scheduler are in DeepSpeed's files, progress and random states in one file for each process,
    and the identity of the run in `run.json`. The folder gets its name when all of it is there: see `checkpoints`.

    Raises:
        OSError: it could not be written. Nothing of it is left, and earlier checkpoints are as they were.
    """
    rank = dist.get_rank()
    aside = folder / f".step-{progress.step:08d}"
    try:
        if rank == 0:
            aside = checkpoints.begin(folder, progress.step)
        dist.barrier()
        engine.save_checkpoint(str(aside), tag="engine", save_latest=False)
        torch.save({"progress": vars(progress), "random": random_states()}, aside / f"process-{rank:05d}.pt")
        dist.barrier()
        if rank == 0:
            write_whole(aside / "run.json", json.dumps(identity, indent=1) + "\n")
            checkpoints.publish(folder, progress.step, keep)
        dist.barrier()
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
        if rank == 0:
            checkpoints.abandon(folder, progress.step)
        raise OSError(
            f"the checkpoint of step {progress.step} could not be written to {folder}: {error}. Earlier ones are as "
            "they were: make room, and go on with --resume auto"
        ) from error


def load_checkpoint(engine: Any, checkpoint: Path) -> Progress:
    """Puts model, optimiser, scheduler and random states where the checkpoint had them; returns its progress."""
    if not load_engine(engine, checkpoint, tag="engine"):
        raise ValueError(f"DeepSpeed cannot load {checkpoint}")
    own = torch.load(checkpoint / f"process-{dist.get_rank():05d}.pt", weights_only=True, map_location=engine.device)
    restore_random_states(own["random"])
    return Progress(**own["progress"])


class StopRequest:
    """Remembers that SIGTERM came, so that the run can save a checkpoint and stop instead of being ended by it."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # signals can be handled nowhere else
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.requested = True


def stopped_run(console: Console, output_dir: Path, lines: list[LoggedMetrics], progress: Progress) -> TrainResult:
    """Says how the run can go on; the result has no evaluation of the end, as there was none."""
    console.print(
        f"stopped by SIGTERM after step {progress.step}; a checkpoint was saved: go on with --resume auto",
        soft_wrap=True,
    )
    summary = {"before": finite_or_none(progress.first_evaluation), "after": {}}
    return TrainResult(output_dir=output_dir, metrics=lines, summary=summary, stopped_at=progress.step)
