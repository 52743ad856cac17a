"""Models from disk to DeepSpeed and back.

loading      model folders → models, or under ZeRO-3 this process's part of them; whether there is room for them
processes    they find one another, each on its device
engine       engines around policy and reference, the optimiser's step
lora         adapters on the policy
saving       the trained weights → a model folder, file after file
"""

from __future__ import annotations

from selective_pref_adapters.deepspeed_loop.engine.engine import (
    further_settings,
    load_engine,
    start_engine,
    start_frozen_engine,
    step_engine,
)
from selective_pref_adapters.deepspeed_loop.engine.loading import check_models, load
from selective_pref_adapters.deepspeed_loop.engine.lora import with_adapters
from selective_pref_adapters.deepspeed_loop.engine.processes import start_processes
from selective_pref_adapters.deepspeed_loop.engine.saving import save_model

__all__ = [
    "check_models",
    "further_settings",
    "load",
    "load_engine",
    "save_model",
    "start_engine",
    "start_frozen_engine",
    "start_processes",
    "step_engine",
    "with_adapters",
]
