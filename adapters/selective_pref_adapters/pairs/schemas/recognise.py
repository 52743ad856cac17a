"""Columns → one `PreferenceRow`: which of a dozen schemas a row has, and where its prompt stands.

In: a row as a file or a data set holds it. Out: prompt, chosen and rejected, as text where the columns hold text that
is read on without a break (TRL's standard format, hh-rlhf), else as messages. A row is recognised by its columns;
`columns` says instead which ones are meant. A row that fits nowhere is an error with the nearest schema, and so is a
column beside a known schema that may hold (a part of) a prompt: no part of a prompt is dropped silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from selective_pref_adapters.pairs.messages import json_or
from selective_pref_adapters.pairs.rows import PreferenceRow, Prose, RowError, checked_weight
from selective_pref_adapters.pairs.schemas.readers import ANSWER_COLUMNS, ONE_ANSWER, TWO_ANSWERS, Schema
from selective_pref_adapters.pairs.split import split_pair

Columns = Mapping[str, str]
"""Name here → column of the file."""
NAMES = ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs", "weight")
"""What `columns` may name."""
_ALWAYS = ("tools", "chat_template_kwargs", "weight")


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


def preference_row(row: Any, place: str, columns: Columns | None = None, *, chosen_only: bool = False) -> PreferenceRow:
    """A checked row with its prompt made explicit.

    Args:
        row: what a file or a data set holds: a dict.
        place: where it came from, for error messages.
        columns: which columns hold `prompt`, `chosen`, `rejected`, `system`, `tools`, `chat_template_kwargs`,
            `weight`, where they have other names than the schema that the row would be read by. Other columns are then
            not looked at.
        chosen_only: for supervised training: `rejected` is left out, and rows of a prompt and one answer will do.

    Raises:
        RowError: it is no preference pair, or a part of its prompt might be lost.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"{place}: expected an object with the columns of a preference pair; got {type(row).__name__}")
    filled = {name: value for name, value in row.items() if value is not None}
    if columns is not None:
        filled = _renamed(filled, columns, place, chosen_only)
    schema = _schema_of(filled, place, chosen_only)
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
        rejected=None if chosen_only else rejected,
        place=place,
        tools=tools,
        template_options=options,
        schema=_name_of(schema, prompt, "prompt" in filled),
        weight=checked_weight(filled["weight"], place) if "weight" in filled else None,
    )


def _renamed(row: Mapping[str, Any], columns: Columns, place: str, chosen_only: bool) -> dict[str, Any]:
    needed = ("chosen", "prompt") if chosen_only else ("chosen", "rejected", "prompt")
    absent = [column for name, column in columns.items() if column not in row and name in needed]
    if absent:
        raise RowError(f"{place}: no column {absent[0]!r}, which --columns names; found {sorted(row)}")
    wanted = {**{name: name for name in ("chosen", "rejected", *_ALWAYS)}, **columns}
    return {name: row[column] for name, column in wanted.items() if column in row}


# --- recognising -----------------------------------------------------------------------------------------------------


def _schema_of(row: Mapping[str, Any], place: str, chosen_only: bool) -> Schema:
    known = (*TWO_ANSWERS, *ONE_ANSWER) if chosen_only else TWO_ANSWERS
    for schema in known:
        if all(name in row for name in schema.needs):
            _check_one_answer(row, schema, place)
            return schema
    near = _nearest(row, ONE_ANSWER if chosen_only else TWO_ANSWERS)
    lacks = [name for name in near.needs if name not in row]
    what = lacks[0] if len(lacks) == 1 else "chosen" if "chosen" not in row else "rejected"
    found = ", ".join(sorted(map(str, row))) or "none"
    lacking, remedy = f"no {what!r}; a preference row needs a prompt and two answers", ",rejected=other"
    if chosen_only:
        lacking, remedy = f"no {lacks[0]!r}; supervised training needs a prompt and an answer", ""
    elif any(all(name in row for name in schema.needs) for schema in ONE_ANSWER):
        lacking += " (with one answer: supervised training, selective-pref train --objective sft)"
    raise RowError(
        f"{place}: {lacking}. Columns found: {found}. Nearest schema: {near.name} ({', '.join(near.needs)}), which "
        f"lacks {', '.join(lacks)}. Say which columns are meant, as --columns prompt=question,chosen=answer{remedy}",
        "columns of no known schema",
    )


def _check_one_answer(row: Mapping[str, Any], schema: Schema, place: str) -> None:
    """Raises RowError where a row of one answer has two of them, or says that its answer is a bad one."""
    if not set(ANSWER_COLUMNS) & set(schema.needs) or schema in TWO_ANSWERS:
        return
    answers = [name for name in ANSWER_COLUMNS if row.get(name)]
    if len(answers) > 1:
        raise RowError(
            f"{place}: {' and '.join(map(repr, answers))} may both be the answer: say which one is, as --columns "
            f"prompt={schema.needs[0]},chosen={answers[0]}"
        )
    if row.get("label") is False:
        raise RowError(
            f"{place}: 'label' is false, so {answers[0]!r} is an answer that is not wanted, and would be trained on: "
            "remove such rows",
            "an answer that is not wanted",
        )


def _nearest(row: Mapping[str, Any], known: Sequence[Schema]) -> Schema:
    """The schema that shares most with the columns that are there; of like ones one with a prompt, then the first."""

    def likeness(schema: Schema) -> tuple[float, bool]:
        here = sum(name in row for name in schema.needs)
        alike = sum(bool(difflib.get_close_matches(name, map(str, row), n=1, cutoff=0.75)) for name in schema.needs)
        shared = here + 0.5 * (alike - here) + 0.1 * sum(name in row for name in schema.may)
        return shared / len(schema.needs), "prompt" in schema.needs

    return max(known, key=likeness)


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
    rejected = ",rejected=…" if schema in TWO_ANSWERS else ""
    remedy = (
        "only text is trained on: remove such rows, or the column if the text does not refer to it"
        if name in _PICTURES
        else f"if it is the prompt, or a part of it, name it: --columns prompt={name},chosen=…{rejected}; if it is "
        "not, name the right one so"
    )
    return (
        f"{place}: read as a {schema.name} row ({', '.join(schema.needs)}), but its column {name!r} is not in the "
        f"prompt and would be lost: {remedy}"
    )


def _tools_of(row: Mapping[str, Any]) -> Any:
    asked = row.get("input")
    return row.get("tools") or (asked.get("tools") if isinstance(asked, Mapping) else None)


def _name_of(schema: Schema, prompt: Prose, explicit: bool) -> str:
    if not schema.name.startswith("TRL"):
        return schema.name
    kind = "standard" if isinstance(prompt, str) else "conversational"
    return f"TRL {kind}" if explicit else f"TRL {kind}, implicit prompt"
