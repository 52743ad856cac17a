"""Tables → what they show, in sentences that are made from the numbers, whatever those are.

A finding is *robust* where it came out on every seed and setting that was tried: then it has an expectation, and
`holds` says whether these numbers meet it. Everything else is told and not expected: in particular no share and no β is
expected to be the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from selective_pref_adapters.replication.tables import Mean, Row, Table

FAR, NEAR = 0.15, 0.1
"""Shares of right answers: what counts as far above, and as near, where the robust findings are asserted."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence; `holds` is None where nothing is expected."""

    text: str
    holds: bool | None = None


def findings(tables: Sequence[Table]) -> list[Finding]:
    """All that the tables tell; a table or row that is not there tells nothing."""
    rows = {row.key: row for table in tables for row in table.rows if not row.variation}
    by_key = {table.key: table for table in tables}
    found = [*_robust(rows)]
    found += [_best(by_key[key]) for key in ("table_2", "table_3") if key in by_key]
    found += _beyond(rows)
    if strong := rows.get("selective_strong"):
        found += _score_over_training(strong)
    if "stranger" in rows:
        found += _vetoed(rows)
    return [*found, *(_other_data(table) for table in tables if any(row.variation for row in table.rows))]


def failures(found: Sequence[Finding]) -> list[str]:
    """The sentences of robust findings that did not come out."""
    return [finding.text for finding in found if finding.holds is False]


def _robust(rows: dict[str, Row]) -> list[Finding]:
    strong, start = rows.get("selective_strong"), rows.get("student")
    if strong is None or start is None:
        return []
    found = []
    for key in ("dpo", "distilled_dpo", "random", "selective_own"):
        if other := rows.get(key):
            gap = _gap(strong, other)
            text = f"Selective-DPO with the strong reference answers {_right(strong)} right, {_named(other)}."
            found.append(Finding(text=text, holds=gap > FAR))
    if wrong := rows.get("wrong_way"):
        below = _gap(wrong, start) < 0
        text = f"Keeping the lowest scores: {_right(wrong)} right, {'' if below else 'not '}below the start "
        found.append(Finding(text=f"{text}({_right(start)}).", holds=below))
    if own := rows.get("selective_own"):
        gap = _gap(own, start)
        text = f"With its own start as reference, Selective-DPO ends at {_right(own)}, {_points(gap)} from the start: "
        text += "every score begins at 0, and what moves drops out." if abs(gap) < NEAR else "more than was expected."
        found.append(Finding(text=text, holds=abs(gap) < NEAR))
    if (distilled := rows.get("distilled_dpo")) and (plain := rows.get("dpo")):
        gap = _gap(distilled, plain)
        text = f"Distilled DPO is {_points(gap)} from DPO: at ratio 1 a reference only weighs the pairs, and at this β "
        text += "the weights hardly differ." if abs(gap) < NEAR else "that was expected to differ little."
        found.append(Finding(text=text, holds=abs(gap) < NEAR))
    return found


def _best(table: Table) -> Finding:
    """Which rows cannot be told from the best one by their intervals."""
    time = table.times[-1]
    known = [(row, mean) for row in table.rows if (mean := row.success(time)) is not None]
    best, top = max(known, key=lambda one: one[1].value)
    alike = [row.title for row, mean in known if mean.value + _half(mean) >= top.value - _half(top)]
    text = f"{table.title}: after {time}x steps the highest mean is {best.title} with {_percent(top)}"
    others = [title for title in alike if title != best.title]
    return Finding(
        text=f"{text}; not to be told from it by their intervals: {', '.join(others)}."
        if others
        else f"{text}, apart from all others."
    )


def _beyond(rows: dict[str, Row]) -> list[Finding]:
    strong = rows.get("selective_strong")
    if strong is None:
        return []
    names = ("veto", "distillation", "distillation_sharp", "fixed_and_moving", "above_0", "sft")
    last = list(strong.measured)[-1]
    known = [f"{row.title} {_percent(mean)}" for key in names if (row := rows.get(key)) and (mean := row.success(last))]
    if not known:
        return []
    at_end = strong.success(last)
    text = f"Beside it, after {last}x steps: {', '.join(known)}"
    return [Finding(text=f"{text}; Selective-DPO {'diverged' if at_end is None else _percent(at_end)}.")]


def _score_over_training(strong: Row) -> list[Finding]:
    times = [time for time, found in strong.measured.items() if found]
    if len(times) < 2:
        return []
    first, last = (strong.measured[time] for time in (times[0], times[-1]))
    said = [f"{side} {first[f'auc/{side}'].value:.2f} to {last[f'auc/{side}'].value:.2f}" for side in SIDES]
    text = f"The score's AUC for tokens that decide, from the start to {times[-1]}x steps: {' and '.join(said)}"
    below = [side for side in SIDES if last[f"auc/{side}"].value < 0.5 <= first[f"auc/{side}"].value]
    text += f": it inverts ({', '.join(below)}), since learnt tokens drop out." if below else "."
    return [Finding(text=text)]


SIDES = ("chosen", "rejected")


def _vetoed(rows: dict[str, Row]) -> list[Finding]:
    shares = {name: rows[name].measured["0"]["vetoed"] for name in ("teacher", "stranger") if name in rows}
    if len(shares) < 2:
        return []
    text = "At least 1 nat less likely than under the start, and so vetoed, are "
    text += (
        f"{_percent(shares['teacher'])} of the tokens under the strong reference and {_percent(shares['stranger'])} "
    )
    return [Finding(text=text + "under the teacher of another style: above about a tenth, a veto means another style.")]


def _other_data(table: Table) -> Finding:
    time = table.times[-1]
    said = ", ".join(f"{row.title} {_percent(mean)}" for row in table.rows if (mean := row.success(time)))
    return Finding(text=f"{table.title}, after {time}x steps: {said}.")


def _gap(row: Row, other: Row) -> float:
    """How much more is right after 1x steps; a run that diverged has nothing right."""
    return (_value(row) or 0.0) - (_value(other) or 0.0)


def _value(row: Row) -> float | None:
    mean = row.success("1")
    return None if mean is None else mean.value


def _right(row: Row) -> str:
    mean = row.success("1")
    return "nothing (diverged)" if mean is None else _percent(mean)


def _named(row: Row) -> str:
    return f"{row.title} {_right(row)}"


def _percent(mean: Mean) -> str:
    return f"{mean} %"


def _points(gap: float) -> str:
    return f"{abs(100 * gap):.1f} points"


def _half(mean: Mean) -> float:
    return 0.0 if math.isnan(mean.half) else mean.half
