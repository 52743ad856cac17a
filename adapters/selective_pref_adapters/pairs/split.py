"""Prompt, chosen and rejected as a row gives them → one prompt and two completions, cut in the right place.

In: text or messages of either side, and the prompt where there is one. Out: the same three, all text or all messages,
of which the completions begin with what the assistant says. Whatever would lose a prompt, or train on it, is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selective_pref_adapters.pairs.rows import Messages, Prose, RowError

Split = tuple[Prose, Prose, Prose]
_TURN = "\n\nAssistant:"  # hh-rlhf: one string per side, "\n\nHuman: … \n\nAssistant: …"
_REPEATED = 40  # characters of a prompt that stand at the beginning of both sides by no accident


def split_pair(prompt: Prose | None, chosen: Prose, rejected: Prose, place: str) -> Split:
    """(prompt, chosen, rejected).

    Raises:
        RowError: text beside messages, no prompt to be found, or two different ones.
    """
    kinds = {name: "text" if isinstance(side, str) else "messages" for name, side in _named(prompt, chosen, rejected)}
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _prompt_of_text(chosen, rejected, place)
        if isinstance(prompt, str):
            _check_not_repeated(prompt, chosen, rejected, place)
            return prompt, chosen, rejected
        answers = [_assistant(chosen)], [_assistant(rejected)]
        _check_ends(prompt, *answers, place)
        return prompt, *answers
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError(
            f"{place}: chosen and rejected must be both text or both messages; got {kinds}. Write the text as a "
            'message, [{"role": "assistant", "content": "…"}]'
        )
    if prompt is None:
        return _prompt_of_messages(chosen, rejected, place)
    if not _is_conversation(chosen) and not _is_conversation(rejected):
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        _check_ends(said, chosen, rejected, place)
        return said, chosen, rejected
    return _beside_conversations(prompt, chosen, rejected, place)


def _named(prompt: Prose | None, chosen: Prose, rejected: Prose) -> list[tuple[str, Prose]]:
    named: list[tuple[str, Prose | None]] = [("prompt", prompt), ("chosen", chosen), ("rejected", rejected)]
    return [(name, side) for name, side in named if side is not None]


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _is_conversation(side: Messages) -> bool:
    """Whether a side holds more than what the assistant says: the prompt stands in it."""
    return bool(side) and side[0]["role"] != "assistant"


def _check_not_repeated(prompt: str, chosen: str, rejected: str, place: str) -> None:
    if len(prompt) >= _REPEATED and chosen.startswith(prompt) and rejected.startswith(prompt):
        raise RowError(
            f"{place}: the answers begin with the prompt, which would be read twice and trained on: cut it off them",
            "prompt repeated in the completions",
        )


def _prompt_of_text(chosen: str, rejected: str, place: str) -> Split:
    """hh-rlhf strings: the prompt reaches to the end of the last assistant marker."""
    cuts = [side.rfind(_TURN) + len(_TURN) for side in (chosen, rejected)]
    if min(cuts) < len(_TURN):
        raise RowError(f"{place}: no 'prompt', and the texts hold no {_TURN!r} turn that would end an implicit one")
    if chosen[: cuts[0]] != rejected[: cuts[1]]:
        raise _different_prompts(place, chosen[: cuts[0]], rejected[: cuts[1]])
    return chosen[: cuts[0]], chosen[cuts[0] :], rejected[cuts[1] :]


def _prompt_of_messages(chosen: Messages, rejected: Messages, place: str) -> tuple[Messages, Messages, Messages]:
    """Whole conversations: the prompt is what stands before the last message, or where two answers differ earlier."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) < 2 or side[-1]["role"] != "assistant" or side[0]["role"] == "assistant":
            raise RowError(
                f"{place}: {name!r} must be a whole conversation, which begins with what is asked and ends with an "
                "assistant message, or stand beside a 'prompt' that holds the rest; got roles "
                f"{[message['role'] for message in side]}"
            )
    cut = len(chosen) - 1
    if chosen[:-1] != rejected[:-1]:
        cut = common_prefix(chosen, rejected)
        ends = [side[cut]["role"] for side in (chosen, rejected) if cut < len(side)]
        if ends != ["assistant", "assistant"] or cut == 0:
            raise _different_prompts(place, chosen[:-1], rejected[:-1])
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _beside_conversations(prompt: Prose, chosen: Messages, rejected: Messages, place: str) -> Split:
    """A prompt beside whole conversations, which say it again: it must be in them, and is read once."""
    if not isinstance(prompt, str) and prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        cut = len(prompt)
        _check_ends(prompt, chosen[cut:], rejected[cut:], place)
        return prompt, chosen[cut:], rejected[cut:]
    said, chosen, rejected = _prompt_of_messages(chosen, rejected, place)
    if isinstance(prompt, str):
        if prompt.strip() not in [message["content"].strip() for message in said]:
            raise RowError(
                f"{place}: 'prompt' is a text beside whole conversations, but no message before the last says it: "
                f"{prompt[:60]!r}. Leave 'prompt' out, or make it the list of messages before the answer"
            )
        return said, chosen, rejected
    system = prompt[:1] if prompt and prompt[0]["role"] == "system" and said[0]["role"] != "system" else []
    for message in prompt[len(system) :]:
        if message not in said:
            raise RowError(
                f"{place}: the prompt stands beside whole conversations, but is not in them: "
                f"{message['content'][:60]!r} ({message['role']}). Leave the prompt out of the conversations, or leave "
                "out the column that holds this one"
            )
    return [*system, *said], chosen, rejected


def _check_ends(prompt: Messages, chosen: Messages, rejected: Messages, place: str) -> None:
    """Raises unless there is something to answer, and the assistant has the first and the last word of the answers."""
    if not prompt:
        raise RowError(f"{place}: the prompt holds no messages: an answer needs something that it answers")
    if prompt[-1]["role"] == "assistant":
        raise RowError(
            f"{place}: the prompt ends with an assistant message, {prompt[-1]['content'][:60]!r}, so the answers would "
            "stand after an answer: is it one of the two? Take it out of the prompt"
        )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in side]
        if roles and not roles[0] == roles[-1] == "assistant":
            raise RowError(
                f"{place}: {name!r} must begin and end with an assistant message after the prompt; got roles {roles}"
            )


def _different_prompts(place: str, chosen: Sequence[Any], rejected: Sequence[Any]) -> RowError:
    at = common_prefix(chosen, rejected)
    return RowError(
        f"{place}: the prompt differs between chosen and rejected, first at {at}: {str(chosen[at:])[:60]!r} against "
        f"{str(rejected[at:])[:60]!r}. A pair needs one prompt: repair or remove the row",
        "prompts that differ",
    )


def common_prefix(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many leading items both share."""
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return index
    return min(len(ours), len(theirs))
