"""Preference training with the plain Hugging Face `Trainer`: a loss, a collator and a callback.

In: a `Trainer` of your own. Out: the same `Trainer`, training on preference pairs:

    trainer = Trainer(
        model=model,
        args=TrainingArguments(..., remove_unused_columns=False),
        train_dataset=pairs,
        data_collator=PreferenceCollator(tokenizer),
        compute_loss_func=SelectivePreferenceLoss(ref_model=stronger_model),
    )
    SelectionCallback().attach(trainer)

    collator    pairs → one padded batch, with stored reference log-probs where there is a store
    loss        a model's output → Selective-DPO, or another objective, and the metrics of the selection
    callback    schedules of the ratio and of β, metrics in the logs, warnings, pictures
    checks      what would train wrongly, or fail later, is an error before the first step
    mixin       the same three objects for those who subclass
"""

from __future__ import annotations

import os

from selective_pref_adapters.hf_trainer.callback import SelectionCallback
from selective_pref_adapters.hf_trainer.collator import PreferenceCollator, PreferenceLabels
from selective_pref_adapters.hf_trainer.loss import SelectivePreferenceLoss
from selective_pref_adapters.hf_trainer.mixin import SelectivePreferenceMixin, SelectivePreferenceTrainer
from selective_pref_adapters.objectives import Schedule
from selective_pref_adapters.sharded import give_freed_memory_back

if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    # A script that is run by several processes may load its models sharded, and does so before it calls anything here:
    # afterwards it is too late, holes are filled again before the system is asked for a new block.
    give_freed_memory_back()

__all__ = [
    "PreferenceCollator",
    "PreferenceLabels",
    "Schedule",
    "SelectionCallback",
    "SelectivePreferenceLoss",
    "SelectivePreferenceMixin",
    "SelectivePreferenceTrainer",
]
