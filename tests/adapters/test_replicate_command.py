"""The sweep behind the tables: what is run, what is kept, what is made of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from selective_pref_adapters.cli import main
from selective_pref_adapters.replication.miniature.methods import METHODS
from selective_pref_adapters.replication.miniature.worlds import FULL, TINY, prepare
from selective_pref_adapters.replication.study import sweep as sweeps
from selective_pref_adapters.replication.sweep import (
    Plan,
    SweepError,
    Variation,
    best_rates,
    cells_of_tests,
    cells_of_tuning,
    path_of,
    sweep,
)
from selective_pref_adapters.replication.tables import markdown, mean_of, tables_of

PLAN = Plan(
    scale=TINY,
    methods=("dpo", "selective_strong"),
    varied=((Variation(swapped=0.5), ("dpo",)),),
    rates=(1e-4, 1e-3),
    tuning_seeds=(100,),
    test_seeds=(0,),
)


def write(folder: Path, cell: sweeps.Cell, *success: float, diverged: bool = False) -> None:
    """A run's file, with this success at the start and at each time."""
    numbers = {"well_formed": 1.0, "entropy": 0.5, "kl": 0.25, "auc/chosen": 0.75, "auc/rejected": 0.5}
    measured = [
        {"times": time, "success": value, **numbers} for time, value in zip((0, *cell.run.times), success, strict=False)
    ]
    path = path_of(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": {"times": cell.run.times}, "diverged": diverged, "measured": measured}))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worlds of seeds 0 and 100, for a sweep's folder."""
    folder = tmp_path_factory.mktemp("worlds")
    for seed in (0, 100):
        prepare(folder / f"seed-{seed}", seed, TINY)
    return folder


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on(worlds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(worlds, tmp_path / "worlds")
    real, calls = sweeps.train, []

    def stopped(*given: object) -> object:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(sweeps, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, PLAN, progress=False)
    assert len(list((tmp_path / "runs").iterdir())) == 3
    before = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    rates = sweep(tmp_path, PLAN, progress=False)
    wanted = [*cells_of_tuning(PLAN), *cells_of_tests(PLAN, rates)]
    assert len(calls) == len(wanted) + 1
    assert {path_of(tmp_path, cell) for cell in wanted} == set((tmp_path / "runs").iterdir())
    assert {path: path.read_bytes() for path in before} == before
    tables = tables_of(tmp_path, PLAN, rates)
    assert [(table.key, [row.key for row in table.rows]) for table in tables] == [
        ("table_1", ["dpo", "selective_strong"]),
        ("swapped-50", ["dpo"]),
    ]
    for path, content in before.items():  # the same again from nothing
        path.unlink()
        sweep(tmp_path, PLAN, progress=False)
        assert path.read_bytes() == content
        break


@pytest.mark.slow
def test_the_command_in_small(worlds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "replication"
    shutil.copytree(worlds, folder / "worlds")
    arguments = ["replicate", "--tiny", "--seeds", "1", "--output-dir", str(folder)]
    assert main([*arguments, "--processes", "2"]) == 0
    assert "Table 1: methods and references" in (folder / "tables.md").read_text()
    assert {table["key"] for table in json.loads((folder / "tables.json").read_text())} >= {"table_1", "swapped-50"}
    assert (folder / "figures" / "table_1.svg").exists()
    capsys.readouterr()
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    next(iter(stamps)).write_text("{")
    assert main([*arguments, "--processes", "1"]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_another_scale_needs_another_folder(tmp_path: Path) -> None:
    sweeps.check_settings(tmp_path, PLAN)
    sweeps.check_settings(tmp_path, PLAN)
    with pytest.raises(SweepError, match=r"student_steps 4 instead of 250.*give another folder"):
        sweeps.check_settings(tmp_path, replace(PLAN, scale=FULL))


def test_the_best_rate_is_that_of_the_highest_mean_in_tuning(tmp_path: Path) -> None:
    plan = replace(PLAN, methods=("dpo",), varied=(), rates=(1e-4, 1e-3, 1e-2), tuning_seeds=(100, 101))
    success = {1e-4: (0.1, 0.5), 1e-3: (0.3, 0.3), 1e-2: (0.9, 0.9)}
    for cell in cells_of_tuning(plan):
        value = success[cell.run.rate][cell.seed - 100]
        write(tmp_path, cell, 0.0, value, diverged=cell.run.rate == 1e-2)
    assert best_rates(tmp_path, plan) == {"dpo": 1e-4}  # the higher of two equals is not worth its risk


def test_means_intervals_and_paired_differences(tmp_path: Path) -> None:
    plan = replace(PLAN, varied=(), test_seeds=(0, 1, 2))
    rates = dict.fromkeys(plan.methods, 1e-3)
    found = {"dpo": [0.2, 0.3, 0.4], "selective_strong": [0.5, 0.7, 0.6]}
    for cell in cells_of_tests(plan, rates):
        ended = cell.method == "selective_strong" and cell.seed == 2
        write(tmp_path, cell, 0.1, found[cell.method][cell.seed], 0.0, diverged=ended)
    (table,) = tables_of(tmp_path, plan, rates)
    dpo, selective = table.rows
    assert dpo.measured["1"]["success"].value == pytest.approx(0.3)
    assert dpo.measured["1"]["success"].half == pytest.approx(4.302653 * 0.1 / math.sqrt(3))  # t of two degrees
    assert selective.diverged == [2]
    assert selective.measured["1"]["success"].seeds == 2
    assert selective.ahead["1"].value == pytest.approx((0.3 + 0.4) / 2)
    text = markdown(table)
    assert "Selective-DPO, strong reference (1 of the seeds diverged) | 0.001 | 60.0 ± 127.1 |" in text
    assert math.isnan(mean_of([0.5]).half)
    assert str(mean_of([0.5])) == "50.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_seeds": (100,)}, r"got \[100\] in both"),
        ({"methods": ("dpo", "dop")}, "unknown methods: dop; known are dpo, "),
        ({"varied": ((Variation(pairs=2), ("veto",)),)}, "no rate is tuned for veto"),
    ],
)
def test_plans_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **options)


def test_files_of_runs_have_names_of_their_own() -> None:
    plan = Plan(varied=tuple((v, tuple(METHODS)) for v in (Variation(swapped=0.0), Variation(swapped=1.0, pairs=150))))
    cells = [*cells_of_tuning(plan), *cells_of_tests(plan, dict.fromkeys(METHODS, 1e-3))]
    assert len({cell.name for cell in cells}) == len(cells)
