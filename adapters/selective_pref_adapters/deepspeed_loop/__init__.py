"""The reference loop for full training with DeepSpeed. Read `loop` from top to bottom; it is meant to be copied.

loop          rows in, trained model out: the run, the training step, the evaluation
checks        options, hardware, folder, disk and policy, before the first step
data          rows → token ids of training and evaluation pairs
sampling      which pairs make a step, as a pure function of its number
engine        DeepSpeed: models from disk, processes, engines, the optimiser's step, the saved model
reference     models beside the policy, stores of log-probs, stores filled by models
state         progress, metrics since the last line of the log, random states
not_finite    batches and gradients that are not finite: stop, or leave out on all processes
checkpoints   checkpoint folders, complete or not there at all
resume        whether it is the same run; saving and loading checkpoints; SIGTERM
pictures      the selection of a few fixed pairs, drawn at each evaluation
run_log       metrics.jsonl, TensorBoard, trackers; the table and the sentences at the end
"""

from __future__ import annotations

from selective_pref_adapters.deepspeed_loop.loop import train
from selective_pref_adapters.deepspeed_loop.state import TrainResult
from selective_pref_adapters.launching.processes import leave_processes
from selective_pref_adapters.options import TrainConfig

__all__ = ["TrainConfig", "TrainResult", "leave_processes", "train"]
