"""The selection of a run's fixed pairs, at each evaluation of a `SelectiveDPOTrainer`.

In: the trainer, at an evaluation. Out: a picture and its numbers in the run's folder, an image wherever it reports.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from selective_pref_adapters.heads import frozen_per_token_logps
from selective_pref_adapters.objectives import loss_of_batch
from selective_pref_adapters.seeing.pictures import remove_selections_after
from selective_pref_adapters.seeing.shown import ShownPair, shown_pairs
from selective_pref_adapters.seeing.trackers import NO_IMAGES, can_draw, keep_selection

logger = logging.getLogger(__name__)


class SelectionPictures(TrainerCallback):
    """Draws the first pairs of the evaluation set, the first of several, once per step.

    Every process passes them through the model, since weights may be sharded; the first one draws.
    """

    def __init__(self, trainer: Any, pairs: int) -> None:
        self._trainer = trainer
        self._pairs = pairs
        self._drawn_at = -1
        if not can_draw() and trainer.is_world_process_zero():
            logger.warning("%s", NO_IMAGES)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes what an earlier run drew after this step: a resumed run goes on from it."""
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
        rows = list(islice(dataset, self._pairs))
        size = args.per_device_eval_batch_size
        shown = [pair for at in range(0, len(rows), size) for pair in self._shown(rows[at : at + size], at)]
        if state.is_world_process_zero:
            keep_selection(self._trainer, shown)

    def _shown(self, rows: list[Any], first: int) -> Iterator[ShownPair]:
        trainer = self._trainer
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        model = trainer.model_wrapped if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled else trainer.model
        model.eval()
        with torch.no_grad():
            logps = frozen_per_token_logps(model, batch)
            out = loss_of_batch(trainer.objective, batch, logps, trainer.reference.logps_of(batch))
        places = [row.get("place") or f"evaluation set, row {at}" for at, row in enumerate(rows, start=first)]
        yield from shown_pairs(out, batch["input_ids"], trainer.processing_class, places=places)
