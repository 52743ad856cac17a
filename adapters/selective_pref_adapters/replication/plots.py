"""Tables and runs → figures: methods side by side, ratios, β, and how the score fares during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from selective_pref_adapters.replication.tables import Mean, Row, Table
from selective_pref_adapters.seeing.figures import CHOSEN, LINES, REJECTED, SOFT, Figure, figure


def figures_of(tables: Sequence[Table]) -> list[Figure]:
    """A figure for each table, and one of the score's AUC over training."""
    made = [_bars(table) for table in tables]
    first = next((table for table in tables if table.key == "table_1"), None)
    return [*made, *([] if first is None else [_score_over_training(first)])]


def _bars(table: Table) -> Figure:
    """Success of each row after 1x and 3x steps, with intervals, the start as a line."""
    rows, times = table.rows, table.times
    step = 0.8 / len(times)
    start = next((mean for row in rows if row.rate is not None and (mean := row.success("0"))), None)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, time in enumerate(times):
            found = [row.success(time) for row in rows]
            places = [place - 0.4 + step * (number + 0.5) for place in range(len(rows))]
            axes.barh(
                places,
                [math.nan if mean is None else 100 * mean.value for mean in found],
                step * 0.92,
                xerr=[0 if mean is None or math.isnan(mean.half) else 100 * mean.half for mean in found],
                color=(CHOSEN, REJECTED, *LINES)[number],
                ecolor=SOFT,
                label=f"{time}x steps",
            )
        if start is not None:
            axes.axvline(100 * start.value, color=SOFT, ls="--", label="start")
        axes.set_yticks(range(len(rows)), [row.title for row in rows])
        axes.invert_yaxis()
        axes.set(title=table.title, xlabel="sampled answers that are right, %", xlim=(0, 100))
        axes.grid(axis="y", visible=False)
        canvas.legend(fontsize=8.5, loc="outside lower center", ncols=3)

    caption = f"{table.title}: right answers to unseen prompts, mean over {_seeds(rows)} and 95 % interval."
    return figure(table.key, caption, draw, (7.4, 1.5 + 0.42 * len(rows)))


def _score_over_training(table: Table) -> Figure:
    """Whether a token that decides still has the higher score, at each measurement of the selective runs."""
    rows = [row for row in table.rows if row.key.startswith("selective")]

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, row in enumerate(rows):
            for side, dash in (("chosen", "-"), ("rejected", "--")):
                times = [time for time, found in row.measured.items() if found]
                means = [row.measured[time][f"auc/{side}"].value for time in times]
                axes.plot(
                    [float(time) for time in times],
                    means,
                    ls=dash,
                    marker="o",
                    color=LINES[number],
                    label=f"{row.title}, {side}",
                )
        axes.axhline(0.5, color=SOFT, lw=1)
        axes.set(title="Does the score find what decides?", xlabel="steps, in multiples", ylabel="AUC", ylim=(0, 1.03))
        axes.legend(fontsize=8)

    caption = (
        "The chance that a token that decides has a higher score (Eq. 6, beside the strong reference) than one that "
        "does not. Below one half, the score points at the others."
    )
    return figure("score_over_training", caption, draw, (7.4, 3.4))


def _seeds(rows: Sequence[Row]) -> str:
    counts = {mean.seeds for row in rows for found in row.measured.values() for mean in _successes(found)}
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)})) + " seeds"


def _successes(found: dict[str, Mean]) -> list[Mean]:
    return [found["success"]] if "success" in found else []
