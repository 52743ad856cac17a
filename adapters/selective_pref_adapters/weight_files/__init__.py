"""The files of a model's weights, for engines that cut a model while it is loaded (ZeRO-3).

checkpoint   safetensors files, of which values are read when they are needed
memory       how much room this process has for weights
checks       whether models can be loaded in parts, and have room; before any is loaded
"""

from __future__ import annotations

from selective_pref_adapters.weight_files.checkpoint import Checkpoint
from selective_pref_adapters.weight_files.checks import check_weight_files

__all__ = ["Checkpoint", "check_weight_files"]
