"""What was selected, as a picture: tokens with their weights → one SVG file that every browser shows.

In: rows of tokens, what each counted for and how it scored. Out: text of an SVG: a box behind each token, the darker
the more the token counted, green on the chosen side, red on the rejected one; its score shows when one points at it.
An SVG needs no library, and no font has to be shipped for scripts that the reader's browser can write.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from selective_pref import PreferenceLoss
from selective_pref_adapters.files import write_whole

_COLUMNS, _WIDTH, _HEIGHT, _MARGIN = 100, 8, 20, 12  # characters of a line, pixels of a cell and around the picture
_CHOSEN, _REJECTED = "#2e9e5b", "#d0453e"
_CSS = "text{font:13px monospace;white-space:pre}.title{font-weight:bold}"
_SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """One response.

    Attributes:
        title: what stands above it.
        tokens: text of each token of the completion.
        weights: what each counted for, in [0, 1].
        scores: what they were selected by, in nats.
        is_chosen: which side of its pair it is.
    """

    title: str
    tokens: Sequence[str]
    weights: Sequence[float]
    scores: Sequence[float]
    is_chosen: bool


def picture_rows(
    out: PreferenceLoss, ids: Sequence[Sequence[list[int]]], places: Sequence[str], tokenizer: Any
) -> Iterator[PictureRow]:
    """Chosen and rejected side of each pair, with the completion's tokens and what they count for."""
    for number, place in enumerate(places):
        for side, name in enumerate(("chosen", "rejected")):
            response = (out.chosen, out.rejected)[side]
            where = response.mask[number].nonzero().squeeze(-1).tolist()
            weights = response.token_weights[number].tolist()
            scores = [0.0] * len(weights) if response.scores is None else response.scores[number].tolist()
            tokens = [tokenizer.decode([ids[number][side][at]]) for at in where]
            yield PictureRow(
                title=f"{place}, {name}",
                tokens=tokens,
                weights=[weights[at] for at in where],
                scores=[scores[at] for at in where],
                is_chosen=not side,
            )


def write_picture(path: Path, rows: Sequence[PictureRow]) -> None:
    """Writes the picture so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, selection_picture(rows, title=path.stem))


def selection_picture(rows: Sequence[PictureRow], *, title: str) -> str:
    """The text of an SVG file that shows these responses under each other."""
    body: list[str] = []
    y = _MARGIN + _HEIGHT
    for row in rows:
        kept = f"{sum(row.weights):g} of {len(row.tokens)} tokens"
        body.append(f'<text class="title" x="{_MARGIN}" y="{y}">{_text(row.title)}: {kept}</text>')
        y = y + _HEIGHT
        column = 0
        for token, weight, score in zip(row.tokens, row.weights, row.scores, strict=True):
            shown = _text(token, keep_spaces=True)
            width = max(_columns(token), 1)
            if column and column + width > _COLUMNS:
                column, y = 0, y + _HEIGHT
            body.extend(_token(shown, weight, score, row.is_chosen, _MARGIN + column * _WIDTH, y, width * _WIDTH))
            column += width
        y += 2 * _HEIGHT
    width = 2 * _MARGIN + _COLUMNS * _WIDTH
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">',
            f"<title>{_text(title)}</title><style>{_CSS}</style>",
            '<rect width="100%" height="100%" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _token(shown: str, weight: float, score: float, is_chosen: bool, x: int, y: int, width: int) -> Iterator[str]:
    colour = _CHOSEN if is_chosen else _REJECTED
    says = quoteattr(f"weight {weight:.3g}, score {score:.4g}")
    yield f"<g aria-label={says}><title>{says[1:-1]}</title>"
    box = f'x="{x}" y="{y - 15}" width="{width}" height="{_HEIGHT - 1}"'
    yield f'<rect {box} fill="{colour}" fill-opacity="{0.7 * weight:.3f}"/>'
    yield f'<text x="{x}" y="{y}" textLength="{width}" lengthAdjust="spacingAndGlyphs">{shown}</text></g>'


def _columns(token: str) -> int:
    """How many columns of a monospaced font a text takes: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in _printable(token)
    )


def _printable(text: str) -> str:
    """Line ends as signs, and without the control characters that XML forbids."""
    return "".join(_SHOWN.get(c, c if unicodedata.category(c)[0] != "C" else "·") for c in text)


def _text(text: str, keep_spaces: bool = False) -> str:
    shown = escape(_printable(text))
    return shown.replace(" ", "\u00a0") if keep_spaces else shown
