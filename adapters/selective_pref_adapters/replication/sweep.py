"""All runs of the tables: what is run, in which order, and what is kept of it.

In: a plan (tables, seeds, learning rates). Out: a folder with one file for each run. A file that is there is not run
again, so a sweep that was killed goes on where it was; runs go to as many processes as are asked for.

    worlds → tuning: every method at every rate, on seeds of its own → the best rate → tests on other seeds
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from selective_pref_adapters.files import write_whole
from selective_pref_adapters.replication.miniature.methods import METHODS
from selective_pref_adapters.replication.miniature.trials import Run, measure_given, train
from selective_pref_adapters.replication.miniature.worlds import (
    FULL,
    MODELS,
    SWAPPED_LABELS,
    Scale,
    World,
    prepare,
)

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
SETTINGS_FILE = "settings.json"


class SweepError(ValueError):
    """A folder that holds another sweep's runs, or a damaged one."""


@dataclass(frozen=True, kw_only=True)
class Variation:
    """Data other than the usual: the share of swapped labels, and how many pairs (None for all)."""

    swapped: float = SWAPPED_LABELS
    pairs: int | None = None

    @property
    def name(self) -> str:
        """As files and tables have it; empty for the usual data."""
        parts = [] if self.swapped == SWAPPED_LABELS else [f"swapped-{100 * self.swapped:g}"]
        return "-".join([*parts, *([] if self.pairs is None else [f"pairs-{self.pairs}"])])


USUAL = Variation()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep runs.

    Attributes:
        scale: how much of everything.
        methods: keys of `METHODS`, tuned and tested on the usual data.
        varied: (variation, methods): tested at the rates that were found on the usual data.
        rates: AdamW's, tried for every method.
        known_rates: method → rate, where nothing is tuned; None where `rates` are tried.
        tuning_seeds, test_seeds: of worlds; no seed is in both.
        times: at which multiples of the steps the tests are measured; tuning ends at 1.
        models: of each world.
    """

    scale: Scale = FULL
    methods: Sequence[str] = tuple(METHODS)
    varied: Sequence[tuple[Variation, Sequence[str]]] = ()
    rates: Sequence[float] = RATES
    known_rates: Mapping[str, float] | None = None
    tuning_seeds: Sequence[int] = (100, 101)
    test_seeds: Sequence[int] = (0, 1, 2, 3, 4)
    times: Sequence[float] = (0.2, 1, 3)
    models: Sequence[str] = MODELS

    def __post_init__(self) -> None:
        if self.known_rates is not None:
            if self.tuning_seeds:
                raise ValueError("a plan with known rates has no seeds for tuning")
            if lacking := set(self.methods) - set(self.known_rates):
                raise ValueError(f"no rate is known for {', '.join(sorted(lacking))}")
        elif not self.tuning_seeds:
            raise ValueError("a plan without known rates must have seeds for tuning")
        if common := set(self.tuning_seeds) & set(self.test_seeds):
            raise ValueError(f"seeds are tuned on or tested, not both; got {sorted(common)} in both")
        if unknown := [name for name in self.every_method() if name not in METHODS]:
            raise ValueError(f"unknown methods: {', '.join(unknown)}; known are {', '.join(METHODS)}")
        if missing := set(self.every_method()) - set(self.methods):
            raise ValueError(f"no rate is tuned for {', '.join(sorted(missing))}: methods must name them, too")

    def every_method(self) -> list[str]:
        """All methods, each once."""
        return list(dict.fromkeys([*self.methods, *(name for _, names in self.varied for name in names)]))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a method in the world of a seed."""

    method: str
    seed: int
    run: Run

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        variation = Variation(swapped=self.run.swapped, pairs=self.run.pairs).name
        times = "-".join(f"{time:g}x" for time in self.run.times)
        return ".".join(filter(None, [self.method, f"rate-{self.run.rate:g}", f"seed-{self.seed}", times, variation]))


def sweep(folder: Path, plan: Plan, *, processes: int = 1, progress: bool = True) -> dict[str, float]:
    """Runs what is lacking in `folder`, and returns the rate that was found for every method.

    Raises:
        SweepError: the folder holds runs of another scale, or a file that is damaged.
    """
    check_settings(folder, plan)
    seeds = [*plan.tuning_seeds, *plan.test_seeds]
    with pool(processes) as run:
        lacking = [(folder, seed, plan) for seed in seeds if not given_path(folder, seed).exists()]
        for (_, seed, _), found in run(_prepare, lacking, "worlds", progress):
            write_whole(given_path(folder, seed), json.dumps(found) + "\n")
        _run_cells(folder, plan, cells_of_tuning(plan), run, "tuning", progress)
        rates = best_rates(folder, plan)
        _run_cells(folder, plan, cells_of_tests(plan, rates), run, "tests", progress)
    return rates


def cells_of_tuning(plan: Plan) -> list[Cell]:
    """Every method at every rate, in the worlds for tuning."""
    return [
        Cell(method=method, seed=seed, run=Run(rate=rate))
        for seed in plan.tuning_seeds
        for method in plan.methods
        for rate in plan.rates
    ]


def cells_of_tests(plan: Plan, rates: dict[str, float]) -> list[Cell]:
    """Every method at its rate, in the worlds for tests, on the usual data and on others."""
    wanted = [(USUAL, plan.methods), *plan.varied]
    return [
        Cell(
            method=method,
            seed=seed,
            run=Run(rate=rates[method], times=plan.times, swapped=variation.swapped, pairs=variation.pairs),
        )
        for variation, methods in wanted
        for seed in plan.test_seeds
        for method in methods
    ]


def best_rates(folder: Path, plan: Plan) -> dict[str, float]:
    """The rate of the highest mean success in tuning, for every method; the lower one of two equals.

    A run that diverged has no success. Rates that the plan knows are not tuned.
    """
    if plan.known_rates is not None:
        return {name: plan.known_rates[name] for name in plan.methods}
    found: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in plan.rates} for name in plan.methods}
    for cell in cells_of_tuning(plan):
        result = read_cell(folder, cell)
        success = 0.0 if result["diverged"] else result["measured"][-1]["success"]
        found[cell.method][cell.run.rate].append(success)
    return {
        name: max(by_rate, key=lambda rate: (statistics.mean(by_rate[rate]), -rate)) for name, by_rate in found.items()
    }


def path_of(folder: Path, cell: Cell) -> Path:
    """Where a run's results are."""
    return folder / "runs" / f"{cell.name}.json"


def given_path(folder: Path, seed: int) -> Path:
    """Where the measurements of a world's models are, as `measure_given` returns them."""
    return folder / "given" / f"seed-{seed}.json"


def read_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    """What a run found.

    Raises:
        SweepError: its file is damaged: it must be deleted, to be made again.
    """
    return read_record(path_of(folder, cell))


def read_record(path: Path) -> dict[str, Any]:
    """A file of a sweep; SweepError as `read_cell`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SweepError(f"{path} is damaged ({error}): delete it, and run the same command again") from None


def check_settings(folder: Path, plan: Plan) -> None:
    """Notes the scale of a new folder, and raises SweepError where a folder has runs of another one."""
    path, scale = folder / SETTINGS_FILE, asdict(plan.scale)
    for name in ("runs", "given"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["scale"]
        if found != scale:
            keys = [key for key in scale if found.get(key) != scale[key]]
            differ = ", ".join(f"{key} {found.get(key)} instead of {scale[key]}" for key in keys)
            raise SweepError(f"{folder} holds runs of another scale ({differ}): give another folder")
        return
    write_whole(path, json.dumps({"scale": scale}, indent=2) + "\n")


def _run_cells(folder: Path, plan: Plan, cells: Iterable[Cell], run: Any, title: str, progress: bool) -> None:
    lacking = [cell for cell in cells if not path_of(folder, cell).exists()]
    work = [(folder, cell, plan) for cell in lacking]
    for (_, cell, _), result in run(_run, work, title, progress):
        write_whole(path_of(folder, cell), json.dumps({**asdict(cell), **result}) + "\n")


def _prepare(folder: Path, seed: int, plan: Plan) -> dict[str, dict[str, float]]:
    return measure_given(world_of(folder, seed, plan.scale, tuple(plan.models)))


def _run(folder: Path, cell: Cell, plan: Plan) -> dict[str, Any]:
    start = read_record(given_path(folder, cell.seed))["student"]
    del start["vetoed"]
    return train(world_of(folder, cell.seed, plan.scale, tuple(plan.models)), METHODS[cell.method], cell.run, start)


@lru_cache(maxsize=2)
def world_of(folder: Path, seed: int, scale: Scale, models: Sequence[str]) -> World:
    """The world of a seed, which a process keeps while it runs cells of it."""
    return prepare(folder / "worlds" / f"seed-{seed}", seed, scale, models)


Runner = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], str, bool], Iterator[tuple[tuple[Any, ...], Any]]]


@contextmanager
def pool(processes: int) -> Iterator[Runner]:
    """Work in processes of their own, or here where one is enough."""
    executor = None
    if processes > 1:
        executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_one_thread)

    def run(
        work: Callable[..., Any], items: Sequence[tuple[Any, ...]], title: str, progress: bool
    ) -> Iterator[tuple[tuple[Any, ...], Any]]:
        with tqdm(total=len(items), desc=title, unit="run", disable=not progress) as bar:
            if executor is None:
                _one_thread()
                results = ((item, work(*item)) for item in items)
            else:
                started = {executor.submit(work, *item): item for item in items}
                results = ((started[future], future.result()) for future in as_completed(started))
            for item, result in results:
                yield item, result
                bar.update()

    try:
        yield run
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """Models this small are faster on one thread, and give the same numbers whatever runs beside them."""
    torch.set_num_threads(1)
    disable_progress_bar()
