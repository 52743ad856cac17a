"""The tables of schemas: by which columns a row is recognised, and how its prompt and answers are read from them.

In: a row as a file or a data set holds it. Out: prompt (or None, where it stands in the answers), chosen and rejected,
not yet split. The first schema of a table whose columns are all there is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from selective_pref_adapters.pairs.messages import prose, turns
from selective_pref_adapters.pairs.rows import Messages, Prose, RowError

Sides = tuple["Prose | None", Prose, Prose]
Answers = tuple[str, str]
"""The columns of chosen and rejected. A row of one answer is read as a pair of that answer and itself."""
CHOSEN_REJECTED: Answers = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Schema:
    """How the rows of one kind of data set are read.

    Attributes:
        name: for people.
        needs: columns that such a row has.
        may: columns that are read where they are there.
        read: (row, place) → prompt, chosen, rejected.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any], str], Sides]


def _side(row: Mapping[str, Any], name: str, place: str) -> Prose:
    return prose(row[name], f"{place}: {name!r}")


def _both(row: Mapping[str, Any], place: str, answers: Answers) -> tuple[Prose, Prose]:
    chosen, rejected = (_side(row, name, place) for name in answers)
    return chosen, rejected


def _system(row: Mapping[str, Any], place: str) -> Messages:
    text = row.get("system") or row.get("system_prompt") or ""
    if not isinstance(text, str):
        raise RowError(f"{place}: 'system' must be text; got {type(text).__name__}")
    return turns([{"role": "system", "content": text}], f"{place}: 'system'") if text.strip() else []


def _under_system(row: Mapping[str, Any], said: Messages, place: str) -> Messages:
    """The turns with what the column `system` says in front, unless they begin with it."""
    system = _system(row, place)
    if not system or said[:1] == system:
        return said
    if said and said[0]["role"] == "system":
        raise RowError(f"{place}: the column 'system' and the first turn give two different system prompts")
    return [*system, *said]


def _asked(row: Mapping[str, Any], text: Any, place: str) -> Messages:
    """The turns that columns of text name: system, earlier questions and answers, the question."""
    if not isinstance(text, str):
        raise RowError(f"{place}: the question must be text; got {type(text).__name__}")
    said = _system(row, place)
    for exchange in row.get("history") or []:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise RowError(f"{place}: 'history' must hold [question, answer] pairs; got {exchange!r:.80}")
        for role, content in zip(("user", "assistant"), exchange, strict=True):
            said += turns([{"role": role, "content": content}], f"{place}: 'history'")
    return said + turns([{"role": "user", "content": text}], f"{place}: the question")


def _trl(row: Mapping[str, Any], place: str, answers: Answers = CHOSEN_REJECTED) -> Sides:
    chosen, rejected = _both(row, place, answers)
    prompt = _side(row, "prompt", place) if "prompt" in row else None
    if "system" not in row and "system_prompt" not in row:
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is not None:
        return _under_system(row, prompt, place), chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        if _system(row, place):
            raise RowError(f"{place}: 'system' beside texts without a 'prompt': it would be lost")
        return None, chosen, rejected
    return None, _under_system(row, chosen, place), _under_system(row, rejected, place)


def _share_gpt(row: Mapping[str, Any], place: str, answers: Answers = CHOSEN_REJECTED) -> Sides:
    said = turns(row["conversations"], f"{place}: 'conversations'")
    return _under_system(row, said, place), *_both(row, place, answers)


def _messages(row: Mapping[str, Any], place: str, answers: Answers = CHOSEN_REJECTED) -> Sides:
    """`messages` is the prompt, unless the sides are whole conversations themselves."""
    chosen, rejected = _both(row, place, answers)
    if not isinstance(chosen, str) and chosen and chosen[0]["role"] != "assistant":
        return _trl(row, place, answers)
    said = turns(row["messages"], f"{place}: 'messages'")
    return _under_system(row, said, place), chosen, rejected


def _alpaca(
    row: Mapping[str, Any], place: str, answers: Answers = CHOSEN_REJECTED, *, asked: str = "instruction"
) -> Sides:
    """A question in one column, and what belongs to it in `input` or `context`."""
    question, more = row[asked], row.get("input") or row.get("context") or ""
    joined = f"{question}\n{more}" if isinstance(more, str) and more.strip() else question
    return _asked(row, joined, place), *_both(row, place, answers)


def _question(row: Mapping[str, Any], place: str, answers: Answers = CHOSEN_REJECTED, *, asked: str) -> Sides:
    return _asked(row, row[asked], place), *_both(row, place, answers)


def _swift(row: Mapping[str, Any], place: str) -> Sides:
    whole = _under_system(row, turns(row["messages"], f"{place}: 'messages'"), place)
    if "rejected_messages" in row:
        other = turns(row["rejected_messages"], f"{place}: 'rejected_messages'")
        return None, whole, _under_system(row, other, place)
    if not whole or whole[-1]["role"] != "assistant":
        raise RowError(f"{place}: 'messages' must end with the chosen answer, an assistant message")
    rejected = _side(row, "rejected_response", place)
    answer = [{"role": "assistant", "content": rejected}] if isinstance(rejected, str) else rejected
    return None, whole, [*whole[:-1], *answer]


def _openai(row: Mapping[str, Any], place: str) -> Sides:
    asked = row["input"]
    if not isinstance(asked, Mapping) or "messages" not in asked:
        raise RowError(f"{place}: 'input' must be an object with 'messages'; got {asked!r:.80}")
    said = turns(asked["messages"], f"{place}: 'input.messages'")
    return said, *_both(row, place, ("preferred_output", "non_preferred_output"))


def _conversation(row: Mapping[str, Any], place: str, *, said: str) -> Sides:
    """A whole conversation: all that the assistant says in it is the answer."""
    whole = _under_system(row, turns(row[said], f"{place}: {said!r}"), place)
    roles = [message["role"] for message in whole]
    if "assistant" not in roles or roles[0] == "assistant" or roles[-1] != "assistant":
        raise RowError(
            f"{place}: {said!r} must begin with what is asked and end with an assistant message; got roles {roles}"
        )
    start = roles.index("assistant")
    return whole[:start], whole[start:], whole[start:]


_SYSTEM = ("system", "system_prompt")
_ASKED = (*_SYSTEM, "history")
TWO_ANSWERS = (
    Schema(name="OpenAI preference", needs=("input", "preferred_output", "non_preferred_output"), read=_openai),
    Schema(name="ms-swift", needs=("messages", "rejected_messages"), may=_SYSTEM, read=_swift),
    Schema(name="ms-swift", needs=("messages", "rejected_response"), may=_SYSTEM, read=_swift),
    Schema(
        name="ms-swift",
        needs=("query", "response", "rejected_response"),
        may=_ASKED,
        read=partial(_question, asked="query", answers=("response", "rejected_response")),
    ),
    Schema(name="ShareGPT", needs=("conversations", "chosen", "rejected"), may=_SYSTEM, read=_share_gpt),
    Schema(name="TRL", needs=("prompt", "chosen", "rejected"), may=_SYSTEM, read=_trl),
    Schema(
        name="Argilla",
        needs=("instruction", "chosen_response", "rejected_response"),
        may=("input", *_ASKED),
        read=partial(_alpaca, answers=("chosen_response", "rejected_response")),
    ),
    Schema(name="Alpaca", needs=("instruction", "chosen", "rejected"), may=("input", *_ASKED), read=_alpaca),
    Schema(
        name="Orca", needs=("question", "chosen", "rejected"), may=_ASKED, read=partial(_question, asked="question")
    ),
    Schema(
        name="Argilla Orca", needs=("input", "chosen", "rejected"), may=_ASKED, read=partial(_question, asked="input")
    ),
    Schema(name="messages", needs=("messages", "chosen", "rejected"), may=_SYSTEM, read=_messages),
    Schema(name="TRL", needs=("chosen", "rejected"), may=_SYSTEM, read=_trl),
)
"""Preference pairs."""


def _of_one_answer(column: str) -> tuple[Schema, ...]:
    """Every way to ask, beside a column that holds the answer."""
    answers = (column, column)
    return (
        Schema(name=f"prompt-{column}", needs=("prompt", column), may=_SYSTEM, read=partial(_trl, answers=answers)),
        Schema(
            name="Alpaca",
            needs=("instruction", column),
            may=("input", "context", *_ASKED),
            read=partial(_alpaca, answers=answers),
        ),
        *(
            Schema(
                name=f"{asked}-{column}",
                needs=(asked, column),
                may=_ASKED,
                read=partial(_question, asked=asked, answers=answers),
            )
            for asked in ("question", "query", "input")
        ),
    )


ANSWER_COLUMNS = ("completion", "response", "answer", "output")
_CHOSEN = ("chosen", "chosen")
ONE_ANSWER = (
    Schema(name="ShareGPT", needs=("conversations", "chosen"), may=_SYSTEM, read=partial(_share_gpt, answers=_CHOSEN)),
    Schema(name="messages", needs=("messages", "chosen"), may=_SYSTEM, read=partial(_messages, answers=_CHOSEN)),
    Schema(name="messages", needs=("messages",), may=_SYSTEM, read=partial(_conversation, said="messages")),
    Schema(name="ShareGPT", needs=("conversations",), may=_SYSTEM, read=partial(_conversation, said="conversations")),
    *(schema for column in (*ANSWER_COLUMNS, "chosen") for schema in _of_one_answer(column)),
    Schema(name="TRL", needs=("chosen",), may=_SYSTEM, read=partial(_trl, answers=_CHOSEN)),
)
"""Rows of a prompt and one answer, for supervised training."""
