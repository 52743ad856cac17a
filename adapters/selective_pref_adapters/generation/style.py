"""What Arena-Hard's style control reads of an answer. In: its text. Out: length and counts, as the benchmark has them.

The counts are those of the benchmark's own code, the odd ones included: what stands in a code fence is taken out
wherever else it stands, too, and a line of one star and a blank is a list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

Length: TypeAlias = Callable[[str], int]
"""Text → its tokens."""

_FENCED = re.compile(r"```([^`]*)```")
_HEADER = re.compile(r"^(#{1,6})\s", re.MULTILINE)
_LISTS = {
    "ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE),
    "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE),
}
_BOLD = {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")}


def style_of(answer: str, length: Length | None) -> dict[str, Any]:
    """{token_len, header_count, list_count, bold_count} of an answer.

    The order is part of the format: style control takes the first number as the length.

    Args:
        answer: Markdown.
        length: how many tokens a text has; with None, `token_len` is null.
    """
    text = answer
    for inside in _FENCED.findall(answer):
        text = text.replace(inside, "")
    headers = Counter(len(marks) for marks in _HEADER.findall(text))
    return {
        "token_len": None if length is None else length(answer),
        "header_count": {f"h{level}": headers[level] for level in range(1, 7)},
        "list_count": {kind: len(pattern.findall(text)) for kind, pattern in _LISTS.items()},
        "bold_count": {mark: len(pattern.findall(text)) for mark, pattern in _BOLD.items()},
    }


def gpt_4o_length() -> Length:
    """How many tokens of gpt-4o (o200k_base) a text has.

    Raises:
        ModuleNotFoundError: tiktoken is not installed.
        ValueError: its encoding is neither on this machine nor to be had.
    """
    import tiktoken

    try:
        encoding = tiktoken.encoding_for_model("gpt-4o")
    except Exception as error:  # of whichever client it downloads with
        raise ValueError(
            "token_len needs tiktoken's encoding o200k_base, which is downloaded at its first use, and this failed "
            f"({type(error).__name__}). Either set TIKTOKEN_CACHE_DIR to a folder that was filled on a machine with a "
            "network (there: TIKTOKEN_CACHE_DIR=folder python -c 'import tiktoken; "
            'tiktoken.encoding_for_model("gpt-4o")\'), or give --token-len none: all but style control works without, '
            "and the same command with --token-len tiktoken fills the lengths in later"
        ) from error
    return length_by(encoding)


def length_by(encoding: Any) -> Length:
    """The length in tokens of a `tiktoken.Encoding`; text that looks like a special token is text."""
    return lambda text: len(encoding.encode(text, disallowed_special=()))
