"""The results as pages. In: findings, tables, figures. Out: one page of all of it, and one of what the loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selective_pref_adapters.replication.findings import Finding
from selective_pref_adapters.replication.miniature.methods import BETA, RATIO
from selective_pref_adapters.seeing.figures import Figure
from selective_pref_adapters.seeing.inspect_command import inspect
from selective_pref_adapters.seeing.options import InspectConfig
from selective_pref_adapters.seeing.page import SelectionPage, template
from selective_pref_adapters.seeing.statistics import Table

ROWS = "1-12"
"""Held-out pairs that are shown."""


def results_page(
    found: Sequence[Finding],
    tables: Sequence[tuple[str, tuple[Sequence[str], Sequence[Sequence[str]]]]],
    figures: Sequence[Figure],
    *,
    title: str = "The paper's tables in miniature",
) -> SelectionPage:
    """Findings, then figures, then tables: (title, (columns, rows))."""
    return SelectionPage(
        template("replication.html").render(
            title=title,
            findings=found,
            figures=figures,
            tables=[
                Table(caption=title, head=tuple(head), rows=[tuple(row) for row in rows])
                for title, (head, rows) in tables
            ],
        )
    )


def selection_page_of(world: Path) -> Path:
    """Writes `selection.html`: the first held-out pairs, as the start reads them beside the strong reference."""
    path = world / "selection.html"
    inspect(
        InspectConfig(
            model=str(world / "student"),
            ref_model=str(world / "teacher"),
            pairs=str(world / "held_out.jsonl"),
            rows=ROWS,
            out=str(path),
            title="What Selective-DPO reads at its first step",
            selection_ratio=RATIO,
            beta=BETA,
        )
    )
    return path
