"""`selective-pref replicate --pairs … --sft-data …`: the comparison on real pairs. Out: a folder of results."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from selective_pref_adapters.files import write_whole
from selective_pref_adapters.replication.options import ReplicateConfig
from selective_pref_adapters.replication.page import results_page
from selective_pref_adapters.replication.real.runs import RATES, RATIO, RealCell, cells_of, measure, path_of, run_cell
from selective_pref_adapters.replication.real.start import MODELS, REAL, TINY_REAL, prepare_real
from selective_pref_adapters.replication.real.tables import classes_table, results_table
from selective_pref_adapters.replication.sweep import pool
from selective_pref_adapters.replication.tables import markdown
from selective_pref_adapters.seeing.inspect_command import inspect
from selective_pref_adapters.seeing.options import InspectConfig

COUNTED = 300
"""Held-out rows that the statistics of the selection read."""


def replicate_real(config: ReplicateConfig) -> int:
    """Runs what is lacking, and writes `index.html`, `tables.md`, `tables.json` and pages of the selection.

    Returns:
        The exit status, 0.

    Raises:
        ValueError, OSError: files that cannot be read, a folder made from other data, a damaged file.
    """
    folder, scale = Path(config.output_dir), TINY_REAL if config.tiny else REAL
    seeds = config.seeds or (1 if config.tiny else 2)
    cells = cells_of(RATES[:1] if config.tiny else RATES, seeds)
    console, start = Console(highlight=False), time.monotonic()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    with said_in(folder / "training.log"):
        prepare_real(folder, str(config.pairs), str(config.sft_data), scale)
    lacking = [name for name in MODELS if not path_of(folder, name).exists()]
    for name in lacking:
        write_whole(path_of(folder, name), json.dumps(measure(folder, folder / name)) + "\n")
    work = [(folder, cell) for cell in cells if not path_of(folder, cell.name).exists()]
    with pool(config.processes) as run:
        for _ in run(_run, work, "runs", True):
            pass
    for name in MODELS[1:]:
        if not (folder / "selected" / name / "statistics.json").exists():
            _show(folder, name)
    tables = [results_table(folder, cells), classes_table(folder)]
    write_whole(folder / "tables.md", "\n".join(markdown(title, *found) for title, found in tables))
    write_whole(folder / "tables.json", json.dumps(tables, indent=2, ensure_ascii=False) + "\n")
    page = results_page([], tables, [], title="The comparison on real pairs").write(folder / "index.html")
    for title, (head, rows) in tables:
        grid = Grid(title=title, title_justify="left")
        for name in head:
            grid.add_column(name, overflow="fold")
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
    console.print(f"{time.monotonic() - start:.0f} s; runs and tables: {folder}", soft_wrap=True)
    console.print(f"on one page: {page}", soft_wrap=True)
    for name in MODELS[1:]:
        page = folder / "selected" / name / "page.html"
        console.print(f"what is selected beside the {name} model: {page}", soft_wrap=True)
    return 0


def _run(folder: Path, cell: RealCell) -> None:
    with said_in(folder / "models" / f"{cell.name}.log"):
        run_cell(folder, cell)


@contextlib.contextmanager
def said_in(path: Path) -> Iterator[None]:
    """What the training job prints goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def _show(folder: Path, reference: str) -> None:
    """A page of held-out pairs as the start reads them, with statistics."""
    held_out = folder / "held_out.jsonl"
    count = min(COUNTED, held_out.read_text(encoding="utf-8").count("\n"))
    inspect(
        InspectConfig(
            model=str(folder / "student"),
            ref_model=str(folder / reference),
            pairs=str(held_out),
            rows=f"1-{min(8, count)}",
            statistics=count,
            figures=str(folder / "selected" / reference),
            out=str(folder / "selected" / reference / "page.html"),
            title=f"What Selective-DPO reads at its first step, beside the {reference} model",
            selection_ratio=RATIO,
        )
    )
