"""Turns of a conversation, however they are written → messages with `role` and text `content`.

In: `{"role", "content"}` or ShareGPT's `{"from", "value"}`, content as text, null or parts that are text, tool calls.
Out: what chat templates read. Nothing of a turn is dropped but keys that are null (a table of rows fills every row with
every key that any row has).
"""

from __future__ import annotations

import json
import re
from typing import Any

from selective_pref_adapters.pairs.rows import Message, Messages, Prose, RowError

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Names of speakers that are not those of chat templates."""
_CALLS = ("function_call", "tool_call")
_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")


def prose(value: Any, what: str) -> Prose:
    """Text as it is, or turns as messages; one turn alone becomes a list of one.

    Args:
        value: what a column holds.
        what: place and column, for error messages.

    Raises:
        RowError: it is neither.
    """
    if isinstance(value, str):
        _check_encodable(value, what)
        return _read_messages(value, what) if _WRITTEN_MESSAGES.match(value) else value
    if isinstance(value, dict):
        return [_message(value, what)]
    if isinstance(value, list):
        return [_message(turn, what) for turn in value]
    raise RowError(f"{what} must be text or a list of messages; got {type(value).__name__}")


def turns(value: Any, what: str) -> Messages:
    """The same where only messages will do."""
    read = prose(value, what)
    if isinstance(read, str):
        raise RowError(f"{what} must be a list of messages; got text")
    return read


def without_nulls(value: Any) -> Any:
    """A copy without keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def json_or(value: Any, what: str) -> Any:
    """`value`, read as JSON where it is text (tables keep tools and options as text); None where it is empty."""
    if not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise RowError(f"{what} must be JSON; got {value[:60]!r}: {error}") from error


def has_more_than_text(message: Message) -> bool:
    """Whether a message calls a tool, or keeps its reasoning beside its text."""
    return any(message.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking"))


def says_something(message: Message) -> bool:
    """Whether a message has any text, tool call or reasoning."""
    return bool(message["content"].strip()) or has_more_than_text(message)


def _read_messages(value: str, what: str) -> Messages:
    """Messages that a table holds as text."""
    try:
        return turns(json.loads(value), what)
    except json.JSONDecodeError as error:
        raise RowError(
            f"{what} looks like a list of messages that was written as text, but is not JSON ({error}): write it with "
            "json.dumps"
        ) from error


def _message(turn: Any, what: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{what} must hold messages with 'role' and 'content'; got {turn!r:.80}")
    speaker, said = ("from", "value") if turn.get("role") is None and "from" in turn else ("role", "content")
    role = turn.get(speaker)
    calls = without_nulls(turn.get("tool_calls")) or None
    if not isinstance(role, str) or (said not in turn and calls is None):
        raise RowError(f"{what} must hold messages with 'role' and 'content' (or 'from' and 'value'); got {turn!r:.80}")
    rest = {key: value for key, value in turn.items() if value is not None}
    for key in (speaker, said, "tool_calls"):
        rest.pop(key, None)
    content = _text(turn.get(said), what)
    if speaker == "from" and role in _CALLS:
        calls, content = _calls_of_text(content, what), ""
    message = {"role": ROLES.get(role, role), "content": content, **without_nulls(rest)}
    if calls is not None:
        message["tool_calls"] = [_call(call, what) for call in calls]
    _check_encodable(message, what)
    return message


def _text(content: Any, what: str) -> str:
    """Content as text: null is none, parts are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{what} must hold text content; got {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RowError(f"{what} must hold text content; got a part of type {kind!r}, and only text is trained on")
    return "".join(part["text"] for part in content)


def _call(call: Any, what: str) -> Any:
    """A tool call whose arguments are an object: chat templates would write a text in quotes."""
    if not isinstance(call, dict):
        raise RowError(f"{what}: a tool call must be an object with 'function'; got {call!r:.80}")
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except json.JSONDecodeError:
            return call
        if isinstance(arguments, dict):
            function = {**function, "arguments": arguments}
            return {**call, "function": function} if "function" in call else function
    return call


def _calls_of_text(value: str, what: str) -> list[Any]:
    """LLaMA-Factory's turn `function_call`: one call as JSON, or a list of them."""
    try:
        calls = json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{what}: a turn from 'function_call' must be JSON; got {value[:60]!r}: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def _check_encodable(value: Any, what: str) -> None:
    """Raises RowError where text holds half of a surrogate pair, which no tokenizer and no file can take."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                f"{what} holds half of a character, {value[error.start]!r} at {error.start} of {len(value)} (a text "
                "that was cut within an emoji, say): repair or remove the row",
                "half of a character",
            ) from error
    elif isinstance(value, dict):
        for one in value.values():
            _check_encodable(one, what)
    elif isinstance(value, list):
        for one in value:
            _check_encodable(one, what)
