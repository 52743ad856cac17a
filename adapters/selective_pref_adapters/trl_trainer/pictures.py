"""Rows of the evaluation set → pairs as they are shown: what `SelectionPictures` draws for a `SelectiveDPOTrainer`."""

from __future__ import annotations

from typing import Any

import torch

from selective_pref_adapters.heads import frozen_per_token_logps
from selective_pref_adapters.models import running_model
from selective_pref_adapters.objectives import loss_of_batch
from selective_pref_adapters.seeing.shown import ShownPair, shown_pairs


def shown_rows(trainer: Any, rows: list[Any], first: int) -> list[ShownPair]:
    """What the loss says of these rows now; `first` is the number of the first of them. Every process calls it."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    model = running_model(trainer)
    model.eval()
    with torch.no_grad():
        logps = frozen_per_token_logps(model, batch)
        out = loss_of_batch(trainer.objective, batch, logps, trainer.reference.logps_of(batch))
    places = [row.get("place") or f"evaluation set, row {at}" for at, row in enumerate(rows, start=first)]
    return shown_pairs(out, batch["input_ids"], trainer.processing_class, places=places)
