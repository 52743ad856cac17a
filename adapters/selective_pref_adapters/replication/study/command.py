"""`selective-pref replicate`: the paper's tables in miniature, with controls. In: flags. Out: a folder of results."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from selective_pref_adapters.files import write_whole
from selective_pref_adapters.replication.study.methods import METHODS
from selective_pref_adapters.replication.study.options import ReplicateConfig
from selective_pref_adapters.replication.study.plots import figures_of
from selective_pref_adapters.replication.study.sweep import Plan, Variation, sweep
from selective_pref_adapters.replication.study.tables import markdown, record, tables_of
from selective_pref_adapters.replication.study.worlds import TINY
from selective_pref_adapters.seeing.figures import write_figures

ON_OTHER_DATA = ("dpo", "selective_strong", "veto", "distillation")
VARIED = tuple(
    (variation, ON_OTHER_DATA)
    for variation in (Variation(swapped=0.0), Variation(swapped=0.5), Variation(swapped=1.0), Variation(pairs=150))
)


def plan_of(config: ReplicateConfig) -> Plan:
    """What the flags ask for."""
    seeds = tuple(range(config.seeds))
    if config.tiny:
        some = ("dpo", "distilled_dpo", "selective_strong", "veto")
        varied = ((Variation(swapped=0.5), ("dpo", "selective_strong")),)
        return Plan(scale=TINY, methods=some, varied=varied, rates=(1e-4, 1e-3), tuning_seeds=(100,), test_seeds=seeds)
    return Plan(methods=tuple(METHODS), varied=VARIED, test_seeds=seeds)


def replicate(config: ReplicateConfig) -> None:
    """Runs what is lacking, and writes `tables.md`, `tables.json` and the figures.

    Raises:
        SweepError: the folder holds runs of another scale, or a damaged file.
    """
    folder, plan = Path(config.output_dir), plan_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    console, start = Console(highlight=False), time.monotonic()
    rates = sweep(folder, plan, processes=config.processes)
    tables = tables_of(folder, plan, rates)
    text = "\n".join(markdown(table) for table in tables)
    write_whole(folder / "tables.md", text)
    write_whole(folder / "tables.json", json.dumps([record(table) for table in tables], indent=2) + "\n")
    write_figures(folder / "figures", figures_of(tables))
    console.print(Markdown(text))
    console.print(f"{time.monotonic() - start:.0f} s; tables, figures and every run: {folder}", soft_wrap=True)
