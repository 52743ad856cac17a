"""Runs → the paper's tables: means over seeds with 95 % intervals, and paired differences.

In: a sweep's folder and plan. Out: `Table`s of `Row`s, and the same as Markdown, as JSON and for a page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from selective_pref_adapters.replication.miniature.methods import (
    BETAS,
    BEYOND,
    CONTROLS,
    GIVEN,
    METHODS,
    RATIOS,
    STRANGER,
    TABLE_1,
)
from selective_pref_adapters.replication.sweep import (
    USUAL,
    Plan,
    Variation,
    cells_of_tests,
    given_path,
    read_cell,
    read_record,
)

CHANCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds, with half of the width of its 95 % interval (Student's t; NaN of one seed)."""

    value: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}" + ("" if math.isnan(self.half) else f" ± {100 * self.half:.1f}")


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of one value for each seed."""
    count = len(values)
    half = math.nan
    if count > 1:
        half = float(student_t.ppf((1 + CHANCE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Mean(value=statistics.mean(values), half=half, seeds=count)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method on some data, or a model that is given: what was measured, after each multiple of the steps.

    Attributes:
        key, title: of the method or model.
        variation: the data's name, empty for the usual data.
        rate: its learning rate; None of a model that is given, which is the same at all times.
        measured: for each multiple ("1", "3"), and "0" for the start, name → mean over the seeds that did not diverge.
        ahead: for each multiple, how much more of the answers is right than of the table's `against`, seed by seed.
        diverged: seeds whose run ended early.
    """

    key: str
    title: str
    variation: str
    rate: float | None
    measured: dict[str, dict[str, Mean]]
    ahead: dict[str, Mean]
    diverged: list[int]

    def success(self, time: str) -> Mean | None:
        """The share of right answers; None where every seed diverged."""
        return self.measured[time].get("success")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a heading; `against` is the key of the method that they are compared with."""

    key: str
    title: str
    against: str
    rows: list[Row]

    @property
    def times(self) -> list[str]:
        """The whole multiples of the steps: those that a table shows."""
        return [time for time in self.rows[0].measured if float(time) >= 1]

    def row(self, key: str) -> Row | None:
        """The row of a method or model, if there is one."""
        return next((row for row in self.rows if row.key == key), None)


Entries = Sequence[tuple[str, str]]
"""(key, title) of each row."""


def _entries(methods: Sequence[Any], *given: str) -> Entries:
    return [*((name, GIVEN[name]) for name in given), *((method.key, method.title) for method in methods)]


GROUPS: tuple[tuple[str, str, str, Entries], ...] = (
    ("table_1", "Table 1: methods and references", "dpo", _entries(TABLE_1, "student", "weak", "teacher")),
    ("controls", "Controls", "selective_strong", _entries(CONTROLS)),
    ("beyond", "What may be better", "selective_strong", _entries(BEYOND)),
    ("table_2", "Table 2: share of the tokens", "selective_strong", _entries(RATIOS)),
    ("table_3", "Table 3: β", "selective_strong", _entries(BETAS)),
    ("stranger", "A teacher of another style", "selective_strong", _entries(STRANGER, "stranger")),
)


def tables_of(folder: Path, plan: Plan, rates: dict[str, float]) -> list[Table]:
    """The tables of a sweep whose runs are all there; a group without a method of the plan has none.

    Raises:
        SweepError: a damaged file.
    """
    results: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for cell in cells_of_tests(plan, rates):
        variation = Variation(swapped=cell.run.swapped, pairs=cell.run.pairs).name
        results.setdefault((cell.method, variation), {})[cell.seed] = read_cell(folder, cell)
    for seed in plan.test_seeds:
        for name, found in read_record(given_path(folder, seed)).items():
            measured = [{"times": time, **found} for time in (0, *plan.times)]
            results.setdefault((name, ""), {})[seed] = {"diverged": False, "measured": measured}

    def row(key: str, title: str, variation: str, against: str) -> Row:
        other = results.get((against, variation), {})
        return _row((key, title, variation, rates.get(key)), plan.times, results[key, variation], other)

    made: list[Table] = []
    shown: set[str] = set()  # a table that has no method of its own says nothing
    for key, title, against, entries in GROUPS:
        rows = [row(name, said, USUAL.name, against) for name, said in entries if (name, "") in results]
        own = {one.key for one in rows if one.rate is not None} - shown
        shown |= own
        if own:
            made.append(Table(key=key, title=title, against=against, rows=rows))
    for variation, names in plan.varied:
        rows = [row(name, METHODS[name].title, variation.name, "dpo") for name in names]
        made.append(Table(key=variation.name, title=_title(variation), against="dpo", rows=rows))
    return made


def cells_of(table: Table) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows) as text: success and its distance in percent, form, and entropy and KL in nats."""
    times = table.times
    compared = METHODS[table.against].title
    head = ["", "rate", *(f"right, {time}x, %" for time in times), *(f"− {compared}, {time}x" for time in times)]
    head += ["well formed, %", "entropy", "KL to the start"]
    rows = []
    for row in table.rows:
        last = row.measured[times[-1]]
        cells = [row.title + (f" ({len(row.diverged)} of the seeds diverged)" if row.diverged else "")]
        cells += ["—" if row.rate is None else f"{row.rate:g}"]
        cells += [str(row.success(time) or "—") for time in times]
        cells += [str(row.ahead.get(time, "—")) for time in times]
        cells += [str(last["well_formed"]) if last else "—"]
        cells += [f"{last[name].value:.2f}" if last else "—" for name in ("entropy", "kl")]
        rows.append(cells)
    return head, rows


def score_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows) as text: after each multiple of the steps, does the score find what decides?"""
    head = ["", "steps", *(f"{name}, {side}" for side in ("chosen", "rejected") for name in ("AUC", "precision, %"))]
    rows = []
    for row in table.rows:
        for time in row.measured if row.key.startswith("selective") else ():
            if found := row.measured[time]:
                cells = [row.title, f"{time}x"]
                for side in ("chosen", "rejected"):
                    precision, base = (100 * found[f"{name}/{side}"].value for name in ("precision", "base"))
                    cells += [f"{found[f'auc/{side}'].value:.2f}", f"{precision:.0f} (of all: {base:.0f})"]
                rows.append(cells)
    return head, rows


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown, under its heading."""
    lines = [f"### {title}", "", _line(head), "|---" * len(head) + "|", *map(_line, rows)]
    return "\n".join(lines) + "\n"


def record(table: Table) -> dict[str, Any]:
    """A table as JSON has it."""
    return asdict(table)


def _row(
    names: tuple[str, str, str, float | None],
    times: Sequence[float],
    results: dict[int, dict[str, Any]],
    others: dict[int, dict[str, Any]],
) -> Row:
    """A row (key, title, variation, rate), from what each seed found, and what the seeds of `against` did."""
    key, title, variation, rate = names
    whole = {seed: _by_time(result) for seed, result in results.items() if not result["diverged"]}
    other = {seed: _by_time(result) for seed, result in others.items() if not result["diverged"]}
    both = sorted(whole.keys() & other.keys())
    measured: dict[str, dict[str, Mean]] = {}
    ahead: dict[str, Mean] = {}
    for time in (f"{time:g}" for time in (0, *times)):
        seen = [by_time[time] for by_time in whole.values()]
        measured[time] = {name: mean_of([one[name] for one in seen]) for name in seen[0]} if seen else {}
        if both and time != "0":
            ahead[time] = mean_of([whole[seed][time]["success"] - other[seed][time]["success"] for seed in both])
    diverged = sorted(seed for seed, result in results.items() if result["diverged"])
    return Row(key=key, title=title, variation=variation, rate=rate, measured=measured, ahead=ahead, diverged=diverged)


def _by_time(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        f"{one['times']:g}": {name: value for name, value in one.items() if name != "times"}
        for one in result["measured"]
    }


def _title(variation: Variation) -> str:
    parts = [f"{100 * variation.swapped:g} % of the labels swapped"] if variation.swapped != USUAL.swapped else []
    return ", ".join([*parts, *([] if variation.pairs is None else [f"{variation.pairs} pairs"])])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
