"""How a token looks: the text that it adds, and the colour of its score.

In: ids and a tokenizer; scores. Out: one text for each token, which together are the decoded whole, and a step of a
colour scale. A token that holds only a part of a character (bytes of an emoji, say) adds no text; the character stands
at the token that completes it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

LIGHT = ("#78abdd", "#a3c7ea", "#cbdff3", "#e9f1fa", "#ffffff", "#fdefdd", "#fbd8ae", "#f6b671", "#ea9338")
"""Colours of the steps −4 … 4 on white paper: blue to orange, which every common colour blindness tells apart."""
DARK = ("#295d97", "#234a75", "#20374f", "#1d2937", "#191c21", "#34291c", "#513a1c", "#6f4914", "#8d590b")
"""Likewise on a dark screen, under light text."""

_UNFINISHED = "\ufffd"  # what decoders give for bytes that are no character yet
_LONGEST = 4  # bytes of a character in UTF-8, so tokens that one may be spread over
_SIGNS = {"\n": "⏎\n", "\t": "⇥\t", "\r": "␍"}
_JOINERS = "\u200c\u200d"  # decide how their neighbours look: emoji and Indic scripts need them


class TokenTexts:
    """The texts of tokens as one tokenizer decodes them.

    Args:
        tokenizer: of transformers: `decode` and, where it has them, `all_special_ids` and `added_tokens_decoder`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoded: dict[tuple[int, ...], str] = {}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = frozenset(getattr(tokenizer, "all_special_ids", ())) | {
            number for number, token in added.items() if getattr(token, "special", False)
        }
        """Ids of tokens such as end-of-sequence, which are no text that anybody wrote."""

    def text(self, ids: Sequence[int]) -> str:
        """The text of these tokens together, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def texts(self, ids: Sequence[int], start: int = 0) -> list[str]:
        """What each token from `start` on adds to the text before it.

        A token is decoded behind the one before it, because whether it begins with a space may depend on that.

        Args:
            ids: of the whole sequence, prompt included.
            start: the first token whose text is wanted.

        Returns:
            One text for each of ``ids[start:]``. Empty where a token ends inside a character.
        """
        found: list[str] = []
        context, done = max(start - 1, 0), start  # ids[context:done] have given their text
        for end in range(start + 1, len(ids) + 1):
            now = self._window(ids, context, end)
            unfinished = now.endswith(_UNFINISHED) and end - done < _LONGEST and end < len(ids)
            if unfinished:
                found.append("")
                continue
            found.append(now[_common(self._window(ids, context, done), now) :])
            context, done = done, end
        return found

    def _window(self, ids: Sequence[int], start: int, end: int) -> str:
        key = tuple(ids[start:end])
        if key not in self._decoded:
            self._decoded[key] = self.text(key) if key else ""
        return self._decoded[key]


def score_scale(scores: Iterable[float]) -> float | None:
    """The size of a score, in nats, that gets the strongest colour: 98 % of the finite scores are not larger.

    None where there are none; 1 where all are 0.
    """
    sizes = sorted(abs(score) for score in scores if math.isfinite(score))
    if not sizes:
        return None
    largest = sizes[min(len(sizes) - 1, int(0.98 * len(sizes)))] or sizes[-1]
    return float(f"{largest:.3g}") or 1.0


def tint(score: float, scale: float) -> int:
    """The step of the colour scale, −4 … 4: four times the root of the score's share of `scale`, rounded.

    The root tells small scores apart, which most are. NaN has step 0.
    """
    if math.isnan(score):
        return 0
    size = math.ceil(4 * math.sqrt(min(1.0, abs(score) / scale)) - 0.5)
    return int(math.copysign(min(4, max(0, size)), score))


def printable(text: str) -> str:
    """`text` with a sign for what cannot be seen or would change the text around it.

    Line ends and tabs keep their effect behind their sign; control characters get their own picture (␀); marks that
    turn the direction of the text and other invisible ones are named (‹U+202E›).
    """
    return "".join(_SIGNS.get(c) or _visible(c) for c in text)


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if (
        (kind[0] != "C" and kind not in ("Zl", "Zp"))
        or character in _JOINERS
        or "\U000e0020" <= character <= "\U000e007f"
    ):  # flags of regions
        return character
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    return "␡" if character == "\x7f" else f"‹U+{ord(character):04X}›"


def _common(ours: str, theirs: str) -> int:
    """How many leading characters both share: decoders may rewrite the end of a text when more follows."""
    if theirs.startswith(ours):
        return len(ours)
    differ = (index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    return next(differ, len(theirs))
