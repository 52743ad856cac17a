"""Two processes: what they compute is what one computes, whatever each of them holds; and they end together."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

from plain_loop import LEARNING_RATE, plain_torch_run, training_pairs
from ranks import everything, one_hangs, run_ranks
from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.deepspeed_loop.engine import processes
from selective_pref_adapters.deepspeed_loop.sampling import FILLER, evaluation_batches, make_order, share_of
from selective_pref_adapters.launching.launcher import PLACE
from selective_pref_adapters.models import load_model, load_tokenizer
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import TokenizedPair
from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space
from selective_pref_adapters.reference_store.rows import rows_of_pairs
from selective_pref_adapters.seeing.runs import read_run
from tiny import make_model, text_rows, write_jsonl

Step = list[list[TokenizedPair]]
Once = Callable[[str, Callable[[Path], None]], Path]
LOSS_TOLERANCE = 1e-6  # relative, of a float32 loss: measured below 2e-7
WEIGHT_TOLERANCE = 2e-4  # absolute, after steps of 1e-2: Adam magnifies the last bits of small gradients


def make_files(folder: Path) -> None:
    broken = make_model(folder / "broken", seed=2, hidden_size=24, intermediate_size=16)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = math.nan  # the last word only
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    # DeepSpeed leaves small parameters whole: nothing here would be sharded
    (folder / "deepspeed.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    rows = json.loads(json.dumps(text_rows(35)).replace("w23", "w22"))
    for number in (3, 24):  # two rows that the broken reference cannot read
        rows[number]["chosen"] += " w23"
    write_jsonl(folder / "broken.jsonl", rows)
    make_model(folder / "policy", seed=1, tie_word_embeddings=True)
    make_model(folder / "reference", seed=2, hidden_size=24, intermediate_size=16)
    write_jsonl(folder / "pairs.jsonl", text_rows(35))  # 7 a prompt: an odd number is held out


@pytest.fixture(scope="module")
def files(once: Once) -> dict[str, Path]:
    folder = once("two", make_files)
    return {
        "folder": folder,
        "broken pairs": folder / "broken.jsonl",
        "policy": folder / "policy",
        "reference": folder / "reference",
        "broken": folder / "broken",
        "pairs": folder / "pairs.jsonl",
        "settings": folder / "deepspeed.json",
    }


def configured(files: dict[str, Path], name: str, **options: Any) -> TrainConfig:
    settings = {
        "model": str(files["policy"]),
        "ref_model": str(files["reference"]),
        "pairs": str(files["pairs"]),
        "output_dir": str(files["folder"] / name.replace(" ", "-")),
        "batch_size": 2,
        "global_batch_size": 8,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "eval_fraction": 0.2,
        "max_steps": 4,
        "process_timeout_minutes": 4.0,
    }
    return TrainConfig(**{**settings, **options})


def resumable(files: dict[str, Path], name: str, **options: Any) -> TrainConfig:
    """A run under ZeRO-3 that keeps every checkpoint it needs to go on."""
    sharded = {"zero_stage": 3, "deepspeed_config": str(files["settings"])}
    return configured(files, name, **sharded, resume="auto", save_steps=1, **options)


@pytest.fixture(scope="module")
def killed(files: dict[str, Path], once: Once) -> subprocess.CompletedProcess[str]:
    """What `torchrun` says of a sharded run, one process of which is killed in the second step."""

    def run(folder: Path) -> None:
        recipe = folder / "killed.yaml"
        recipe.write_text(yaml.safe_dump(dataclasses.asdict(resumable(files, "killed"))))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*launcher, str(Path(__file__).with_name("failing_rank.py")), "train", "--config", str(recipe)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=1200,  # the other one is ended by torchrun, or pytest ends this
            check=False,
        )
        (folder / "done.json").write_text(json.dumps(vars(done)))

    return subprocess.CompletedProcess(**json.loads((once("two-killed", run) / "done.json").read_text()))


@pytest.fixture(scope="module")
def two(files: dict[str, Path], killed: Any, once: Once) -> dict[str, Any]:
    """Everything that two processes do, once: {name: {metrics, summary, stopped_at}} as the first process has it."""
    sharded = {"zero_stage": 3, "deepspeed_config": str(files["settings"])}
    configs = {
        **{f"stage {stage}": configured(files, f"stage {stage}", zero_stage=stage) for stage in (0, 1, 2)},
        "stage 3": configured(files, "stage 3", **sharded),
        "padded rows": configured(files, "padded rows", share_prefix="off", **sharded),
        "empty rank": configured(files, "empty rank", **sharded),
        "not finite": configured(
            files,
            "not finite",
            ref_model=str(files["broken"]),
            pairs=str(files["broken pairs"]),
            non_finite="skip",
            **sharded,
        ),
        "filled": configured(files, "filled", reference_store=str(files["folder"] / "store"), **sharded),
        "adapters": configured(files, "adapters", ref_model=None, lora_r=2, **sharded),
        "adapters stopped": resumable(files, "adapters-resumed", ref_model=None, lora_r=2),
        "adapters resumed": resumable(files, "adapters-resumed", ref_model=None, lora_r=2),
        "stopped": resumable(files, "resumed"),
        "resumed": resumable(files, "resumed"),
        "after the kill": resumable(files, "killed"),
    }

    def run(folder: Path) -> None:
        assert run_ranks(everything, folder, configs) == [0, 0]

    folder = once("two-seen", run)
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert json.dumps(first) == json.dumps(second)  # metrics and decisions, on both processes
    return first


def steps_of(files: dict[str, Path], pairs: str = "pairs") -> list[Step]:
    """The four batches of every step: two of the first process, two of the second."""
    some = training_pairs(files["policy"], files[pairs])
    order = make_order([1] * len(some), 8, 0)
    shares = [[share_of(some, order(step), 2, rank, 2) for rank in (0, 1)] for step in range(1, 5)]
    return [[*first, *second] for first, second in shares]


def losses(run: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in run["metrics"] if "loss" in line]


def check(files: dict[str, Path], name: str, run: dict[str, Any] | None, expected: tuple[dict[str, Any], Any]) -> None:
    weights, expected_losses = expected
    got = load_file(files["folder"] / name.replace(" ", "-") / "model.safetensors")
    for key, parameter in got.items():
        torch.testing.assert_close(parameter, weights[key], rtol=0, atol=WEIGHT_TOLERANCE, msg=f"{name} {key}")
    lines = (files["folder"] / name.replace(" ", "-") / "metrics.jsonl").read_text().splitlines()
    assert losses(run or {"metrics": map(json.loads, lines)}) == pytest.approx(expected_losses, rel=LOSS_TOLERANCE)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(files: dict[str, Path], two: dict[str, Any]) -> None:
    """At every stage, with rows of unequal length; held-out pairs that do not divide evenly included."""
    expected = plain_torch_run(files["policy"], files["reference"], steps_of(files))
    alone = train(configured(files, "alone"))
    drawn = [read_run(files["folder"] / name).visits for name in ("stage-3", "alone")]
    assert [visit.step for visit in drawn[0]] == [0, 4]
    for visits in zip(*drawn, strict=True):  # sharded weights are gathered by both processes, to be drawn by the first
        for pairs in zip(*(visit.pairs for visit in visits), strict=True):
            assert pairs[0]["chosen"]["scores"] == pytest.approx(pairs[1]["chosen"]["scores"], abs=1e-4)
    for stage in range(4):
        name = f"stage {stage}"
        check(files, name, two[name], expected)
        assert two[name]["summary"]["eval_pairs"] == 7
        for when in ("before", "after"):
            theirs = two[name]["summary"][when]
            assert theirs == pytest.approx(alone.summary[when], rel=1e-4, abs=1e-5), name
        assert [line["grad_norm"] for line in two[name]["metrics"] if "loss" in line] == pytest.approx(
            [line["grad_norm"] for line in alone.metrics if "loss" in line], rel=1e-4
        )
    assert not (files["folder"] / "stage-3" / ".saving").exists()


@pytest.mark.slow
def test_sharded_weights_and_shared_prompts(two: dict[str, Any]) -> None:
    assert [two[name]["shares"] for name in ("stage 0", "stage 2", "stage 3", "padded rows")] == [True] * 3 + [False]
    assert losses(two["stage 3"]) == pytest.approx(losses(two["padded rows"]), rel=LOSS_TOLERANCE)


@pytest.mark.slow
def test_a_sharded_reference_fills_a_store(files: dict[str, Path], two: dict[str, Any]) -> None:
    """With the log-probs that it gives when it is whole; and the run that reads them is that of the reference."""
    model, tokenizer = load_model(str(files["reference"]), dtype="float32"), load_tokenizer(str(files["reference"]))
    store = ReferenceStore.open(files["folder"] / "store")
    assert store.space.identity == reference_space(model, tokenizer).identity
    whole = ReferenceStore.create(files["folder"] / "whole", reference_space(model, tokenizer))
    pairs = training_pairs(files["policy"], files["pairs"])
    fill_store(whole, pairs, model, pad_token_id=0, progress=False)
    rows = rows_of_pairs(pairs)
    for ours, theirs in zip(store.values_of(rows), whole.values_of(rows), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert losses(two["filled"]) == pytest.approx(losses(two["stage 3"]), rel=LOSS_TOLERANCE)


@pytest.mark.slow
def test_adapters_on_a_sharded_policy(files: dict[str, Path], two: dict[str, Any]) -> None:
    """The losses of one process that holds the whole; a folder that PEFT reads."""
    alone = train(configured(files, "adapters alone", ref_model=None, lora_r=2))
    assert losses(two["adapters"]) == pytest.approx(losses({"metrics": alone.metrics}), rel=LOSS_TOLERANCE)
    assert any("equals the initial policy" in note for note in two["adapters"]["summary"]["notes"])
    saved = [load_file(files["folder"] / name / "adapter_model.safetensors") for name in ("adapters", "adapters-alone")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(tensor, saved[1][name], rtol=0, atol=WEIGHT_TOLERANCE)
    base = load_model(str(files["policy"]), dtype="float32")
    loaded = PeftModel.from_pretrained(base, str(files["folder"] / "adapters"))
    factors = {name: p for name, p in loaded.named_parameters() if "lora_B" in name}
    assert factors
    assert all(parameter.any() for parameter in factors.values())
    assert two["adapters stopped"]["stopped_at"] == 1
    assert two["adapters resumed"]["batches"] == 6
    assert two["adapters resumed"]["metrics"] == two["adapters"]["metrics"]


@pytest.mark.slow
def test_a_process_without_a_completion_takes_part(files: dict[str, Path], two: dict[str, Any]) -> None:
    halves = [[*step[:2], [FILLER] * 2, [FILLER] * 2] for step in steps_of(files)]
    check(files, "empty rank", None, plain_torch_run(files["policy"], files["reference"], halves))


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_left_out_on_both(files: dict[str, Path], two: dict[str, Any]) -> None:
    def both(step: Step) -> Step:
        """A batch of one process and the batch of the other at the same time are left out together."""
        return [step[0] + step[2], step[1] + step[3]]

    steps = [both(step) for step in steps_of(files, "broken pairs")]
    expected = plain_torch_run(files["policy"], files["broken"], steps, leave_out=True)
    check(files, "not finite", two["not finite"], expected)
    skipped = two["not finite"]["summary"]["skipped_batches"]
    assert skipped == 2
    assert [line["skipped_batches"] for line in two["not finite"]["metrics"] if "loss" in line][-1] == skipped


@pytest.mark.slow
def test_sigterm_to_one_stops_both_and_they_go_on_bit_by_bit(files: dict[str, Path], two: dict[str, Any]) -> None:
    assert two["stopped"]["stopped_at"] == 1  # the third batch is the first of step 2, which is not finished
    assert two["resumed"]["metrics"] == two["stage 3"]["metrics"]
    one, other = (load_file(files["folder"] / name / "model.safetensors") for name in ("stage-3", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match=r"belongs to another run: .*processes was 2, is now 1"):
        train(configured(files, "resumed", zero_stage=3, deepspeed_config=str(files["settings"]), resume="auto"))


@pytest.mark.parametrize("weight", [None, 2.0])
def test_held_out_pairs_are_dealt_out_evenly(weight: float | None) -> None:
    """What fills up a process's last batch has a weight where pairs have one: all processes log the same names."""
    pairs = [dataclasses.replace(FILLER, place=str(number), weight=weight) for number in range(7)]
    dealt = [list(evaluation_batches(pairs, 3, rank, 2)) for rank in (0, 1)]
    filler = FILLER if weight is None else dataclasses.replace(FILLER, weight=1.0)
    assert dealt == [[(pairs[0:5:2], 3), ([pairs[6]], 1)], [(pairs[1:6:2], 3), ([filler], 0)]]
    assert list(evaluation_batches(pairs, 4, 0, 1)) == [(pairs[:4], 4), (pairs[4:], 3)]


def test_each_process_takes_its_device_before_the_first_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all processes of a host would send from device 0, which NCCL refuses."""
    calls: list[Any] = []
    for name, value in zip(PLACE, ("5", "8", "3", "127.0.0.1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(processes.deepspeed, "init_distributed", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 8)
    config = TrainConfig(model="", pairs="")
    assert processes.start_processes(config) == (5, 8)
    assert calls == [3, "nccl"]

    def alone(*_: Any, **__: Any) -> None:
        raise torch.distributed.DistStoreError("Timed out after 61 seconds waiting for clients. 1/8 clients joined.")

    monkeypatch.setattr(processes.deepspeed, "init_distributed", alone)
    expected = r"process 5 of 8, on .*, found not all of the others at 127\.0\.0\.1:0 within 30 minutes.* 1/8 clients"
    with pytest.raises(OSError, match=expected):
        processes.start_processes(config)


@pytest.mark.slow
def test_one_that_hangs_does_not_hold_the_others_for_ever(files: dict[str, Path]) -> None:
    config = configured(files, "hanging", process_timeout_minutes=0.15, eval_fraction=0)
    assert run_ranks(one_hangs, config) == [17, 3]


@pytest.mark.slow
def test_one_that_is_killed_takes_the_others_with_it_and_the_run_goes_on(
    files: dict[str, Path], killed: Any, two: dict[str, Any]
) -> None:
    """Under torchrun, with sharded weights; from its checkpoint it comes to the losses of the run that was not."""
    assert killed.returncode != 0
    assert "exitcode  : -9" in killed.stderr, killed.stderr
    assert [two[name]["batches"] for name in ("stage 3", "after the kill")] == [8, 6]  # it went on after the first step
    assert two["after the kill"]["metrics"] == two["stage 3"]["metrics"]
    one, other = (load_file(files["folder"] / name / "model.safetensors") for name in ("stage-3", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
