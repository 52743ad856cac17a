"""What a run knows of itself: its progress, the metrics since the last line of the log, the random states."""

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


@dataclass
class Progress:
    """What a run knows of itself beside model and optimiser. A checkpoint holds it, one for each process.

    The sampler's position is `step`: which pairs a step reads depends on its number and the seed alone.
    """

    step: int = 0
    first_evaluation: Metrics = field(default_factory=dict[str, float])
    last_evaluation: Metrics = field(default_factory=dict[str, float])
    window: list[dict[str, torch.Tensor]] = field(default_factory=list[dict[str, torch.Tensor]])
    """Metrics of every batch since the last line of the log; they stay on the device until they are shown."""
    skipped_batches: int = 0
    empty_steps: int = 0
    """Steps in a row that moved no weight."""

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
    metrics: list[Metrics]
    summary: dict[str, Any]
    stopped_at: int | None = None


def close_window(progress: Progress) -> Metrics:
    """The means over all batches since the last line; starts anew. Every process must call it."""
    means = mean_over_pairs(progress.window, [1] * len(progress.window))  # all batches hold equally many pairs
    progress.window = []
    return means


def metrics_of_step(engine: Any, scheduler: Any, progress: Progress, norm: float) -> Metrics:
    """What a line says beside the means: rate of the next step, gradient norm of the last, and what was skipped."""
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
