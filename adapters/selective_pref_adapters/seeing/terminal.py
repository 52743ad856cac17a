"""The selection in a terminal. In: `ShownPair`s. Out: text, with colours where the terminal has them.

With colours a token has the colour of its score and kept tokens are underlined; without, kept runs stand in ⟦brackets⟧.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from selective_pref import PreferenceLoss
from selective_pref_adapters.seeing.shown import ShownPair, ShownResponse, scores_of, shown_pairs
from selective_pref_adapters.seeing.tokens import LIGHT, printable, score_scale, tint

_PROMPT = 160  # characters of a prompt that are shown: its end, where the response follows


def selection_text(
    out: PreferenceLoss,
    ids: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    places: Sequence[str] | None = None,
    colour: bool | None = None,
    width: int | None = None,
) -> str:
    """The pairs of a batch as text to print.

    Args:
        out, ids, tokenizer, places: as in `selection_page`.
        colour: whether to use the terminal's colours; None for yes where standard output is a terminal.
        width: columns; None for the terminal's.

    Raises:
        ValueError: ids or places that do not belong to `out`.
    """
    pairs = shown_pairs(out, ids, tokenizer, places=places)
    colour = sys.stdout.isatty() if colour is None else colour
    written = io.StringIO()
    console = Console(
        file=written, force_terminal=colour, color_system="truecolor" if colour else None, width=width, highlight=False
    )
    print_pairs(console, pairs)
    return written.getvalue()


def print_pairs(console: Console, pairs: Iterable[ShownPair]) -> None:
    """Prints pairs, with colours where the console has them."""
    pairs = list(pairs)
    scale = score_scale(scores_of(pairs))
    colour = console.is_terminal and console.color_system is not None
    for pair in pairs:
        margins = (
            []
            if pair.rejected is None
            else [
                f"margin {pair.chosen.reward - pair.rejected.reward:+.4g}",
                f"of kept tokens {pair.chosen.selected_reward - pair.rejected.selected_reward:+.4g}",
            ]
        )
        title = f"{printable(pair.place)}  {', '.join([*margins, f'loss {pair.loss:.4g}'])}"
        console.rule(Text(title, style="bold"), align="left")
        if pair.prompt:
            end = printable(pair.prompt[-_PROMPT:]).strip()
            console.print(Text(("…" if len(pair.prompt) > _PROMPT else "") + end, style="dim"))
        for name, side in pair.sides:
            head = f"{name}: kept {side.kept:g} of {side.tokens}, reward {side.reward:+.4g}, of kept tokens "
            console.print(Text(f"{head}{side.selected_reward:+.4g}", style="bold"))
            console.print(response_text(side, scale, colour=colour))
        console.print()


def response_text(side: ShownResponse, scale: float | None, *, colour: bool) -> Text:
    """One response; `scale` is the score of the strongest colour."""
    text = Text(overflow="fold")
    if not colour:
        for kept, run in groupby(range(len(side.texts)), key=lambda n: side.weights[n] > 0):
            words = "".join(printable(side.texts[n]) for n in run)
            ends = len(words) - len(words.rstrip("\n"))  # line ends stay outside, or the bracket begins the next line
            text.append(f"⟦{words[: len(words) - ends]}⟧{words[len(words) - ends :]}" if kept else words)
        return text
    for number, token in enumerate(side.texts):
        text.append(printable(token), style=_style(side, number, scale))
    return text


def _style(side: ShownResponse, number: int, scale: float | None) -> str:
    if not side.counts[number]:
        return "dim"
    words = ["underline"] if side.weights[number] > 0 else []
    if 0 < side.weights[number] < 1:
        words.append("italic")  # in part
    if side.scores is not None and scale is not None and (step := tint(side.scores[number], scale)):
        words.append(f"#16181d on {LIGHT[4 + step]}")
    return " ".join(words) or "none"
