"""Preference training with DeepSpeed, to be read from top to bottom.

In: a `TrainConfig` that names a policy, a reference and a file of preference pairs. Out: a folder with the trained
model, `metrics.jsonl`, TensorBoard events, the configuration and a summary.

    rows → token ids → per-token log-probs of policy and reference → objective → optimiser → evaluation → saved model

The loop runs on one process, CPU or GPU, at any ZeRO stage.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed
from transformers.utils.logging import disable_progress_bar

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed says on stdout when it has to guess
import deepspeed

from selective_pref import Objective, PreferenceLoss, diagnostics
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head, model_per_token_logps
from selective_pref_adapters.monitoring import (
    SELF_REFERENCE,
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
    read_rows,
    split_by_prompt,
    tokenize_pairs,
)
from selective_pref_adapters.train_config import UNREAD, TrainConfig

Metrics: TypeAlias = dict[str, float]

PAPER_MAX_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves behind: the folder of the saved model, the logged metrics, and first and last evaluation."""

    output_dir: Path
    metrics: list[Metrics]
    summary: dict[str, Any]


def train(config: TrainConfig) -> TrainResult:
    """Trains `config.model` on `config.pairs` and saves it.

    Raises:
        ValueError, FileNotFoundError: an option, a row, a folder or a pair of models that does not work; everything
            that can be checked is checked before the first step, and nothing is overwritten.
        NonFiniteError: a log-prob became NaN or infinite; names step, rows and tokens.
    """
    check_config(config)
    objective = configured_objective(config)
    output_dir = fresh_folder(config.output_dir)  # made when there is something to put into it
    console = Console(stderr=True)
    disable_progress_bar()  # of loading and saving; ours are those of tokenising and training
    set_seed(config.seed)

    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, config.dtype)
    reference = None
    if config.ref_model is not None:
        reference = load_model(config.ref_model, config.dtype)
        check_same_tokenizer(tokenizer, load_tokenizer(config.ref_model))
    max_length = usable_length(config.max_length, policy, reference)
    train_pairs, eval_pairs, notes = load_pairs(config, tokenizer, max_length)
    check_vocabulary([*train_pairs, *eval_pairs], policy, reference)
    if config.objective == "selective_dpo" and config.selection_ratio < 1 and same_weights(policy, reference):
        notes.append(SELF_REFERENCE)
    for note in notes:
        console.print(f"[yellow]note:[/yellow] {note}", soft_wrap=True)
    steps = number_of_steps(config, len(train_pairs))
    if config.fused_head:
        for model in (policy, reference):
            if model is not None:
                install_fused_head(model)

    engine, scheduler = start_engine(config, policy, steps)
    ref_engine = None if reference is None else start_frozen_engine(config, reference)
    pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    def losses_of(pairs: Sequence[TokenizedPair]) -> PreferenceLoss:
        """The step that the rest of this file serves: token ids in, losses out."""
        batch = {name: tensor.to(engine.device) for name, tensor in collate(pairs, pad_token_id).items()}
        ref_logps = None if ref_engine is None else frozen_per_token_logps(ref_engine, batch)
        return loss_of_batch(objective, batch, model_per_token_logps(engine, batch), ref_logps)

    def evaluate() -> Metrics:
        """Means over the held-out pairs, names prefixed with `eval_`; empty without held-out pairs."""
        if not eval_pairs:
            return {}
        engine.eval()
        starts = range(0, len(eval_pairs), config.batch_size)
        batches = [eval_pairs[start : start + config.batch_size] for start in starts]
        with torch.no_grad():
            means = mean_over_pairs([diagnostics(losses_of(pairs)) for pairs in batches], [*map(len, batches)])
        engine.train()
        return {f"eval_{name}": value for name, value in means.items()}

    with RunLog(output_dir, config) as log:
        first_evaluation = last_evaluation = evaluate()
        log.write(0, 0.0, first_evaluation)
        batches = endless_batches(train_pairs, config.batch_size, config.seed)
        window = Window()
        bar = tqdm(range(1, steps + 1), desc="train", unit="step")
        engine.train()
        for step in bar:
            for _ in range(config.gradient_accumulation_steps):
                pairs = next(batches)
                out = losses_of(pairs)
                raise_if_not_finite(out, pairs, step)
                engine.backward(out.loss)
                window.add(diagnostics(out))
                norm = step_engine(engine)
            bar.set_postfix(window.postfix())
            epoch = step * config.batch_size * config.gradient_accumulation_steps / len(train_pairs)
            if step % config.logging_steps == 0 or step == steps:
                extra = {"learning_rate": float(scheduler.get_last_lr()[0]), "grad_norm": norm}
                log.write(step, epoch, {**window.close(), **extra})
            if step == steps or (config.eval_steps and step % config.eval_steps == 0):
                last_evaluation = evaluate()
                log.write(step, epoch, last_evaluation)

    save_model(engine, tokenizer, output_dir)
    summary = {
        "steps": steps,
        "train_pairs": len(train_pairs),
        "eval_pairs": len(eval_pairs),
        "notes": notes,
        "before": first_evaluation,
        "after": last_evaluation,
    }
    write_whole(output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_summary(Console(), config, output_dir, summary)
    return TrainResult(output_dir=output_dir, metrics=log.lines, summary=summary)


# --- what a run is made of -------------------------------------------------------------------------------------------


def check_config(config: TrainConfig) -> None:
    """Raises ValueError at the first option that makes no sense, alone or beside another.

    β, ratio, pool, ties, γ and label smoothing are checked by the loss itself, on a pair of one token.
    """
    objective = configured_objective(config)
    needs_reference = config.objective in NEEDS_REFERENCE
    if needs_reference and config.ref_model is None:
        raise ValueError(
            f"objective {config.objective!r} compares the policy with a reference: give ref_model (the stronger the "
            "better; the policy's own start is legal but teaches little below ratio 1)"
        )
    if not needs_reference and config.ref_model is not None:
        raise ValueError(f"objective {config.objective!r} reads no reference: leave ref_model out")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in UNREAD[config.objective]:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"objective {config.objective!r} does not read {name}: leave it out")
    for name in ("learning_rate", "max_grad_norm", "epochs", "batch_size", "gradient_accumulation_steps"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be above 0; got {getattr(config, name)}")
    for name in ("max_steps", "eval_steps", "logging_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    for name in ("warmup_steps", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 0; got {getattr(config, name)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"this loop runs on one process; got WORLD_SIZE={os.environ['WORLD_SIZE']}: start it without torchrun"
        )
    check_objective(objective, reference=needs_reference)


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


def fresh_folder(path: str) -> Path:
    """The output folder, which must be absent or empty."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir {folder} is not empty: choose another, or move it away (nothing is overwritten)")
    return folder


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub id."""
    return _load("tokenizer", name, AutoTokenizer.from_pretrained)


def load_model(name: str, dtype: str) -> torch.nn.Module:
    """A causal LM from a folder or hub id, with dropout off: policy and reference must differ by weights only."""
    model = _load("model", name, partial(AutoModelForCausalLM.from_pretrained, dtype=getattr(torch, dtype)))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
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


def usable_length(max_length: int | None, policy: torch.nn.Module, reference: torch.nn.Module | None) -> int:
    """`max_length`, checked against (or by default taken from) what both models can read."""
    contexts = {
        name: model.config.max_position_embeddings
        for name, model in (("policy", policy), ("reference", reference))
        if model is not None and getattr(model.config, "max_position_embeddings", None)
    }
    for name, context in contexts.items():
        if max_length is not None and max_length > context:
            raise ValueError(f"max_length {max_length} is longer than the {name} can read ({context} tokens)")
    return max_length if max_length is not None else min([PAPER_MAX_LENGTH, *contexts.values()])


def load_pairs(
    config: TrainConfig, tokenizer: Any, max_length: int
) -> tuple[list[TokenizedPair], list[TokenizedPair], list[str]]:
    """(training pairs, evaluation pairs, what a reader should know about them)."""
    notes: list[str] = []
    malformed: list[str] | None = [] if config.skip_malformed_rows else None
    rows = read_rows(config.pairs, malformed)
    if config.eval_pairs is None:
        rows, eval_rows = split_by_prompt(rows, config.eval_fraction, config.seed)
    else:
        eval_rows = read_rows(config.eval_pairs, malformed)
        seen = {row.prompt_key for row in rows}
        if common := sum(row.prompt_key in seen for row in eval_rows):
            notes.append(f"{common} of {len(eval_rows)} evaluation rows have a prompt that is trained on")
    if malformed:
        notes.append(f"{len(malformed)} malformed rows left out, the first: {malformed[0]}")

    def tokenized(which: str, some: list[PreferenceRow]) -> list[TokenizedPair]:
        pairs, report = tokenize_pairs(
            some, tokenizer, max_length=max_length, truncation_mode=config.truncation_mode, progress=True
        )
        notes.extend(f"{which}: {line}" for line in report.lines())
        return pairs

    return tokenized("training", rows), tokenized("evaluation", eval_rows) if eval_rows else [], notes


def check_vocabulary(
    pairs: Sequence[TokenizedPair], policy: torch.nn.Module, reference: torch.nn.Module | None
) -> None:
    """Raises ValueError where a token id has no row in a model's embedding."""
    highest = max(max(pair.chosen_ids + pair.rejected_ids) for pair in pairs)
    for name, model in (("policy", policy), ("reference", reference)):
        if model is not None and highest >= model.config.vocab_size:
            raise ValueError(
                f"token id {highest} is outside the {name}'s vocabulary of {model.config.vocab_size}: tokenizer and "
                "model do not belong together"
            )


def number_of_steps(config: TrainConfig, pairs: int) -> int:
    """Optimiser steps of the run; what is left of the last epoch and fills no whole step is dropped."""
    if config.max_steps is not None:
        return config.max_steps
    per_step = config.batch_size * config.gradient_accumulation_steps
    steps = math.floor(pairs * config.epochs / per_step)
    if steps < 1:
        raise ValueError(
            f"too few pairs: {pairs} × {config.epochs:g} epochs fill no step of {per_step} pairs (batch_size "
            f"{config.batch_size} × gradient_accumulation_steps {config.gradient_accumulation_steps})"
        )
    return steps


def endless_batches(pairs: Sequence[TokenizedPair], size: int, seed: int) -> Iterator[list[TokenizedPair]]:
    """Batches of exactly `size` pairs: epoch after epoch, each in its own seeded order, with no gap between them."""
    generator = torch.Generator().manual_seed(seed)
    batch: list[TokenizedPair] = []
    while True:
        for index in torch.randperm(len(pairs), generator=generator).tolist():
            batch.append(pairs[index])
            if len(batch) == size:
                yield batch
                batch = []


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def start_engine(config: TrainConfig, policy: torch.nn.Module, steps: int) -> tuple[Any, Any]:
    """(engine around the policy, learning-rate scheduler)."""
    _start_process_group()
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
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.max_grad_norm,
            # AdamW of torch: DeepSpeed's own would be compiled at the first start.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine, scheduler


def start_frozen_engine(config: TrainConfig, reference: torch.nn.Module) -> Any:
    """The reference, in evaluation mode and without gradients; sharded beside the policy under ZeRO-3."""
    reference.eval().requires_grad_(False)
    settings = _shared_settings(config)
    if config.zero_stage < 3:
        settings["zero_optimization"] = {"stage": 0}  # nothing to shard without an optimiser
    engine, *_ = deepspeed.initialize(model=reference, config=settings)
    return engine


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.dtype == "bfloat16"},
    }


def _start_process_group() -> None:
    """One process without a launcher: DeepSpeed would look for MPI, and compile an all-reduce for shared memory."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="deepspeed")
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def step_engine(engine: Any) -> float:
    """Ends a micro-batch, and the optimiser step where it is the last; returns the gradient's norm before clipping."""
    own = 0.0
    if engine.is_gradient_accumulation_boundary():
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        own = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    engine.step()
    norm = engine.get_global_grad_norm()  # None where DeepSpeed has no optimiser of its own around AdamW
    return own if norm is None else float(norm)


def save_model(engine: Any, tokenizer: Any, output_dir: Path) -> None:
    """Weights, configuration and tokenizer into `output_dir`: written aside first, so that no half is ever there."""
    aside = output_dir / ".saving"
    parameters = list(engine.module.parameters())
    sharded = any(hasattr(parameter, "ds_id") for parameter in parameters)
    try:
        with deepspeed.zero.GatheredParameters(parameters) if sharded else nullcontext():
            engine.module.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"the trained model could not be written to {output_dir}: {error}") from error
    for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(output_dir / file.name)
    shutil.rmtree(aside)


# --- what a reader sees ----------------------------------------------------------------------------------------------


def raise_if_not_finite(out: PreferenceLoss, pairs: Sequence[TokenizedPair], step: int) -> None:
    """Stops before a gradient that is not finite reaches the weights. Reads one number back from the device."""
    if not finite_everywhere(out.losses):
        raise non_finite_error(out, f"step {step}", [pair.place for pair in pairs])


@dataclass
class Window:
    """Metrics since the last line of the log; they stay on the device until they are shown."""

    batches: list[dict[str, torch.Tensor]] = field(default_factory=list[dict[str, torch.Tensor]])

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Takes in one batch; all batches hold equally many pairs."""
        self.batches.append(metrics)

    def close(self) -> Metrics:
        """The means over the batches; starts anew."""
        means = mean_over_pairs(self.batches, [1] * len(self.batches))
        self.batches = []
        return means

    def postfix(self) -> dict[str, str]:
        """The last batch for the progress bar: loss, accuracies and margins, full and of the selected tokens."""
        shown = {
            "loss": "loss",
            "acc": "rewards/accuracies",
            "margin": "rewards/margins",
            "sel_acc": "selection/rewards/accuracies",
            "sel_margin": "selection/rewards/margins",
        }
        return {short: f"{float(self.batches[-1][name]):.4g}" for short, name in shown.items()}


class RunLog:
    """`metrics.jsonl` (a line per event, flushed), TensorBoard events, and `config.yaml`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        self.lines: list[Metrics] = []
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Adds one line; nothing where there are no metrics."""
        if not metrics:
            return
        self.lines.append({"step": step, "epoch": round(epoch, 6), **metrics})
        self._file.write(json.dumps(self.lines[-1]) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name.replace("eval_", "eval/", 1), value, step)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def print_summary(console: Console, config: TrainConfig, output_dir: Path, summary: dict[str, Any]) -> None:
    """The evaluation before and after, side by side."""
    before, after = summary["before"], summary["after"]
    sizes = f"{summary['steps']} steps, {summary['train_pairs']} pairs, {summary['eval_pairs']} held out"
    table = Table(title=f"{config.objective}: {sizes}")
    for column in ("held-out", "before", "after"):
        table.add_column(column, justify="left" if column == "held-out" else "right")
    for name in after:
        table.add_row(name.removeprefix("eval_"), f"{before[name]:.5g}", f"{after[name]:.5g}")
    if after:
        console.print(table)
    if config.objective == "selective_dpo" and after.get("eval_selection/rewards/margins", 0.0) < 0:
        console.print(
            "The selected margin is below 0: selection takes the tokens that most need the update, so that is normal. "
            "Judge the run by whether rewards/margins and rewards/accuracies rise; beside a stronger reference they "
            "start low too.",
            soft_wrap=True,
        )
    console.print(f"model and logs: {output_dir}")
