"""The training job, for real on tiny models: it learns, it reloads, it stops with a clear word on bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref import NonFiniteError, selective_dpo_loss
from selective_pref_adapters.batch import responses
from selective_pref_adapters.deepspeed_loop import TrainConfig, make_order, number_of_steps, pairs_per_step, train
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.pairs import collate, read_rows, tokenize_pairs
from tiny import WORDS, make_model, text_rows, write_jsonl

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


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_it_trains_alike_at_every_zero_stage_and_the_saved_model_reloads(
    configure: Configure,
    tmp_path: Path,
    policy_folder: Path,
    reference_folder: Path,
    pairs_file: Path,
    zero_stage: int,
) -> None:
    sharded = tmp_path / "deepspeed.json"  # DeepSpeed leaves small parameters whole: nothing here would be sharded
    sharded.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    options = {"deepspeed_config": str(sharded)} if zero_stage == 3 else {}
    result = train(configure(zero_stage=zero_stage, gradient_accumulation_steps=2, epochs=3, **options))
    expected, losses = plain_torch_run(policy_folder, reference_folder, pairs_file, result.summary["steps"])
    logged = [line for line in result.metrics if "loss" in line]
    assert [line["loss"] for line in logged] == pytest.approx(losses, rel=1e-4)
    got = load_file(result.output_dir / "model.safetensors")
    for name, parameter in expected.items():
        torch.testing.assert_close(got[name], parameter, rtol=0, atol=2e-4, msg=name)
    assert not torch.equal(logps_of(result.output_dir, pairs_file), logps_of(policy_folder, pairs_file))
    assert all(line["grad_norm"] > 0 for line in logged)


def plain_torch_run(policy: Path, reference: Path, pairs_file: Path, steps: int) -> tuple[dict[str, Any], list[float]]:
    """The same run written out by hand, without DeepSpeed: weights and the loss of each step."""
    from selective_pref_adapters.pairs import split_by_prompt

    rows, _ = split_by_prompt(read_rows(pairs_file), 0.2, 0)
    pairs, _ = tokenize_pairs(rows, AutoTokenizer.from_pretrained(policy), max_length=64)
    model = AutoModelForCausalLM.from_pretrained(policy)
    ref_model = AutoModelForCausalLM.from_pretrained(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    order, losses = make_order([0] * len(pairs), 8, 0), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        total = 0.0
        indices = order(step + 1)
        for half in (indices[:4], indices[4:]):
            batch = collate([pairs[index] for index in half], 0)
            with torch.no_grad():
                ref_logps = model_per_token_logps(ref_model, batch)
            sides = responses(batch, model_per_token_logps(model, batch), ref_logps)
            loss = selective_dpo_loss(*sides, beta=0.01, selection_ratio=0.4).loss
            (loss / 2).backward()
            total += loss.item() / 2
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return model.state_dict(), losses


@pytest.mark.parametrize("objective", ["selective_dpo", "dpo", "simpo", "sft"])
def test_every_objective_learns_what_it_is_told(configure: Configure, tmp_path: Path, objective: str) -> None:
    """Chosen answers are one word, rejected another: the margin of unseen prompts must grow."""
    rows = [{"prompt": f"{a} {b} ", "chosen": "w20 w21", "rejected": "w22 w23"} for a in WORDS[:6] for b in WORDS[6:10]]
    options: dict[str, Any] = {} if objective in ("selective_dpo", "dpo") else {"ref_model": None}
    options |= {} if objective == "sft" else {"beta": 0.5}
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    out = train(configure(objective=objective, pairs=path, epochs=4, learning_rate=5e-3, **options))
    before, after = out.summary["before"], out.summary["after"]
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
    result = train(
        configure(pairs=path, max_steps=1, skip_malformed_rows=True, eval_fraction=0, output_dir=str(tmp_path / "o"))
    )
    notes = " ".join(result.summary["notes"])
    assert "1 malformed rows left out" in notes
    assert "1 of 21 pairs left out: chosen and rejected are equal" in notes
    assert "rows.jsonl:22" in capsys.readouterr().err


def test_nan_in_a_model_stops_the_run_and_saves_nothing(configure: Configure, tmp_path: Path) -> None:
    broken = make_model(tmp_path / "broken", seed=2)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = math.nan  # the last word only
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
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
        ({"eval_fraction": 1.0}, "eval_fraction must be in"),
        ({"pairs": "absent.jsonl"}, "no preference pairs at"),
        ({"model": "absent-model"}, "there is no such folder, nor a hub model at hand"),
    ],
)
def test_options_that_make_no_sense(configure: Configure, options: dict[str, Any], message: str) -> None:
    config = configure(**options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
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
        eval_fraction=0.02,
    )
    after = train(config).summary["after"]
    again = TrainConfig(**{**vars(config), "model": str(tmp_path), "output_dir": str(tmp_path / "again")})
    before = train(again).summary["before"]
    assert before["eval_logps/chosen"] == after["eval_logps/chosen"]
    assert before["eval_rewards/margins"] == after["eval_rewards/margins"]
