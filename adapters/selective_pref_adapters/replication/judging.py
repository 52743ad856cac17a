"""Is an answer right, and does a selected token decide? In: models of the demo. Out: rates and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from selective_pref import select
from selective_pref_adapters.batch import responses
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.pairs import TokenizedPair, collate
from selective_pref_adapters.replication.language import Language, decisive_words, is_right
from selective_pref_adapters.replication.runs import RATIO

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


@dataclass(frozen=True, kw_only=True)
class Share:
    """Share of decisive tokens, in [0, 1]: among the selected ones, and among all tokens of the responses."""

    chosen: float
    rejected: float
    chosen_base: float
    rejected_base: float


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


def decisive_share(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    tokenizer: PreTrainedTokenizerFast,
) -> Share:
    """How much of the selected weight lies on decisive tokens: Σ weight·decisive / Σ weight, over all pairs.

    The base rate is the same with weight 1 on every token of the responses.
    """
    batch = collate(pairs, tokenizer.pad_token_id)
    with torch.no_grad():
        logps, ref_logps = model_per_token_logps(policy, batch), model_per_token_logps(reference, batch)
    sides = select(*responses(batch, logps, ref_logps), selection_ratio=RATIO)
    decisive = decisive_mask(pairs, tokenizer, logps.shape[1])
    selected = [
        float((s.token_weights * d).sum() / s.token_weights.sum()) for s, d in zip(sides, decisive, strict=True)
    ]
    base = [float(d.sum() / s.mask.sum()) for s, d in zip(sides, decisive, strict=True)]
    return Share(chosen=selected[0], rejected=selected[1], chosen_base=base[0], rejected_base=base[1])


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """The chance that one of `positive` is above one of `negative`, ties counting half: ROC area."""
    below = torch.searchsorted(negative.sort().values, positive).double()
    not_above = torch.searchsorted(negative.sort().values, positive, right=True).double()
    return float((below + not_above).mean() / (2 * len(negative)))
