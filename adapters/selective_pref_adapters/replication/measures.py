"""What is measured of a model on the small language: sampled answers, and which tokens of a pair decide.

In: models, prompts, pairs. Out: rates with their errors, masks of the decisive tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from selective_pref_adapters.pairs import TokenizedPair
from selective_pref_adapters.replication.language import Language, decisive_words, is_right

MAX_ANSWER = 24  # tokens; the longest right answer has 21


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How many of so many sampled answers are right."""

    right: int
    samples: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.right / self.samples

    @property
    def error(self) -> float:
        """Its binomial standard error."""
        return math.sqrt(self.value * (1 - self.value) / self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval (Wilson's, which also holds near 0 and 1)."""
        z, n, p = 1.96, self.samples, self.value
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

    def record(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "right": self.right,
            "samples": self.samples,
            "rate": self.value,
            "standard_error": self.error,
            "interval_95": list(self.interval),
        }

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} %"


def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seed: int
) -> list[str]:
    """One answer to every prompt, sampled at temperature 1 from the whole distribution. Prompts are equally long."""
    torch.manual_seed(seed)
    asked = tokenizer(list(prompts), return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            **asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_ANSWER, use_cache=True
        )
    return tokenizer.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def success_rate(language: Language, prompts: Sequence[str], answers: Sequence[str]) -> Rate:
    """How many answers have all four digits right."""
    right = sum(is_right(language, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    return Rate(right=right, samples=len(prompts))


def decisive_mask(
    pairs: Sequence[TokenizedPair], tokenizer: PreTrainedTokenizerFast, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens decide, for chosen and rejected: bool [B T] each, shifted like `per_token_logps`, T = `width`."""
    masks = torch.zeros(2, len(pairs), width, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        starts = (pair.chosen_prompt_length, pair.rejected_prompt_length)
        words = [
            tokenizer.convert_ids_to_tokens(ids[start:])
            for ids, start in zip((pair.chosen_ids, pair.rejected_ids), starts, strict=True)
        ]
        for side, marks in enumerate(decisive_words(*words)):
            masks[side, row, starts[side] - 1 : starts[side] - 1 + len(marks)] = torch.tensor(marks)
    return masks[0], masks[1]


def difference(one: Rate, other: Rate) -> int:
    """1 if `one` is above `other` by more than two standard errors, −1 if below, 0 if neither."""
    error = math.hypot(one.error, other.error)
    gap = one.value - other.value
    return 0 if abs(gap) <= 2 * error else (1 if gap > 0 else -1)


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """The chance that one of `positive` is above one of `negative`, ties counting half: ROC area."""
    below = torch.searchsorted(negative.sort().values, positive).double()
    not_above = torch.searchsorted(negative.sort().values, positive, right=True).double()
    return float((below + not_above).mean() / (2 * len(negative)))
