"""The training job, for real on tiny models: it learns, it reloads, it stops with a clear word on bad input."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from plain_loop import plain_torch_run, training_pairs
from ranks import step_engine_of_the_loop, stop_at
from selective_pref import NonFiniteError, selective_dpo_loss
from selective_pref_adapters import references
from selective_pref_adapters.batch import responses
from selective_pref_adapters.deepspeed_loop import loop, train
from selective_pref_adapters.deepspeed_loop import reference as references_of_the_loop
from selective_pref_adapters.deepspeed_loop.engine import start_processes
from selective_pref_adapters.deepspeed_loop.run_log import RunLog
from selective_pref_adapters.deepspeed_loop.sampling import make_order, number_of_steps, pairs_per_step, share_of
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.model_checks import check_policy
from selective_pref_adapters.models import load_model
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import TokenizedPair, collate, read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space
from selective_pref_adapters.seeing.runs import read_run
from tiny import WORDS, make_mixture, make_model, make_text_and_image_model, needs_experts, text_rows, write_jsonl

Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure(tmp_path: Path, policy_folder: Path, reference_folder: Path, pairs_file: Path) -> Configure:
    def make(**options: Any) -> TrainConfig:
        settings = {
            "model": str(policy_folder),
            "ref_model": str(reference_folder),
            "pairs": str(pairs_file),
            "output_dir": str(tmp_path / "out"),
            "batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_fraction": 0.2,
        }
        return TrainConfig(**{**settings, **options})

    return make


def logps_of(folder: Path, pairs_file: Path) -> torch.Tensor:
    pairs, _ = tokenize_pairs(read_rows(pairs_file), AutoTokenizer.from_pretrained(folder), max_length=64)
    with torch.no_grad():
        return model_per_token_logps(AutoModelForCausalLM.from_pretrained(folder), collate(pairs, 0))


@pytest.fixture
def sharded(tmp_path: Path) -> str:
    """DeepSpeed leaves small parameters whole: without this, nothing here would be sharded."""
    settings = tmp_path / "deepspeed.json"
    settings.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    return str(settings)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_it_trains_alike_at_every_zero_stage_and_the_saved_model_reloads(
    configure: Configure,
    sharded: str,
    policy_folder: Path,
    reference_folder: Path,
    pairs_file: Path,
    zero_stage: int,
) -> None:
    """Offloaded as far as the stage allows."""
    options: dict[str, Any] = {"zero_stage": zero_stage, "offload_optimizer": zero_stage > 0}
    options |= {"deepspeed_config": sharded, "offload_parameters": True} if zero_stage == 3 else {}
    result = train(configure(gradient_accumulation_steps=2, epochs=3, **options))
    expected, losses = plain_torch_run(policy_folder, reference_folder, halves(policy_folder, pairs_file, 12))
    assert result.summary["steps"] == 12
    logged = [line for line in result.metrics if "loss" in line]
    assert [line["loss"] for line in logged] == pytest.approx(losses, rel=1e-5)
    got = load_file(result.output_dir / "model.safetensors")
    for name, parameter in expected.items():
        torch.testing.assert_close(got[name], parameter, rtol=0, atol=2e-4, msg=name)
    assert not torch.equal(logps_of(result.output_dir, pairs_file), logps_of(policy_folder, pairs_file))
    assert all(line["grad_norm"] > 0 for line in logged)


def halves(policy: Path, pairs_file: Path, steps: int) -> list[list[list[TokenizedPair]]]:
    """Steps of two batches of four pairs."""
    pairs = training_pairs(policy, pairs_file)
    order = make_order([1] * len(pairs), 8, 0)
    return [share_of(pairs, order(step), 4, 0, 1) for step in range(1, steps + 1)]


def test_rows_count_for_their_weight(configure: Configure, tmp_path: Path) -> None:
    """A weight of 0 is as good as a row that is not there, twice the weight as good as the row twice."""
    rows = text_rows(3)
    weighted = [{**row, "weight": weight} for row, weight in zip(rows, [0, 1.0, 2.0], strict=True)]

    def result(some: list[dict[str, Any]], name: str, **options: Any) -> Any:
        options = {"batch_size": 1, "gradient_accumulation_steps": 3, "eval_fraction": 0, **options}
        file = write_jsonl(tmp_path / f"{name}.jsonl", some)
        return train(configure(pairs=str(file), output_dir=str(tmp_path / name), max_steps=1, **options))

    got, same = result(weighted, "weighted"), result([rows[1], rows[2], rows[2]], "repeated")
    for name in ("loss", "grad_norm"):
        assert got.metrics[0][name] == pytest.approx(same.metrics[0][name], rel=1e-5)
    assert got.metrics[0]["pair_weight"] == pytest.approx(1.0)
    assert "training: losses are multiplied by the rows' weights, from 0 to 2, mean 1" in got.summary["notes"]
    plain = result(rows, "plain")
    assert plain.metrics[0]["loss"] != pytest.approx(got.metrics[0]["loss"], rel=1e-3)
    assert "pair_weight" not in plain.metrics[0]
    held_out = result(rows, "held-out", eval_pairs=str(tmp_path / "weighted.jsonl"), batch_size=3)
    repeated = result(rows, "held-out-2", eval_pairs=str(tmp_path / "repeated.jsonl"), batch_size=3)
    before, expected = held_out.summary["before"], repeated.summary["before"]
    assert before["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for name, wrong, message in (
        ("none", [0, 0, 0], "training pairs: every weight is 0"),
        ("some", [1, None, 1], r"training pairs: 2 of 3 rows have a weight, the others \(the first is number 2\)"),
        ("negative", [1, -0.5, 1], "negative.jsonl:2: 'weight', .* at least 0; got -0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            result([{**row, "weight": weight} for row, weight in zip(rows, wrong, strict=True)], name)
    with pytest.raises(ValueError, match=r"pairs cannot be weighted .* under aot"):
        result(weighted, "aot", loss_type=("aot",))


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "float32"), (3, "float32"), (0, "bfloat16"), (1, "bfloat16")])
def test_a_step_of_which_nothing_is_left_moves_no_weight(
    configure: Configure, tmp_path: Path, sharded: str, zero_stage: int, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every batch is broken in one step of three: the weights after it are those before it."""
    broken = broken_reference(tmp_path)
    rows = json.loads(json.dumps(text_rows(24)).replace("w23", "w22"))
    order = make_order([1] * 24, 8, 0)
    for index in order(3):
        rows[index]["chosen"] += " w23"
    options: dict[str, Any] = {
        "ref_model": str(broken),
        "pairs": str(write_jsonl(tmp_path / "rows.jsonl", rows)),
        "eval_fraction": 0,
        "gradient_accumulation_steps": 2,
        "non_finite": "skip",
        "zero_stage": zero_stage,
        "dtype": dtype,
        "lr_schedule": "constant",
        **({"deepspeed_config": sharded} if zero_stage == 3 else {}),
    }
    two = train(configure(max_steps=2, output_dir=str(tmp_path / "two"), **options))
    three = train(configure(max_steps=3, output_dir=str(tmp_path / "three"), **options))
    before, after = (load_file(run.output_dir / "model.safetensors") for run in (two, three))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (three.summary["skipped_batches"], three.summary["skipped_steps"]) == (2, 1)
    assert "loss" not in three.metrics[-1]
    assert three.metrics[-1]["skipped_steps"] == 1
    shown = capsys.readouterr()
    assert shown.err.count("batch left out on all processes: step 3: non-finite values inside the mask") == 2
    assert "not finite, and left out: 2 batches, 1 steps" in shown.out


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_gradient_that_is_not_finite_moves_no_weight(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, policy_folder: Path, zero_stage: int
) -> None:
    """The losses are finite, the gradient is not: at the second step here."""
    inside = loop.loss_of_batch
    calls = [0]

    def loss_of_batch(*arguments: Any, **options: Any) -> Any:
        out = inside(*arguments, **options)
        if out.losses.requires_grad:
            calls[0] += 1
            if calls[0] == 2:
                out.losses.register_hook(lambda gradient: gradient * math.inf)
        return out

    monkeypatch.setattr(loop, "loss_of_batch", loss_of_batch)
    options = {"max_steps": 4, "eval_fraction": 0, "zero_stage": zero_stage}
    with pytest.raises(NonFiniteError, match="step 2: the gradient is not finite although every loss is"):
        train(configure(**options))
    calls[0] = 0
    config = configure(**options, non_finite="skip", output_dir=configure().output_dir + "2")
    result = train(config)
    assert result.summary["skipped_steps"] == 1
    assert ["grad_norm" in line for line in result.metrics] == [True, False, True, True]
    assert [line["learning_rate"] for line in result.metrics] == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0])  # goes on
    weights = load_file(result.output_dir / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_policy_that_is_broken_ends_a_run_that_skips(configure: Configure, tmp_path: Path) -> None:
    broken = make_model(tmp_path / "policy", seed=2)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="20 times in a row: the weights are broken"):
        train(configure(model=str(broken), max_steps=30, eval_fraction=0, non_finite="skip"))


def broken_reference(folder: Path) -> Path:
    """A model that gives NaN for answers with the word w23."""
    broken = make_model(folder / "broken", seed=2)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = math.nan  # the last word only
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return broken


def fill(folder: Path, reference: Path, pairs_file: Path) -> ReferenceStore:
    """A store of what the reference says of all rows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(reference), AutoTokenizer.from_pretrained(reference)
    store = ReferenceStore.create(folder, reference_space(model, tokenizer, label=reference.name))
    pairs, _ = tokenize_pairs(read_rows(pairs_file), tokenizer, max_length=64)
    fill_store(store, pairs, model, pad_token_id=0, progress=False)
    return store


def test_a_store_gives_the_run_of_the_reference_and_the_teacher_never_runs(
    configure: Configure, tmp_path: Path, reference_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep over β and ratio, two epochs, a stop and a resumption: not one pass through a reference."""
    runs = [{}, {"beta": 0.5}, {"selection_ratio": 0.2}, {"objective": "dpo"}]
    online = [train(configure(epochs=2, output_dir=str(tmp_path / f"online{n}"), **o)) for n, o in enumerate(runs)]
    fill(tmp_path / "store", reference_folder, pairs_file)

    def never(*_: Any) -> None:
        raise AssertionError("a reference ran")

    monkeypatch.setattr(references, "frozen_per_token_logps", never)
    monkeypatch.setattr(references_of_the_loop, "start_frozen_engine", never)
    stored: dict[str, Any] = {"ref_model": None, "reference_store": str(tmp_path / "store"), "epochs": 2}
    for number, options in enumerate(runs):
        config = configure(output_dir=str(tmp_path / f"stored{number}"), resume="auto", **stored, **options)
        if number == 0:
            stop_at(3)
            assert train(config).stopped_at == 3
            loop.step_engine = step_engine_of_the_loop
        result = train(config)
        assert_same_metrics(result.metrics, online[number].metrics)
        one, other = (load_file(r.output_dir / "model.safetensors") for r in (result, online[number]))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def assert_same_metrics(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Equal but for rounding: log-probs from a store were computed in batches of other shapes."""
    assert len(ours) == len(theirs)
    for line, other in zip(ours, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimizaton": {}}, "DeepSpeed knows no 'zero_optimizaton': did you mean 'zero_optimization'"),
        ({"zero_optimization": {"reduce_bucket_sizes": 5}}, "zero_optimization: reduce_bucket_sizes: Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "zero_optimization: reduce_bucket_size: .*integer"),
    ],
)
def test_a_wrong_name_in_deepspeeds_settings(
    configure: Configure, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """Before a model is looked at, which is not to blame."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"deepspeed_config {path}: {message}"):
        train(configure(deepspeed_config=str(path), zero_stage=3, model=str(tmp_path / "absent")))


def test_a_store_that_training_fills_knows_at_which_length_rows_were_cut(configure: Configure, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    train(configure(reference_store=store, max_length=20, max_steps=1))
    with pytest.raises(ValueError, match=r"The store was filled with max_length 20 \(keep_start\)\."):
        train(configure(ref_model=None, reference_store=store, max_length=9, output_dir=str(tmp_path / "shorter")))


def test_two_references_one_to_score_and_one_to_anchor(
    configure: Configure, tmp_path: Path, policy_folder: Path, reference_folder: Path, pairs_file: Path
) -> None:
    """The policy's own start anchors the reward, the strong one scores; from models and from one store of both."""
    online = train(configure(max_steps=3, ref_model=str(policy_folder), scoring_ref_model=str(reference_folder)))
    for folder in (policy_folder, reference_folder):
        fill(tmp_path / "store", folder, pairs_file)
    stores: dict[str, Any] = {
        "ref_model": None,
        "reference_store": str(tmp_path / "store"),
        "reference_space": policy_folder.name,
        "scoring_reference_store": str(tmp_path / "store"),
        "scoring_reference_space": reference_folder.name,
        "output_dir": str(tmp_path / "stored"),
    }
    assert_same_metrics(train(configure(max_steps=3, **stores)).metrics, online.metrics)
    assert online.summary["before"]["eval_rewards/margins"] == 0  # of the reference
    assert online.summary["before"]["eval_selection/tied_fraction"] < 0.5  # of the scoring reference
    assert not any("equals the initial policy" in note for note in online.summary["notes"])
    with pytest.raises(ValueError, match="Name one of them"):
        train(configure(**{**stores, "reference_space": None, "output_dir": str(tmp_path / "third")}))
    swapped = {"reference_space": reference_folder.name, "scoring_reference_space": policy_folder.name}
    config = configure(**{**stores, **swapped, "output_dir": str(tmp_path / "swapped"), "max_steps": 1})
    assert any("equals the initial policy" in note for note in train(config).summary["notes"])


def test_stores_that_do_not_fit(configure: Configure, tmp_path: Path, reference_folder: Path, pairs_file: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", text_rows(40)[:30])
    fill(tmp_path / "few", reference_folder, few)
    stored: dict[str, Any] = {"ref_model": None, "reference_store": str(tmp_path / "few")}
    with pytest.raises(ValueError, match=r"10 of 40 pairs .*selective-pref score"):
        train(configure(**stored))
    other = make_model(tmp_path / "other", seed=0, words=[*WORDS[1:], WORDS[0]])
    with pytest.raises(ValueError, match="tokenizes differently: id 6 is 'w1'"):
        train(configure(model=str(other), **stored))
    with pytest.raises(ValueError, match="no reference store at"):
        train(configure(ref_model=None, reference_store=str(tmp_path / "absent")))
    assert not Path(configure().output_dir).exists()


def test_options_that_change_the_work_and_not_the_result(configure: Configure, tmp_path: Path) -> None:
    """Checkpointed activations: bit by bit. Another split of the same global batch: the same losses."""
    plain = train(configure(max_steps=3))
    again = train(configure(max_steps=3, gradient_checkpointing=True, output_dir=str(tmp_path / "checkpointed")))
    assert again.metrics == plain.metrics
    split = train(configure(max_steps=3, batch_size=1, global_batch_size=4, output_dir=str(tmp_path / "split")))
    losses = [[line["loss"] for line in run.metrics if "loss" in line] for run in (plain, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("count", "per_step"), [(1000, 8), (1003, 8), (20, 8), (7, 8)])
def test_grouping_by_length_keeps_every_pair_and_pads_less(count: int, per_step: int) -> None:
    pick = random.Random(0)
    lengths = [pick.randint(5, 500) for _ in range(count)]
    plain, grouped = make_order(lengths, per_step, 3), make_order(lengths, per_step, 3, by_length=True)
    steps = 3 * count // per_step
    drawn = [index for step in range(1, steps + 1) for index in grouped(step)]
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))
    padding = [
        sum(
            max(lengths[i] for i in order(step)) * per_step - sum(lengths[i] for i in order(step))
            for step in range(1, steps)
        )
        for order in (plain, grouped)
    ]
    assert padding[1] < 0.2 * padding[0] or count < 1000
    longest = [max(lengths[i] for i in grouped(step)) for step in range(1, count // per_step)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True)) or count < 1000  # steps stay shuffled


def test_a_run_by_length_learns_the_same_pairs(configure: Configure) -> None:
    result = train(configure(group_by_length=True, epochs=2, batch_size=8))
    assert result.summary["steps"] == 8


def test_a_cosine_falls_after_its_warm_up(configure: Configure) -> None:
    result = train(configure(max_steps=6, warmup_steps=2, lr_schedule="cosine", eval_fraction=0))
    assert result.summary["notes"] == ["pairs.jsonl: TRL standard rows: 40"]
    short = train(configure(max_steps=1, warmup_steps=1, eval_fraction=0, output_dir=configure().output_dir + "2"))
    assert short.summary["notes"][1:] == ["warmup_steps 1 of 1 steps: the learning rate reaches its peak at no step"]
    rates = [line["learning_rate"] for line in result.metrics]
    assert rates == pytest.approx(
        [1e-2 * x for x in (0.5, 1, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in (1, 2, 3, 4)))]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"optimizer": {"type": "Adam"}}', "sets optimizer: leave it to the option learning_rate"),
        ('{"zero_optimization": {"stage": 1}}', "sets zero_optimization.stage: leave it to the option zero_stage"),
        ("[]", "must hold a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_deepspeed_settings_of_ones_own(configure: Configure, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        train(configure(deepspeed_config=str(tmp_path / "settings.json")))


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_gradients_are_clipped(configure: Configure, policy_folder: Path, zero_stage: int) -> None:
    """Far below AdamW's ε of 1e-8, so that a clipped gradient moves nothing; an unclipped one moves weights by 1e-2."""
    options = {"max_steps": 1, "zero_stage": zero_stage, "max_grad_norm": 1e-12, "eval_fraction": 0}
    result = train(configure(**options, lr_schedule="constant"))
    before, after = (load_file(folder / "model.safetensors") for folder in (policy_folder, result.output_dir))
    assert max((after[name] - before[name]).abs().max() for name in before) < 1e-5
    assert result.metrics[-1]["grad_norm"] > 1e-6  # before clipping


def test_weights_decay(configure: Configure, policy_folder: Path, tmp_path: Path) -> None:
    """The first step of AdamW with weight decay λ is the one without it, less learning rate · λ · weight."""
    options = {"max_steps": 1, "eval_fraction": 0, "lr_schedule": "constant"}
    runs = [train(configure(**options, weight_decay=w, output_dir=str(tmp_path / str(w)))) for w in (0.0, 0.5)]
    start = load_file(policy_folder / "model.safetensors")
    without, decayed = (load_file(run.output_dir / "model.safetensors") for run in runs)
    for name, weight in start.items():
        torch.testing.assert_close(decayed[name], without[name] - 1e-2 * 0.5 * weight, rtol=0, atol=1e-6)
    assert not torch.equal(decayed["lm_head.weight"], without["lm_head.weight"])


def test_the_policy_trains_again_after_an_evaluation(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers recomputes activations in training mode alone, so the mode decides about memory."""
    modes: list[tuple[bool, bool]] = []
    inside = loop.model_per_token_logps

    def model_per_token_logps(engine: Any, batch: Any) -> torch.Tensor:
        modes.append((torch.is_grad_enabled(), engine.module.training))
        return inside(engine, batch)

    monkeypatch.setattr(loop, "model_per_token_logps", model_per_token_logps)
    train(configure(max_steps=3, eval_steps=1, gradient_checkpointing=True))
    assert modes.count((True, True)) == 3
    assert set(modes) == {(True, True), (False, False)}


def test_a_number_that_is_not_finite_in_an_evaluation(configure: Configure, tmp_path: Path) -> None:
    """It stops the run, or is left out of the means and counted; what is written is JSON either way."""
    rows = json.loads(json.dumps(text_rows(40)).replace("w23", "w22"))
    held_out = json.loads(json.dumps(rows[:8]))
    held_out[5]["chosen"] += " w23"
    options: dict[str, Any] = {
        "ref_model": str(broken_reference(tmp_path)),
        "pairs": str(write_jsonl(tmp_path / "rows.jsonl", rows)),
        "eval_pairs": str(write_jsonl(tmp_path / "held_out.jsonl", held_out)),
        "max_steps": 2,
    }
    with pytest.raises(NonFiniteError, match=r"evaluation after step 0: .*ref_per_token_logps.*held_out\.jsonl:6"):
        train(configure(**options))
    with pytest.raises(NonFiniteError, match="evaluation after step 0"):  # it came to nothing, and is in nobody's way
        train(configure(**options))
    result = train(configure(**options, non_finite="skip", output_dir=str(tmp_path / "skipped")))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    texts = [*(result.output_dir / "metrics.jsonl").read_text().splitlines()]
    for text in [*texts, (result.output_dir / "summary.json").read_text()]:
        json.loads(text, parse_constant=refuse)
    evaluations = [line for line in result.metrics if "eval_loss" in line]
    assert [line["eval_skipped_batches"] for line in evaluations] == [1, 1]
    assert result.summary["skipped_batches"] == 0  # of the training
    first = str(write_jsonl(tmp_path / "first.jsonl", held_out[:4]))  # the batch without the broken row
    whole = train(configure(**{**options, "eval_pairs": first}, output_dir=str(tmp_path / "first")))
    assert result.summary["before"]["eval_loss"] == whole.summary["before"]["eval_loss"]


def test_the_model_is_saved_before_an_evaluation_that_ends_the_run(configure: Configure) -> None:
    """One step this large makes every log-prob NaN; the training of a longer run would be lost with the model."""
    config = configure(max_steps=1, learning_rate=1e18, lr_schedule="constant")
    with pytest.raises(NonFiniteError, match="evaluation after step 1: "):
        train(config)
    assert (Path(config.output_dir) / "model.safetensors").exists()
    assert not (Path(config.output_dir) / "summary.json").exists()


def test_values_that_json_cannot_express_are_null(configure: Configure, tmp_path: Path) -> None:
    start_processes(configure())
    with RunLog(tmp_path / "log", configure(), {}, None, writes=True) as log:
        log.write(1, 0.5, {"loss": math.nan, "rewards/margins": math.inf, "learning_rate": 1.0})
    expected = {"step": 1, "epoch": 0.5, "loss": None, "rewards/margins": None, "learning_rate": 1.0}
    assert json.loads((tmp_path / "log" / "metrics.jsonl").read_text()) == expected == log.lines[0]


@pytest.mark.parametrize(
    ("swapped", "said", "unsaid", "rate"),
    [(False, "rose from", "Warning:", 1e-3), (True, "fell from", "rose from", 2e-2)],
    ids=["a run that goes well", "held-out pairs that are swapped"],
)
def test_the_end_says_which_way_the_run_went(
    configure: Configure,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    swapped: bool,
    said: str,
    unsaid: str,
    rate: float,
) -> None:
    """The selected margin is below 0 in both, so it cannot be what tells them apart."""
    texts = [{"chosen": "w20 w21", "rejected": "w22 w23"}, {"chosen": "w22 w23", "rejected": "w20 w21"}]
    rows = [{"prompt": f"{a} {b} ", **texts[0]} for a in WORDS[:6] for b in WORDS[6:10]]
    held_out = [{"prompt": f"{a} {b} ", **texts[swapped]} for a in WORDS[:6] for b in WORDS[10:12]]
    files = {"pairs": rows, "eval_pairs": held_out}
    paths = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", some)) for name, some in files.items()}
    result = train(configure(**paths, max_steps=4, learning_rate=rate))
    assert result.summary["after"]["eval_selection/rewards/margins"] < 0
    shown = capsys.readouterr().out
    assert f"The full margin (eval_rewards/margins) {said}" in shown
    assert unsaid not in shown
    assert ("is falling: the policy moves towards the rejected" in shown) == swapped
    assert "The margin of the selected tokens is below 0. That alone says nothing" in shown


def test_a_model_of_text_and_images_trains_and_comes_back(configure: Configure, tmp_path: Path) -> None:
    """Its vocabulary and context length stand in the text part of its configuration."""
    folder = make_text_and_image_model(tmp_path / "gemma", seed=1)
    models = {"model": str(folder), "ref_model": str(make_text_and_image_model(tmp_path / "reference", seed=2))}
    with pytest.raises(ValueError, match=r"max_length 65 is longer than the policy can read \(64 tokens\)"):
        train(configure(**models, max_length=65))
    result = train(configure(**models, max_steps=2))
    again = train(configure(**{**models, "model": str(result.output_dir)}, max_steps=1, output_dir=str(tmp_path / "b")))
    before, after = again.summary["before"], result.summary["after"]
    assert before["eval_logps/chosen"] == pytest.approx(after["eval_logps/chosen"], rel=1e-6)


@needs_experts
def test_a_mixture_of_experts_trains_and_comes_back(configure: Configure, tmp_path: Path) -> None:
    """With no loss for its router asked for; one that asks is refused, as that loss would be left out."""
    asking = make_mixture(tmp_path / "asking", seed=1, output_router_logits=True)
    with pytest.raises(ValueError, match="asks for a load-balancing loss"):
        train(configure(model=str(asking)))
    mixture = str(make_mixture(tmp_path / "mixture", seed=1))
    result = train(configure(model=mixture, max_steps=2))
    parts = configure(model=mixture, max_steps=2, resume="auto", output_dir=str(tmp_path / "parts"))
    stop_at(1)
    assert train(parts).stopped_at == 1
    loop.step_engine = step_engine_of_the_loop
    assert train(parts).metrics == result.metrics  # the experts of the checkpoint are loaded back
    again = train(configure(model=str(result.output_dir), max_steps=1, output_dir=str(tmp_path / "again")))
    before, after = again.summary["before"], result.summary["after"]
    assert before["eval_logps/chosen"] == pytest.approx(after["eval_logps/chosen"], rel=1e-6)


def test_a_generation_configuration_that_cannot_be_saved(configure: Configure, tmp_path: Path) -> None:
    """Repaired where that changes no text, refused before the first step where it cannot be."""
    folder = make_model(tmp_path / "model", seed=1)
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 2}')
    result = train(configure(model=str(folder), max_steps=1))
    assert any("temperature are not read" in note for note in result.summary["notes"])
    assert "temperature" not in json.loads((result.output_dir / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text('{"do_sample": false, "num_return_sequences": 4}')
    config = configure(model=str(folder), output_dir=str(tmp_path / "refused"))
    with pytest.raises(ValueError, match="num_return_sequences"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_a_policy_of_which_nothing_learns_is_refused(policy_folder: Path) -> None:
    """Quantised weights, say, take no gradient."""
    policy = load_model(str(policy_folder), dtype="float32").requires_grad_(False)
    with pytest.raises(ValueError, match="the policy has no trainable parameter"):
        check_policy(policy, AutoTokenizer.from_pretrained(policy_folder))


def test_weights_are_kept_where_the_model_is_refused_at_the_end(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something spoils the configuration while the run is on."""
    inside = loop.save_model

    def spoilt(engine: Any, tokenizer: Any, output_dir: Path) -> None:
        engine.module.generation_config.num_return_sequences = 4
        inside(engine, tokenizer, output_dir)

    monkeypatch.setattr(loop, "save_model", spoilt)
    config = configure(max_steps=1)
    with pytest.raises(OSError, match=r"num_return_sequences.*Its weights are in rescued\.safetensors"):
        train(config)
    folder = Path(config.output_dir)
    rescued = load_file(folder / "rescued.safetensors")
    assert rescued.keys() == load_file(Path(config.model) / "model.safetensors").keys()
    assert not (folder / ".saving").exists()
    assert not (folder / "config.json").exists()


def test_a_tracker_that_does_not_start_leaves_the_folder_free(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither tracker is installed here: a module of the name stands for one without a login."""
    (tmp_path / "trackio.py").write_text("def init(**_):\n    raise RuntimeError('no login')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = configure(tracker="trackio", max_steps=1)
    with pytest.raises(ValueError, match="tracker trackio cannot be started: no login"):
        train(config)
    del sys.modules["trackio"]  # the one without a login
    assert not Path(config.output_dir).exists()
    config.tracker = "none"
    assert train(config).summary["steps"] == 1


@pytest.mark.parametrize("objective", ["selective_dpo", "dpo", "simpo", "sft"])
def test_every_objective_learns_what_it_is_told(configure: Configure, tmp_path: Path, objective: str) -> None:
    """Chosen answers are one word, rejected another: the margin of unseen prompts must grow."""
    rows = [{"prompt": f"{a} {b} ", "chosen": "w20 w21", "rejected": "w22 w23"} for a in WORDS[:6] for b in WORDS[6:10]]
    options: dict[str, Any] = {} if objective in ("selective_dpo", "dpo") else {"ref_model": None}
    options |= {} if objective == "sft" else {"beta": 0.5}
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    out = train(configure(objective=objective, pairs=path, epochs=4, learning_rate=5e-3, **options))
    before, after = out.summary["before"], out.summary["after"]
    if objective == "sft":
        assert not any("margins" in name or "rejected" in name for name in after)
    else:
        assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.05
    if objective != "selective_dpo":
        assert after["eval_loss"] < before["eval_loss"]


def test_what_a_run_leaves_behind(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(epochs=2, eval_steps=5)
    result = train(config)
    folder = result.output_dir
    assert {p.name for p in folder.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
    }
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert TrainConfig(**yaml.safe_load((folder / "config.yaml").read_text())) == config
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    steps = result.summary["steps"]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == sorted({0, *range(5, steps, 5), steps})
    trained = next(line for line in lines if "loss" in line)
    assert {"rewards/margins", "selection/rewards/margins", "selection/fraction", "grad_norm", "learning_rate"} <= set(
        trained
    )
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert list((folder / "tensorboard").iterdir())
    shown = capsys.readouterr()
    assert "rewards/accuracies" in shown.out
    assert "sel_margin" in shown.err


def test_the_selection_of_the_first_held_out_pairs_is_kept_at_each_evaluation(
    configure: Configure, tmp_path: Path, reference_folder: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    held_out = write_jsonl(tmp_path / "held_out.jsonl", text_rows(8))
    options = {"eval_pairs": str(held_out), "max_steps": 4, "batch_size": 2, "save_steps": 2}
    result = train(configure(picture_pairs=3, eval_steps=1, **options))  # more than one batch of them
    folder = result.output_dir
    run = read_run(folder)
    assert [visit.step for visit in run.visits] == [0, 1, 2, 3, 4]
    pairs, _ = tokenize_pairs(read_rows(held_out), AutoTokenizer.from_pretrained(folder), max_length=64)
    batch = collate(pairs[:3], 0)
    with torch.no_grad():
        logps = [
            model_per_token_logps(AutoModelForCausalLM.from_pretrained(model), batch)
            for model in (folder, reference_folder)
        ]
    out = selective_dpo_loss(*responses(batch, *logps), beta=0.01, selection_ratio=0.4)
    drawn = run.visits[-1].pairs
    assert [pair["place"] for pair in drawn] == [f"held_out.jsonl:{row}" for row in (1, 2, 3)]
    for side in ("chosen", "rejected"):
        weights, mask = getattr(out, f"{side}_weights"), getattr(out, side).mask
        for row, pair in enumerate(drawn):
            assert pair[side]["weights"] == pytest.approx(weights[row][mask[row]].tolist())
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={IMAGES: 0}).Reload()
    assert [event.step for event in events.Images("selection/pairs")] == [0, 1, 2, 3, 4]

    without = train(configure(picture_pairs=0, output_dir=str(tmp_path / "without"), **options))
    assert not (without.output_dir / "selection").exists()
    ours, theirs = (load_file(run / "model.safetensors") for run in (folder, without.output_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # It goes on from step 2, with an evaluation at the end alone: what the first run drew at step 3 is not of this run.
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    train(configure(picture_pairs=1, resume="auto", **options))
    assert [(visit.step, len(visit.pairs)) for visit in read_run(folder).visits] == [(0, 3), (1, 3), (2, 3), (4, 1)]


def test_without_matplotlib_there_are_files_and_a_note(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    result = train(configure(max_steps=1, objective="sft", ref_model=None))
    assert (result.output_dir / "selection" / "step-000001.svg").exists()
    assert "matplotlib is not installed: the selection of the fixed pairs is kept as files" in capsys.readouterr().err


def test_a_run_repeats_itself(configure: Configure, tmp_path: Path) -> None:
    one = train(configure(max_steps=4, output_dir=str(tmp_path / "one")))
    two = train(configure(max_steps=4, output_dir=str(tmp_path / "two")))
    assert one.metrics == two.metrics
    a, b = (load_file(r.output_dir / "model.safetensors") for r in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_evaluation_is_the_mean_over_all_held_out_pairs(configure: Configure, tmp_path: Path) -> None:
    """Whatever the batch size: no mean of means over unequal batches."""
    results = [
        train(configure(max_steps=1, batch_size=size, eval_fraction=0.4, output_dir=str(tmp_path / str(size))))
        for size in (3, 16)
    ]
    small, large = (result.summary["before"] for result in results)
    assert small == pytest.approx(large, rel=1e-4, abs=1e-6)


def test_bf16_runs_and_reports_in_float32(configure: Configure) -> None:
    result = train(configure(dtype="bfloat16", max_steps=3))
    assert load_file(result.output_dir / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    loss = next(line["loss"] for line in result.metrics if "loss" in line)
    assert loss != float(torch.tensor(loss).bfloat16())


def test_a_reference_equal_to_the_policy_warns_once(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(max_steps=1)
    config.ref_model = config.model
    result = train(config)
    warning = "the reference equals the initial policy"
    assert capsys.readouterr().err.count(warning) == 1
    assert any(warning in note for note in result.summary["notes"])
    assert result.summary["before"]["eval_selection/tied_fraction"] == 1.0


def test_rows_left_out_are_reported(configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*text_rows(20), {"prompt": "w0", "chosen": "w1", "rejected": "w1"}, "{broken"]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=r"rows\.jsonl:22"):
        train(configure(pairs=path, max_steps=1))
    equal = str(write_jsonl(tmp_path / "equal.jsonl", rows[20:21]))
    with pytest.raises(ValueError, match="evaluation pairs: none of 1 pairs can be trained on"):
        train(configure(eval_pairs=equal, max_steps=1))
    result = train(
        configure(pairs=path, max_steps=1, skip_malformed_rows=True, eval_fraction=0, output_dir=str(tmp_path / "o"))
    )
    notes = " ".join(result.summary["notes"])
    assert "1 malformed rows left out" in notes
    assert "1 of 21 pairs left out: chosen and rejected are equal" in notes
    assert "rows.jsonl:22" in capsys.readouterr().err


def test_nan_in_a_model_stops_the_run_and_saves_nothing(configure: Configure, tmp_path: Path) -> None:
    broken = broken_reference(tmp_path)
    rows = [*text_rows(8), {"prompt": "w0 ", "chosen": "w1 w23 w2", "rejected": "w3"}]
    path = str(write_jsonl(tmp_path / "rows.jsonl", [r for r in rows if "w23" not in str(r)] + rows[-1:]))
    config = configure(ref_model=str(broken), pairs=path, eval_fraction=0, batch_size=2, epochs=4)
    with pytest.raises(NonFiniteError, match=r"step \d+: .*ref_per_token_logps.*rows.*tokens.*rows\.jsonl:"):
        train(config)
    assert not (Path(config.output_dir) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_model": None}, "give ref_model"),
        ({"objective": "simpo"}, "reads no reference"),
        ({"objective": "dpo", "selection_ratio": 0.5}, "'dpo' does not read selection_ratio"),
        ({"objective": "sft", "ref_model": None, "beta": 0.5}, "'sft' does not read beta"),
        ({"gamma": 1.0}, "'selective_dpo' does not read gamma"),
        ({"objective": "kto"}, "objective must be one of"),
        ({"objective": "dpo", "loss_type": ("sigmod",)}, "got 'sigmod': did you mean 'sigmoid'"),
        ({"loss_type": ("hinge",), "label_smoothing": 0.1}, "'selective_dpo' does not read label_smoothing"),
        ({"objective": "simpo", "ref_model": None, "loss_type": ("ipo",)}, "'simpo' does not read loss_type"),
        ({"selection_ratio": (0.4, 0.1), "selection_pool": "pair"}, "two selection ratios need pool='response'"),
        ({"min_score": math.nan}, "min_score"),
        ({"beta": 0.0}, "beta must be a finite number above 0; got 0.0"),
        ({"selection_ratio": 0.0}, r"selection_ratio must be in \(0, 1\]"),
        ({"selection_ratio": 40}, "40 % is 0.4"),
        ({"selection_pool": "all"}, "pool must be"),
        ({"selection_ties": "random"}, "ties must be"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"epochs": math.nan}, "epochs must be above 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"logging_steps": 0}, "logging_steps must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"max_length": 65}, r"longer than the policy can read \(64 tokens\)"),
        ({"batch_size": 1000}, "too few pairs"),
        ({"reference_store": "store", "reference_space": "s"}, "fills its own space of reference_store"),
        ({"reference_space": "s"}, "says which part of reference_store to read"),
        ({"objective": "simpo", "ref_model": None, "reference_store": "s"}, "reads no reference"),
        ({"objective": "dpo", "scoring_ref_model": "s"}, "'dpo' scores no tokens"),
        ({"global_batch_size": 6}, r"no multiple of 4 \(batch_size 4 × 1 processes\): the nearest that fits is 8"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "give one of them"),
        ({"offload_optimizer": True}, "offload_optimizer needs zero_stage 1"),
        ({"offload_parameters": True, "zero_stage": 2}, "offload_parameters needs zero_stage 3; got 2"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"save_steps": 0}, "save_steps must be at least 1"),
        ({"tracker": "nowhere_to_be_found"}, "tracker nowhere_to_be_found is not installed"),
        ({"output_dir": "/proc/nothing"}, "cannot be written to"),
        ({"eval_fraction": 1.0}, "eval_fraction must be in"),
        ({"pairs": "absent.jsonl"}, "no preference pairs at"),
        ({"model": "absent-model"}, "there is no such folder, nor a hub model at hand"),
    ],
)
def test_options_that_make_no_sense(configure: Configure, options: dict[str, Any], message: str) -> None:
    config = configure(**options)
    with pytest.raises((ValueError, OSError), match=message):
        train(config)
    assert not Path(config.output_dir).exists()


def test_folders_that_are_none(configure: Configure, tmp_path: Path, policy_folder: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="is no model folder"):
        train(configure(model=str(tmp_path / "bare")))
    half = make_model(tmp_path / "half", seed=0)
    (half / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the folder is incomplete"):
        train(configure(ref_model=str(half), output_dir=str(tmp_path / "a")))
    other = make_model(tmp_path / "other", seed=0, words=[*WORDS[1:], WORDS[0]])
    with pytest.raises(ValueError, match="tokenize differently: id 6 is 'w0'"):
        train(configure(ref_model=str(other), output_dir=str(tmp_path / "b")))
    small = make_model(tmp_path / "small", seed=0, vocab_size=20)
    with pytest.raises(ValueError, match="outside the reference's vocabulary of 20"):
        train(configure(ref_model=str(small), output_dir=str(tmp_path / "c")))


def test_an_output_folder_that_holds_something_is_left_alone(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")
    with pytest.raises(ValueError, match="is not empty"):
        train(configure())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    with pytest.raises(ValueError, match="is a file"):
        train(configure(output_dir=str(tmp_path / "out" / "precious")))
    assert (tmp_path / "out" / "precious").read_text() == "keep me"


def test_bf16_where_the_hardware_has_none(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no such GPU here: what torch says of one is put in its place."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # which torch 2.10 lacks
        assert (
            "this CPU has no instructions for bfloat16"
            in train(configure(dtype="bfloat16", max_steps=1, eval_fraction=0)).summary["notes"][0]
        )
    config = configure(dtype="bfloat16", output_dir=configure().output_dir + "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    with pytest.raises(ValueError, match="an old card does not compute in bf16"):
        train(config)


def test_a_disk_without_room_is_found_before_the_first_step(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model; and as many checkpoints as are there at one time, with the two moments of AdamW."""
    weights = (Path(configure().model) / "model.safetensors").stat().st_size
    for free, options, message in (
        (1000, {}, r"its disk has 0\.0000 GB free; the model takes"),
        (weights * 9, {"save_steps": 1, "max_steps": 9}, "the model and 3 checkpoints take"),
    ):
        usage = shutil.disk_usage(".")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        with pytest.raises(OSError, match=message):
            train(configure(**options))
        monkeypatch.undo()
    assert not Path(configure().output_dir).exists()


def test_a_model_that_cannot_be_written_leaves_no_half_of_it(configure: Configure, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk."""
    import resource

    wide = make_model(tmp_path / "wide", seed=5, hidden_size=128)
    config = configure(model=str(wide), max_steps=1, eval_fraction=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written to"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = {p.name for p in Path(config.output_dir).iterdir()}
    assert left == {"config.yaml", "run.json", "metrics.jsonl", "tensorboard"}


def test_steps_cover_every_pair_once_an_epoch() -> None:
    order = make_order([1] * 10, per_step=4, seed=1)
    drawn = [index for step in range(1, 6) for index in order(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert make_order([1] * 10, per_step=4, seed=1)(4) == order(4)  # whatever was asked before


def test_number_of_steps(configure: Configure) -> None:
    assert number_of_steps(configure(epochs=1.5), 100, 8) == 150 // 8
    assert number_of_steps(configure(max_steps=7), 100, 8) == 7
    assert pairs_per_step(configure(gradient_accumulation_steps=3), 2) == 4 * 3 * 2
    assert pairs_per_step(configure(global_batch_size=1280, batch_size=1), 8) == 1280


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k_pairs", "chat_pairs_en"])
def test_real_model_and_rows(shared: Path, tmp_path: Path, name: str) -> None:
    """A real model on real rows; the saved model gives the log-probs that the run ended with."""
    folder, rows = str(shared / "models" / "stories260k"), str(shared / "data" / f"{name}.jsonl")
    config = TrainConfig(
        model=folder,
        ref_model=folder,
        pairs=rows,
        output_dir=str(tmp_path),
        max_steps=3,
        batch_size=2,
        eval_fraction=0.004,
    )
    after = train(config).summary["after"]
    changed = {"model": str(tmp_path), "output_dir": str(tmp_path / "again"), "max_steps": 1, "picture_pairs": 0}
    again = TrainConfig(**{**vars(config), **changed})
    before = train(again).summary["before"]
    assert before["eval_logps/chosen"] == after["eval_logps/chosen"]
    assert before["eval_rewards/margins"] == after["eval_rewards/margins"]


@pytest.mark.parametrize("name", ["gpt2", "opt", "biogpt"])
def test_dropout_is_off_wherever_a_model_keeps_its_rates(tmp_path: Path, name: str) -> None:
    """In modules of their own, or in numbers that the layers hand to functions."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16}
    sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "intermediate_size": 16, "word_embed_proj_dim": 16}
    known = AutoConfig.for_model(name)
    rates = {key: 0.5 for key, value in known.to_dict().items() if "drop" in key and isinstance(value, (int, float))}
    config = AutoConfig.for_model(name, **{k: v for k, v in {**sizes, **rates}.items() if hasattr(known, k)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32")
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
