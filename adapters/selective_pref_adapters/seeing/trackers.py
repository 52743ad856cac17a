"""The selection of a run's fixed pairs in trackers, under one key, so that their step slider is the run's history.

In: `ShownPair`s, a step, and what logs images: TensorBoard's writer, the module `wandb` or `trackio`, or a `Trainer` of
transformers that reports to some of them, with `SelectionPictures` among its callbacks. Out: an image in each. Images
need matplotlib.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from selective_pref_adapters.seeing.pictures import remove_selections_after, write_pairs
from selective_pref_adapters.seeing.shown import ShownPair

logger = logging.getLogger(__name__)

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


class SelectionPictures(TrainerCallback):
    """Keeps the selection of the first pairs of a `Trainer`'s evaluation set, of the first of several, once per step.

    Args:
        trainer: of transformers, built.
        pairs: how many.
        shown: rows of the set, and the number of the first → these pairs as they are to be shown. Every process calls
            it, since weights may be sharded; the first one draws.
    """

    def __init__(self, trainer: Any, pairs: int, shown: Callable[[list[Any], int], Sequence[ShownPair]]) -> None:
        self._trainer, self._pairs, self._shown = trainer, pairs, shown
        self._drawn_at = -1
        if not can_draw() and trainer.is_world_process_zero():
            logger.warning("%s", NO_IMAGES)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes what another run, or one that is resumed, kept after this step."""
        self._drawn_at = -1
        if state.is_world_process_zero:
            remove_selections_after(Path(args.output_dir), state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws."""
        dataset = self._trainer.eval_dataset
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()), None)
        if dataset is None or self._drawn_at == state.global_step:
            return
        self._drawn_at = state.global_step
        rows, size = list(islice(dataset, self._pairs)), args.per_device_eval_batch_size
        pairs = [pair for at in range(0, len(rows), size) for pair in self._shown(rows[at : at + size], at)]
        if state.is_world_process_zero:
            keep_selection(self._trainer, pairs)


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
