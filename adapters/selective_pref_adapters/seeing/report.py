"""`selective-pref report`: runs → one page: their curves, what differs between them, what a reader may conclude.

In: a `ReportConfig`. Out: a page. What it concludes is what `monitoring.verdict` says, as at the end of
`selective-pref train`, and what `SelectionCallback` warned of while the run went on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from selective_pref_adapters.monitoring import verdict
from selective_pref_adapters.seeing.figures import Figure, series_figure, write_figures
from selective_pref_adapters.seeing.options import ReportConfig
from selective_pref_adapters.seeing.page import SelectionPage, template
from selective_pref_adapters.seeing.runs import Run, Visit, differences, read_runs
from selective_pref_adapters.seeing.shown import overlap
from selective_pref_adapters.seeing.statistics import Table
from selective_pref_adapters.seeing.tokens import printable, score_scale, tint

CURVES = (
    ("rewards/margins", "Margin, full responses", "Judge a run by this one: it should rise."),
    ("rewards/accuracies", "Accuracy, full responses", "Share of the pairs with a full margin above 0."),
    ("loss", "Loss", "The dotted line is log 2: a selective loss above it is normal."),
    ("selection/rewards/margins", "Margin, kept tokens", "Biased low by construction: below 0 is normal."),
    ("selection/rewards/accuracies", "Accuracy, kept tokens", "Biased low likewise."),
    ("selection/fraction", "Kept share", "Kept weight over tokens."),
    ("selection/tied_fraction", "Tied share", "Tokens on the threshold with another. Near 1 where models are equal."),
    ("selection/threshold", "Threshold", "The lowest score that was kept, nats."),
    ("learning_rate", "Learning rate", "As it was scheduled."),
    ("grad_norm", "Gradient norm", "Before clipping."),
)
COUNTS = (
    ("skipped_batches", "Batches left out", "Not finite, left out so far."),
    ("skipped_steps", "Steps left out", "Not finite, left out so far."),
    ("selection/skipped_pairs", "Pairs left out", "Share of the pairs with a broken reference."),
    ("selection/empty_rows", "Empty responses", "Share of the responses without a token that counts."),
    ("selection/nonfinite_rows", "Broken responses", "Share of the responses with a value that is not finite."),
)
"""Shown only where one is above 0."""

SHARES = ("rewards/accuracies", "selection/rewards/accuracies", "selection/fraction", "selection/tied_fraction")
"""Drawn from 0 to 1."""

_FRAMES, _FILMS = 12, 4  # visits of one film strip, and pairs that have one


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence on a run, of the kind "good", "normal" or "warning"."""

    kind: str
    text: str


def report(config: ReportConfig) -> Path:
    """Writes the page of the runs, and returns its path.

    Raises:
        ValueError: a folder that holds no run; the message says what was looked for.
        OSError: the page cannot be written.
    """
    if Path(config.out).suffix != ".html":
        raise ValueError(f"--out must end in .html; got {config.out!r}")
    runs = read_runs(config.runs)
    figures = run_figures(runs)
    path = report_page(runs, figures, title=config.title).write(config.out)
    if config.figures is not None:
        write_figures(Path(config.figures), figures)
    console = Console(stderr=True, highlight=False)
    for run in runs:
        for finding in findings(run):
            label = "" if finding.kind == "normal" else f"{finding.kind}: "
            console.print(f"{run.name}: {label}{finding.text}", soft_wrap=True, markup=False)
    console.print(f"report: {path}", soft_wrap=True, markup=False)
    return path


def report_page(runs: Sequence[Run], figures: Sequence[Figure], *, title: str) -> SelectionPage:
    """The page of some runs."""
    rows = differences(runs) if len(runs) > 1 else []
    tables = [
        Table(caption="What differs", head=("option", *(run.name for run in runs)), rows=rows, numbers=False),
    ]
    html = template("report.html").render(
        title=title,
        runs=[
            {"run": run, "findings": findings(run), "steps": max(line["step"] for line in run.lines)} for run in runs
        ],
        tables=tables if rows else [],
        several=len(runs) > 1,
        figures=figures,
        films=[film for run in runs for film in films(run)],
    )
    return SelectionPage(html)


def run_figures(runs: Sequence[Run]) -> list[Figure]:
    """A figure for each metric that a run logged, in training and in evaluation."""
    drawn: list[Figure] = []
    for kinds, positive in ((CURVES, False), (COUNTS, True)):
        for name, title, caption in kinds:
            for prefix, where in (("eval_", ", held out"), ("", "")):
                series = {run.name: run.series(prefix + name) for run in runs}
                series = {run: points for run, points in series.items() if points[0]}
                if not series or (positive and not any(v > 0 for _, values in series.values() for v in values)):
                    continue
                absent = [run.name for run in runs if run.name not in series]
                said = f"{caption} Not logged by {', '.join(absent)}." if absent else caption
                supervised = not any(run.series(f"{prefix}rewards/margins")[0] for run in runs)
                level = math.log(2) if name == "loss" and not supervised else None
                file = (prefix + name).replace("/", "_")
                drawn.append(series_figure(file, title + where, said, series, level=level, share=name in SHARES))
    series = {run.name: points for run in runs if (points := run.overlaps())[0]}
    if series:
        caption = "Of the fixed pairs: the share of the selection that was selected at the visit before."
        drawn.append(series_figure("overlap", "Overlap from visit to visit", caption, series, share=True))
    return drawn


def findings(run: Run) -> list[Finding]:
    """What a reader should conclude: what the callback said while the run went on, then `monitoring.verdict`."""
    selective = run.config.get("objective", "selective_dpo") == "selective_dpo"
    ratio = run.config.get("selection_ratio") or 1.0
    selects = selective and ratio < 1
    said = verdict(run.lines, selection_ratio=ratio if selects else 1.0, patience=run.patience)
    given = {warning["kind"]: f"step {warning['step']}: {warning['message']}" for warning in run.warnings}
    warned = {kind: f"{text[0].upper()}{text[1:]}." for kind, text in said.warnings.items()}
    found = [Finding(kind="warning", text=text) for text in (warned | given).values()]
    broken = sum(math.isnan(value) for name in ("loss", "rewards/margins") for value in run.series(name)[1])
    if broken:
        found.append(Finding(kind="warning", text=f"{broken} logged losses or margins are not finite."))
    if said.moved:
        good = said.rose and "falling" not in said.warnings
        found.append(Finding(kind="good" if good else "normal", text=said.moved))
    prefix = "eval_" if len(run.series("eval_rewards/margins")[0]) > 1 else ""
    losses, selected = (run.series(f"{prefix}{name}")[1] for name in ("loss", "selection/rewards/margins"))
    if selects and losses and losses[-1] > math.log(2):
        text = f"The loss ends at {losses[-1]:.4g}, above log 2. "
        text += "With a selection that is normal where the full margin rises." if said.rose else "See the full margin."
        found.append(Finding(kind="normal", text=text))
    if selects and selected and selected[-1] < 0:
        text = f"The margin of the kept tokens ends at {selected[-1]:.4g}: selection takes the tokens that look worst, "
        found.append(Finding(kind="normal", text=f"{text}so below 0 is normal. Judge by the full margin."))
    if not said.moved:
        text = "There are no two values of rewards/margins and rewards/accuracies (of loss, in supervised training) to "
        text += "compare: nothing can be concluded."
        found.append(Finding(kind="normal", text=text))
    return found


# --- film strips -----------------------------------------------------------------------------------------------------


def films(run: Run) -> list[dict[str, Any]]:
    """For each side of a few fixed pairs: its selection at some of the visits, first and last included."""
    visits = _spread(run.visits)
    if not visits:
        return []
    scores = [s for visit in visits for pair in visit.pairs for side in _sides(pair) for s in side["scores"] or ()]
    scale = score_scale(score for score in scores if score is not None) or 1.0
    strips: list[dict[str, Any]] = []
    for number in range(min(_FILMS, *(len(visit.pairs) for visit in visits))):
        for name in ("chosen", "rejected"):
            if any(name not in visit.pairs[number] for visit in visits):
                continue  # supervised training reads the chosen side alone
            sides = [visit.pairs[number][name] for visit in visits]
            steps = [visit.step for visit in visits]
            place = visits[0].pairs[number].get("place", "")
            if any(side["ids"] != sides[0]["ids"] for side in sides):
                continue  # other pairs were drawn from some visit on
            shared = [None, *(overlap(_weights(a), _weights(b)) for a, b in pairwise(sides))]
            strips.append(
                {
                    "title": f"{run.name}: {printable(place)}, {name}",
                    "frames": [
                        {
                            "step": step,
                            "kept": f"{sum(_weights(side)):g} of {sum(side['counts'])}",
                            "shared": None if share is None else f"{100 * share:.0f} %",
                            "tokens": _tokens(side, scale),
                        }
                        for step, side, share in zip(steps, sides, shared, strict=True)
                    ],
                }
            )
    return strips


def _spread(visits: Sequence[Visit]) -> list[Visit]:
    """At most so many visits as a strip has frames, evenly spaced."""
    if len(visits) <= _FRAMES:
        return list(visits)
    return [visits[round(n * (len(visits) - 1) / (_FRAMES - 1))] for n in range(_FRAMES)]


def _sides(pair: dict[str, Any]) -> list[dict[str, Any]]:
    return [pair[name] for name in ("chosen", "rejected") if name in pair]


def _weights(side: dict[str, Any]) -> list[float]:
    return [weight or 0.0 for weight in side["weights"]]


def _tokens(side: dict[str, Any], scale: float) -> list[tuple[str, str]]:
    """(classes of the style sheet, text) of each token."""
    scores = side["scores"] or [0.0] * len(side["ids"])
    tokens: list[tuple[str, str]] = []
    for text, counts, weight, score in zip(side["texts"], side["counts"], _weights(side), scores, strict=True):
        step = tint(score, scale) if counts and score is not None else 0
        classes = ["t" if counts else "t x", "k" if weight >= 1 else "f" if weight > 0 else ""]
        classes.append(f"{'h' if step > 0 else 'l'}{abs(step)}" if step else "n" if score is None else "")
        tokens.append((" ".join(filter(None, classes)), printable(text)))
    return tokens
