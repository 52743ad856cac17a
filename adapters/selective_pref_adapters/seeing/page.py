"""The selection as one HTML file: chosen and rejected side by side, with what the loss read of each token.

In: `ShownPair`s. Out: the text of a page that needs no network, no notebook and no library: its numbers, styles and
script stand in it, and its content policy lets nothing else in. The share of kept tokens changes in the page.
"""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from selective_pref import PreferenceLoss, __version__
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.seeing.shown import ShownPair, ShownResponse, finite, implied_beta, scores_of, shown_pairs
from selective_pref_adapters.seeing.tokens import DARK, LIGHT, printable, score_scale

RULES = (
    ("read", "as the loss read them"),
    *((f"{percent}", f"{percent} %") for percent in (20, 40, 60, 80, 100)),
    ("threshold", "threshold"),
    ("sides", "per side"),
)
_TEMPLATES = Path(__file__).parent / "templates"
_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}  # so that no text can end the script element


class SelectionPage:
    """A page. `write` makes a file of it; a notebook shows it by itself.

    Attributes:
        html: its text.
    """

    def __init__(self, html: str) -> None:
        self.html = html

    def write(self, path: str | Path) -> Path:
        """Writes the file, whole or not at all; makes its folder.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.html)
        return path

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame of its own, so that neither changes the other's style."""
        return (
            '<iframe sandbox="allow-scripts" title="selection" '
            'style="width:100%;height:640px;border:1px solid #8886;border-radius:8px" '
            f'srcdoc="{escape(self.html)}"></iframe>'
        )


def selection_page(
    out: PreferenceLoss,
    ids: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    places: Sequence[str] | None = None,
    title: str = "What the loss read",
) -> SelectionPage:
    """A page of the pairs of a batch: each token with its score, weight and log-probs.

    Args:
        out: what a loss of `selective_pref` returned, for B pairs.
        ids: the batch's `input_ids` [2B T+1], chosen rows first.
        tokenizer: the one that made the ids.
        places: where each pair came from; default "pair 1", "pair 2", …
        title: stands above it.

    Returns:
        A `SelectionPage`: the last line of a notebook cell shows it, ``.write("page.html")`` makes a file.

    Raises:
        ValueError: ids or places that do not belong to `out`.
    """
    return page_of_pairs(shown_pairs(out, ids, tokenizer, places=places), title=title)


def page_of_pairs(
    pairs: Sequence[ShownPair],
    *,
    title: str,
    lead: str = "Chosen and rejected responses, with the score of every token and the tokens that the loss kept.",
    figures: Sequence[Any] = (),
    tables: Sequence[Any] = (),
) -> SelectionPage:
    """`selection_page` of pairs that are gathered already, from one batch or many.

    Args:
        pairs: in the order in which they are to be shown.
        title, lead: heading, and the sentence below it.
        figures: each with `svg`, markup that is put in as it is, and `caption`.
        tables: each with `caption`, `head` and `rows`.
    """
    scale = score_scale(scores_of(pairs))
    special = {
        token
        for pair in pairs
        for _, side in pair.sides
        for token, is_special in zip(side.ids, side.special, strict=True)
        if is_special
    }
    payload = {
        "beta": implied_beta(pairs),
        "scale": scale,
        "special": sorted(special),
        "pairs": [
            {
                "place": printable(pair.place),
                "prompt": _prompt(pair.prompt),
                "loss": finite(pair.loss),
                "c": _packed(pair.chosen),
                "r": None if pair.rejected is None else _packed(pair.rejected),
            }
            for pair in pairs
        ],
    }
    html = template("page.html").render(
        title=title,
        lead=lead,
        rules=RULES,
        scored=scale is not None,
        figures=figures,
        tables=tables,
        payload=script_json(payload),
    )
    return SelectionPage(html)


@cache
def template(name: str) -> Any:
    """A template of this package, with escaping on."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    ).get_template(name, globals={"light": LIGHT, "dark": DARK, "version": __version__})


def script_json(value: Any) -> str:
    """JSON for the inside of a script element, whatever the text in it says."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)


def _packed(side: ShownResponse) -> dict[str, Any]:
    """The columns of a side: texts as they are shown, numbers as the base64 of little-endian arrays.

    Scores keep all their bits, since equal ones must stay equal.
    """
    return {
        "t": [printable(text) for text in side.texts],
        "i": _base64("i", side.ids),
        "p": _base64("f", side.logps),
        "q": _base64("f", side.ref_logps),
        "s": _base64("d", side.scores),
        "w": _base64("f", side.weights),
        "m": None if all(side.counts) else _base64("B", side.counts),
        "f": finite(side.reward),
        "k": finite(side.selected_reward),
    }


def _base64(kind: str, values: Sequence[float] | None) -> str | None:
    if values is None:
        return None
    column = array(kind, values)
    if column.itemsize > 1 and array("H", [1]).tobytes() != b"\x01\x00":
        column.byteswap()
    return base64.b64encode(column.tobytes()).decode("ascii")


def _prompt(text: str) -> str:
    """A prompt is read, not looked into: only what would change the text around it is replaced."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)
