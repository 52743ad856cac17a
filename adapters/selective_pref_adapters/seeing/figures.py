"""Figures of a data set and of runs. In: numbers. Out: SVG for a page, files for a paper.

Drawn by matplotlib without its global state, so that a program's own figures are left alone. Text stays text.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from selective_pref_adapters.files import write_whole
from selective_pref_adapters.seeing.shown import ShownPair, scores_of
from selective_pref_adapters.seeing.statistics import POSITIONS, RATIOS, Statistics
from selective_pref_adapters.seeing.tokens import LIGHT, score_scale

CHOSEN, REJECTED, SOFT = "#1f5fa8", "#c2601a", "#8a919c"
LINES = ("#1f5fa8", "#c2601a", "#3d8b57", "#8b4fa8", "#7a6a1f", "#4b5563", "#b03a5b", "#1d8a99")
"""Colours of runs; their lines differ in dashes, too."""
DASHES = ("-", "--", "-.", ":")

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a919c",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": "#e3e6eb",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a token is a dollar sign
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure.

    Attributes:
        name: of its files.
        caption: what one sees in it.
        svg: an `<svg>` element.
        canvas: matplotlib's figure, to be saved in another form.
    """

    name: str
    caption: str
    svg: str
    canvas: Canvas


def figure(name: str, caption: str, draw: Any, size: tuple[float, float] = (6.2, 3.0)) -> Figure:
    """Calls `draw` with an empty matplotlib figure, in this package's style."""
    # The salt keeps the identifiers of several figures on one page apart, and the same from run to run.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=size)
        draw(canvas)
        written = io.StringIO()
        canvas.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = written.getvalue()
    return Figure(name=name, caption=caption, svg=svg[svg.index("<svg") :], canvas=canvas)


def write_figures(folder: Path, figures: Sequence[Figure]) -> None:
    """Each figure as `name.svg` and `name.png`, whole or not at all.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for one in figures:
        write_whole(folder / f"{one.name}.svg", one.svg)
        image = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            one.canvas.savefig(image, format="png", dpi=160)
        write_whole(folder / f"{one.name}.png", image.getvalue())


def data_figures(found: Statistics) -> list[Figure]:
    """What is selected over a data set."""
    colours = {"chosen": CHOSEN, "rejected": REJECTED}
    hatches = {"chosen": "", "rejected": "//"}

    def scores(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for name, side in found.sides.items():
            axes.stairs(side.histogram, found.score_edges, color=colours[name], label=name, lw=1.8)
        axes.axvline(0, color=SOFT, lw=1)
        axes.set(title="Scores", xlabel="score, nats", ylabel="share of the tokens")
        axes.legend()

    def positions(canvas: Canvas) -> None:
        axes = canvas.subplots()
        middle = [(part + 0.5) / POSITIONS for part in range(POSITIONS)]
        for (name, side), mark in zip(found.sides.items(), "os", strict=True):
            shares = [float("nan") if share is None else share for share in side.by_position]
            axes.plot(middle, shares, color=colours[name], marker=mark, ms=4, label=name)
        axes.set(title="Kept share by position", xlabel="position in the response, 0 to 1", ylabel="kept share")
        axes.set_ylim(bottom=0)
        axes.legend()

    def classes(canvas: Canvas) -> None:
        axes = canvas.subplots()
        names = list(dict.fromkeys(name for side in found.sides.values() for name in side.by_class))
        for offset, (name, side) in zip((-0.2, 0.2), found.sides.items(), strict=True):
            shares = [side.by_class.get(kind, (0, 0.0))[1] for kind in names]
            axes.bar(
                [index + offset for index in range(len(names))],
                shares,
                0.38,
                color=colours[name],
                hatch=hatches[name],
                edgecolor="white",
                label=name,
            )
        counts = [sum(side.by_class.get(kind, (0, 0.0))[0] for side in found.sides.values()) for kind in names]
        ticks = [f"{kind.replace(' of a ', chr(10) + 'of a ')}\n{n:,}" for kind, n in zip(names, counts, strict=True)]
        axes.set_xticks(range(len(names)), ticks, fontsize=8.5)
        axes.set(title="Kept share by class of token", ylabel="kept share")
        axes.grid(axis="x", visible=False)
        axes.legend()

    def overlaps(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for number, (name, shares) in enumerate(found.overlaps.items()):
            axes.plot(RATIOS, shares, color=_colour(number), ls=_dash(number), marker="o", ms=4, label=name)
        axes.plot(RATIOS, RATIOS, color=SOFT, ls=":", label="by chance")
        axes.set(title="Tokens kept by both", xlabel="share that is kept", ylabel="of it, kept by both", ylim=(0, 1.03))
        axes.legend()

    drawn = [
        figure("scores", "How the scores are spread. The outermost bins hold what lies beyond them.", scores),
        figure("positions", "What share of the tokens at each position of a response is kept.", positions),
        figure("classes", "What share of each class of token is kept, and how many tokens it has.", classes),
    ]
    if found.overlaps:
        caption = "How much of the selection stays under another policy, reference or precision."
        drawn.append(figure("overlap", caption, overlaps))
    return drawn


def series_figure(
    name: str,
    title: str,
    caption: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    level: float | None = None,
    share: bool = False,
) -> Figure:
    """One metric of several runs over their steps.

    Args:
        name, caption: of the figure.
        title: stands above it.
        series: run → (steps, values).
        level: a value to draw a line at, as log 2 for a loss.
        share: whether the axis goes from 0 to 1.
    """

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for number, (run, (steps, values)) in enumerate(series.items()):
            mark = "o" if len(steps) < 30 else None
            axes.plot(steps, values, color=_colour(number), ls=_dash(number), marker=mark, ms=3.5, label=run)
        if level is not None:
            axes.axhline(level, color=SOFT, lw=1, ls=":")
        axes.set(title=title, xlabel="step", **({"ylim": (-0.03, 1.03)} if share else {}))
        if len(series) > 1:
            axes.legend(fontsize=8.5)

    return figure(name, caption, draw, (6.2, 2.8))


def selection_figure(pairs: Sequence[ShownPair], *, title: str) -> Canvas:
    """The selection of a few pairs as an image without text, for trackers: a row of cells for each response.

    A cell has the colour of its token's score; a black bar below it is as high as its weight.
    """
    scale = score_scale(scores_of(pairs)) or 1.0
    sides = [(f"{pair.place} {name}", side) for pair in pairs for name, side in pair.sides]
    width = max(1, *(len(side.ids) for _, side in sides))
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("score", LIGHT)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        canvas = Canvas(figsize=(10, 0.6 + 0.5 * len(sides)))
        for axes, (name, side) in zip(canvas.subplots(len(sides), 1, squeeze=False)[:, 0], sides, strict=True):
            scores = side.scores if side.scores is not None else (0.0,) * len(side.ids)
            axes.imshow([scores], aspect="auto", cmap=colours, vmin=-scale, vmax=scale, extent=(0, len(scores), 0, 1))
            # One shape for all bars, a tenth of a cell apart: a patch for each would take a millisecond each.
            edges = [0.0, *(n + edge for n in range(len(scores)) for edge in (0.05, 0.95))]
            heights = [height for weight in side.weights for height in (0.0, -0.45 * weight)]
            axes.stairs(heights, edges, fill=True, color="#16181d", snap=True)
            axes.set(xlim=(0, width), ylim=(-0.5, 1), xticks=[], yticks=[])
            axes.set_title(name, fontsize=8, fontweight="normal", pad=2)
            axes.spines[:].set_visible(False)
        canvas.suptitle(title, fontsize=10, ha="left", x=0.01)
    return canvas


def _colour(number: int) -> str:
    return LINES[number % len(LINES)]


def _dash(number: int) -> str:
    return DASHES[number % len(DASHES)]
