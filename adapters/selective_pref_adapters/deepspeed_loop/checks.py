"""What can be known before the first step, and is checked before it: options, hardware, folders, disk.

In: a `TrainConfig`, then the policy. Out: notes for the reader, or an error that says what to change; nothing has been
written by then.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch

from selective_pref import Objective
from selective_pref_adapters.deepspeed_loop.engine import further_settings
from selective_pref_adapters.deepspeed_loop.sampling import pairs_per_step
from selective_pref_adapters.files import existing
from selective_pref_adapters.launching.together import LOCK
from selective_pref_adapters.objectives import make_objective, needs_reference, unread
from selective_pref_adapters.objectives.veto import NO_START
from selective_pref_adapters.options import MAY_DIFFER_ON_HOSTS, LossOptions, TrainConfig
from selective_pref_adapters.seeing.trackers import NO_IMAGES, can_draw
from selective_pref_adapters.sharded import whole_shape


def check_config(config: TrainConfig) -> None:
    """Raises ValueError at the first option that makes no sense, alone, beside another, or on this machine.

    β, ratio, pool, ties, γ and label smoothing are checked by the loss itself, on a pair of one token.
    """
    reads_reference = needs_reference(configured_objective(config))
    reference = [config.ref_model is not None, config.reference_store is not None]
    scoring_reference = [config.scoring_ref_model is not None, config.scoring_reference_store is not None]
    if reads_reference and not any(reference) and config.lora_r is None:
        raise ValueError(
            f"objective {config.objective!r} compares the policy with a reference: give ref_model (the stronger the "
            "better; the policy's own start is legal but teaches little below ratio 1) or a reference_store"
        )
    if not reads_reference and any(reference):
        raise ValueError(f"objective {config.objective!r} reads no reference: leave ref_model and reference_store out")
    if config.objective == "teacher_veto" and not any(scoring_reference):
        raise ValueError(NO_START)
    if any(scoring_reference) and config.objective not in ("selective_dpo", "teacher_veto"):
        raise ValueError(f"objective {config.objective!r} scores no tokens: leave the scoring reference out")
    for space, store in (
        ("reference_space", "reference_store"),
        ("scoring_reference_space", "scoring_reference_store"),
    ):
        if getattr(config, space) is not None and getattr(config, store) is None:
            raise ValueError(f"{space} says which part of {store} to read: give {store}")
        model = "scoring_ref_model" if store.startswith("scoring") else "ref_model"
        if getattr(config, space) is not None and getattr(config, model) is not None:
            raise ValueError(f"{model} fills its own space of {store}, so leave {space} out (or {model}, to only read)")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in unread(config.objective, config.loss_type, config.f_divergence_type):
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"objective {config.objective!r} does not read {name}: leave it out")
    above_0 = ("learning_rate", "max_grad_norm", "epochs", "batch_size", "gradient_accumulation_steps")
    for name in (*above_0, "process_timeout_minutes"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be above 0; got {getattr(config, name)}")
    for name in ("max_steps", "eval_steps", "logging_steps", "save_steps", "keep_checkpoints"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    for name in ("warmup_steps", "weight_decay", "picture_pairs"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 0; got {getattr(config, name)}")
    check_lora(config)
    check_data(config)
    if config.offload_optimizer and config.zero_stage < 1:
        raise ValueError("offload_optimizer needs zero_stage 1 or above: nothing is sharded or moved at stage 0")
    if config.offload_parameters and config.zero_stage < 3:
        raise ValueError(f"offload_parameters needs zero_stage 3; got {config.zero_stage}")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise ValueError(f"tracker {config.tracker} is not installed: pip install {config.tracker}")
    further_settings(config)
    pairs_per_step(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_hardware(config)


def check_data(config: TrainConfig) -> None:
    """Raises ValueError at options of the rows that make no sense, or cannot be had from a stream."""
    if config.data_workers < 1:
        raise ValueError(f"data_workers must be at least 1; got {config.data_workers}")
    if not config.streaming:
        return
    if config.max_steps is None:
        raise ValueError("streaming does not know how many rows there are: give max_steps, the length of the run")
    if config.eval_pairs is None and config.eval_fraction:
        raise ValueError(
            f"streaming cannot hold out {config.eval_fraction:g} of the rows by their prompts, which are not known "
            "beforehand: give eval_pairs, or eval_fraction 0"
        )
    if config.group_by_length:
        raise ValueError("group_by_length sorts all rows, and streaming holds none: leave one of them out")
    for prefix in ("", "scoring_"):
        if getattr(config, f"{prefix}ref_model") and getattr(config, f"{prefix}reference_store"):
            raise ValueError(
                f"{prefix}ref_model fills {prefix}reference_store with all rows before the first step, which streaming "
                f"does not see: fill it first (selective-pref score), and leave {prefix}ref_model out"
            )


def check_lora(config: TrainConfig) -> None:
    """Raises ValueError at options of LoRA that make no sense, or where PEFT is not installed."""
    if config.lora_r is None:
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if getattr(config, name):
                raise ValueError(f"{name} is read with lora_r only: give lora_r, or leave {name} out")
        return
    if config.lora_r < 1:
        raise ValueError(f"lora_r must be at least 1; got {config.lora_r}")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1); got {config.lora_dropout}")
    if config.lora_alpha is not None and not 0 < config.lora_alpha < math.inf:
        raise ValueError(f"lora_alpha must be above 0; got {config.lora_alpha}")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora_r needs PEFT, which is not installed: pip install 'selective-pref[peft]'")


def check_hardware(config: TrainConfig) -> None:
    """Raises ValueError where this machine cannot compute in `config.dtype`, or has too few devices."""
    if not torch.cuda.is_available():
        return  # a CPU computes bf16 one way or another; see `load_pairs` for the note
    if config.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"dtype bfloat16: {torch.cuda.get_device_name()} does not compute in bf16 (it takes compute capability "
            "8.0 or above): use dtype float32"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no device: there are {torch.cuda.device_count()}. Start as many "
            "processes as there are devices, and let each see all of them (srun --gpus-per-node, not --gpus-per-task)"
        )


def configured_objective(config: TrainConfig) -> Objective:
    """The loss that the configuration names, as a callable (chosen, rejected) → PreferenceLoss."""
    numbers = {option.name: getattr(config, option.name) for option in dataclasses.fields(LossOptions)}
    return make_objective(config.objective, **numbers)


def usable_folder(config: TrainConfig) -> Path:
    """The output folder: absent, empty, or one of a run that is to be resumed; and it can be written to.

    Nothing is left in it: it is made when there is something to put there.

    Raises:
        ValueError: it is a file, or holds something.
        OSError: its disk is full or read-only, or it may not be written to.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file")
    if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):  # a killed run leaves its lock
        if not (folder / "run.json").exists():
            raise ValueError(
                f"output_dir {folder} is not empty: choose another, or move it away (nothing is overwritten)"
            )
        if config.resume is None and not _holds_no_step(folder):
            raise ValueError(f"output_dir {folder} is not empty: it holds a run. Choose another, or --resume auto")
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be written to: {error}") from error
    return folder


def _holds_no_step(folder: Path) -> bool:
    """Whether a run ended before it had anything to write, as at an evaluation before the first step that failed."""
    log = folder / "metrics.jsonl"
    empty = log.is_file() and not log.stat().st_size
    return empty and not (folder / "summary.json").exists() and not any((folder / "checkpoints").glob("*"))


def options_of_all(config: TrainConfig) -> dict[str, object]:
    """The options that must be the same in all processes of a run: all but paths."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_DIFFER_ON_HOSTS}


def warm_up_note(config: TrainConfig, steps: int) -> list[str]:
    """A sentence where the run ends before the learning rate has reached its peak."""
    if config.warmup_steps < steps:
        return []
    return [f"warmup_steps {config.warmup_steps} of {steps} steps: the learning rate reaches its peak at no step"]


def image_note(config: TrainConfig) -> list[str]:
    """A sentence where the selection of the fixed pairs cannot be drawn as an image, for lack of a library."""
    return [NO_IMAGES] if config.picture_pairs and not can_draw() else []


def check_space(folder: Path, policy: torch.nn.Module, steps: int, config: TrainConfig) -> None:
    """Raises OSError where the disk has no room for what the run is going to write at least.

    That is the model (of LoRA the adapters), and as many checkpoints as are there at one time: those that are kept,
    and the next one while it is being written. A checkpoint holds weights, AdamW's two float32 moments, and in bfloat16
    the float32 weights.
    """
    learns = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    numbers = sum(whole_shape(parameter).numel() for parameter in learns)
    weights = sum(whole_shape(parameter).numel() * parameter.element_size() for parameter in learns)
    frozen = [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    beside = sum(whole_shape(parameter).numel() * parameter.element_size() for parameter in frozen)
    checkpoint = weights + beside + 4 * numbers * (2 if config.dtype == "float32" else 3)
    written = 0 if config.save_steps is None else min(steps // config.save_steps, config.keep_checkpoints + 1)
    needed = weights + written * checkpoint
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        what = f"the model and {written} checkpoints take" if written else "the model takes"
        raise OSError(f"output_dir {folder}: its disk has {free / 1e9:.4f} GB free; {what} {needed / 1e9:.4f} GB")
