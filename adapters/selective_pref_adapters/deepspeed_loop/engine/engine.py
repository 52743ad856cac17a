"""DeepSpeed: engines around policy and reference, the optimiser's step."""

from __future__ import annotations

import difflib
import json
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import get_scheduler

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints a line on stdout when it has to guess
import deepspeed
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from selective_pref_adapters.heads import install_fused_head
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.sharded import is_sharded


def start_engine(config: TrainConfig, policy: torch.nn.Module, steps: int, per_step: int) -> tuple[Any, Any]:
    """(engine around the policy, learning-rate scheduler)."""
    if config.fused_head:
        install_fused_head(policy, at_first_call=is_sharded(policy), share_prefix=config.share_prefix)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    wrapped = config.zero_stage > 0 or config.dtype != "float32"  # DeepSpeed's optimizer around ours clips and skips
    learns = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = (
        torch.optim.AdamW(learns, **options)
        if wrapped
        else FiniteAdamW(learns, max_grad_norm=config.max_grad_norm, **options)
    )
    scheduler = get_scheduler(
        config.lr_schedule if config.lr_schedule != "constant" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=steps,
    )
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config={
            **shared_settings(config),
            "gradient_accumulation_steps": per_step // (config.batch_size * dist.get_world_size()),
            "gradient_clipping": config.max_grad_norm if wrapped else 0.0,
            # AdamW of torch: DeepSpeed's own would be compiled at the first start.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine, scheduler


def start_frozen_engine(config: TrainConfig, reference: torch.nn.Module, _: torch.device) -> Any:
    """An engine around a frozen model, on this process's device; sharded beside the policy under ZeRO-3."""
    settings = shared_settings(config)
    settings["zero_optimization"].pop("offload_optimizer", None)
    if config.zero_stage < 3:
        settings["zero_optimization"] = {"stage": 0}  # nothing to shard without an optimiser
    engine, *_ = deepspeed.initialize(model=reference, config=settings)
    return engine


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """What DeepSpeed is told about policy and references alike."""
    settings = further_settings(config)
    zero: dict[str, Any] = {**_BUCKETS[config.zero_stage], **settings.get("zero_optimization", {})}
    zero["stage"] = config.zero_stage
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        **settings,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bfloat16"},
    }


_NUMBERS = 20_000_000
_ZERO_3 = {"reduce_bucket_size": _NUMBERS, "stage3_prefetch_bucket_size": _NUMBERS, "sub_group_size": _NUMBERS}
_BUCKETS: dict[int, dict[str, int]] = {0: {}, 1: {}, 2: {}, 3: _ZERO_3}
"""How many numbers ZeRO-3 handles at a time; DeepSpeed's own 500 million gradients, and a billion in the optimiser,
take more memory than a small model."""

KNOWN = {
    "activation_checkpointing",
    "aio",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "optimizer",
    "prescale_gradients",
    "scheduler",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
"""Settings of DeepSpeed, for names that are nearly these; it has more."""
DECIDED_BY_FLAGS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "learning_rate and weight_decay",
    "scheduler": "lr_schedule",
    "bf16": "dtype",
    "fp16": "dtype",
    "zero_optimization.stage": "zero_stage",
}


def further_settings(config: TrainConfig) -> dict[str, Any]:
    """What `deepspeed_config` holds. Raises ValueError where it is no JSON object, or decides what a flag decides."""
    if config.deepspeed_config is None:
        return {}
    path = Path(config.deepspeed_config)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed_config {path} cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed_config {path} must hold a JSON object; got {type(settings).__name__}")
    zero = settings.get("zero_optimization", {})
    for name in [*settings, *(f"zero_optimization.{name}" for name in zero)]:
        if name in DECIDED_BY_FLAGS:
            raise ValueError(f"deepspeed_config {path} sets {name}: leave it to the option {DECIDED_BY_FLAGS[name]}")
    for name in settings.keys() - KNOWN:  # DeepSpeed ignores what it does not know
        if near := difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8):
            raise ValueError(f"deepspeed_config {path}: DeepSpeed knows no {name!r}: did you mean {near[0]!r}?")
    try:
        DeepSpeedZeroConfig(**zero)
    except (ValueError, TypeError) as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in getattr(error, "errors", list)())
        raise ValueError(f"deepspeed_config {path}: zero_optimization: {said or error}") from error
    return settings


class FiniteAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient, and leaves the weights alone where its norm is not finite.

    For ZeRO stage 0 in float32, where DeepSpeed wraps no optimizer of its own around this one. It reads both
    attributes: `overflow` makes it count the step as skipped, `_global_grad_norm` is what `get_global_grad_norm` gives.

    Args:
        parameters: what is trained.
        max_grad_norm: gradients are clipped to this norm.
        options: as `torch.optim.AdamW` takes them.
    """

    def __init__(self, parameters: Any, *, max_grad_norm: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.max_grad_norm = max_grad_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Any = None) -> Any:
        """One step, or none where the gradient is not finite."""
        trained = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        self._global_grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return None
        clip_grad_norm_(trained, self.max_grad_norm)  # DeepSpeed's, as at every other stage
        return super().step(closure)


def step_engine(engine: Any) -> float:
    """Ends a batch, and the optimiser step where it is the last; returns the gradient's norm before clipping.

    A gradient that is not finite moves no weight: the optimizer skips such a step, `engine.skipped_steps` counts it,
    and the learning rate moves on all the same.
    """
    skipped = engine.skipped_steps
    engine.step()
    if engine.skipped_steps > skipped:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch suspects a mistake where the first step is skipped
            engine.lr_scheduler.step()
    norm = engine.get_global_grad_norm()
    return 0.0 if norm is None else float(norm)


def load_engine(engine: Any, folder: Path, tag: str) -> bool:
    """Puts model, optimiser and scheduler where DeepSpeed saved them; returns whether it found them.

    DeepSpeed unpickles its files, and a pickle can run any code when it is read. Here only tensors, plain values and
    the three classes below, which DeepSpeed writes, are accepted.

    Raises:
        ValueError: a file holds anything else.
    """

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load
    try:
        found, _ = engine.load_checkpoint(str(folder), tag=tag)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder} holds more than tensors and plain values, and is not loaded: {error}") from error
    return found is not None
