"""A run that is killed, stopped, or out of disk goes on where it was: the same weights, bit by bit, the same log."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ranks import PATIENCE, run_cli, start, step_engine_of_the_loop, stop_at, train_all
from selective_pref_adapters.cli import main
from selective_pref_adapters.deepspeed_loop import TrainResult, checkpoints, loop, state, train
from selective_pref_adapters.launching.together import LOCK, own_folder
from selective_pref_adapters.options import TrainConfig
from tiny import make_model, text_rows, write_jsonl

Configure = Callable[..., TrainConfig]
STEPS = 12


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Configure:
    folder = tmp_path_factory.mktemp("resume")
    settings = {
        "model": str(make_model(folder / "policy", seed=1)),
        "ref_model": str(make_model(folder / "reference", seed=2, hidden_size=24, intermediate_size=16)),
        "pairs": str(write_jsonl(folder / "pairs.jsonl", text_rows(40))),
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_schedule": "cosine",
        "logging_steps": 5,  # lines of the log reach over checkpoints
        "eval_steps": 4,
        "save_steps": 1,
        "eval_fraction": 0.2,
        "resume": "auto",
    }
    return lambda name, **options: TrainConfig(**{**settings, "output_dir": str(folder / name), **options})


@pytest.fixture(scope="module")
def uninterrupted(configure: Configure) -> TrainResult:
    return train(configure("uninterrupted"))


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    loop.step_engine = step_engine_of_the_loop


def check_equal(config: TrainConfig, expected: TrainResult) -> None:
    """Weights, log and summary of a run that came to its end are those of the run that nothing disturbed."""
    folder = Path(config.output_dir)
    one, other = load_file(folder / "model.safetensors"), load_file(expected.output_dir / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("metrics.jsonl", "summary.json"):
        assert (folder / name).read_text() == (expected.output_dir / name).read_text()
    kept = checkpoints.complete(folder / "checkpoints")
    assert [checkpoints.step_of(path) for path in kept] == [STEPS - 1, STEPS]
    assert not checkpoints.incomplete(folder / "checkpoints")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_kills_at_any_moment(configure: Configure, uninterrupted: TrainResult) -> None:
    """While it steps, while it writes a checkpoint, while it writes the model."""
    config = configure("killed")
    folder = Path(config.output_dir)
    written = folder / "checkpoints"
    pick = random.Random(0)

    def newest() -> str:
        return max((path.name for path in written.glob("step-*")), default="")

    moments: dict[str, Callable[[], bool]] = {
        "before a checkpoint": lambda: (folder / "metrics.jsonl").exists(),
        "stepping": lambda: newest() != before,
        "writing": lambda: newest() != before and any(written.glob(".step-*")),
        "writing again": lambda: newest() != before and any(written.glob(".step-*")),
        "stepping again": lambda: newest() != before,
        "writing the model": lambda: (folder / ".saving").exists(),
    }
    killed = 0
    for name, reached in moments.items():
        before = newest()
        process = start(train_all, [config])
        end = time.monotonic() + PATIENCE
        while process.is_alive() and not reached() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(pick.uniform(0, 0.02 if "stepping" in name else 0.002))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 4  # the last ones may come too late, when the run is over
    train(config)
    check_equal(config, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_status_0(configure: Configure, uninterrupted: TrainResult) -> None:
    config = configure("terminated", save_steps=None)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(config).items() if value != default(name)]
    process = start(run_cli, ["train", *flags])
    end = time.monotonic() + PATIENCE
    while not (Path(config.output_dir) / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert not (Path(config.output_dir) / "summary.json").exists()
    stopped = checkpoints.newest_complete(Path(config.output_dir) / "checkpoints")
    assert stopped is not None
    assert checkpoints.step_of(stopped) < STEPS
    config = configure("terminated")
    train(config)
    check_equal(config, uninterrupted)


def default(name: str) -> Any:
    return TrainConfig.__dataclass_fields__[name].default


def test_a_stop_within_a_step_does_that_step_again(configure: Configure, uninterrupted: TrainResult) -> None:
    config = configure("within", save_steps=None)
    stop_at(1)
    assert train(config).stopped_at == 0
    stop_at(2 * 6 + 1)  # two batches a step: the first of step 7
    assert train(config).stopped_at == 6
    stop_at(2)
    assert train(config).stopped_at == 7  # asked at its last batch: it is finished
    loop.step_engine = step_engine_of_the_loop
    config = configure("within")
    result = train(config)
    check_equal(config, uninterrupted)
    assert result.metrics == uninterrupted.metrics
    again = train(config)  # nothing left to do
    assert again.summary == uninterrupted.summary
    assert again.metrics == uninterrupted.metrics


def test_a_full_disk_leaves_the_checkpoint_before(
    configure: Configure, uninterrupted: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file sizes stands in for the disk."""
    config = configure("full")
    written = Path(config.output_dir) / "checkpoints"
    stop_at(9)
    train(config)
    loop.step_engine = step_engine_of_the_loop
    before = checkpoints.newest_complete(written)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(config).items() if value != default(name)]
    try:
        assert main(["train", *flags]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the checkpoint of step 5 could not be written" in capsys.readouterr().err
    assert checkpoints.newest_complete(written) == before
    assert not checkpoints.incomplete(written)
    train(config)
    check_equal(config, uninterrupted)


def test_a_run_that_changed_is_refused_with_the_difference_or_forced(
    configure: Configure, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    stop_at(3)
    train(configure("changed"))
    loop.step_engine = step_engine_of_the_loop
    other = write_jsonl(tmp_path / "other.jsonl", text_rows(39))
    for options, difference in (
        ({"beta": 0.5}, "beta was 0.01, is now 0.5"),
        ({"selection_ratio": 0.5}, "selection_ratio was 0.4, is now 0.5"),
        ({"pairs": str(other)}, "training_data was '32 pairs, .*', is now '31 pairs, "),
        ({"learning_rate": 1.0}, "learning_rate was 0.01, is now 1.0"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run: {difference}.*--force-resume"):
            train(configure("changed", **options))
    with pytest.raises(ValueError, match="cannot be read otherwise than it was written: zero_stage was 0, is now 1"):
        train(configure("changed", zero_stage=1, force_resume=True))
    copy = write_jsonl(tmp_path / "same.jsonl", text_rows(40))  # the same rows elsewhere are the same data
    stop_at(3)
    result = train(configure("changed", pairs=str(copy), beta=0.5, force_resume=True))
    assert result.stopped_at == 2
    with pytest.raises(ValueError, match=r"it holds a run\. Choose another, or --resume auto"):
        train(configure("changed", resume=None))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        train(configure("changed", resume=str(tmp_path)))


def test_other_weights_in_the_references_folder_are_another_run(configure: Configure, tmp_path: Path) -> None:
    """The names in the options are the same."""
    reference = tmp_path / "reference"
    make_model(reference, seed=2)
    options = {"ref_model": str(reference), "scoring_ref_model": str(reference), "max_steps": 3}
    stop_at(3)
    train(configure("reweighed", **options))
    loop.step_engine = step_engine_of_the_loop
    make_model(reference, seed=3)
    with pytest.raises(
        ValueError, match=r"another run: reference_weights was '\w+', is now '\w+'; scoring_reference_w"
    ):
        train(configure("reweighed", **options))
    make_model(reference, seed=2)
    assert train(configure("reweighed", **options)).stopped_at is None


def test_force_resume_takes_a_finished_run_further(configure: Configure) -> None:
    short = train(configure("further", max_steps=4))
    assert train(configure("further", max_steps=4)).summary == short.summary
    with pytest.raises(ValueError, match="max_steps was 4, is now 6"):
        train(configure("further", max_steps=6))
    longer = train(configure("further", max_steps=6, force_resume=True))
    assert longer.summary["steps"] == longer.metrics[-1]["step"] == 6
    assert longer.metrics[: len(short.metrics)] == short.metrics
    train(configure("no checkpoints", max_steps=2, save_steps=None))
    with pytest.raises(ValueError, match="finished after 2 steps and kept no checkpoint, so it cannot go on to 3"):
        train(configure("no checkpoints", max_steps=3, save_steps=None, force_resume=True))


@pytest.mark.parametrize(("zero_stage", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "float32")])
def test_checkpoints_hold_tensors_and_plain_values_alone(configure: Configure, zero_stage: int, dtype: str) -> None:
    """What DeepSpeed writes at these stages is read without running any code, and the run goes on bit by bit."""
    options: dict[str, Any] = {"zero_stage": zero_stage, "dtype": dtype, "max_steps": 3, "save_steps": None}
    whole = train(configure(f"whole {zero_stage}", **options))
    stop_at(4)
    assert train(configure(f"parts {zero_stage}", **options)).stopped_at == 2
    loop.step_engine = step_engine_of_the_loop
    parts = train(configure(f"parts {zero_stage}", **options))
    assert parts.metrics == whole.metrics
    one, other = (load_file(run.output_dir / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


class Intruder:
    """Pickled, it runs a command where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_a_checkpoint_that_would_run_code_is_not_loaded(configure: Configure, tmp_path: Path) -> None:
    config = configure("intruded")
    stop_at(3)
    train(config)
    loop.step_engine = step_engine_of_the_loop
    newest = checkpoints.newest_complete(Path(config.output_dir) / "checkpoints")
    assert newest is not None
    file = next(newest.glob("engine/*"))
    torch.save({"module": Intruder(tmp_path / "trace")}, file)
    marker = json.loads((newest / checkpoints.MARKER).read_text())
    marker["files"][str(file.relative_to(newest))] = file.stat().st_size
    (newest / checkpoints.MARKER).write_text(json.dumps(marker))
    with pytest.raises(ValueError, match="holds more than tensors and plain values, and is not loaded"):
        train(config)
    assert not (tmp_path / "trace").exists()


def test_what_is_damaged_is_named(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    """An unreadable newest checkpoint is passed over with a note; where none can be read, nothing begins anew."""
    config = configure("damaged", eval_fraction=0)
    folder = Path(config.output_dir)
    stop_at(4)
    train(config)
    loop.step_engine = step_engine_of_the_loop
    older, newest = checkpoints.complete(folder / "checkpoints")
    (newest / "process-00000.pt").write_bytes(b"")
    stop_at(2)
    train(config)
    loop.step_engine = step_engine_of_the_loop
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"{newest.name} in {newest.parent} cannot be read: files are missing or cut off. The run goes on from" in said
    )
    for path in checkpoints.complete(folder / "checkpoints"):
        (path / checkpoints.MARKER).unlink()
    with pytest.raises(ValueError, match=rf"{older.name}.* cannot be read.*begin anew in another output_dir"):
        train(config)
    assert (folder / "run.json").exists()
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        train(config)


def test_a_stop_after_a_batch_that_was_left_out_does_not_count_it_twice(configure: Configure, tmp_path: Path) -> None:
    """Every pair is broken, so each step leaves its two batches out; SIGTERM comes between the two of step 2."""
    broken = make_model(tmp_path / "broken", seed=2)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    options = {"ref_model": str(broken), "non_finite": "skip", "max_steps": 3, "save_steps": None, "eval_fraction": 0}
    stop_at(3)
    stopped = train(configure("left out", **options))
    assert stopped.stopped_at == 1
    loop.step_engine = step_engine_of_the_loop
    assert train(configure("left out", **options)).summary["skipped_batches"] == 2 * 3


def test_two_runs_do_not_write_to_one_folder(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that was killed may have left its processes alive. Nothing is loaded before it is noticed."""
    config = configure("shared")
    stop_at(3)
    train(config)
    loop.step_engine = step_engine_of_the_loop
    with own_folder(Path(config.output_dir), {}), monkeypatch.context() as patched:
        patched.delattr(loop, "load_tokenizer")
        with pytest.raises(OSError, match="another run is writing to"):
            train(config)
    (Path(config.output_dir) / LOCK).write_text("of a run that was killed")
    assert train(config).stopped_at is None
    assert not (Path(config.output_dir) / LOCK).exists()


def test_random_states_come_back() -> None:
    states = state.random_states()
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    state.restore_random_states(states)
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == drawn


def test_random_states_are_in_the_checkpoint(configure: Configure) -> None:
    """A run that draws gets after its resumption the numbers that it would have got."""
    drawn: dict[str, list[float]] = {}

    def drawing(name: str, stop: int | None) -> None:
        stop_at(stop or 10**9)
        inner = loop.step_engine

        def step_engine(engine: Any) -> float:
            drawn.setdefault(name, []).append(random.random() + np.random.rand() + torch.rand(1).item())
            return inner(engine)

        loop.step_engine = step_engine
        train(configure(name, max_steps=4, save_steps=None))

    drawing("whole", None)
    drawing("parts", 4)  # at the last batch of step 2
    drawing("parts", None)
    assert drawn["parts"] == drawn["whole"]


def test_damage_falls_back_to_the_checkpoint_before(configure: Configure, uninterrupted: TrainResult) -> None:
    config = configure("cut_off")
    stop_at(9)
    train(config)
    loop.step_engine = step_engine_of_the_loop
    newest = checkpoints.newest_complete(Path(config.output_dir) / "checkpoints")
    assert newest is not None
    file = next(newest.glob("engine/*"))
    file.write_bytes(file.read_bytes()[:-1])
    with (Path(config.output_dir) / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # cut short by a kill
    train(config)
    summary = Path(config.output_dir) / "summary.json"
    told = json.loads(summary.read_text())
    assert "cannot be read: files are missing or cut off" in told["notes"].pop()
    summary.write_text(json.dumps(told, indent=2) + "\n")  # without it, the run is the one that nothing disturbed
    check_equal(config, uninterrupted)
    assert json.loads((Path(config.output_dir) / "run.json").read_text())["processes"] == 1
