"""The loss for ``Trainer(compute_loss_func=...)``: the second of the three objects of `hf_trainer`.

In: what a model answered to a batch of `PreferenceCollator`, and that batch's labels. Out: the loss, divided by the
number of pairs that the `Trainer` counted in the optimiser step; on the side, statistics of the selection. The
reference's log-probs are in the labels (a store), or the reference is asked here (it runs beside the policy).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from selective_pref import Objective, Pool, PreferenceLoss, Ties, diagnostics, per_token_logps
from selective_pref_adapters.batch import REF_LOGPS, SCORING_REF_LOGPS, labels_of
from selective_pref_adapters.hf_trainer.collator import PreferenceLabels
from selective_pref_adapters.monitoring import finite_everywhere, mean_over_pairs, non_finite_error
from selective_pref_adapters.objectives import check_objective, loss_of_batch, make_objective, needs_reference
from selective_pref_adapters.options import UNREAD
from selective_pref_adapters.references import AdapterOffReference, Reference, RunningReference, ref_logps_of

SKIPPED = "selection/skipped_pairs"
DISTANCE = "distance"  # of policy and reference; read by `SelectionCallback`, not logged
NO_REFERENCE = (
    "objective {objective!r} compares the policy with a reference, and there is none: give "
    "SelectivePreferenceLoss(ref_model=...) or PreferenceCollator(ref_store=...)"
)


class SelectivePreferenceLoss:
    """A preference loss for ``Trainer(compute_loss_func=...)``: (outputs, labels, number of pairs) → scalar loss.

    The loss is the sum over this micro-batch's pairs, divided by the number of pairs that the `Trainer` counted in the
    whole optimiser step. So {accumulation 4} = {batch × 4} = {2 processes × 2}, uneven last batches included.

    Args:
        objective: "selective_dpo", "dpo", "simpo", "sft", or any callable (chosen, rejected) → PreferenceLoss.
        beta, selection_ratio: 0.01 and 0.4 (the paper's) where they are not given; `SelectionCallback` can move them.
        selection_pool, selection_ties, gamma, label_smoothing: as in `make_objective`.
        ref_model: a reference that runs beside the policy: a model with the same tokenizer, or the policy itself where
            it is a PEFT model (its adapters are then switched off). None where the collator has a `ref_store`.
        scoring_ref_model: a reference that scores tokens (Eq. 6), where it is another than the one that anchors.
        non_finite: "raise" stops on every process, before the gradient reaches the weights, when a loss is not finite;
            "skip" leaves the pairs out whose *reference* is broken and counts them. A broken policy always raises.

    Raises:
        ValueError, TypeError: an option that is out of range, or that the objective does not read.
    """

    def __init__(
        self,
        objective: str | Objective = "selective_dpo",
        *,
        beta: float | None = None,
        selection_ratio: float | None = None,
        selection_pool: Pool | None = None,
        selection_ties: Ties | None = None,
        gamma: float | None = None,
        label_smoothing: float | None = None,
        ref_model: nn.Module | None = None,
        scoring_ref_model: nn.Module | None = None,
        non_finite: Literal["raise", "skip"] = "raise",
    ) -> None:
        given = {
            "beta": beta,
            "selection_ratio": selection_ratio,
            "selection_pool": selection_pool,
            "selection_ties": selection_ties,
            "gamma": gamma,
            "label_smoothing": label_smoothing,
        }
        options = {name: value for name, value in given.items() if value is not None}
        if non_finite not in ("raise", "skip"):
            raise ValueError(f"non_finite must be 'raise' or 'skip'; got {non_finite!r}")
        if callable(objective):
            if options:
                raise ValueError(f"a callable objective has its numbers bound already: leave {sorted(options)} out")
        elif unread := sorted(options.keys() & set(UNREAD.get(objective, ()))):
            raise ValueError(f"objective {objective!r} does not read {', '.join(unread)}: leave it out")
        defaults = {"beta": 0.01, "selection_ratio": 0.4, "gamma": 0.5}
        self.objective = objective
        self.options = {**defaults, **options}
        self.non_finite = non_finite
        self.references = {
            key: open_reference(model)
            for key, model in ((REF_LOGPS, ref_model), (SCORING_REF_LOGPS, scoring_ref_model))
            if model is not None
        }
        self.now: dict[str, float] = {}  # what a schedule says of the current step
        self.final: dict[str, float] = {}  # and of its end: evaluations must be comparable with one another
        self.where = "a batch"  # for error messages
        self.windows: dict[str, Window] | None = None  # statistics, where somebody collects them
        self.reads_reference = needs_reference(self._bound())
        self.check()

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
        return make_objective(self.objective, **{**self.options, **numbers})

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
            raise ValueError("the Trainer gave no number of pairs to divide the loss by: transformers >= 5 is needed")
        logps = logps_of(outputs, labels)
        out, kept = self.preferences(logps, labels)
        if torch.is_grad_enabled():
            total = out.losses.sum() if kept.any() else 0.0 * logps.sum()
        else:
            total = labels.pairs * _mean_of_evaluation(out, kept)
        return total / num_items_in_batch

    def preferences(self, logps: Tensor, labels: PreferenceLabels) -> tuple[PreferenceLoss, np.ndarray]:
        """What the objective says of a batch, and which pairs it says it of; takes in the statistics.

        Evaluations (no gradient) use the schedule's final numbers. On the last batch of an evaluation over several
        processes, pairs that were repeated to fill it up are not in the statistics.

        Returns:
            The losses of the kept pairs (of all, if none is), and which pairs of the batch were kept: bool [B].
        """
        training = torch.is_grad_enabled()
        refs = {key: ref_logps_of(labels, key, self.references.get(key)) for key in (REF_LOGPS, SCORING_REF_LOGPS)}
        if refs[REF_LOGPS] is None and self.reads_reference:
            raise ValueError(NO_REFERENCE.format(objective=self.objective))
        objective = self._bound(**(self.now if training else self.final))

        def losses_of(pairs: np.ndarray) -> PreferenceLoss:
            chosen = np.flatnonzero(pairs) if pairs.any() else np.arange(len(pairs))
            rows: Any = torch.from_numpy(np.concatenate([chosen, chosen + len(pairs)])).to(logps.device)
            rows = slice(None) if pairs.all() else rows
            some = [None if ref is None else ref[rows] for ref in refs.values()]
            return loss_of_batch(objective, {"completion_mask": labels["completion_mask"][rows]}, logps[rows], *some)

        kept = np.ones(labels.pairs, dtype=bool)
        out = losses_of(kept)
        if not finite_everywhere(out.losses):
            mask = labels["completion_mask"][:, 1:] != 0
            if self.non_finite == "raise" or not finite_everywhere(logps.detach().masked_fill(~mask, 0.0)):
                raise non_finite_error(out, self.where, labels.places)
            kept = torch.isfinite(out.losses.detach()).cpu().numpy()
            out = losses_of(kept)
        if self.windows is not None:
            own = np.arange(labels.pairs) < (labels.pairs if training else _own_pairs(labels.pairs))
            seen = out if own.all() else losses_of(kept & own)
            window = self.windows["train" if training else "eval"]
            window.add(self._metrics(seen), pairs=int((kept & own).sum()), left_out=int((~kept & own).sum()))
        return out, kept

    def _metrics(self, out: PreferenceLoss) -> dict[str, Tensor]:
        """`diagnostics`, and how far policy and reference are apart: the mean |log-ratio| of a token."""
        if not self.reads_reference:
            return diagnostics(out)
        mask = torch.cat([out.chosen.mask.flatten(), out.rejected.mask.flatten()])
        ratios = torch.cat([out.chosen.log_ratios.flatten(), out.rejected.log_ratios.flatten()])
        return {**diagnostics(out), DISTANCE: ratios.abs().sum() / mask.sum().clamp(min=1)}


def logps_of(outputs: Any, labels: Mapping[str, Any]) -> Tensor:
    """The policy's log-probs [2B T] in what a model answered: those of the fused head, or from its logits."""
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        return outputs
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    targets = labels_of(labels)
    return per_token_logps(logits[:, -targets.shape[1] :], targets)[0]  # a soft prompt stands in front


# --- a reference beside the policy -----------------------------------------------------------------------------------


def open_reference(model: nn.Module) -> Reference:
    """A loaded model as a reference; a PEFT model that can be trained is the policy, and its adapters are switched off.

    By the first batch the policy has been wrapped: a reference of its own then goes to the batch's device, or into a
    ZeRO-3 engine where the policy is in one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a reference must be a loaded model; got {type(model).__name__} {model!r:.60}")
    if hasattr(model, "disable_adapter") and any(parameter.requires_grad for parameter in model.parameters()):
        return AdapterOffReference(model)
    return RunningReference(model, start=_started)


def _started(model: nn.Module, device: torch.device) -> Any:
    if not is_deepspeed_zero3_enabled():
        return model.to(device)
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


# --- statistics ------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """Sums of metrics over the batches since the last log; they stay on the device until then."""

    names: list[str] = field(default_factory=list[str])
    sums: Tensor | None = None
    pairs: int = 0
    left_out: int = 0

    def add(self, metrics: Mapping[str, Tensor], *, pairs: int, left_out: int = 0) -> None:
        """Takes in one batch: its means, over how many pairs, and how many were broken."""
        values = torch.stack([value.detach().double() for value in metrics.values()])
        self.names = list(metrics)
        self.sums = torch.zeros_like(values) if self.sums is None else self.sums
        if pairs:
            self.sums = self.sums + values * pairs
        self.pairs += pairs
        self.left_out += left_out

    def close(self) -> dict[str, float]:
        """Means over all pairs of all processes, and starts anew; every process must call it. Empty if nothing was."""
        if self.sums is None:
            return {}
        means = dict(zip(self.names, self.sums / max(self.pairs, 1), strict=True))
        seen = self.pairs + self.left_out
        values = mean_over_pairs([{SKIPPED: self.sums.new_tensor(self.left_out / max(seen, 1))}], [seen])
        if values[SKIPPED] < 1:
            values |= mean_over_pairs([means], [self.pairs])
        self.clear()
        return values

    def clear(self) -> None:
        """Forgets what was taken in."""
        self.sums, self.pairs, self.left_out = None, 0, 0


def _own_pairs(pairs: int) -> int:
    """How many of this process's pairs are its own: the last batch of an evaluation is filled up with repeated ones."""
    state = GradientState()
    if not (state.end_of_dataloader and state.remainder > 0):
        return pairs
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return min(max(state.remainder - rank * pairs, 0), pairs)


def _mean_of_evaluation(out: PreferenceLoss, kept: np.ndarray) -> Tensor:
    """The mean loss of a batch's pairs; of an evaluation's last batch, the mean over those of all processes.

    The Trainer keeps the first values of what it gathers from that batch, each the mean of one process's pairs. Given
    one mean without the repeated pairs for all of them, its `eval_loss` is the mean over the evaluation pairs.
    """
    own = np.arange(len(kept)) < _own_pairs(len(kept))
    losses = out.losses.new_zeros(len(kept))
    losses[torch.from_numpy(kept)] = out.losses if kept.any() else losses[:0]
    count = int((kept & own).sum())
    total = losses[torch.from_numpy(kept & own)].sum()
    mean = total / max(count, 1)
    if not GradientState().end_of_dataloader:
        return mean
    sums = mean_over_pairs([{"loss": total, "pairs": total.new_tensor(float(count))}], [1])
    return mean.new_tensor(sums["loss"] / max(sums["pairs"], 1e-9))  # pairs 0: every one was broken
