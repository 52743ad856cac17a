"""The reference loop for full training with DeepSpeed. `loop` is the text to read, from top to bottom, and to copy.

loop          rows in, trained model out: the training step, the evaluation, and what stands around them
checks        options, hardware, folder and disk, before anything is loaded
data          rows → token ids of training and evaluation pairs
sampling      which pairs make a step, as a pure function of its number
engine        DeepSpeed: processes, engines, the optimiser's step, the saved model
state         progress, metrics since the last line of the log, random states
not_finite    batches and gradients that are not finite: stop, or leave out on all processes
checkpoints   folders that are there whole or not at all
resume        what makes it the same run; saving and loading checkpoints; SIGTERM
run_log       metrics.jsonl, TensorBoard, trackers, the table at the end
"""

from __future__ import annotations

from selective_pref_adapters.deepspeed_loop.engine import leave_processes
from selective_pref_adapters.deepspeed_loop.loop import train
from selective_pref_adapters.deepspeed_loop.state import TrainResult
from selective_pref_adapters.options import TrainConfig

__all__ = ["TrainConfig", "TrainResult", "leave_processes", "train"]
