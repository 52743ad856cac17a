"""Is an answer right, and which tokens decide? In: models and pairs of the miniature. Out: shares and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from selective_pref_adapters.pairs import TokenizedPair
from selective_pref_adapters.replication.miniature.language import Language, decisive_words, is_right

MAX_ANSWER = 24  # tokens; the longest right answer has 21


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


def success_rate(language: Language, prompts: Sequence[str], answers: Sequence[str]) -> float:
    """The share of the answers that have all four digits right."""
    right = sum(is_right(language, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    return right / len(prompts)


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


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """The chance that one of `positive` is above one of `negative`, ties counting half: ROC area."""
    below = torch.searchsorted(negative.sort().values, positive).double()
    not_above = torch.searchsorted(negative.sort().values, positive, right=True).double()
    return float((below + not_above).mean() / (2 * len(negative)))
