"""The files of a model's weights: whole or not, and read in parts where an engine cuts a model that it loads (ZeRO-3).

checkpoint   safetensors files, of which values are read when they are needed
memory       how much room this process has for weights
checks       whether files hold every weight, can be loaded in parts, and have room; before a model is loaded
"""

from __future__ import annotations

from selective_pref_adapters.weight_files.checkpoint import Checkpoint
from selective_pref_adapters.weight_files.checks import (
    check_fits,
    check_room,
    check_weight_files,
    check_whole,
    check_whole_models,
    in_parts,
    is_quantised,
)

__all__ = [
    "Checkpoint",
    "check_fits",
    "check_room",
    "check_weight_files",
    "check_whole",
    "check_whole_models",
    "in_parts",
    "is_quantised",
]
