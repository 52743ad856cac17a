"""The sweep behind the tables: what is run, what is kept, what is made of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from selective_pref_adapters.cli import main
from selective_pref_adapters.replication import sweep as sweeps
from selective_pref_adapters.replication.command import plan_of
from selective_pref_adapters.replication.findings import failures, findings
from selective_pref_adapters.replication.miniature.methods import METHODS
from selective_pref_adapters.replication.miniature.worlds import FULL, TINY, prepare
from selective_pref_adapters.replication.options import ReplicateConfig
from selective_pref_adapters.replication.sweep import (
    Plan,
    SweepError,
    Variation,
    best_rates,
    cells_of_tests,
    cells_of_tuning,
    given_path,
    path_of,
    sweep,
)
from selective_pref_adapters.replication.tables import Mean, Row, Table, cells_of, markdown, mean_of, tables_of

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


def write_given(folder: Path, seed: int, **success: float) -> None:
    """What is measured of a world's models."""
    numbers = {"well_formed": 1.0, "entropy": 0.5, "kl": 0.25, "vetoed": 0.05}
    path = given_path(folder, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: {"success": value, **numbers} for name, value in success.items()}))


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
        ("table_1", ["student", "weak", "teacher", "dpo", "selective_strong"]),
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
    shown = capsys.readouterr().out
    for page in ("index.html", "worlds/seed-0/selection.html"):
        assert (folder / page).exists()
        assert str(folder / page) in shown
    assert "<svg" in (folder / "index.html").read_text(encoding="utf-8")
    assert "held_out.jsonl:12" in (folder / "worlds/seed-0/selection.html").read_text(encoding="utf-8")
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
        write(tmp_path, cell, 0.1, 0.15, found[cell.method][cell.seed], 0.0, diverged=ended)
    for seed in plan.test_seeds:
        write_given(tmp_path, seed, student=0.1, teacher=0.9)
    (table,) = tables_of(tmp_path, plan, rates)
    start, teacher, dpo, selective = table.rows
    assert start.measured["1"] == start.measured["3"] == start.measured["0"]
    assert teacher.ahead["1"].value == pytest.approx(0.9 - 0.3)
    assert dpo.measured["1"]["success"].value == pytest.approx(0.3)
    assert dpo.measured["1"]["success"].half == pytest.approx(4.302653 * 0.1 / math.sqrt(3))  # t of two degrees
    assert selective.diverged == [2]
    assert selective.measured["1"]["success"].seeds == 2
    assert selective.ahead["1"].value == pytest.approx((0.3 + 0.4) / 2)
    text = markdown(table.title, *cells_of(table))
    assert "Selective-DPO, strong reference (1 of the seeds diverged) | 0.001 | 60.0 ± 127.1 |" in text
    assert "| strong reference | — | 90.0 ± 0.0 | 90.0 ± 0.0 | 60.0 ± 24.8 |" in text
    assert math.isnan(mean_of([0.5]).half)
    assert str(mean_of([0.5])) == "50.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_seeds": (100,)}, r"got \[100\] in both"),
        ({"methods": ("dpo", "dop")}, "unknown methods: dop; known are dpo, "),
        ({"varied": ((Variation(pairs=2), ("veto",)),)}, "no rate is tuned for veto"),
        ({"known_rates": {"dpo": 1e-3}}, "a plan with known rates has no seeds for tuning"),
        ({"known_rates": {"dpo": 1e-3}, "tuning_seeds": ()}, "no rate is known for selective_strong"),
        ({"tuning_seeds": ()}, "a plan without known rates must have seeds for tuning"),
    ],
)
def test_plans_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **options)


def test_files_of_runs_have_names_of_their_own() -> None:
    plan = Plan(varied=tuple((v, tuple(METHODS)) for v in (Variation(swapped=0.0), Variation(swapped=1.0, pairs=150))))
    cells = [*cells_of_tuning(plan), *cells_of_tests(plan, dict.fromkeys(METHODS, 1e-3))]
    assert len({cell.name for cell in cells}) == len(cells)


def row(key: str, *success: float | None, variation: str = "", rate: float | None = 1e-3, **numbers: float) -> Row:
    """A row with this success at 0x, 1x and 3x; None where every seed diverged."""
    measured = {
        time: {} if value is None else {name: Mean(value=v, half=0.02, seeds=5) for name, v in found.items()}
        for time, value in zip(("0", "1", "3"), success, strict=True)
        for found in [{"success": value, **numbers}]
    }
    title = METHODS[key].title if key in METHODS else key
    return Row(key=key, title=title, variation=variation, rate=rate, measured=measured, ahead={}, diverged=[])


def robust_table(**success: float | None) -> Table:
    found = {"dpo": 0.2, "distilled_dpo": 0.22, "random": 0.2, "selective_own": 0.15, "wrong_way": 0.0}
    found |= {"selective_strong": 0.7, **success}
    rows = [row("student", 0.15, 0.15, 0.15, rate=None)]
    rows += [row(key, 0.15, value, value, **{"auc/chosen": 0.8, "auc/rejected": 0.9}) for key, value in found.items()]
    return Table(key="table_1", title="Table 1", against="dpo", rows=rows)


def test_robust_findings_hold_or_are_named() -> None:
    found = findings([robust_table()])
    assert [finding.holds for finding in found].count(True) == 7
    assert failures(found) == []
    assert "Selective-DPO with the strong reference answers 70.0 ± 2.0 % right, DPO 20.0 ± 2.0 %." in [
        finding.text for finding in found
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dpo": 0.6, "distilled_dpo": 0.6}, "DPO 60.0"),
        ({"random": 0.65}, "40 % at random 65.0"),
        ({"selective_own": 0.4}, "25.0 points from the start: more than was expected"),
        ({"wrong_way": 0.2}, "not below the start"),
        ({"distilled_dpo": 0.35}, "Distilled DPO is 15.0 points from DPO"),
        ({"selective_strong": None}, "answers nothing (diverged) right"),
    ],
)
def test_a_robust_finding_that_fails_says_so(changed: dict[str, float | None], said: str) -> None:
    failed = failures(findings([robust_table(**changed)]))
    assert any(said in text for text in failed)


def test_what_is_told_without_being_expected() -> None:
    ratios = [row(key, 0.1, value, value) for key, value in (("ratio_10", 0.5), ("ratio_20", 0.53), ("ratio_80", 0.3))]
    varied = [row("dpo", 0.1, 0.1, 0.2, variation="swapped-50"), row("veto", 0.1, 0.6, None, variation="swapped-50")]
    tables = [
        robust_table(),
        Table(key="table_2", title="Table 2", against="dpo", rows=ratios),
        Table(key="swapped-50", title="50 % of the labels swapped", against="dpo", rows=varied),
    ]
    texts = [finding.text for finding in findings(tables) if finding.holds is None]
    best = "Table 2: after 3x steps the highest mean is 20 % with 53.0 ± 2.0 %; not to be told from it by their "
    assert f"{best}intervals: 10 %." in texts
    assert "50 % of the labels swapped, after 3x steps: DPO 20.0 ± 2.0 %." in texts


def test_the_forms_of_the_command() -> None:
    full, quick = plan_of(ReplicateConfig()), plan_of(ReplicateConfig(quick=True))
    assert set(full.methods) == set(METHODS)
    assert len(full.test_seeds) == 5
    assert quick.known_rates is not None
    assert set(quick.known_rates.values()) <= set(full.rates)
    assert not set(full.tuning_seeds) & set(full.test_seeds)
    with pytest.raises(ValueError, match="quick and tiny are two forms"):
        ReplicateConfig(quick=True, tiny=True)
    with pytest.raises(ValueError, match="seeds must be at least 1; got 0"):
        ReplicateConfig(seeds=0)
