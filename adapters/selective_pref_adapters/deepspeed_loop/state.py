"""The state of a run beside model and optimiser: progress, metrics since the last line of the log, random states."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from selective_pref_adapters.monitoring import mean_over_pairs

Metrics: TypeAlias = dict[str, float]
LoggedMetrics: TypeAlias = dict[str, float | None]
"""A line of the log: None (`null` in the file) stands for a value that is not finite, which JSON cannot express."""


@dataclass
class Progress:
    """How far a run has come. A checkpoint holds one for each process.

    The sampler's position is `step`: which pairs a step reads depends on its number and the seed alone, unless rows are
    streamed.
    """

    step: int = 0
    first_evaluation: Metrics = field(default_factory=dict[str, float])
    last_evaluation: Metrics = field(default_factory=dict[str, float])
    window: list[dict[str, torch.Tensor]] = field(default_factory=list[dict[str, torch.Tensor]])
    """Metrics of every batch since the last line of the log; they stay on the device until a line is written."""
    skipped_batches: int = 0
    empty_steps: int = 0
    """The number of consecutive steps, up to the last one, that moved no weight."""
    stream: dict[str, Any] | None = None
    """Where the stream stands from which rows are read; None where their order is known."""

    def postfix(self, skipped_steps: int) -> dict[str, str]:
        """The last batch for the progress bar: loss, accuracies and margins, full and of the selected tokens."""
        shown = {
            "loss": "loss",
            "acc": "rewards/accuracies",
            "margin": "rewards/margins",
            "sel_acc": "selection/rewards/accuracies",
            "sel_margin": "selection/rewards/margins",
        }
        last = self.window[-1] if self.window else {}
        values = {short: f"{float(last[name]):.4g}" for short, name in shown.items() if name in last}
        skipped = {"skipped_batches": self.skipped_batches, "skipped_steps": skipped_steps}
        return values | {name: str(count) for name, count in skipped.items() if count}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves behind: its folder, the logged metrics, and first and last evaluation.

    `stopped_at` is the step after which SIGTERM ended the run, with a checkpoint and without a saved model; else None.
    """

    output_dir: Path
    metrics: list[LoggedMetrics]
    summary: dict[str, Any]
    stopped_at: int | None = None


def finite_or_none(metrics: Metrics) -> LoggedMetrics:
    """The metrics as JSON can hold them: None for NaN and infinities."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def close_window(progress: Progress) -> Metrics:
    """The means over all batches since the last line, after which none are left. Every process must call it."""
    means = mean_over_pairs(progress.window, [1] * len(progress.window))  # all batches hold equally many pairs
    progress.window = []
    return means


def metrics_of_step(engine: Any, scheduler: Any, progress: Progress, norm: float) -> Metrics:
    """What a line holds beside the means: rate of the next step, gradient norm of the last, and what was skipped."""
    return {
        "learning_rate": float(scheduler.get_last_lr()[0]),
        **({"grad_norm": norm} if math.isfinite(norm) else {}),
        "skipped_batches": float(progress.skipped_batches),
        "skipped_steps": float(engine.skipped_steps),
    }


def random_states() -> dict[str, Any]:
    """The states of all generators that a run can draw from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undoes every draw since `random_states`."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu())
