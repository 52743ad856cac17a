"""`selective-pref replicate`: the paper's tables in miniature, with controls. In: flags. Out: a folder of results."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from selective_pref_adapters.files import write_whole
from selective_pref_adapters.replication.findings import failures, findings
from selective_pref_adapters.replication.miniature.methods import METHODS
from selective_pref_adapters.replication.miniature.worlds import FULL, TINY
from selective_pref_adapters.replication.options import ReplicateConfig
from selective_pref_adapters.replication.page import results_page, selection_page_of
from selective_pref_adapters.replication.plots import figures_of
from selective_pref_adapters.replication.sweep import Plan, Variation, sweep
from selective_pref_adapters.replication.tables import Table, cells_of, markdown, record, score_cells, tables_of
from selective_pref_adapters.seeing.figures import write_figures

ON_OTHER_DATA = ("dpo", "selective_strong", "veto", "distillation")
VARIED = tuple(
    (variation, ON_OTHER_DATA)
    for variation in (Variation(swapped=0.0), Variation(swapped=0.5), Variation(swapped=1.0), Variation(pairs=150))
)

QUICK_RATES = {
    "dpo": 1e-4,
    "distilled_dpo": 1e-4,
    "selective_weak": 3e-3,
    "selective_strong": 1e-3,
    "selective_own": 3e-3,
    "random": 1e-4,
    "wrong_way": 3e-5,
    "sft": 3e-3,
    "distillation": 3e-3,
    "veto": 1e-3,
}
"""Methods of the quick form, with the rates that the full form found for them."""


def plan_of(config: ReplicateConfig) -> Plan:
    """What the flags ask for."""
    usual = 1 if config.tiny else 4 if config.quick else 5
    seeds = tuple(range(usual if config.seeds is None else config.seeds))
    if config.tiny:
        some = ("dpo", "distilled_dpo", "selective_strong", "veto")
        varied = ((Variation(swapped=0.5), ("dpo", "selective_strong")),)
        return Plan(scale=TINY, methods=some, varied=varied, rates=(1e-4, 1e-3), tuning_seeds=(100,), test_seeds=seeds)
    if config.quick:
        return Plan(
            methods=tuple(QUICK_RATES),
            known_rates=QUICK_RATES,
            tuning_seeds=(),
            test_seeds=seeds,
            times=(1,),
            models=("student", "weak", "teacher"),
        )
    return Plan(scale=FULL, methods=tuple(METHODS), varied=VARIED, test_seeds=seeds)


def replicate(config: ReplicateConfig) -> int:
    """Runs what is lacking, and writes `index.html`, `tables.md`, `tables.json` and the figures.

    Returns:
        The exit status: 1 where `strict` is asked for and a robust finding did not come out, else 0.

    Raises:
        SweepError: the folder holds runs of another scale, or a damaged file.
    """
    if config.pairs is not None:
        from selective_pref_adapters.replication.real.command import replicate_real  # needs the training job

        return replicate_real(config)
    folder, plan = Path(config.output_dir), plan_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    console, start = Console(highlight=False), time.monotonic()
    rates = sweep(folder, plan, processes=config.processes)
    tables = tables_of(folder, plan, rates)
    found = [] if config.tiny else findings(tables)
    figures = figures_of(tables)
    write_whole(folder / "tables.md", "\n".join(markdown(title, *cells) for title, cells in _all_cells(tables)))
    write_whole(folder / "tables.json", json.dumps([record(table) for table in tables], indent=2) + "\n")
    write_figures(folder / "figures", figures)
    page = results_page(found, _all_cells(tables), figures).write(folder / "index.html")
    for table in tables:
        console.print(_grid(table))
    for finding in found:
        console.print(f"• {finding.text}", soft_wrap=True)
    seen = selection_page_of(folder / "worlds" / f"seed-{plan.test_seeds[0]}")
    console.print(f"{time.monotonic() - start:.0f} s; runs, tables and figures: {folder}", soft_wrap=True)
    console.print(f"all of it on one page: {page}", soft_wrap=True)
    console.print(f"which tokens Selective-DPO reads at its first step: {seen}", soft_wrap=True)
    failed = failures(found)
    for text in failed if config.strict else ():
        console.print(f"did not come out as it always did: {text}", soft_wrap=True)
    return 1 if failed and config.strict else 0


def _all_cells(tables: list[Table]) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """(title, (columns, rows)) of every table, and of the score over training."""
    made = [(table.title, cells_of(table)) for table in tables]
    return [*made, *((f"The score over training: {t.title}", score_cells(t)) for t in tables if t.key == "table_1")]


def _grid(table: Table) -> Grid:
    """What a terminal shows: right answers alone."""
    grid = Grid(title=f"{table.title}: right answers to unseen prompts, %", title_justify="left")
    grid.add_column("")
    grid.add_column("rate", justify="right")
    for multiple in table.times:
        grid.add_column(f"{multiple}x steps", justify="right")
    for row in table.rows:
        rate = "" if row.rate is None else f"{row.rate:g}"
        grid.add_row(row.title, rate, *(str(row.success(multiple) or "diverged") for multiple in table.times))
    return grid
