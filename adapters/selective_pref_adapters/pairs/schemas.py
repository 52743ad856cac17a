"""Columns → one `PreferenceRow`: which of a dozen schemas a row has, and where its prompt stands.

In: a row as a file or a data set holds it. Out: prompt, chosen and rejected, as text where the columns hold text that
is read on without a break (TRL's standard format, hh-rlhf), else as messages. A row is recognised by its columns;
`columns` says instead which ones are meant. A row that fits nowhere is an error with the nearest schema, and so is a
column beside a known schema that may hold (a part of) a prompt: no part of a prompt is dropped silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from selective_pref_adapters.pairs.messages import json_or, prose, turns
from selective_pref_adapters.pairs.rows import Messages, PreferenceRow, Prose, RowError
from selective_pref_adapters.pairs.split import split_pair

Columns = Mapping[str, str]
"""Name here → column of the file."""
Sides = tuple["Prose | None", Prose, Prose]

NAMES = ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs")
"""What `columns` may name."""
_ALWAYS = ("tools", "chat_template_kwargs")


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


def parse_columns(text: str | None) -> dict[str, str] | None:
    """``prompt=question,chosen=answer`` as a dict; None for None.

    Raises:
        ValueError: it is not of that form, or names what no row has.
    """
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {name.strip(): column.strip() for name, _, column in pairs}
    unknown = [name for name in columns if name not in NAMES]
    if unknown or not all(columns.values()) or len(columns) < len(pairs):
        raise ValueError(f"columns must be like prompt=question,chosen=answer with names of {NAMES}; got {text!r}")
    return columns


def preference_row(row: Any, place: str, columns: Columns | None = None) -> PreferenceRow:
    """A checked row with its prompt made explicit.

    Args:
        row: what a file or a data set holds: a dict.
        place: where it came from, for error messages.
        columns: which columns hold `prompt`, `chosen`, `rejected`, `system`, `tools`, `chat_template_kwargs`, where
            they have other names than the schema that the row would be read by. Other columns are then not looked at.

    Raises:
        RowError: it is no preference pair, or a part of its prompt might be lost.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"{place}: expected an object with the columns of a preference pair; got {type(row).__name__}")
    filled = {name: value for name, value in row.items() if value is not None}
    if columns is not None:
        filled = _renamed(filled, columns, place)
    schema = _schema_of(filled, place)
    prompt, chosen, rejected = split_pair(*schema.read(filled, place), place)
    if columns is None:
        _check_nothing_lost(filled, schema, prompt, place)
    tools = json_or(_tools_of(filled), f"{place}: 'tools'") or None
    options = json_or(filled.get("chat_template_kwargs"), f"{place}: 'chat_template_kwargs'") or {}
    if not isinstance(options, dict) or not isinstance(tools, list | None):
        raise RowError(f"{place}: 'tools' must be a list and 'chat_template_kwargs' an object")
    if tools and isinstance(prompt, str):
        raise RowError(
            f"{place}: tools beside a prompt that is text: only a chat template writes them into the prompt. Give the "
            "prompt as messages, or leave the tools out (--columns prompt=prompt,chosen=chosen,rejected=rejected,"
            "tools=none)"
        )
    return PreferenceRow(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        place=place,
        tools=tools,
        template_options=options,
        schema=_name_of(schema, prompt, "prompt" in filled),
    )


def _renamed(row: Mapping[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    absent = [column for name, column in columns.items() if column not in row and name in ("chosen", "rejected")]
    if absent or ("prompt" in columns and columns["prompt"] not in row):
        raise RowError(
            f"{place}: no column {(absent or [columns['prompt']])[0]!r}, which --columns names; found {sorted(row)}"
        )
    wanted = {**{name: name for name in ("chosen", "rejected", *_ALWAYS)}, **columns}
    return {name: row[column] for name, column in wanted.items() if column in row}


# --- recognising -----------------------------------------------------------------------------------------------------


def _schema_of(row: Mapping[str, Any], place: str) -> Schema:
    for schema in SCHEMAS:
        if all(name in row for name in schema.needs):
            return schema
    near = _nearest(row)
    lacks = [name for name in near.needs if name not in row]
    what = lacks[0] if len(lacks) == 1 else "chosen" if "chosen" not in row else "rejected"
    found = ", ".join(sorted(map(str, row))) or "none"
    raise RowError(
        f"{place}: no {what!r}; a preference row needs a prompt and two answers. Columns found: {found}. Nearest "
        f"schema: {near.name} ({', '.join(near.needs)}), which lacks {', '.join(lacks)}. Say which columns are meant, "
        "as --columns prompt=question,chosen=answer,rejected=other",
        "columns of no known schema",
    )


def _nearest(row: Mapping[str, Any]) -> Schema:
    """The schema that shares most with the columns that are there; of similar ones, the first."""

    def likeness(schema: Schema) -> float:
        here = sum(name in row for name in schema.needs)
        alike = sum(bool(difflib.get_close_matches(name, map(str, row), n=1, cutoff=0.75)) for name in schema.needs)
        return (here + 0.5 * (alike - here) + 0.1 * sum(name in row for name in schema.may)) / len(schema.needs)

    return max(SCHEMAS, key=likeness)


_PROSE_COLUMNS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "input",
    "context",
    "system",
    "system_prompt",
    "problem",
)
_LIST_COLUMNS = ("conversations", "history")
_PICTURES = ("image", "images", "videos", "audios")


def _check_nothing_lost(row: Mapping[str, Any], schema: Schema, prompt: Prose, place: str) -> None:
    """Raises RowError where a column that was not read may hold a part of the prompt."""
    read = {*schema.needs, *schema.may}
    said = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    for name in _PROSE_COLUMNS:
        value = row.get(name)
        if name not in read and isinstance(value, str) and value.strip() and value.strip() not in said:
            raise RowError(_lost(name, schema, place), "a prompt that might be lost")
    for name in (*_LIST_COLUMNS, *_PICTURES):
        if name not in read and row.get(name):
            raise RowError(_lost(name, schema, place), "a prompt that might be lost")


def _lost(name: str, schema: Schema, place: str) -> str:
    remedy = (
        "only text is trained on: remove such rows, or the column if the text does not refer to it"
        if name in _PICTURES
        else f"if it is the prompt, or a part of it, name it: --columns prompt={name},chosen=…,rejected=…; if it is "
        "not, name the right one so"
    )
    return (
        f"{place}: read as a {schema.name} row ({', '.join(schema.needs)}), but its column {name!r} is not in the "
        f"prompt and would be lost: {remedy}"
    )


def _name_of(schema: Schema, prompt: Prose, explicit: bool) -> str:
    if not schema.name.startswith("TRL"):
        return schema.name
    kind = "standard" if isinstance(prompt, str) else "conversational"
    return f"TRL {kind}" if explicit else f"TRL {kind}, implicit prompt"


# --- reading ---------------------------------------------------------------------------------------------------------


def _side(row: Mapping[str, Any], name: str, place: str) -> Prose:
    return prose(row[name], f"{place}: {name!r}")


def _both(
    row: Mapping[str, Any], place: str, chosen: str = "chosen", rejected: str = "rejected"
) -> tuple[Prose, Prose]:
    return _side(row, chosen, place), _side(row, rejected, place)


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


def _trl(row: Mapping[str, Any], place: str) -> Sides:
    chosen, rejected = _both(row, place)
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


def _share_gpt(row: Mapping[str, Any], place: str) -> Sides:
    said = turns(row["conversations"], f"{place}: 'conversations'")
    return _under_system(row, said, place), *_both(row, place)


def _messages(row: Mapping[str, Any], place: str) -> Sides:
    """`messages` is the prompt, unless the sides are whole conversations themselves."""
    chosen, rejected = _both(row, place)
    if not isinstance(chosen, str) and chosen and chosen[0]["role"] != "assistant":
        return _trl(row, place)
    said = turns(row["messages"], f"{place}: 'messages'")
    return _under_system(row, said, place), chosen, rejected


def _alpaca(row: Mapping[str, Any], place: str, chosen: str = "chosen", rejected: str = "rejected") -> Sides:
    instruction, more = row["instruction"], row.get("input") or ""
    joined = f"{instruction}\n{more}" if isinstance(more, str) and more.strip() else instruction
    return _asked(row, joined, place), *_both(row, place, chosen, rejected)


def _argilla(row: Mapping[str, Any], place: str) -> Sides:
    return _alpaca(row, place, "chosen_response", "rejected_response")


def _orca(row: Mapping[str, Any], place: str) -> Sides:
    return _asked(row, row["question"], place), *_both(row, place)


def _argilla_orca(row: Mapping[str, Any], place: str) -> Sides:
    return _asked(row, row["input"], place), *_both(row, place)


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


def _swift_query(row: Mapping[str, Any], place: str) -> Sides:
    return _asked(row, row["query"], place), *_both(row, place, "response", "rejected_response")


def _openai(row: Mapping[str, Any], place: str) -> Sides:
    asked = row["input"]
    if not isinstance(asked, Mapping) or "messages" not in asked:
        raise RowError(f"{place}: 'input' must be an object with 'messages'; got {asked!r:.80}")
    said = turns(asked["messages"], f"{place}: 'input.messages'")
    return said, *_both(row, place, "preferred_output", "non_preferred_output")


def _tools_of(row: Mapping[str, Any]) -> Any:
    asked = row.get("input")
    return row.get("tools") or (asked.get("tools") if isinstance(asked, Mapping) else None)


_SYSTEM = ("system", "system_prompt")
SCHEMAS = (
    Schema(name="OpenAI preference", needs=("input", "preferred_output", "non_preferred_output"), read=_openai),
    Schema(name="ms-swift", needs=("messages", "rejected_messages"), may=_SYSTEM, read=_swift),
    Schema(name="ms-swift", needs=("messages", "rejected_response"), may=_SYSTEM, read=_swift),
    Schema(
        name="ms-swift", needs=("query", "response", "rejected_response"), may=(*_SYSTEM, "history"), read=_swift_query
    ),
    Schema(name="ShareGPT", needs=("conversations", "chosen", "rejected"), may=_SYSTEM, read=_share_gpt),
    Schema(name="TRL", needs=("prompt", "chosen", "rejected"), may=_SYSTEM, read=_trl),
    Schema(
        name="Argilla",
        needs=("instruction", "chosen_response", "rejected_response"),
        may=("input", *_SYSTEM, "history"),
        read=_argilla,
    ),
    Schema(
        name="Alpaca", needs=("instruction", "chosen", "rejected"), may=("input", *_SYSTEM, "history"), read=_alpaca
    ),
    Schema(name="Orca", needs=("question", "chosen", "rejected"), may=(*_SYSTEM, "history"), read=_orca),
    Schema(name="Argilla Orca", needs=("input", "chosen", "rejected"), may=(*_SYSTEM, "history"), read=_argilla_orca),
    Schema(name="messages", needs=("messages", "chosen", "rejected"), may=_SYSTEM, read=_messages),
    Schema(name="TRL", needs=("chosen", "rejected"), may=_SYSTEM, read=_trl),
)
"""The first whose columns are all there is taken."""
