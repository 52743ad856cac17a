"""Preference training with DeepSpeed, to be read from top to bottom.

In: a `TrainConfig` that names a policy, a reference (a model, or a store of its log-probs) and a file of preference
pairs. Out: a folder with the trained model, checkpoints, `metrics.jsonl`, TensorBoard events and a summary.

    rows → token ids → per-token log-probs of policy and reference → objective → optimiser → evaluation → saved model

Every process runs this text with its own pairs of each step: the same forward and backward passes, the same decisions,
whatever its pairs hold. Only the first one writes logs and the model. CPU or GPU, any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from selective_pref import Objective, PreferenceLoss, diagnostics
from selective_pref_adapters.deepspeed_loop.checks import (
    check_config,
    check_space,
    configured_objective,
    image_note,
    options_of_all,
    usable_folder,
    warm_up_note,
)
from selective_pref_adapters.deepspeed_loop.data import check_pairs, load_pairs
from selective_pref_adapters.deepspeed_loop.engine import (
    check_models,
    load,
    save_model,
    start_engine,
    start_processes,
    step_engine,
    with_adapters,
)
from selective_pref_adapters.deepspeed_loop.not_finite import check_gradient, leave_out, loss_without_gradient
from selective_pref_adapters.deepspeed_loop.pictures import Pictures
from selective_pref_adapters.deepspeed_loop.reference import fill_stores, open_references, own_start_note
from selective_pref_adapters.deepspeed_loop.resume import (
    StopRequest,
    check_same_run,
    checkpoint_to_resume,
    finished_run,
    identity_of,
    load_checkpoint,
    save_checkpoint,
    stopped_run,
    unreadable_note,
)
from selective_pref_adapters.deepspeed_loop.run_log import RunLog, write_summary
from selective_pref_adapters.deepspeed_loop.sampling import (
    evaluation_batches,
    make_order,
    number_of_steps,
    pairs_per_step,
    places,
    share_of,
)
from selective_pref_adapters.deepspeed_loop.state import (
    Metrics,
    Progress,
    TrainResult,
    close_window,
    finite_or_none,
    metrics_of_step,
)
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.launching.launcher import join_launcher
from selective_pref_adapters.launching.together import own_folder
from selective_pref_adapters.model_checks import check_padding, check_policy
from selective_pref_adapters.models import load_tokenizer, pad_token_id, usable_length
from selective_pref_adapters.monitoring import (
    anywhere,
    finite_everywhere,
    mean_over_pairs,
    non_finite_error,
)
from selective_pref_adapters.objectives import CHOSEN_ONLY, loss_of_batch, needs_reference
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import TokenizedPair, collate, pair_weights
from selective_pref_adapters.pairs.large import PairStream
from selective_pref_adapters.references import AdapterOffReference, Reference


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every step of a run uses: the policy in its engine, the references, the loss, how far the run has come."""

    config: TrainConfig
    engine: Any
    scheduler: Any
    objective: Objective
    reference: Reference | None
    scoring_reference: Reference | None
    pad_token_id: int
    rank: int
    world_size: int
    console: Console
    pictures: Pictures
    progress: Progress

    @property
    def chosen_only(self) -> bool:
        """Whether the pairs have no rejected side, as in supervised training."""
        return self.config.objective in CHOSEN_ONLY


def train(config: TrainConfig) -> TrainResult:
    """Trains `config.model` on `config.pairs` and saves it.

    Raises:
        ValueError, OSError: an option, a row, a folder, a store or a pair of models that does not work; everything
            that can be checked is checked before the first step, and nothing is overwritten. Later, OSError where
            something could not be written; the checkpoints before it are as they were.
        NonFiniteError: a log-prob or a gradient became NaN or infinite (names step, rows and tokens), unless
            `config.non_finite` is "skip".
    """
    join_launcher()
    check_config(config)
    output_dir = usable_folder(config)
    rank, world_size = start_processes(config)
    with own_folder(output_dir, options_of_all(config)):
        return run_in(output_dir, config, rank, world_size)


def run_in(output_dir: Path, config: TrainConfig, rank: int, world_size: int) -> TrainResult:
    """The whole run in a folder that is its own, in process `rank` of `world_size`."""
    checkpoint = checkpoint_to_resume(config, output_dir)
    console = Console(stderr=True, quiet=rank > 0)
    disable_progress_bar()  # of transformers, at loading and saving
    set_seed(config.seed)

    tokenizer = load_tokenizer(config.model)
    named = {"policy": config.model, "reference": config.ref_model, "scoring reference": config.scoring_ref_model}
    check_models(config, named)
    policy = load(config, config.model)
    opened = open_references(config, tokenizer)
    notes = own_start_note(config, opened, policy)
    policy = with_adapters(config, policy)
    if config.reference_is_start and needs_reference(configured_objective(config)):
        opened["reference"].reference = AdapterOffReference(policy)
    sources = {name: one.reference for name, one in opened.items()}
    models = {"policy": policy, **{name: one.model for name, one in opened.items() if one.model is not None}}
    stores = [one.store for one in opened.values() if one.store is not None and one.model is None]
    notes += check_policy(policy, tokenizer)
    check_padding(tokenizer, models)
    max_length = usable_length(config.max_length, models)
    train_pairs, eval_pairs, about_pairs = load_pairs(config, tokenizer, max_length, progress=rank == 0)
    check_pairs([train_pairs, eval_pairs], tokenizer, models, stores)
    notes += about_pairs
    per_step = pairs_per_step(config, world_size)
    stream = train_pairs if isinstance(train_pairs, PairStream) else None
    count = per_step * config.max_steps if stream else len(train_pairs)
    steps = number_of_steps(config, count, per_step)
    check_space(output_dir, policy, steps, config)
    identity = identity_of(config, world_size, train_pairs, eval_pairs, sources)
    notes += warm_up_note(config, steps) + image_note(config) + check_same_run(checkpoint, output_dir, identity, config)
    notes += unreadable_note(output_dir, checkpoint) if config.resume == "auto" else []
    for note in notes:
        console.print(f"[yellow]note:[/yellow] {note}", soft_wrap=True, highlight=False)
    if config.resume and (finished := finished_run(output_dir, steps, checkpoint)):
        console.print(f"this run is finished, so nothing was done: {output_dir}", soft_wrap=True)
        return finished
    if checkpoint is not None:
        console.print(f"goes on from {checkpoint}", soft_wrap=True, highlight=False)

    tables = [train_pairs, eval_pairs]
    fill_stores(config, tokenizer, opened, tables, max_length=max_length, progress=rank == 0)
    engine, scheduler = start_engine(config, policy, steps, per_step)
    for source in sources.values():
        if isinstance(source, AdapterOffReference):
            source.policy = lambda: engine
    run = Run(
        config=config,
        engine=engine,
        scheduler=scheduler,
        objective=configured_objective(config),
        reference=sources["reference"],
        scoring_reference=sources["scoring reference"],
        pad_token_id=pad_token_id(tokenizer),
        rank=rank,
        world_size=world_size,
        console=console,
        pictures=Pictures(config, eval_pairs, tokenizer),
        progress=Progress() if checkpoint is None else load_checkpoint(engine, checkpoint),
    )
    progress = run.progress
    save = partial(save_checkpoint, engine, output_dir / "checkpoints", progress, identity, config.keep_checkpoints)
    order = None if stream else make_order(train_pairs.lengths, per_step, config.seed, config.group_by_length)
    if stream and progress.stream is not None:
        stream.load(progress.stream)
    resumed_at = None if checkpoint is None else progress.step
    with StopRequest() as stop, RunLog(output_dir, config, identity, resumed_at, writes=rank == 0) as log:
        if checkpoint is None:
            progress.first_evaluation = progress.last_evaluation = evaluate(run, eval_pairs, log, 0.0)
        engine.train()
        todo = range(progress.step + 1, steps + 1)
        bar = tqdm(todo, desc="train", unit="step", initial=progress.step, total=steps, disable=rank > 0)
        for step in bar:
            if order is None:
                batches = stream.batches(per_step // world_size, config.batch_size)
            else:
                batches = share_of(train_pairs, order(step), config.batch_size, rank, world_size)
            norm = training_step(run, step, batches, stop)
            if norm is None:
                save()
                return stopped_run(console, output_dir, log.lines, progress)
            bar.set_postfix(progress.postfix(engine.skipped_steps))
            progress.stream = None if stream is None else stream.state()
            epoch = step * per_step / count if stream is None else float(stream.passes)
            if step % config.logging_steps == 0 or step == steps:
                log.write(step, epoch, {**close_window(progress), **metrics_of_step(engine, scheduler, progress, norm)})
            if step == steps:  # before the last evaluation, which may end the run at a number that is not finite
                save_model(engine, tokenizer, output_dir)
            if step == steps or (config.eval_steps and step % config.eval_steps == 0):
                progress.last_evaluation = evaluate(run, eval_pairs, log, epoch)
            if config.save_steps and step % config.save_steps == 0:
                save()
        if resumed_at == steps:  # that run ended between its last checkpoint and its summary
            save_model(engine, tokenizer, output_dir)
    summary = {
        "steps": steps,
        "train_pairs": count,
        "eval_pairs": len(eval_pairs),
        "skipped_batches": progress.skipped_batches,
        "skipped_steps": engine.skipped_steps,
        "notes": notes,
        "before": finite_or_none(progress.first_evaluation),
        "after": finite_or_none(progress.last_evaluation),
    }
    if rank == 0:
        write_summary(config, output_dir, summary, log.lines)
    return TrainResult(output_dir=output_dir, metrics=log.lines, summary=summary)


def training_step(run: Run, step: int, batches: Sequence[Sequence[TokenizedPair]], stop: StopRequest) -> float | None:
    """One optimiser step: a forward and a backward pass of each batch, then the optimiser.

    A batch whose loss is not finite on some process ends the run, or is left out on all processes. They then go through
    the same passes with a gradient of zero, since they exchange sharded weights and gradients in every pass.

    Returns:
        The gradient's norm before clipping; None where SIGTERM asks the run to stop: the step is then not counted, and
        will be done again as a whole.
    """
    progress, engine = run.progress, run.engine
    seen, left_out, before = len(progress.window), progress.skipped_batches, engine.skipped_steps
    norm = 0.0
    for pairs in batches:
        if anywhere(stop.requested, engine.device):
            del progress.window[seen:]
            progress.skipped_batches = left_out
            return None
        out = losses_of(run, pairs)
        if finite_everywhere(out.losses):
            engine.backward(out.loss)
            progress.window.append(diagnostics(out, chosen_only=run.chosen_only))
        else:
            leave_out(run.config, run.console, non_finite_error(out, f"step {step}", places(pairs)))
            progress.skipped_batches += 1
            nothing_left = len(progress.window) == seen and engine.is_gradient_accumulation_boundary()
            engine.backward(out.loss if nothing_left else loss_without_gradient(engine, run.pad_token_id))
        norm = step_engine(engine)
    progress.step = step
    any_batch, skipped = len(progress.window) > seen, engine.skipped_steps > before
    check_gradient(run.config, progress, run.console, norm, any_batch, skipped)
    return norm


def losses_of(run: Run, pairs: Sequence[TokenizedPair], count: int | None = None) -> PreferenceLoss:
    """Token ids of a batch → log-probs of policy and references → losses.

    Args:
        run: with the models.
        pairs: the batch.
        count: how many of the pairs, the first ones, are read by the loss; None or 0 for all.
    """
    batch = {name: tensor.to(run.engine.device) for name, tensor in collate(pairs, run.pad_token_id).items()}
    logps = [model_per_token_logps(run.engine, batch)]
    logps += [None if reference is None else reference(batch) for reference in (run.reference, run.scoring_reference)]
    counted = None if count is None else torch.arange(len(pairs)) < count
    weights = pair_weights(pairs)
    weights = None if weights is None else weights.to(run.engine.device)
    return loss_of_batch(run.objective, batch, *logps, pair_weights=weights, chosen_only=run.chosen_only, pairs=counted)


def evaluate(run: Run, eval_pairs: Sequence[TokenizedPair], log: RunLog, epoch: float) -> Metrics:
    """Logs means over the held-out pairs, names prefixed with `eval_` (none without pairs), and draws the fixed ones.

    A batch whose loss is not finite on some process is treated as in training; `eval_skipped_batches` counts those
    that were left out.
    """
    if not eval_pairs:
        return {}
    run.engine.eval()
    batches = evaluation_batches(eval_pairs, run.config.batch_size, run.rank, run.world_size)
    seen: list[tuple[dict[str, torch.Tensor], int]] = []
    done = 0
    with torch.no_grad():
        for pairs, count in batches:
            done += 1
            out = losses_of(run, pairs, count)
            if finite_everywhere(out.losses):
                seen.append((diagnostics(out, chosen_only=run.chosen_only), count))
            else:
                where = f"evaluation after step {run.progress.step}"
                leave_out(run.config, run.console, non_finite_error(out, where, places(pairs)))
        read = [losses_of(run, pairs) for pairs in run.pictures.batches]
    run.engine.train()
    means = mean_over_pairs([metrics for metrics, _ in seen], [count for _, count in seen])
    means |= {"skipped_batches": float(done - len(seen))} if len(seen) < done else {}
    metrics = {f"eval_{name}": value for name, value in means.items()}
    log.write(run.progress.step, epoch, metrics)
    run.pictures.draw(read, log, run.progress.step)
    return metrics
