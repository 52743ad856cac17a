"""The selection of a run's fixed pairs in trackers, under one key, so that their step slider is the run's history.

In: `ShownPair`s, a step, and what logs images: TensorBoard's writer, or the module `wandb` or `trackio`. Out: an
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from selective_pref_adapters.seeing.figures import selection_figure
from selective_pref_adapters.seeing.shown import ShownPair

KEY = "selection/pairs"


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


def selection_pixels(pairs: Sequence[ShownPair], *, title: str) -> np.ndarray:
    """The image: uint8 [height, width, 3]."""
    agg = FigureCanvasAgg(selection_figure(pairs, title=title))
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()
