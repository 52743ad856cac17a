"""What `SelectiveDPOTrainer` logs beside `diagnostics`: TRL's statistics of the logits, as means over tokens.

In: a micro-batch, its losses and the statistics of its logits. Out: 0-d tensors per pair, which a `MetricWindow` sums
up; afterwards plain numbers per token.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from selective_pref import PreferenceLoss, diagnostics
from selective_pref.fused import LogitStatistics
from selective_pref_adapters.batch import Batch


def batch_metrics(inputs: Batch, out: PreferenceLoss, statistics: LogitStatistics) -> dict[str, Tensor]:
    """The metrics of a micro-batch, 0-d: `diagnostics`, and sums per pair that `token_means` divides later.

    Args:
        inputs: the batch, with `attention_mask` [2B T+1].
        out: its losses.
        statistics: of the policy's logits, each [2B T].
    """
    metrics = diagnostics(out)
    del metrics["loss"]  # the trainer logs it
    (chosen_logits, rejected_logits), (chosen_top1, _) = statistics.mean_logits.chunk(2), statistics.is_top1.chunk(2)
    sums = {
        "tokens": inputs["attention_mask"],
        "chosen_tokens": out.chosen.mask,
        "rejected_tokens": out.rejected.mask,
        "entropy": statistics.entropy,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "chosen_top1": chosen_top1,
    }
    return metrics | {name: array.sum() / len(out.losses) for name, array in sums.items()}


def token_means(means: Mapping[str, float]) -> dict[str, float]:
    """The metrics of `batch_metrics`, their sums over tokens turned into means over tokens."""
    means = dict(means)
    chosen, rejected = means.pop("chosen_tokens"), means.pop("rejected_tokens")
    parts = {
        "entropy": (means.pop("entropy"), chosen + rejected),
        "logits/chosen": (means.pop("chosen_logits"), chosen),
        "logits/rejected": (means.pop("rejected_logits"), rejected),
        "mean_token_accuracy": (means.pop("chosen_top1"), chosen),
    }
    return means | {name: total / count if count else 0.0 for name, (total, count) in parts.items()}
