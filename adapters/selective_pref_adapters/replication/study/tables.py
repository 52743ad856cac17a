"""Runs → the paper's tables: means over seeds with 95 % intervals, and paired differences.

In: a sweep's folder and plan. Out: `Table`s, which are written as Markdown and JSON.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from selective_pref_adapters.replication.study.methods import (
    BETAS,
    BEYOND,
    CONTROLS,
    METHODS,
    RATIOS,
    STRANGER,
    TABLE_1,
)
from selective_pref_adapters.replication.study.sweep import USUAL, Plan, Variation, cells_of_tests, read_cell

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
    """A method on some data: what was measured, after each multiple of the steps.

    Attributes:
        key, title: of the method.
        variation: the data's name, empty for the usual data.
        rate: its learning rate.
        measured: for each multiple ("1", "3"), and "0" for the start, name → mean over the seeds that did not diverge.
        ahead: for each multiple, how much more of the answers is right than of `against`, seed by seed.
        diverged: seeds whose run ended early.
    """

    key: str
    title: str
    variation: str
    rate: float
    measured: dict[str, dict[str, Mean]]
    ahead: dict[str, Mean]
    diverged: list[int]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a heading; `against` is the key of the method that they are compared with."""

    key: str
    title: str
    against: str
    rows: list[Row]


GROUPS: tuple[tuple[str, str, str, Sequence[Any]], ...] = (
    ("table_1", "Table 1: methods and references", "dpo", TABLE_1),
    ("controls", "Controls", "selective_strong", CONTROLS),
    ("beyond", "What may be better", "selective_strong", BEYOND),
    ("table_2", "Table 2: share of the tokens", "ratio_40", RATIOS),
    ("table_3", "Table 3: β", "selective_beta_0.01", BETAS),
    ("stranger", "A teacher of another style", "selective_strong", STRANGER),
)


def tables_of(folder: Path, plan: Plan, rates: dict[str, float]) -> list[Table]:
    """The tables of a sweep whose runs are all there; a group without a method of the plan has none."""
    results: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for cell in cells_of_tests(plan, rates):
        variation = Variation(swapped=cell.run.swapped, pairs=cell.run.pairs).name
        results.setdefault((cell.method, variation), {})[cell.seed] = read_cell(folder, cell)

    def row(method: str, variation: str, against: str) -> Row:
        return _row(method, variation, rates[method], results[method, variation], results.get((against, variation)))

    made = []
    for key, title, against, methods in GROUPS:
        rows = [row(method.key, USUAL.name, against) for method in methods if (method.key, "") in results]
        if rows:
            made.append(Table(key=key, title=title, against=against, rows=rows))
    for variation, names in plan.varied:
        rows = [row(name, variation.name, "dpo") for name in names]
        made.append(Table(key=variation.name, title=_title(variation), against="dpo", rows=rows))
    return made


def markdown(table: Table) -> str:
    """A table as Markdown: success and its distance in percent, form, and entropy and KL in nats."""
    times = [time for time in table.rows[0].measured if time != "0"]
    compared = METHODS[table.against].title
    columns = ["", "rate", *(f"right, {time}x, %" for time in times), *(f"− {compared}, {time}x" for time in times)]
    columns += ["well formed, %", "entropy", "KL to the start", "AUC chosen", "AUC rejected"]
    lines = [f"### {table.title}", "", _line(columns), "|---" * len(columns) + "|"]
    for row in table.rows:
        last = row.measured.get(times[-1], {})
        title = row.title + (f" ({len(row.diverged)} of the seeds diverged)" if row.diverged else "")
        cells = [title, f"{row.rate:g}"]
        cells += [str(row.measured[time]["success"]) if "success" in row.measured[time] else "—" for time in times]
        cells += [str(row.ahead[time]) if time in row.ahead else "—" for time in times]
        cells += [str(last["well_formed"]) if last else "—"]
        names = ("entropy", "kl", "auc/chosen", "auc/rejected")
        cells += [f"{last[name].value:.2f}" if last else "—" for name in names]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def record(table: Table) -> dict[str, Any]:
    """A table as JSON has it."""
    return asdict(table)


def _row(
    method: str,
    variation: str,
    rate: float,
    results: dict[int, dict[str, Any]],
    others: dict[int, dict[str, Any]] | None,
) -> Row:
    whole = {seed: _by_time(result) for seed, result in results.items() if not result["diverged"]}
    times = [f"{time:g}" for time in next(iter(results.values()))["run"]["times"]]
    measured: dict[str, dict[str, Mean]] = {}
    ahead: dict[str, Mean] = {}
    for time in ("0", *times):
        seen = [by_time[time] for by_time in whole.values()]
        measured[time] = {name: mean_of([one[name] for one in seen]) for name in seen[0]} if seen else {}
        if others is None or time == "0":
            continue
        pairs = [
            whole[seed][time]["success"] - _by_time(other)[time]["success"]
            for seed, other in others.items()
            if seed in whole and not other["diverged"]
        ]
        if pairs:
            ahead[time] = mean_of(pairs)
    return Row(
        key=method,
        title=METHODS[method].title,
        variation=variation,
        rate=rate,
        measured=measured,
        ahead=ahead,
        diverged=sorted(seed for seed, result in results.items() if result["diverged"]),
    )


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
