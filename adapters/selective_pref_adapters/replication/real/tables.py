"""Runs on real pairs → tables: accuracy of the implicit reward, log-probs, and what selection favours.

In: a folder of runs. Out: (title, (columns, rows)) of text, for Markdown, a terminal and a page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selective_pref_adapters.replication.real.runs import METHODS, RealCell, path_of
from selective_pref_adapters.replication.real.start import MODELS
from selective_pref_adapters.replication.tables import mean_of

Cells = tuple[str, tuple[list[str], list[list[str]]]]
TITLES = {"student": "start", "weak": "weak reference: the start after DPO", "teacher": "strong reference"}


def results_table(folder: Path, cells: Sequence[RealCell]) -> Cells:
    """A row for each model that is given, and for each method at each rate; means over the seeds."""
    head = [
        "",
        "rate",
        "implicit reward right, %",
        "chosen likelier, %",
        "log-prob of a chosen token",
        "of a rejected one",
    ]
    rows = [[TITLES[name], "—", *_cells([_read(folder, name)])] for name in MODELS]
    rows[0][2] = "—"  # the start's distance from itself
    for method, rate in dict.fromkeys((cell.method, cell.rate) for cell in cells):
        found = [_read(folder, cell.name) for cell in cells if (cell.method, cell.rate) == (method, rate)]
        whole = [one for one in found if not one.get("diverged")]
        title = METHODS[method].title + ("" if len(whole) == len(found) else f" ({len(found) - len(whole)} diverged)")
        rows.append([title, f"{rate:g}", *(_cells(whole) if whole else ["—"] * 4)])
    return "Held-out pairs", (head, rows)


def classes_table(folder: Path) -> Cells:
    """Which share of each class of token is kept at the first step, beside each reference."""
    found = {name: json.loads((folder / "selected" / name / "statistics.json").read_text()) for name in MODELS[1:]}
    sides = ("chosen", "rejected")
    head = [
        "class of token",
        "how many",
        *(f"{TITLES[name].split(':')[0]}, {side}" for name in found for side in sides),
    ]
    counts: dict[str, int] = {}
    for side in sides:
        for kind, (count, _) in found["teacher"]["sides"][side]["by_class"].items():
            counts[kind] = counts.get(kind, 0) + count
    rows = []
    for kind, count in sorted(counts.items(), key=lambda one: -one[1]):
        kept = [found[name]["sides"][side]["by_class"].get(kind) for name in found for side in sides]
        rows.append([kind, f"{count:,}", *("—" if one is None else f"{100 * one[1]:.0f} %" for one in kept)])
    return "Kept share by class of token, at the first step", (head, rows)


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = path_of(folder, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and run the same command again") from None


def _cells(found: Sequence[dict[str, float]]) -> list[str]:
    shares = [str(mean_of([one[name] for one in found])) for name in ("accuracy", "likelier")]
    return [*shares, *(f"{mean_of([one[name] for one in found]).value:.3f}" for name in ("chosen", "rejected"))]
