"""Which tokens of a completion of several turns are the assistant's.

In: a conversation, where its completion begins, and a tokenizer. Out: the spans of the completion that do not count,
as users and tools speak there.

Where the chat template marks what is generated (`{% generation %}`), its marks are taken. Elsewhere the conversation is
rendered again for each answer, with a character in the answer's place that stands nowhere else: what the two renderings
share before and after it is not the answer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from selective_pref_adapters.pairs.collate import Spans, uncounted_spans
from selective_pref_adapters.pairs.messages import says_something
from selective_pref_adapters.pairs.rows import Message, Messages
from selective_pref_adapters.pairs.split import common_prefix

Render = Callable[..., Any]
"""(messages, **options of apply_chat_template) → what it gives."""

_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, ValueError, IndexError, AttributeError)
"""What a chat template may raise at a conversation that it does not take."""


def has_other_turns(completion: Any) -> bool:
    """Whether anybody but the assistant speaks in a completion."""
    return not isinstance(completion, str) and any(message["role"] != "assistant" for message in completion)


def other_turns(
    tokenizer: Any, template: str, render: Render, messages: Messages, first: int, text: str, ids: list[int], start: int
) -> Spans | None:
    """The tokens of a completion that are not the assistant's, or None where it cannot be told.

    Args:
        tokenizer: says where in a text each token stands.
        template: the chat template in force.
        render: applies it, with the tools and options of the row.
        messages: prompt and completion.
        first: which message the completion begins with.
        text, ids: the whole conversation as rendered, and its tokens.
        start: which token the completion begins with.
    """
    if _MARK.search(template):
        marked = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        if list(marked["input_ids"]) == ids and any(marked["assistant_masks"][start:]):
            return uncounted_spans(marked["assistant_masks"], start)
    answers = _answers(messages, first, text, render)
    if answers is None:
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"][len(encoded["input_ids"]) - len(ids) :]  # without a BOS that stood there twice
    answers[0] = (0, answers[0][1])  # from the first token of the completion on
    return uncounted_spans([any(begin < e and end > s for s, e in answers) for begin, end in offsets], start)


def _answers(messages: Messages, first: int, text: str, render: Render) -> list[tuple[int, int]] | None:
    """(start, end) in the text of each answer, its end of turn included."""
    sign = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    speaking = [at for at in range(first, len(messages)) if messages[at]["role"] == "assistant"]
    stand_in: Message = {"role": "assistant", "content": sign}
    before, after = [], []
    for at in speaking:
        try:
            other = render([*messages[:at], stand_in, *messages[at + 1 :]])
            asked = render(messages[:at], add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return None
        if other.count(sign) != 1:
            return None
        before.append(len(asked) if text.startswith(asked) else common_prefix(text, other))
        after.append(common_prefix(text[::-1], other[::-1]))
    end_of_turn = text[len(text) - after[-1] :]
    answers = []
    for at, start, tail in zip(speaking, before, after, strict=True):
        end = len(text) - tail + common_prefix(text[len(text) - tail :], end_of_turn)
        if start >= end and says_something(messages[at]):
            return None
        answers.append((start, end))
    return answers
