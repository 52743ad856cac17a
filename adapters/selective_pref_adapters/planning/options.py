"""The flags of `selective-pref plan`. Imports nothing but the standard library, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Of which run the memory is computed. Defaults are those of `train --config paper`."""

    model: str
    """Policy: a folder or hub id with the config.json of a causal language model; weights are not read."""
    ref_model: str | None = None
    """Reference: likewise. Default: one of the policy's size."""
    devices: int = 8
    """GPUs of the run, over all hosts: one process each."""
    hosts: int = 1
    """Machines that share the devices evenly."""
    device_memory: float | None = None
    """GiB of one device: says what fits, and what to change where something does not."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed's ZeRO stage of the table; FSDP2 (fully_shard) is counted as stage 3."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the models' weights. In bfloat16 the optimizer keeps float32 master weights."""
    batch_size: int = 1
    """Pairs of one forward pass of one process."""
    max_length: int | None = None
    """Tokens of prompt + completion. Default: what both models can read, at most 4096."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    fused_head: bool = True
    """Compute log-probs without materialising the logits."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the memory of the host; from ZeRO stage 1 on."""
    offload_parameters: bool = False
    """Keep the sharded parameters there too, of policy and reference; ZeRO stage 3."""
    number_of_pairs: int = 80_000
    """Of the store's size on disk, at most: every completion as long as max_length."""
    keep_checkpoints: int = 2
    """How many complete checkpoints are kept."""
    json: bool = False
    """Write one JSON object, in bytes, instead of a table."""
