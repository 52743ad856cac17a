"""The loss for ``Trainer(compute_loss_func=...)``: the second of the three objects of `hf_trainer`.

In: a model's output for a batch of `PreferenceCollator`, and that batch's labels. Out: the loss, divided by the number
of pairs that the `Trainer` counted in the optimiser step. It also collects the metrics that `SelectionCallback` logs.
The reference's log-probs are in the labels (from a store), or the reference model is called here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer

from selective_pref import Objective, PreferenceLoss, diagnostics, per_token_logps
from selective_pref_adapters.batch import PAIR_WEIGHTS, REF_LOGPS, SCORING_REF_LOGPS, from_bits, labels_of
from selective_pref_adapters.fsdp import shard_reference
from selective_pref_adapters.hf_trainer.collator import PreferenceLabels
from selective_pref_adapters.monitoring import (
    MetricWindow,
    evaluation_mean,
    finite_everywhere,
    non_finite_error,
    own_pairs,
)
from selective_pref_adapters.objectives import (
    CHOSEN_ONLY,
    check_objective,
    loss_of_batch,
    make_objective,
    needs_reference,
    unread,
)
from selective_pref_adapters.objectives.named_losses import check_name
from selective_pref_adapters.options import UNREAD, LossOptions
from selective_pref_adapters.references import AdapterOffReference, RunningReference, in_deepspeed, ref_logps_of

DISTANCE = "distance"  # of policy and reference; read by `SelectionCallback`, not logged
NO_REFERENCE = (
    "objective {objective!r} compares the policy with a reference, and there is none: give "
    "SelectivePreferenceLoss(ref_model=...) or PreferenceCollator(reference_store=...)"
)
NO_REJECTED = (
    "objective {objective!r} compares two answers, and the pairs have no rejected side: give pairs (and leave "
    "PreferenceCollator(chosen_only=True) out), or objective 'sft'"
)


class SelectivePreferenceLoss:
    """A preference loss for ``Trainer(compute_loss_func=...)``: (outputs, labels, number of pairs) → scalar loss.

    The loss is the sum over this micro-batch's pairs, divided by the number of pairs that the `Trainer` counted in the
    whole optimiser step. So {accumulation 4} = {batch × 4} = {2 processes × 2}, uneven last batches included.

    Args:
        objective: "selective_dpo", "dpo", "simpo", "sft", "teacher_veto", or any callable (chosen, rejected) →
            PreferenceLoss.
        ref_model: a reference that runs beside the policy: a model with the same tokenizer, or the policy itself where
            it is a PEFT model (its adapters are then switched off). None where the collator has a `reference_store`.
        scoring_ref_model: a second reference from which scores are made (Eq. 6), while the first anchors the reward;
            for "teacher_veto", whose reference is the teacher, the policy's own start.
        non_finite: "raise" stops on every process, before the gradient reaches the weights, when a loss is not finite;
            "skip" leaves the pairs out whose *reference* is broken and counts them. A broken policy always raises.
        options: the fields of `LossOptions` (beta, selection_ratio, …) that are not to have their defaults;
            `SelectionCallback` can move beta and selection_ratio during a run.

    Raises:
        ValueError, TypeError: an option that there is not, that is out of range, or that the objective does not read.
    """

    def __init__(
        self,
        objective: str | Objective = "selective_dpo",
        *,
        ref_model: nn.Module | None = None,
        scoring_ref_model: nn.Module | None = None,
        non_finite: Literal["raise", "skip"] = "raise",
        **options: Any,
    ) -> None:
        defaults = {option.name: option.default for option in fields(LossOptions)}
        if unknown := sorted(options.keys() - defaults.keys()):
            raise TypeError(f"a loss has no option {', '.join(unknown)}; it has {', '.join(sorted(defaults))}")
        if non_finite not in ("raise", "skip"):
            raise ValueError(f"non_finite must be 'raise' or 'skip'; got {non_finite!r}")
        if callable(objective) and options:
            raise ValueError(f"a callable objective has its numbers bound already: leave {sorted(options)} out")
        self.options = {**defaults, **options}
        if isinstance(objective, str):
            check_name("objective", objective, UNREAD)
            not_read = unread(objective, self.options["loss_type"], self.options["f_divergence_type"])
            if wrong := sorted(options.keys() & set(not_read)):
                raise ValueError(f"objective {objective!r} does not read {', '.join(wrong)}: leave it out")
        self.objective = objective
        self._made: tuple[dict[str, float], Objective] | None = None
        self.non_finite = non_finite
        self.references = {
            key: open_reference(model)
            for key, model in ((REF_LOGPS, ref_model), (SCORING_REF_LOGPS, scoring_ref_model))
            if model is not None
        }
        self.windows: dict[str, MetricWindow] | None = None  # of training and evaluation, where they are collected
        self.set_step("a batch", {}, {})
        self.reads_reference = needs_reference(self._bound())
        self.check()

    def set_step(self, where: str, numbers: Mapping[str, float], evaluation_numbers: Mapping[str, float]) -> None:
        """Sets what depends on the optimiser step; `SelectionCallback` calls it before every one.

        Args:
            where: what errors begin with, as ``"step 3"``.
            numbers: beta and selection_ratio of this step, where a schedule moves them; others are as given.
            evaluation_numbers: the same for evaluations, which must be comparable with one another: the schedules' end.
        """
        self.where, self.numbers, self.evaluation_numbers = where, dict(numbers), dict(evaluation_numbers)

    def collect_metrics(self) -> None:
        """From now on, metrics of every batch are collected in `windows`."""
        self.windows = {"train": MetricWindow(), "eval": MetricWindow()}

    @contextmanager
    def without_metrics(self) -> Iterator[None]:
        """Within it, batches are not collected."""
        windows, self.windows = self.windows, None
        try:
            yield
        finally:
            self.windows = windows

    @property
    def schedulable(self) -> set[str]:
        """The numbers that may move while a run goes on: those that the objective reads."""
        if not isinstance(self.objective, str):
            return set()
        return {"beta", "selection_ratio"} - set(UNREAD[self.objective])

    def check(self, **numbers: float) -> None:
        """Raises where the objective refuses its numbers, or `numbers` in their place."""
        check_objective(self._bound(**numbers), reference=self.reads_reference)

    def _bound(self, **numbers: float) -> Objective:
        if not isinstance(self.objective, str):
            return self.objective
        if self._made is None or self._made[0] != numbers:  # one that counts what it sees is kept from batch to batch
            self._made = numbers, make_objective(self.objective, **{**self.options, **numbers})
        return self._made[1]

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch.

        Args:
            outputs: the model's: log-probs [2B T] of the fused head, or an output with logits [2B T+1 V].
            labels: of `PreferenceCollator`.
            num_items_in_batch: pairs of the optimiser step, as the Trainer counts them.

        Raises:
            TypeError, ValueError: a batch that is not ours; no reference, although the objective reads one.
            NonFiniteError: a loss is not finite, on this or another process.
        """
        if not isinstance(labels, PreferenceLabels):
            raise TypeError(
                "SelectivePreferenceLoss needs the batches of PreferenceCollator: pass "
                f"data_collator=PreferenceCollator(tokenizer) to the Trainer; got labels {type(labels).__name__}"
            )
        if num_items_in_batch is None:
            raise ValueError("the Trainer gave no number of pairs to divide the loss by: transformers >= 5.2 is needed")
        logps = logps_of(outputs, labels)
        out, kept = self.preferences(logps, labels)
        if torch.is_grad_enabled():
            total = out.losses.sum() if kept.any() else 0.0 * logps.sum()
            return total / num_items_in_batch
        losses = out.losses.new_zeros(labels.pairs)
        losses[kept] = out.losses if kept.any() else losses[:0]
        counted = (kept & self._own(labels)).to(losses.device)
        return labels.pairs * evaluation_mean(losses, counted) / num_items_in_batch

    def preferences(self, logps: Tensor, labels: PreferenceLabels) -> tuple[PreferenceLoss, Tensor]:
        """The losses of a batch's pairs; adds their metrics to the window.

        Evaluations (no gradient) use the numbers at the end of the schedules. In the last batch of an evaluation over
        several processes, pairs that were repeated to fill it up are not in the metrics.

        Returns:
            The losses of the kept pairs (of all, if none is), and which pairs of the batch were kept: bool [B] on the
            CPU.
        """
        training = torch.is_grad_enabled()
        refs = {key: ref_logps_of(labels, key, self.references.get(key)) for key in (REF_LOGPS, SCORING_REF_LOGPS)}
        if labels.chosen_only and isinstance(self.objective, str) and self.objective not in CHOSEN_ONLY:
            raise ValueError(NO_REJECTED.format(objective=self.objective))
        if refs[REF_LOGPS] is None and self.reads_reference:
            raise ValueError(NO_REFERENCE.format(objective=self.objective))
        objective = self._bound(**(self.numbers if training else self.evaluation_numbers))

        losses_of = partial(
            loss_of_batch,
            objective,
            labels,
            logps,
            *refs.values(),
            pair_weights=from_bits(labels[PAIR_WEIGHTS]) if PAIR_WEIGHTS in labels else None,
            chosen_only=labels.chosen_only,
        )
        kept = torch.ones(labels.pairs, dtype=torch.bool)
        out = losses_of()
        if not finite_everywhere(out.losses):
            mask = labels["completion_mask"][:, 1:] != 0
            if self.non_finite == "raise" or not finite_everywhere(logps.detach().masked_fill(~mask, 0.0)):
                raise non_finite_error(out, self.where if training else f"evaluation at {self.where}", labels.places)
            kept = torch.isfinite(out.losses.detach()).cpu()
            out = losses_of(pairs=kept)
        if self.windows is not None:
            own = self._own(labels)
            seen = out if own.all() else losses_of(pairs=kept & own)
            window = self.windows["train" if training else "eval"]
            window.add(
                self._metrics(seen, labels.chosen_only),
                pairs=int((kept & own).sum()),
                left_out=int((~kept & own).sum()),
            )
        return out, kept

    def _own(self, labels: PreferenceLabels) -> Tensor:
        """Which pairs of a batch are this process's own: bool [B] on the CPU."""
        own = labels.pairs if torch.is_grad_enabled() else own_pairs(labels.pairs)
        return torch.arange(labels.pairs) < own

    def _metrics(self, out: PreferenceLoss, chosen_only: bool) -> dict[str, Tensor]:
        """`diagnostics`, and how far policy and reference are apart: the mean |log-ratio| of a token."""
        if not self.reads_reference:
            return diagnostics(out, chosen_only=chosen_only)
        mask = torch.cat([out.chosen.mask.flatten(), out.rejected.mask.flatten()])
        ratios = torch.cat([out.chosen.log_ratios.flatten(), out.rejected.log_ratios.flatten()])
        return {**diagnostics(out, chosen_only=chosen_only), DISTANCE: ratios.abs().sum() / mask.sum().clamp(min=1)}


def logps_of(outputs: Any, labels: Mapping[str, Any]) -> Tensor:
    """The policy's log-probs [2B T] from a model's output: those that its fused head returned, or from its logits."""
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        return outputs
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    targets = labels_of(labels)
    # Prompt tuning prepends virtual tokens: the last positions are those of the batch's own tokens.
    return per_token_logps(logits[:, -targets.shape[1] :], targets)[0]


# --- a reference beside the policy -----------------------------------------------------------------------------------


def open_reference(model: nn.Module) -> RunningReference | AdapterOffReference:
    """A loaded model as a reference; a PEFT model that can be trained is the policy, and its adapters are switched off.

    The `Trainer` moves and wraps the policy before the first batch, but not a reference: that one goes to the first
    batch's device, and where `SelectionCallback` knows the Trainer, runs as the policy does (see `started_as_policy`).

    Raises:
        TypeError: not a loaded model.
        ValueError: a PEFT policy that also trains weights which stay when its adapters are switched off.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a reference must be a loaded model; got {type(model).__name__} {model!r:.60}")
    if hasattr(model, "disable_adapter") and any(parameter.requires_grad for parameter in model.parameters()):
        return AdapterOffReference(model)
    return RunningReference(model, start=lambda model, device: model.to(device))


def started_as_policy(trainer: Trainer, model: nn.Module, _: torch.device) -> Any:
    """A reference made ready as the `Trainer` makes the policy ready: on its device, in its precision, sharded like it.

    Policy and reference must differ by their weights only. Under `bf16=True` the policy runs in autocast, or DeepSpeed
    casts its weights; a reference that did not would compute other log-probs from equal weights.
    """
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        return shard_reference(model, accelerator)
    if not trainer.is_deepspeed_enabled:
        return accelerator.prepare_model(model, evaluation_mode=True)
    return in_deepspeed(model, accelerator)
