"""Schedules, metrics, warnings and pictures of a run: the third of the three objects of `hf_trainer`.

In: schedules of the ratio and of β. Out: the loss's numbers of each step; the selection's metrics in the Trainer's logs
(means over all processes); warnings where a run looks wrong; pictures of the selection. `attach` also checks the
`Trainer` before its first step, so that what would train wrongly, or fail later, is an error there.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from selective_pref_adapters.batch import REF_LOGPS, SCORING_REF_LOGPS
from selective_pref_adapters.fsdp import enable_fsdp
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head
from selective_pref_adapters.hf_trainer.checks import (
    check_references,
    check_rows,
    check_schedules,
    check_trainer,
    datasets_of,
    models_of,
)
from selective_pref_adapters.hf_trainer.loss import DISTANCE, SelectivePreferenceLoss, started_as_policy
from selective_pref_adapters.launching.processes import leave_at_exit
from selective_pref_adapters.model_checks import check_padding, check_reloadable, check_trainable
from selective_pref_adapters.models import running_model, usable_length
from selective_pref_adapters.monitoring import MOSTLY_TIED, SIGNS, WindowMeans, wrong_signs
from selective_pref_adapters.objectives import CHOSEN_ONLY, Schedule, logged_numbers, selects
from selective_pref_adapters.references import AdapterOffReference, RunningReference, is_initial_policy
from selective_pref_adapters.seeing.shown import ShownPair, shown_pairs
from selective_pref_adapters.seeing.trackers import SelectionPictures

logger = logging.getLogger(__name__)

_SKIPPED = "selection/skipped_pairs"
_SHORT = {"beta": "selection/beta", "selection_ratio": "selection/ratio"}


class SelectionCallback(TrainerCallback, ExportableState):
    """Schedules, metrics, warnings and pictures.

    ``SelectionCallback().attach(trainer)`` adds it to a `Trainer` that is built; in ``Trainer(callbacks=[...])`` it
    attaches itself when that Trainer is built.

    Args:
        beta, selection_ratio: schedules over optimiser steps, as ``Schedule(start=1.0, end=0.4, steps=100)``; None for
            the loss's own number. The step comes from the Trainer, so a resumed run goes on where it stood.
            Evaluations use the end of the schedule: they must be comparable.
        patience: how many logs in a row have to look wrong before a warning.
        picture_pairs: draw the selection of so many pairs, the first of the evaluation set, at each evaluation, into
            `selection/step-….svg` in the output folder, with the numbers in a `.json` beside it, and as an image in
            TensorBoard, W&B and trackio, where the Trainer reports to them.

    Attributes:
        warnings: {"step", "kind", "message"} of each warning that was given.

    Raises:
        TypeError, ValueError: when it is attached: see `attach`.
    """

    def __init__(
        self,
        *,
        beta: Schedule | Mapping[str, Any] | None = None,
        selection_ratio: Schedule | Mapping[str, Any] | None = None,
        patience: int = 10,
        picture_pairs: int = 0,
    ) -> None:
        given = {"beta": beta, "selection_ratio": selection_ratio}
        self.schedules = {name: _schedule(name, value) for name, value in given.items() if value is not None}
        if patience < 2 or picture_pairs < 0:
            raise ValueError(f"patience must be at least 2, picture_pairs 0; got {patience} and {picture_pairs}")
        self.patience = patience
        self.picture_pairs = picture_pairs
        self.warnings: list[dict[str, Any]] = []
        self.history: dict[str, list[list[float]]] = {}  # [margin / β, accuracy] of the last logs, by prefix
        self.trainer: Any = None

    def state(self) -> dict[str, Any]:
        """What checkpoints keep: the options, and what the warnings look back on."""
        schedules = {name: None if (s := self.schedules.get(name)) is None else asdict(s) for name in _SHORT}
        return {
            "args": {**schedules, "patience": self.patience, "picture_pairs": self.picture_pairs},
            "attributes": {"warnings": self.warnings, "history": self.history},
        }

    # --- the trainer -------------------------------------------------------------------------------------------------

    def attach(self, trainer: Trainer) -> None:
        """Checks the trainer, adds this callback to it if it is not there, and lets its logs carry the metrics.

        Raises:
            TypeError, ValueError: a collator or loss that is not ours, an argument that does not go together with
                them, no reference or two, a model that cannot be trained or saved, rows that a model cannot read. Each
                message says what to change.
            MissingRowsError: the store lacks rows of the training or evaluation set.
        """
        loss, collator = trainer.compute_loss_func, trainer.data_collator
        leave_at_exit()
        enable_fsdp(trainer)
        check_trainer(trainer)
        there = [found for found in trainer.callback_handler.callbacks if isinstance(found, SelectionCallback)]
        if any(callback is not self for callback in there):
            raise ValueError("one SelectionCallback is enough: two would set the same schedule")
        check_schedules(loss, self.schedules)
        if not there:
            trainer.add_callback(self)
        self.trainer = trainer
        loss.collect_metrics()
        self._set_step(0)
        pictures = any(isinstance(found, SelectionPictures) for found in trainer.callback_handler.callbacks)
        if self.picture_pairs and not pictures:
            trainer.add_callback(SelectionPictures(trainer, self.picture_pairs, self._shown))
        trainer.model_accepts_loss_kwargs = False  # the model computes no loss, so it gets no count of items
        # A prediction would have two rows per pair, and the Trainer cuts off the last rows of the gathered ones, which
        # are not those that were repeated.
        trainer.args.prediction_loss_only = True
        for reference in loss.references.values():
            if isinstance(reference, AdapterOffReference):
                reference.policy = functools.partial(running_model, trainer)
            elif isinstance(reference, RunningReference):
                reference.start = functools.partial(started_as_policy, trainer)
                install_fused_head(reference.model, at_first_call=True, share_prefix=collator.share_prefix)
        # `model_init` makes another model at each `train`, which has no fused head: its logits are used.
        collator.fused_head = trainer.model_init is None and install_fused_head(
            trainer.model, at_first_call=True, share_prefix=collator.share_prefix
        )
        collator.chosen_only = collator.chosen_only or loss.objective in CHOSEN_ONLY
        models = models_of(trainer)
        check_padding(collator.tokenizer, models)
        collator.max_length = usable_length(collator.max_length, models)
        for name, dataset in datasets_of(trainer):
            check_rows(name, dataset, collator, loss, models)
        _let_logs_carry_metrics(trainer)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end of `Trainer.__init__`."""
        self.attach(_calling_trainer())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores from a checkpoint what the warnings look back on."""
        if self.trainer is None:  # added to a finished Trainer, or made anew from a checkpoint by it
            self.attach(_calling_trainer())
        check_references(self.trainer)  # again: parameters may have been frozen, or unfrozen, since
        check_trainable(self.trainer.model)
        if state.global_step == 0:
            self.warnings, self.history = [], {}
        else:
            check_reloadable(self.trainer, "resume_from_checkpoint")
        stored = state.stateful_callbacks.get(type(self).__name__)
        if stored is not None and state.global_step > 0:
            if stored["args"] != self.state()["args"]:
                logger.warning(
                    "the run is resumed with other options of %s than it was started with: %s, then %s",
                    type(self).__name__,
                    stored["args"],
                    self.state()["args"],
                )
            for name, value in stored["attributes"].items():
                setattr(self, name, value)
        state.stateful_callbacks[type(self).__name__] = self.state()
        self.loss.collect_metrics()
        if state.global_step == 0 and self._selects and self._starts_at_the_reference():
            self._warn("self_reference")
        self._set_step(state.global_step)

    @property
    def loss(self) -> SelectivePreferenceLoss:
        """The loss of the trainer that this callback is attached to."""
        return self.trainer.compute_loss_func

    # --- schedules ---------------------------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the loss its numbers of this optimiser step."""
        self._set_step(state.global_step)
        self.loss.windows["eval"].clear()  # of an evaluation that was interrupted

    def _set_step(self, step: int) -> None:
        now = {name: schedule(step) for name, schedule in self.schedules.items()}
        end = {name: schedule.end for name, schedule in self.schedules.items()}
        self.loss.set_step(f"step {step + 1}", now, end)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the first step: warns if the reference's log-probs were those of the initial policy."""
        if state.global_step == 1 and self._selects:
            distance = self.loss.windows["train"].means().values.get(DISTANCE, 1.0)
            low_precision = args.bf16 or args.fp16 or next(self.trainer.model.parameters()).dtype != torch.float32
            if distance < (2e-2 if low_precision else 1e-3):
                self._warn("self_reference")

    def _starts_at_the_reference(self) -> bool:
        """Whether the reference of the scores is the initial policy; False where only the first step can tell."""
        references = self.loss.references
        reference = references.get(SCORING_REF_LOGPS) or references.get(REF_LOGPS)
        return is_initial_policy(reference, self.trainer.model)

    @property
    def _selects(self) -> bool:
        """Whether the loss selects tokens: from the start, or at the end of a schedule."""
        final = {**self.loss.options, **self.loss.evaluation_numbers}["selection_ratio"]
        return "selection_ratio" in self.loss.schedulable and selects(final, self.loss.options["min_score"])

    # --- logs --------------------------------------------------------------------------------------------------------

    def add_metrics(self, logs: dict[str, float]) -> None:
        """Puts the means since the last log, over all processes, into a log that the Trainer is about to write."""
        windows = self.loss.windows
        if "loss" in logs and "learning_rate" in logs:
            for name in sorted(self.loss.schedulable):
                logs.update(logged_numbers(_SHORT[name], self.loss.numbers.get(name, self.loss.options[name])))
            self._take(logs, windows["train"].close(), "")
            return
        for prefix in [name.removesuffix("runtime") for name in logs if name.endswith("_runtime")]:
            if f"{prefix}loss" in logs:
                self._take(logs, windows["eval"].close(), prefix)

    def _take(self, logs: dict[str, float], means: WindowMeans, prefix: str) -> None:
        values = means.values
        logs.update({f"{prefix}{name}": value for name, value in values.items() if name not in ("loss", DISTANCE)})
        if self.loss.non_finite == "skip" and means.pairs + means.left_out:
            logs[f"{prefix}{_SKIPPED}"] = means.left_out / (means.pairs + means.left_out)
        ratios = [value for name, value in logs.items() if name.startswith("selection/ratio")]
        some_left_out = selects(ratios or 1.0)
        if "rewards/margins" in values:
            seen = self.history.setdefault(prefix, [])
            beta = logs.get("selection/beta", 1.0)  # a schedule of β moves the margin, too
            seen.append([values["rewards/margins"] / beta, values["rewards/accuracies"]])
            patience = max(3, self.patience // 3) if prefix else self.patience
            del seen[: -2 * patience]
            for kind in wrong_signs(seen, patience):
                self._warn(kind, prefix)
        if means.left_out:
            self._warn("non_finite", prefix)
        if some_left_out and values.get("selection/tied_fraction", 0.0) > MOSTLY_TIED:
            self._warn("ties", prefix)

    def _warn(self, kind: str, prefix: str = "") -> None:
        """Gives a warning once in a run: every process keeps it in `warnings`, the first one logs it."""
        if any(given["kind"] == kind for given in self.warnings):
            return
        step, message = self.trainer.state.global_step, SIGNS[kind].format(prefix=prefix)
        self.warnings.append({"step": step, "kind": kind, "message": message})
        if self.trainer.is_world_process_zero():
            logger.warning("step %d: %s", step, message)

    # --- evaluations -------------------------------------------------------------------------------------------------

    def on_predict(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """`Trainer.predict` writes no log, but returns its metrics."""
        self.add_metrics(metrics)

    def _shown(self, rows: list[Any], _: int) -> list[ShownPair]:
        """These rows as the pictures show them. Every process calls it: weights may be sharded."""
        trainer = self.trainer
        labels = trainer._prepare_inputs(trainer.data_collator(rows))["labels"]
        model = running_model(trainer)
        model.eval()
        with torch.no_grad(), self.loss.without_metrics():  # they are not a part of the evaluation
            out, _ = self.loss.preferences(frozen_per_token_logps(model, labels), labels)
        return shown_pairs(out, labels["input_ids"], trainer.data_collator.tokenizer, places=labels.places)


# --- reaching into the trainer ---------------------------------------------------------------------------------------


def _schedule(name: str, value: Schedule | Mapping[str, Any]) -> Schedule:
    if isinstance(value, (Schedule, Mapping)):
        return value if isinstance(value, Schedule) else Schedule(**value)
    raise TypeError(
        f"{name} must be a Schedule(start=..., end=..., steps=...); got {value!r}: a constant belongs into "
        f"SelectivePreferenceLoss({name}=...)"
    )


def _let_logs_carry_metrics(trainer: Any) -> None:
    """Wraps the Trainer's `log`, so that every line gets the metrics before `log_history` and the loggers see it."""
    write = trainer.log
    if hasattr(write, "carries_metrics"):
        return

    @functools.wraps(write)
    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, SelectionCallback):
                callback.add_metrics(logs)
        write(logs, *args, **kwargs)

    log.carries_metrics = True  # type: ignore[attr-defined]
    trainer.log = log


def _calling_trainer() -> Trainer:
    """The Trainer that is calling a callback.

    transformers hands callbacks the model, the arguments and the state, but not the Trainer, whose collator and loss
    have to be checked before training and whose `log` is the one place that all loggers get their numbers from. It is
    found as the `self` of a method on the call stack: a convenience for ``Trainer(callbacks=[...])``; `attach` needs no
    such search.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back
    raise RuntimeError("no Trainer calls SelectionCallback here: call its attach(trainer) once the trainer is built")
