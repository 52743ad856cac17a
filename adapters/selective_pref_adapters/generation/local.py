"""Questions → answers of a model on this process.

In: questions, a causal LM and its tokenizer with a chat template. Out: the answers, as they come. Several questions
share a batch, padded on the left; what is sampled for a question does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from selective_pref_adapters.generation.questions import Question, draw_seed
from selective_pref_adapters.generation.records import Answer
from selective_pref_adapters.models import context_length, evaluating, load_tokenizer, pad_token_id
from selective_pref_adapters.pairs import Tokenizer
from selective_pref_adapters.pairs.rendering import Rendering
from selective_pref_adapters.pairs.turns import TEMPLATE_ERRORS


def chat_tokenizer(name: str, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a folder or hub id, with the chat template of a file where one is given.

    Raises:
        ValueError: there is no tokenizer, no template, or one that refuses a plain conversation.
        OSError: no such file.
    """
    tokenizer = load_tokenizer(name)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {name} has no chat template, so it is not known how the model is asked: give the one it "
            "was trained with, --chat-template FILE (Jinja)"
        )
    try:
        stop_ids(tokenizer, None)
    except TEMPLATE_ERRORS as error:
        raise ValueError(
            f"the chat template refuses a plain conversation: {error}. Give another, --chat-template FILE"
        ) from error
    return tokenizer


def stop_ids(tokenizer: Tokenizer, generation_config: GenerationConfig | None) -> list[int]:
    """The ids that end an answer: EOS, what the model's folder names, and what the template puts behind an answer."""
    named = getattr(generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    answer = "\ue000"  # stands in no template
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    behind = tokenizer.apply_chat_template(said, tokenize=False).rpartition(answer)[2]
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    if ids and ids[0] in tokenizer.all_special_ids + _added_special(tokenizer):
        found.append(ids[0])
    return list(dict.fromkeys(i for i in found if i is not None))


def prompt_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """A conversation as the template writes it, up to where the answer begins, with BOS once, as in training."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return Rendering(tokenizer).ids([text], chat=True)[text]


@torch.inference_mode()
def local_answers(
    questions: Sequence[Question], model: Any, tokenizer: Tokenizer, *, max_new_tokens: int, batch_size: int, seed: int
) -> Iterator[list[Answer]]:
    """The answers to some questions, batch after batch; the longest prompts come first.

    Args:
        questions: what is asked.
        model: a causal LM, on the device where it runs. Of its `generation_config` EOS alone is read.
        tokenizer: its own, with a chat template.
        max_new_tokens: tokens of an answer; fewer where the model cannot read so many. A conversation that it cannot
            read at all has an empty answer.
        batch_size: questions at once.
        seed: of what is sampled, together with the question's id.
    """
    stops = stop_ids(tokenizer, model.generation_config)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=pad_token_id(tokenizer))
    asked = sorted(questions, key=lambda question: sum(map(len, question.turns)), reverse=True)
    with evaluating(model):
        for start in range(0, len(asked), batch_size):
            yield _converse(asked[start : start + batch_size], model, tokenizer, stops, max_new_tokens, seed)


def _converse(
    batch: list[Question], model: Any, tokenizer: Tokenizer, stops: list[int], max_new_tokens: int, seed: int
) -> list[Answer]:
    """The answers of a batch, turn by turn."""
    messages: list[list[dict[str, str]]] = [[] for _ in batch]
    turns: list[list[str]] = [[] for _ in batch]
    cut = [0] * len(batch)
    for turn in range(max(len(question.turns) for question in batch)):
        for question, said in zip(batch, messages, strict=True):
            said.append({"role": "user", "content": question.turns[turn]})
        prompts = [prompt_ids(tokenizer, said) for said in messages]
        room = [min(max_new_tokens, (context_length(model) or 1 << 30) - len(prompt)) for prompt in prompts]
        for limit, rows in groupby(sorted(range(len(batch)), key=lambda row: -room[row]), key=lambda row: room[row]):
            together = list(rows)
            draws = [_Draw(batch[row], turn, seed, model.device) for row in together]
            some = [prompts[row] for row in together]
            for row, ids in zip(together, _generate(model, some, limit, draws), strict=True):
                end = next((at for at, token in enumerate(ids) if token in stops), None)
                cut[row] += end is None
                turns[row].append(tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
        for said, answers in zip(messages, turns, strict=True):
            said.append({"role": "assistant", "content": answers[-1]})
    return [Answer(question=q, turns=tuple(t), cut=c) for q, t, c in zip(batch, turns, cut, strict=True)]


def _generate(model: Any, prompts: list[list[int]], limit: int, draws: list[_Draw]) -> list[list[int]]:
    """What follows each prompt, at most `limit` tokens; an answer that has ended is filled up with padding."""
    if limit < 1:
        return [[] for _ in prompts]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), model.generation_config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=limit,
        do_sample=False,
        logits_processor=[_Sampling(draws)],
    )
    return out[:, width:].tolist()


class _Draw:
    """The random numbers of one answer: they depend on its question, turn and seed, and not on the rest of a batch."""

    def __init__(self, question: Question, turn: int, seed: int, device: torch.device) -> None:
        self.temperature = question.temperature
        self.generator = torch.Generator(device).manual_seed(draw_seed(question, turn, seed))


class _Sampling(LogitsProcessor):
    """Adds noise to logits so that the highest sum is a sample at the row's temperature (the Gumbel-max trick)."""

    def __init__(self, draws: list[_Draw]) -> None:
        self.draws = draws

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noisy = scores.float().clone()
        for row, draw in zip(noisy, self.draws, strict=True):
            if draw.temperature > 0:
                gumbel = torch.empty_like(row).exponential_(generator=draw.generator).log_().neg_()
                row.div_(draw.temperature).add_(gumbel)
        return noisy


def _added_special(tokenizer: Tokenizer) -> list[int]:
    return [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
