"""The selection as an SVG file that every browser shows, and the selection of the same pairs over a run.

In: `ShownPair`s. Out: the text of an SVG: a box behind each token in the colour of its score, a line under what is
kept (dots where it is kept in part), all numbers where one points. It needs no library, and no font has to be shipped
for scripts that the reader's browser can write.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from selective_pref import PreferenceLoss
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.seeing.shown import ShownPair, ShownResponse, scores_of, shown_pairs
from selective_pref_adapters.seeing.tokens import LIGHT, printable, score_scale, tint

FOLDER = "selection"
"""Where a run keeps the selection of its fixed pairs, inside its own folder."""

_COLUMNS, _WIDTH, _HEIGHT, _MARGIN = 100, 8, 24, 14  # characters of a line, pixels of a cell and around the picture
_CSS = (
    "text{font:13px ui-monospace,'DejaVu Sans Mono',monospace;white-space:pre;fill:#16181d}"
    ".title{font-weight:bold}.soft{fill:#565c66}"
)


def selection_svg(
    out: PreferenceLoss,
    ids: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    places: Sequence[str] | None = None,
    title: str = "What the loss read",
) -> str:
    """The text of an SVG file of the pairs of a batch.

    Args, Raises: as `selection_page`.
    """
    return svg_of_pairs(shown_pairs(out, ids, tokenizer, places=places), title=title)


def write_selection(
    out: PreferenceLoss,
    ids: Sequence[Sequence[int]],
    places: Sequence[str],
    tokenizer: Any,
    folder: Path,
    step: int,
) -> list[ShownPair]:
    """Keeps the selection of a run's fixed pairs at one step: `selection/step-….svg` and `.json` in its folder.

    `selective-pref report` shows those of all steps beside each other.

    Args:
        out: what the loss says of the pairs now.
        ids: their token ids, [2B T+1], chosen rows first.
        places: where they came from.
        tokenizer: the policy's.
        folder: the run's.
        step: optimiser steps taken.

    Returns:
        The pairs, to be drawn elsewhere.

    Raises:
        OSError: a file cannot be written.
    """
    pairs = shown_pairs(out, ids, tokenizer, places=places)
    write_pairs(pairs, folder, step)
    return pairs


def write_pairs(pairs: Sequence[ShownPair], folder: Path, step: int) -> None:
    """`write_selection` of pairs that are gathered already."""
    name = f"step-{step:06d}"
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_whole(folder / FOLDER / f"{name}.svg", svg_of_pairs(pairs, title=name))
    write_whole(folder / FOLDER / f"{name}.json", pairs_json(pairs, step=step))


def remove_selections_after(folder: Path, step: int) -> None:
    """Removes what a run kept after `step`: a run that is resumed there goes on from it, perhaps in another way."""
    for path in (folder / FOLDER).glob("step-*.*"):
        if (number := path.stem.removeprefix("step-")).isdigit() and int(number) > step:
            path.unlink()


def pairs_json(pairs: Sequence[ShownPair], **more: Any) -> str:
    """Everything that the pictures show, as JSON; numbers that are not finite are null."""
    value = {**more, "pairs": [pair.record() for pair in pairs]}
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def svg_of_pairs(pairs: Sequence[ShownPair], *, title: str) -> str:
    """The text of an SVG file that shows these pairs under each other."""
    scale = score_scale(scores_of(pairs))
    body: list[str] = list(_legend(scale)) if scale is not None else []
    y = _MARGIN + (2 * _HEIGHT if scale is not None else _HEIGHT)
    for pair in pairs:
        if prompt := _end_of(pair.prompt):
            body.append(_line(f"prompt: {prompt}", y, "soft"))
            y += _HEIGHT
        for name, side in pair.sides:
            body.append(_line(f"{pair.place}, {name}: {side.kept:g} of {side.tokens} tokens", y, "title"))
            y += _HEIGHT
            column = 0
            for number, text in enumerate(side.texts):
                shown = printable(text).replace("\n", "").replace("\t", "")
                width = _columns(shown) or (1 if shown == "" else 0)
                if column and column + width > _COLUMNS:
                    column, y = 0, y + _HEIGHT
                body.extend(_token(side, number, shown, scale, _MARGIN + column * _WIDTH, y, width * _WIDTH))
                column += width
                if text.endswith("\n"):
                    column, y = 0, y + _HEIGHT
            y += _HEIGHT + _HEIGHT // 2
        y += _HEIGHT // 2
    width, height = 2 * _MARGIN + _COLUMNS * _WIDTH, y - _HEIGHT
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"<title>{escape(printable(title))}</title><style>{_CSS}</style>",
            '<rect width="100%" height="100%" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _token(
    side: ShownResponse, number: int, shown: str, scale: float | None, x: int, y: int, width: int
) -> Iterator[str]:
    if not side.counts[number]:
        yield _line(shown, y, "soft", x)
        return
    weight = side.weights[number]
    says = quoteattr(_numbers(side, number))
    yield f"<g aria-label={says}><title>{says[1:-1]}</title>"
    if side.scores is not None and scale is not None:
        colour = LIGHT[4 + tint(side.scores[number], scale)]
        yield f'<rect x="{x}" y="{y - 15}" width="{max(width - 1, 0)}" height="{_HEIGHT - 4}" fill="{colour}"/>'
    if shown:
        fit = f' textLength="{width}" lengthAdjust="spacingAndGlyphs"' if width else ""
        yield f'<text x="{x}" y="{y}"{fit}>{_text(shown)}</text>'
    if weight > 0:
        dots = "" if weight >= 1 else ' stroke-dasharray="2 2"'
        yield (
            f'<path class="kept" d="M{x} {y + 5.5}h{max(width - 1, 0)}" stroke="#16181d" stroke-width="2.5"{dots} '
            f'data-weight="{weight:.6g}"/>'
        )
    yield "</g>"


def _numbers(side: ShownResponse, number: int) -> str:
    parts = [f"weight {side.weights[number]:.3g}", f"policy {side.logps[number]:.4g}"]
    if side.ref_logps is not None:
        parts.append(f"reference {side.ref_logps[number]:.4g}")
    if side.scores is not None:
        parts.append(f"score {side.scores[number]:.4g}, rank {side.ranks[number] or '–'} of {side.tokens}")
    return ", ".join([*parts, f"id {side.ids[number]}"])


def _legend(scale: float) -> Iterator[str]:
    y, low, x = _MARGIN + 11, f"score −{scale:.3g}", _MARGIN
    yield _line(low, y, "soft", x)
    x += len(low) * _WIDTH + 8
    for colour in LIGHT:
        yield f'<rect x="{x}" y="{y - 12}" width="18" height="15" fill="{colour}" stroke="#d9dce2"/>'
        x += 18
    yield _line(f"+{scale:.3g} nats    underlined: kept    dotted: kept in part", y, "soft", x + 8)


def _line(text: str, y: int, kind: str, x: int = _MARGIN) -> str:
    shown = escape(printable(text)) if kind == "title" else _text(text)
    return f'<text class="{kind}" x="{x}" y="{y}">{shown}</text>'


def _end_of(prompt: str) -> str:
    """The end of a prompt, as much as one line holds."""
    words = " ".join(printable(prompt).split())
    kept: list[str] = []
    columns = 0
    for character in reversed(words):
        columns += _columns(character)
        if columns > _COLUMNS - len("prompt: …"):
            return "…" + "".join(reversed(kept))
        kept.append(character)
    return words


def _columns(shown: str) -> int:
    """How many columns of a monospaced font a text takes: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) == "Cf" else 2 if _wide(c) else 1 for c in shown
    )


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _text(text: str) -> str:
    """Text of which every space shows."""
    return escape(printable(text)).replace(" ", "\u00a0")
