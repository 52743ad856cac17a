"""TRL's `DPOTrainer` with a selection of tokens: change two names in a script, and everything else stays.

trainer    `SelectiveDPOTrainer`: `DPOTrainer` with the loss of this library (`compute_loss` is the seam)
config     `SelectiveDPOConfig`: `DPOConfig` with the options of a selection, each of TRL's read or refused
checks     what the trainer is given, checked before the first step
reference  where its reference log-probs come from: a model, the policy with its adapter off, or a store
stored     how stored log-probs are found and reach the loss
metrics    what is logged of a micro-batch
command    `selective-pref dpo`
"""

from __future__ import annotations

from selective_pref_adapters.trl_trainer.config import SelectiveDPOConfig
from selective_pref_adapters.trl_trainer.stored import pairs_of
from selective_pref_adapters.trl_trainer.trainer import SelectiveDPOTrainer

__all__ = ["SelectiveDPOConfig", "SelectiveDPOTrainer", "pairs_of"]
