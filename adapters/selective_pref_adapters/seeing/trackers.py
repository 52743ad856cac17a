"""The selection of a run's fixed pairs in trackers, under one key, so that their step slider is the run's history.

In: `ShownPair`s, a step, and what logs images: TensorBoard's writer, the module `wandb` or `trackio`, or a `Trainer` of
transformers that reports to some of them. Out: an image in each. Images need matplotlib.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selective_pref_adapters.seeing.pictures import write_pairs
from selective_pref_adapters.seeing.shown import ShownPair

KEY = "selection/pairs"

NO_IMAGES = (
    "matplotlib is not installed: the selection of the fixed pairs is kept as files, without images in TensorBoard and "
    "trackers (pip install 'selective-pref[seeing]')"
)


def can_draw() -> bool:
    """Whether images can be drawn; without them `NO_IMAGES` is true."""
    return importlib.util.find_spec("matplotlib") is not None


def track_selection(pairs: Sequence[ShownPair], step: int, *, board: Any = None, tracker: Any = None) -> None:
    """Logs one image of the pairs.

    Args:
        pairs: the same ones at each call.
        step: optimiser steps taken.
        board: a TensorBoard `SummaryWriter`, or None.
        tracker: the module `wandb` or `trackio`, whose run has begun, or None.
    """
    pixels = selection_pixels(pairs, title=f"step {step}")
    if board is not None:
        board.add_image(KEY, pixels, step, dataformats="HWC")
    if tracker is not None:
        tracker.log({KEY: tracker.Image(pixels)}, step=step)


def keep_selection(trainer: Any, pairs: Sequence[ShownPair]) -> None:
    """Keeps the pairs at this step of a `Trainer` of transformers: files in its folder, an image wherever it reports.

    Call it on the first process, at an evaluation.

    Raises:
        OSError: a file cannot be written.
    """
    step = trainer.state.global_step
    write_pairs(pairs, Path(trainer.args.output_dir), step)
    if not can_draw():
        return
    pixels = None
    for board, tracker in _reported_to(trainer):
        pixels = selection_pixels(pairs, title=f"step {step}") if pixels is None else pixels
        if board is not None:
            board.add_image(KEY, pixels, step, dataformats="HWC")
        if tracker is not None:  # transformers gives the step as a metric, and lets the tracker count its own
            tracker.log({KEY: tracker.Image(pixels), "train/global_step": step})


def selection_pixels(pairs: Sequence[ShownPair], *, title: str) -> Any:
    """The image: NumPy's uint8 [height, width, 3]."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from selective_pref_adapters.seeing.figures import selection_figure

    agg = FigureCanvasAgg(selection_figure(pairs, title=title))
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()


def _reported_to(trainer: Any) -> list[tuple[Any, Any]]:
    """(TensorBoard's writer or None, a tracker's module or None) of each callback of transformers that has begun."""
    from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

    found: list[tuple[Any, Any]] = []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            found.append((callback.tb_writer, None))
        elif isinstance(callback, WandbCallback) and callback._initialized:
            found.append((None, callback._wandb))
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            found.append((None, callback._trackio))
    return found
