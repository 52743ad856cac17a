"""Batches and gradients that are not finite: the run stops, or they are left out on all processes and counted."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console

from selective_pref import NonFiniteError
from selective_pref_adapters.deepspeed_loop.sampling import FILLER
from selective_pref_adapters.deepspeed_loop.state import Progress
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import collate

SKIPS_IN_A_ROW = 20
"""This many optimiser steps in a row without a finite gradient end a run that otherwise skips them."""


def loss_without_gradient(engine: Any, pad_token_id: int) -> torch.Tensor:
    """A loss of 0 whose gradient is 0, computed by the same forward pass that any batch takes.

    It takes the place of the loss of a batch that is left out. Where weights are sharded, the processes exchange them
    in every pass, so each process must go through the same number of passes.
    """
    batch = {name: tensor.to(engine.device) for name, tensor in collate([FILLER], pad_token_id).items()}
    return 0 * model_per_token_logps(engine, batch).sum()


def leave_out(config: TrainConfig, console: Console, error: NonFiniteError) -> None:
    """At a batch whose loss is not finite on some process: raises, or says that it is left out, as configured."""
    if config.non_finite == "raise":
        raise error
    console.print(f"[yellow]batch left out on all processes:[/yellow] {error}", soft_wrap=True, highlight=False)


def check_gradient(
    config: TrainConfig, progress: Progress, console: Console, norm: float, any_batch: bool, skipped: bool
) -> None:
    """After a step: raises where its gradient was not finite, or says that it was skipped, as configured.

    Args:
        norm: of the gradient.
        any_batch: whether a batch of the step was finite. Where none was, the step is skipped on purpose, and no
            message is added to those about its batches.
        skipped: whether the step moved no weight.
    """
    progress.empty_steps = progress.empty_steps + 1 if skipped else 0
    if not skipped and math.isfinite(norm):
        return
    what = f"step {progress.step}: the gradient is not finite"
    if not skipped:
        raise NonFiniteError(f"{what}, and the step was taken: the weights are broken; the last checkpoint is not")
    if progress.empty_steps >= SKIPS_IN_A_ROW:
        raise NonFiniteError(f"{what}, {SKIPS_IN_A_ROW} times in a row: the weights are broken, not a batch")
    if not any_batch:
        return
    if config.non_finite == "raise":
        raise NonFiniteError(f"{what} although every loss is; it was not taken. A lower learning_rate may help")
    console.print(f"[yellow]step skipped:[/yellow] {what} although every loss is", soft_wrap=True, highlight=False)
