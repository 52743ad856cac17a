"""TRL's `DPOTrainer` with a selection of tokens: change two names in a script, and everything else stays.

config     `SelectiveDPOConfig`: `DPOConfig` with the options of a selection, each of TRL's read or refused
trainer    `SelectiveDPOTrainer`: `DPOTrainer` with the loss of this library (`compute_loss` is the seam)
command    `selective-pref dpo`
"""

from __future__ import annotations

from selective_pref_adapters.trl_trainer.config import SelectiveDPOConfig
from selective_pref_adapters.trl_trainer.trainer import SelectiveDPOTrainer, pairs_of

__all__ = ["SelectiveDPOConfig", "SelectiveDPOTrainer", "pairs_of"]
