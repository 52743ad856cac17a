"""Preference training with DeepSpeed, to be read from top to bottom.

In: a `TrainConfig` that names a policy, a reference (a model, or a store of its log-probs) and a file of preference
pairs. Out: a folder with the trained model, checkpoints, `metrics.jsonl`, TensorBoard events and a summary.

    rows → token ids → per-token log-probs of policy and reference → objective → optimiser → evaluation → saved model

Every process runs this text with its own pairs of each step: the same forward and backward passes, the same decisions,
whatever its pairs hold. Only the first one writes logs and the model. CPU or GPU, any ZeRO stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import random
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed
from transformers.utils.logging import disable_progress_bar

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed says on stdout when it has to guess
import deepspeed

import selective_pref_adapters.checkpoints as checkpoints
from selective_pref import NonFiniteError, Objective, PreferenceLoss, diagnostics
from selective_pref_adapters.batch import Batch
from selective_pref_adapters.files import existing, write_whole
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head, model_per_token_logps
from selective_pref_adapters.monitoring import (
    SELF_REFERENCE,
    anywhere,
    finite_everywhere,
    mean_over_pairs,
    non_finite_error,
    same_weights,
)
from selective_pref_adapters.objectives import NEEDS_REFERENCE, check_objective, loss_of_batch, make_objective
from selective_pref_adapters.pairs import (
    PreferenceRow,
    TokenizedPair,
    check_same_tokenizer,
    collate,
    parse_columns,
    read_rows,
    split_by_prompt,
    tokenize_pairs,
)
from selective_pref_adapters.reference_cache import ReferenceStore
from selective_pref_adapters.run_log import Metrics, RunLog, print_summary
from selective_pref_adapters.sampling import (
    FILLER,
    evaluation_batches,
    first_pairs,
    make_order,
    number_of_steps,
    pair_length,
    pairs_per_step,
    places,
    share_of,
)
from selective_pref_adapters.scoring import model_identity
from selective_pref_adapters.train_config import MAY_CHANGE_ON_RESUME, UNREAD, TrainConfig

Reference: TypeAlias = "torch.nn.Module | ReferenceStore"

PAPER_MAX_LENGTH = 4096
SKIPS_IN_A_ROW = 20
"""So many optimiser steps in a row without a finite gradient end a run that skips them."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves behind: its folder, the logged metrics, and first and last evaluation.

    `stopped_at` is the step after which SIGTERM ended the run, with a checkpoint and without a saved model; else None.
    """

    output_dir: Path
    metrics: list[Metrics]
    summary: dict[str, Any]
    stopped_at: int | None = None


@dataclass
class Progress:
    """What a run knows of itself beside model and optimiser. A checkpoint holds it, one for each process.

    The sampler's position is `step`: which pairs a step reads depends on its number and the seed alone.
    """

    step: int = 0
    first_evaluation: Metrics = field(default_factory=dict[str, float])
    last_evaluation: Metrics = field(default_factory=dict[str, float])
    window: list[dict[str, torch.Tensor]] = field(default_factory=list[dict[str, torch.Tensor]])
    """Metrics of every batch since the last line of the log; they stay on the device until they are shown."""
    skipped_batches: int = 0
    empty_steps: int = 0
    """Steps in a row that moved no weight."""


def train(config: TrainConfig) -> TrainResult:
    """Trains `config.model` on `config.pairs` and saves it.

    Raises:
        ValueError, OSError: an option, a row, a folder, a store or a pair of models that does not work; everything
            that can be checked is checked before the first step, and nothing is overwritten. Later, OSError where
            something could not be written; the checkpoints before it are as they were.
        NonFiniteError: a log-prob or a gradient became NaN or infinite (names step, rows and tokens), unless
            `config.non_finite` is "skip".
    """
    check_config(config)
    objective = configured_objective(config)
    output_dir = usable_folder(config)
    rank, world_size = start_processes(config)
    checkpoint = checkpoint_to_resume(config, output_dir)
    console = Console(stderr=True, quiet=rank > 0)
    disable_progress_bar()  # of loading and saving; ours are those of tokenising and training
    set_seed(config.seed)

    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, config.dtype)
    anchor = open_reference(config, tokenizer, config.ref_model, config.reference_store, config.reference_space)
    scorer = open_reference(
        config, tokenizer, config.scoring_ref_model, config.scoring_reference_store, config.scoring_reference_space
    )
    max_length = usable_length(config.max_length, policy, anchor, scorer)
    train_pairs, eval_pairs, notes = load_pairs(config, tokenizer, max_length, progress=rank == 0)
    check_pairs([*train_pairs, *eval_pairs], policy, anchor, scorer)
    if config.objective == "selective_dpo" and config.selection_ratio < 1 and teaches_nothing(policy, scorer or anchor):
        notes.append(SELF_REFERENCE)
    per_step = pairs_per_step(config, world_size)
    steps = number_of_steps(config, len(train_pairs), per_step)
    check_space(output_dir, policy, steps, config.save_steps)
    identity = identity_of(config, world_size, train_pairs, eval_pairs, anchor, scorer)
    notes += check_same_run(checkpoint, output_dir, identity, config)
    for note in notes:
        console.print(f"[yellow]note:[/yellow] {note}", soft_wrap=True, highlight=False)
    if config.resume and (finished := finished_run(output_dir)):
        console.print(f"this run is finished: {output_dir}", soft_wrap=True)
        return finished

    engine, scheduler = start_engine(config, policy, steps, per_step)
    references = [start_reference(config, reference) for reference in (anchor, scorer)]
    pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    order = make_order([pair_length(pair) for pair in train_pairs], per_step, config.seed, config.group_by_length)

    def batch_of(pairs: Sequence[TokenizedPair]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(engine.device) for name, tensor in collate(pairs, pad_token_id).items()}

    def losses_of(pairs: Sequence[TokenizedPair], count: int | None = None) -> PreferenceLoss:
        """The step that the rest of this file serves: token ids in, losses of the first `count` pairs out."""
        batch = batch_of(pairs)
        logps = [model_per_token_logps(engine, batch), *(None if of is None else of(batch) for of in references)]
        batch = {name: first_pairs(tensor, count) for name, tensor in batch.items()}
        return loss_of_batch(objective, batch, *(None if some is None else first_pairs(some, count) for some in logps))

    def loss_without_gradient() -> torch.Tensor:
        """Takes the part of a batch that is left out: the same passes through the model, and zeros for a gradient."""
        return 0 * model_per_token_logps(engine, batch_of([FILLER])).sum()

    def evaluate() -> Metrics:
        """Means over the held-out pairs, names prefixed with `eval_`; empty without held-out pairs."""
        if not eval_pairs:
            return {}
        engine.eval()
        batches = evaluation_batches(eval_pairs, config.batch_size, rank, world_size)
        with torch.no_grad():
            metrics = [diagnostics(losses_of(pairs, max(count, 1))) for pairs, count in batches]
        engine.train()
        return {f"eval_{name}": value for name, value in mean_over_pairs(metrics, [n for _, n in batches]).items()}

    def save() -> None:
        save_checkpoint(engine, output_dir / "checkpoints", progress, identity, config.keep_checkpoints)

    progress = Progress() if checkpoint is None else load_checkpoint(engine, checkpoint)
    resumed_at = None if checkpoint is None else progress.step
    with StopRequest() as stop, RunLog(output_dir, config, identity, resumed_at, writes=rank == 0) as log:
        if checkpoint is None:
            progress.first_evaluation = progress.last_evaluation = evaluate()
            log.write(0, 0.0, progress.first_evaluation)
        engine.train()
        todo = range(progress.step + 1, steps + 1)
        bar = tqdm(todo, desc="train", unit="step", initial=progress.step, total=steps, disable=rank > 0)
        for step in bar:
            seen, before = len(progress.window), engine.skipped_steps
            for pairs in share_of(train_pairs, order(step), config.batch_size, rank, world_size):
                if anywhere(stop.requested, engine.device):
                    del progress.window[seen:]  # of a step that is not finished: it will be done again, as a whole
                    save()
                    return stopped_run(console, output_dir, log, progress)
                out = losses_of(pairs)
                if finite_everywhere(out.losses):
                    engine.backward(out.loss)
                    progress.window.append(diagnostics(out))
                else:
                    leave_out(config, progress, console, non_finite_error(out, f"step {step}", places(pairs)))
                    nothing_left = len(progress.window) == seen and engine.is_gradient_accumulation_boundary()
                    engine.backward(out.loss if nothing_left else loss_without_gradient())
                norm = step_engine(engine)
            progress.step = step
            check_gradient(config, progress, console, norm, len(progress.window) > seen, engine.skipped_steps > before)
            bar.set_postfix(postfix(progress, engine.skipped_steps))
            epoch = step * per_step / len(train_pairs)
            if step % config.logging_steps == 0 or step == steps:
                log.write(step, epoch, {**close_window(progress), **state_of_step(engine, scheduler, progress, norm)})
            if step == steps or (config.eval_steps and step % config.eval_steps == 0):
                progress.last_evaluation = evaluate()
                log.write(step, epoch, progress.last_evaluation)
            if config.save_steps and step % config.save_steps == 0:
                save()

        save_model(engine, tokenizer, output_dir)
    summary = {
        "steps": steps,
        "train_pairs": len(train_pairs),
        "eval_pairs": len(eval_pairs),
        "skipped_batches": progress.skipped_batches,
        "skipped_steps": engine.skipped_steps,
        "notes": notes,
        "before": progress.first_evaluation,
        "after": progress.last_evaluation,
    }
    if rank == 0:
        write_whole(output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_summary(Console(), config, output_dir, summary)
    return TrainResult(output_dir=output_dir, metrics=log.lines, summary=summary)


# --- what a run is made of -------------------------------------------------------------------------------------------


def check_config(config: TrainConfig) -> None:
    """Raises ValueError at the first option that makes no sense, alone, beside another, or on this machine.

    β, ratio, pool, ties, γ and label smoothing are checked by the loss itself, on a pair of one token.
    """
    objective = configured_objective(config)
    needs_reference = config.objective in NEEDS_REFERENCE
    has_reference = [config.ref_model is not None, config.reference_store is not None]
    has_scorer = [config.scoring_ref_model is not None, config.scoring_reference_store is not None]
    if needs_reference and not any(has_reference):
        raise ValueError(
            f"objective {config.objective!r} compares the policy with a reference: give ref_model (the stronger the "
            "better; the policy's own start is legal but teaches little below ratio 1) or a reference_store"
        )
    if not needs_reference and any(has_reference):
        raise ValueError(f"objective {config.objective!r} reads no reference: leave ref_model and reference_store out")
    if all(has_reference) or all(has_scorer):
        raise ValueError("give a reference as a model or as a store of its log-probs, not both")
    if any(has_scorer) and config.objective != "selective_dpo":
        raise ValueError(f"objective {config.objective!r} scores no tokens: leave the scoring reference out")
    for space, store in (
        ("reference_space", "reference_store"),
        ("scoring_reference_space", "scoring_reference_store"),
    ):
        if getattr(config, space) is not None and getattr(config, store) is None:
            raise ValueError(f"{space} says which part of {store} to read: give {store}")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in UNREAD[config.objective]:
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
    for name in ("warmup_steps", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 0; got {getattr(config, name)}")
    if config.offload_optimizer and config.zero_stage < 1:
        raise ValueError("offload_optimizer needs zero_stage 1 or above: nothing is sharded or moved at stage 0")
    if config.offload_parameters and config.zero_stage < 3:
        raise ValueError(f"offload_parameters needs zero_stage 3; got {config.zero_stage}")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise ValueError(f"tracker {config.tracker} is not installed: pip install {config.tracker}")
    further_settings(config)
    pairs_per_step(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_hardware(config)
    check_objective(objective, reference=needs_reference)


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
            "processes as there are devices"
        )


def configured_objective(config: TrainConfig) -> Objective:
    """The loss that the configuration names, as a callable (chosen, rejected) → PreferenceLoss."""
    return make_objective(
        config.objective,
        beta=config.beta,
        selection_ratio=config.selection_ratio,
        selection_pool=config.selection_pool,
        selection_ties=config.selection_ties,
        gamma=config.gamma,
        label_smoothing=config.label_smoothing,
    )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub id."""
    return _load("tokenizer", name, AutoTokenizer.from_pretrained)


def load_model(name: str, dtype: str) -> torch.nn.Module:
    """A causal LM from a folder or hub id, with dropout off: policy and reference must differ by weights only."""
    model = _load("model", name, partial(AutoModelForCausalLM.from_pretrained, dtype=getattr(torch, dtype)))
    for module in model.modules():
        rates = ["p"] if isinstance(module, torch.nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for name in rates:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)
    return model


def _load(kind: str, name: str, loader: Any) -> Any:
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} is no model folder: expected a config.json, a tokenizer and safetensors weights in it"
        )
    try:
        return loader(name)
    except (OSError, ValueError) as error:
        where = "the folder is incomplete" if folder.exists() else "there is no such folder, nor a hub model at hand"
        raise ValueError(f"cannot load the {kind} of {name!r} ({where}): {error}") from error


def open_reference(
    config: TrainConfig, tokenizer: Any, model: str | None, store: str | None, space: str | None
) -> Reference | None:
    """A reference as the configuration names it: a model, a store of its log-probs, or None. Tokenizers must agree."""
    if store is not None:
        opened = ReferenceStore.open(store, space)
        opened.check_tokenizer(tokenizer)
        return opened
    if model is None:
        return None
    loaded = load_model(model, config.dtype)
    check_same_tokenizer(tokenizer, load_tokenizer(model))
    return loaded


def start_reference(config: TrainConfig, reference: Reference | None) -> Callable[[Batch], torch.Tensor] | None:
    """How to ask a reference for the log-probs of a batch [2B T], without a gradient."""
    if reference is None:
        return None
    if isinstance(reference, ReferenceStore):
        return partial(stored_per_token_logps, reference)
    return partial(frozen_per_token_logps, start_frozen_engine(config, reference))


def stored_per_token_logps(store: ReferenceStore, batch: Batch) -> torch.Tensor:
    """What the store holds of a batch [2B T]; rows without a completion need not be stored."""
    rows = batch["completion_mask"].any(dim=1)
    logps = torch.zeros(batch["input_ids"][:, 1:].shape, device=batch["input_ids"].device)
    if rows.any():
        logps[rows] = store.lookup({name: tensor[rows] for name, tensor in batch.items()})
    return logps


def teaches_nothing(policy: torch.nn.Module, reference: Reference | None) -> bool:
    """Whether the reference is, weight for weight, the policy."""
    if isinstance(reference, ReferenceStore):
        return reference.space.identity.get("weights") == model_identity(policy)["weights"]
    return same_weights(policy, reference)


def usable_length(max_length: int | None, policy: torch.nn.Module, *references: Reference | None) -> int:
    """`max_length`, checked against (or by default taken from) what all models that run can read."""
    models = {"policy": policy, **dict(zip(("reference", "scoring reference"), references, strict=False))}
    contexts = {
        name: model.config.max_position_embeddings
        for name, model in models.items()
        if isinstance(model, torch.nn.Module) and getattr(model.config, "max_position_embeddings", None)
    }
    for name, context in contexts.items():
        if max_length is not None and max_length > context:
            raise ValueError(f"max_length {max_length} is longer than the {name} can read ({context} tokens)")
    return max_length if max_length is not None else min([PAPER_MAX_LENGTH, *contexts.values()])


def load_pairs(
    config: TrainConfig, tokenizer: Any, max_length: int, progress: bool = True
) -> tuple[list[TokenizedPair], list[TokenizedPair], list[str]]:
    """(training pairs, evaluation pairs, what a reader should know about them and about this machine)."""
    notes: list[str] = []
    if config.dtype == "bfloat16" and not torch.cuda.is_available():
        capabilities = torch.cpu.get_capabilities()
        if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")):
            notes.append("this CPU has no instructions for bfloat16: it is emulated, and slower than float32")
    malformed: list[str] | None = [] if config.skip_malformed_rows else None
    columns = parse_columns(config.columns)
    rows = read_rows(config.pairs, malformed, columns=columns, notes=notes)
    if config.eval_pairs is None:
        rows, eval_rows = split_by_prompt(rows, config.eval_fraction, config.seed)
    else:
        eval_rows = read_rows(config.eval_pairs, malformed, columns=columns, notes=notes)
        seen = {row.prompt_key for row in rows}
        if common := sum(row.prompt_key in seen for row in eval_rows):
            notes.append(f"{common} of {len(eval_rows)} evaluation rows have a prompt that is trained on")

    def tokenized(which: str, some: list[PreferenceRow]) -> list[TokenizedPair]:
        pairs, report = tokenize_pairs(
            some,
            tokenizer,
            max_length=max_length,
            truncation_mode=config.truncation_mode,
            malformed=malformed,
            progress=progress,
        )
        notes.extend(f"{which}: {line}" for line in report.lines())
        return pairs

    train_pairs, eval_pairs = tokenized("training", rows), tokenized("evaluation", eval_rows) if eval_rows else []
    if malformed:
        notes.append(f"{len(malformed)} malformed rows left out, the first: {malformed[0]}")
    return train_pairs, eval_pairs, notes


def check_pairs(pairs: Sequence[TokenizedPair], policy: torch.nn.Module, *references: Reference | None) -> None:
    """Raises ValueError where a token id has no row in a model's embedding, or a pair is not in a store."""
    highest = max(max(pair.chosen_ids + pair.rejected_ids) for pair in pairs)
    for name, model in zip(("policy", "reference", "scoring reference"), (policy, *references), strict=False):
        if isinstance(model, ReferenceStore):
            model.check([pair for pair in pairs if pair is not FILLER])
        elif model is not None and highest >= model.config.vocab_size:
            raise ValueError(
                f"token id {highest} is outside the {name}'s vocabulary of {model.config.vocab_size}: tokenizer and "
                "model do not belong together"
            )


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def start_processes(config: TrainConfig) -> tuple[int, int]:
    """(rank of this process, number of processes). Without a launcher there is one."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():  # else DeepSpeed would look for MPI
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at every start
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo",
        verbose=False,
        timeout=timedelta(minutes=config.process_timeout_minutes),
    )
    return dist.get_rank(), dist.get_world_size()


def leave_processes() -> None:
    """Says good-bye to the other processes; for the end of a program, after which no other run can follow."""
    if dist.get_world_size() > 1:
        dist.destroy_process_group()


def start_engine(config: TrainConfig, policy: torch.nn.Module, steps: int, per_step: int) -> tuple[Any, Any]:
    """(engine around the policy, learning-rate scheduler)."""
    if config.fused_head:
        install_fused_head(policy)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
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
            **_shared_settings(config),
            "gradient_accumulation_steps": per_step // (config.batch_size * dist.get_world_size()),
            "gradient_clipping": config.max_grad_norm,
            # AdamW of torch: DeepSpeed's own would be compiled at the first start.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine, scheduler


def start_frozen_engine(config: TrainConfig, reference: torch.nn.Module) -> Any:
    """The reference, in evaluation mode and without gradients; sharded beside the policy under ZeRO-3."""
    if config.fused_head:
        install_fused_head(reference)
    reference.eval().requires_grad_(False)
    settings = _shared_settings(config)
    settings["zero_optimization"].pop("offload_optimizer", None)
    if config.zero_stage < 3:
        settings["zero_optimization"] = {"stage": 0}  # nothing to shard without an optimiser
    engine, *_ = deepspeed.initialize(model=reference, config=settings)
    return engine


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    settings = further_settings(config)
    zero: dict[str, Any] = {**settings.get("zero_optimization", {}), "stage": config.zero_stage}
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
    return settings


def step_engine(engine: Any) -> float:
    """Ends a batch, and the optimiser step where it is the last; returns the gradient's norm before clipping.

    A gradient that is not finite moves no weight: DeepSpeed skips such a step, except where it has no optimiser of
    its own around AdamW; there it is done here. `engine.skipped_steps` counts both, and the learning rate moves on.
    """
    own, skipped = 0.0, engine.skipped_steps
    if engine.is_gradient_accumulation_boundary():
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        own = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(own) and not hasattr(engine.optimizer, "overflow"):
            engine.zero_grad()  # and what engine.step() does beside stepping
            _next_rate(engine)
            engine.skipped_steps += 1
            engine.global_steps += 1
            engine.global_samples += engine.train_batch_size()
            engine.micro_steps += 1
            return own
    engine.step()
    if engine.skipped_steps > skipped:
        _next_rate(engine)
    norm = engine.get_global_grad_norm()  # None where DeepSpeed has no optimiser of its own around AdamW
    return own if norm is None else float(norm)


def _next_rate(engine: Any) -> None:
    """Moves the schedule on by a step that was skipped; torch suspects a mistake where that is the first one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        engine.lr_scheduler.step()


def gathered_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The whole weights on the first process, in the host's memory; sharded ones are gathered one after another."""
    first = dist.get_rank() == 0
    names = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    weights = {name: t.cpu() for name, t in engine.module.state_dict().items() if name not in names} if first else {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
            if first:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def save_model(engine: Any, tokenizer: Any, output_dir: Path) -> None:
    """Weights, configuration and tokenizer into `output_dir`: written aside first, so that no half is ever there.

    Raises:
        OSError: on every process, where the first one could not write.
    """
    weights = gathered_weights(engine)
    failure: Exception | None = None
    if dist.get_rank() == 0:
        aside = output_dir / ".saving"
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed here
        try:
            engine.module.save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
            for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(output_dir / file.name)
            shutil.rmtree(aside)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            failure = error
    if anywhere(failure is not None, engine.device):
        raise OSError(f"the trained model could not be written to {output_dir}: {failure or 'see the first process'}")


# --- stopping and going on -------------------------------------------------------------------------------------------


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
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "run.json").exists():
            raise ValueError(
                f"output_dir {folder} is not empty: choose another, or move it away (nothing is overwritten)"
            )
        if config.resume is None:
            raise ValueError(f"output_dir {folder} is not empty: it holds a run. Choose another, or --resume auto")
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be written to: {error}") from error
    return folder


def check_space(folder: Path, policy: torch.nn.Module, steps: int, save_steps: int | None) -> None:
    """Raises OSError where the disk has no room for what the run is going to write at least."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    numbers = sum(parameter.numel() for parameter in policy.parameters())
    needed = weights + (2 * 4 * numbers + weights if save_steps is not None and save_steps <= steps else 0)
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        raise OSError(
            f"output_dir {folder}: its disk has {free / 1e9:.2f} GB free; the model takes {needed / 1e9:.2f} GB"
        )


def identity_of(
    config: TrainConfig,
    world_size: int,
    train_pairs: Sequence[TokenizedPair],
    eval_pairs: Sequence[TokenizedPair],
    anchor: Reference | None,
    scorer: Reference | None,
) -> dict[str, Any]:
    """What shapes a run: options, number of processes, what the data and the stores hold."""

    def digest(pairs: Sequence[TokenizedPair]) -> str:
        text = hashlib.sha256()
        for p in pairs:
            lengths = p.chosen_prompt_length, p.rejected_prompt_length
            unscored = *p.chosen_unscored, *p.rejected_unscored
            text.update(repr((p.chosen_ids, p.rejected_ids, *lengths, *unscored)).encode())
        return f"{len(pairs)} pairs, {text.hexdigest()[:16]}"

    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE_ON_RESUME}
    stores = {
        name: reference.space.name
        for name, reference in (("reference_space", anchor), ("scoring_reference_space", scorer))
        if isinstance(reference, ReferenceStore)
    }
    data = {"training_data": digest(train_pairs), "evaluation_data": digest(eval_pairs)}
    return {**options, **stores, "processes": world_size, **data}


FIXED = ("dtype", "zero_stage", "offload_optimizer", "offload_parameters", "processes")
"""What the files of a checkpoint depend on: no force makes them fit another."""


def check_same_run(checkpoint: Path | None, folder: Path, identity: dict[str, Any], config: TrainConfig) -> list[str]:
    """Raises ValueError where the run to be resumed differs from this one; the differences, where they are forced."""
    recorded = (checkpoint or folder) / "run.json"
    if config.resume is None or not recorded.exists():
        return []
    theirs = json.loads(recorded.read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(identity))
    changed = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    listed = [f"{name} was {theirs.get(name)!r}, is now {ours.get(name)!r}" for name in changed]
    if changed and not config.force_resume:
        raise ValueError(
            f"{recorded.parent} belongs to another run: {'; '.join(listed)}. Give the options that it was started "
            "with, start a new run in another output_dir, or take the change with --force-resume"
        )
    fixed = [line for name, line in zip(changed, listed, strict=True) if name in FIXED]
    if checkpoint is not None and fixed:
        raise ValueError(
            f"{checkpoint} cannot be read otherwise than it was written: {'; '.join(fixed)}. Resume it as it was, or "
            "finish that run and start a new one from its saved model"
        )
    return [f"resumed with a difference: {line}" for line in listed]


def checkpoint_to_resume(config: TrainConfig, output_dir: Path) -> Path | None:
    """The checkpoint that the configuration asks for, if there is one; the same on every process.

    Raises:
        ValueError: a checkpoint was named that is absent or incomplete, or processes see different ones.
    """
    found = None
    if config.resume == "auto":
        found = checkpoints.newest_complete(output_dir / "checkpoints")
    elif config.resume is not None:
        found = Path(config.resume)
        if not checkpoints.is_complete(found):
            raise ValueError(f"resume: {found} is no complete checkpoint (expected 'auto' or .../checkpoints/step-...)")
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, None if found is None else checkpoints.step_of(found))
    if len(set(steps)) > 1:
        raise ValueError(f"processes see different checkpoints (steps {steps}): output_dir must be one shared folder")
    return found


def finished_run(output_dir: Path) -> TrainResult | None:
    """What a run in this folder left behind, if it came to its end."""
    if not (output_dir / "summary.json").exists():
        return None
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))
    return TrainResult(output_dir=output_dir, metrics=[json.loads(line) for line in lines], summary=summary)


def save_checkpoint(engine: Any, folder: Path, progress: Progress, identity: dict[str, Any], keep: int) -> None:
    """Writes everything that going on takes; every process must call it.

    Model, optimiser and scheduler are DeepSpeed's files; progress and random states one file for each process; the
    identity of the run is `run.json`. It becomes a checkpoint when all of it is there: see `checkpoints`.

    Raises:
        OSError: it could not be written. Nothing of it is left, and earlier checkpoints are as they were.
    """
    rank = dist.get_rank()
    aside = folder / f".step-{progress.step:08d}"
    try:
        if rank == 0:
            aside = checkpoints.begin(folder, progress.step)
        dist.barrier()
        engine.save_checkpoint(str(aside), tag="engine", save_latest=False)
        torch.save({"progress": vars(progress), "random": random_states()}, aside / f"process-{rank:05d}.pt")
        dist.barrier()
        if rank == 0:
            write_whole(aside / "run.json", json.dumps(identity, indent=1) + "\n")
            checkpoints.publish(folder, progress.step, keep)
        dist.barrier()
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
        if rank == 0:
            checkpoints.abandon(folder, progress.step)
        raise OSError(
            f"the checkpoint of step {progress.step} could not be written to {folder}: {error}. Earlier ones are as "
            "they were: make room, and go on with --resume auto"
        ) from error


def load_checkpoint(engine: Any, checkpoint: Path) -> Progress:
    """Puts model, optimiser, scheduler and random states where the checkpoint had them; returns its progress."""
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag="engine")
    if loaded is None:
        raise ValueError(f"DeepSpeed cannot load {checkpoint}")
    own = torch.load(checkpoint / f"process-{dist.get_rank():05d}.pt", weights_only=True, map_location=engine.device)
    restore_random_states(own["random"])
    return Progress(**own["progress"])


def random_states() -> dict[str, Any]:
    """The states of all generators that a run can draw from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undoes every draw since `random_states`."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu())


class StopRequest:
    """Notes SIGTERM, which asks a run to stop where it can be resumed, instead of dying of it."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # signals can be handled nowhere else
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.requested = True


def stopped_run(console: Console, output_dir: Path, log: RunLog, progress: Progress) -> TrainResult:
    """Says where it can go on; the result has no evaluation of the end, as there was none."""
    console.print(
        f"stopped by SIGTERM after step {progress.step}; a checkpoint was saved: go on with --resume auto",
        soft_wrap=True,
    )
    summary = {"before": progress.first_evaluation, "after": {}}
    return TrainResult(output_dir=output_dir, metrics=log.lines, summary=summary, stopped_at=progress.step)


# --- broken numbers --------------------------------------------------------------------------------------------------


def leave_out(config: TrainConfig, progress: Progress, console: Console, error: NonFiniteError) -> None:
    """At a batch whose loss is not finite on some process: raises, or counts it and says so, as configured."""
    if config.non_finite == "raise":
        raise error
    progress.skipped_batches += 1
    console.print(f"[yellow]batch left out on all processes:[/yellow] {error}", soft_wrap=True, highlight=False)


def check_gradient(
    config: TrainConfig, progress: Progress, console: Console, norm: float, any_batch: bool, skipped: bool
) -> None:
    """After a step: raises where its gradient was not finite, or says that it was skipped, as configured.

    Args:
        norm: of the gradient.
        any_batch: whether a batch of the step was finite. A step of which nothing is left has no finite gradient,
            on purpose: it is skipped without a word more.
        skipped: whether the step moved no weight.
    """
    progress.empty_steps = progress.empty_steps + 1 if skipped else 0
    if not skipped and math.isfinite(norm):
        return
    what = f"step {progress.step}: the gradient is not finite"
    if not skipped:
        raise NonFiniteError(f"{what}, and the step was taken: the weights are broken; the last checkpoint is not")
    if progress.empty_steps >= SKIPS_IN_A_ROW:
        raise NonFiniteError(f"{what}, {SKIPS_IN_A_ROW} times in a row: the weights are broken, not a batch")
    if not any_batch:
        return
    if config.non_finite == "raise":
        raise NonFiniteError(f"{what} although every loss is; it was not taken. A lower learning_rate may help")
    console.print(f"[yellow]step skipped:[/yellow] {what} although every loss is", soft_wrap=True, highlight=False)


# --- what a reader sees ----------------------------------------------------------------------------------------------


def close_window(progress: Progress) -> Metrics:
    """The means over all batches since the last line; starts anew. Every process must call it."""
    means = mean_over_pairs(progress.window, [1] * len(progress.window))  # all batches hold equally many pairs
    progress.window = []
    return means


def state_of_step(engine: Any, scheduler: Any, progress: Progress, norm: float) -> Metrics:
    """What a line says beside the means: rate of the next step, gradient norm of the last, and what was skipped."""
    return {
        "learning_rate": float(scheduler.get_last_lr()[0]),
        **({"grad_norm": norm} if math.isfinite(norm) else {}),
        "skipped_batches": float(progress.skipped_batches),
        "skipped_steps": float(engine.skipped_steps),
    }


def postfix(progress: Progress, skipped_steps: int) -> dict[str, str]:
    """The last batch for the progress bar: loss, accuracies and margins, full and of the selected tokens."""
    shown = {
        "loss": "loss",
        "acc": "rewards/accuracies",
        "margin": "rewards/margins",
        "sel_acc": "selection/rewards/accuracies",
        "sel_margin": "selection/rewards/margins",
    }
    last = progress.window[-1] if progress.window else {}
    values = {short: f"{float(last[name]):.4g}" for short, name in shown.items() if name in last}
    skipped = {"skipped_batches": progress.skipped_batches, "skipped_steps": skipped_steps}
    return values | {name: str(count) for name, count in skipped.items() if count}
