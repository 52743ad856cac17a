"""`selective-pref plan`: predicted bytes beside those of real tensors of small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, T5Config

from selective_pref_adapters.cli import main
from selective_pref_adapters.planning.memory import model_state
from selective_pref_adapters.planning.sizes import activations, model_size, saved_bytes

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(folder: Path, **options: Any) -> str:
    LlamaConfig(**{**SHAPE, **options}).save_pretrained(folder)
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["plan", "--json", *flags])
    return json.loads(capsys.readouterr().out)


def held(tensors: Any) -> int:
    """Bytes of tensors; those that share memory count once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_optimizer_are_as_large_as_those_of_a_real_step(tied: bool, tmp_path: Path) -> None:
    """torch's AdamW in float32 without DeepSpeed. Its counters of steps, four bytes a tensor, are left out."""
    size = model_size(saved(tmp_path, tie_word_embeddings=tied))
    model = AutoModelForCausalLM.from_config(size.config)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [entry[name] for entry in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert model_state(size.parameters, dtype="float32", zero_stage=0, devices=1) == {
        "policy: weights": held(model.parameters()),
        "policy: gradients": held(parameter.grad for parameter in model.parameters()),
        "policy: optimizer": held(moments),
    }


def test_each_zero_stage_cuts_one_thing_more() -> None:
    whole = {"policy: weights": 2.0, "policy: gradients": 2.0, "policy: optimizer": 12.0}
    for stage, cut in enumerate([[], ["optimizer"], ["optimizer", "gradients"], ["optimizer", "gradients", "weights"]]):
        parts = model_state(8_000, dtype="bfloat16", zero_stage=stage, devices=4)
        assert {name: size / 8_000 for name, size in parts.items()} == {
            name: size / (4 if name.removeprefix("policy: ") in cut else 1) for name, size in whole.items()
        }
    assert model_state(8_000, dtype="float32", zero_stage=1, devices=1)["policy: optimizer"] == 12 * 8_000


@pytest.mark.parametrize("config", [LlamaConfig(**SHAPE), MixtralConfig(**SHAPE, num_local_experts=4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_near_what_autograd_keeps_of_a_real_forward_pass(config: Any, dtype: Any) -> None:
    """Never less than 0.99 and never more than 1.35 of it: copies that one backend makes and another does not."""
    length = 96
    expected = activations(config, sequences=2, length=length, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    ids = torch.zeros(2, length, dtype=torch.long)
    whole, layer = saved_bytes(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs, _ = saved_bytes(model, ids)
    assert 0.99 * whole <= expected.whole <= 1.35 * whole
    assert 0.99 * layer <= expected.layer <= 1.35 * layer
    assert 0.99 * inputs <= expected.inputs <= 1.35 * inputs
    assert inputs < whole / 4


class Square(nn.Module):
    """A body whose backward pass needs one tensor twice."""

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        numbers = input_ids.float().requires_grad_()
        return numbers * numbers


def test_memory_that_is_kept_twice_counts_once() -> None:
    assert saved_bytes(Square(), torch.zeros(2, 8, dtype=torch.long)) == (2 * 8 * 4, 2 * 8 * 4)


MEASURED = {0: 633, 1: 2382, 2: 2382, 3: 858}
"""MiB that `tests/benchmarks/bench_plan.py` has seen allocated at the most in a step, by ZeRO stage; float32."""


def test_sums_are_near_what_two_processes_were_seen_to_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"vocab_size": 8186, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    model = saved(tmp_path, **shape, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64)
    flags = ["--devices", "2", "--dtype", "float32", "--max-length", "64", "--no-gradient-checkpointing"]
    totals = planned(capsys, "--model", model, *flags)["device_total_by_zero_stage"]
    for stage, held in MEASURED.items():
        assert 0.98 * held <= totals[str(stage)]["running"] / 2**20 <= 1.03 * held, stage


def test_a_mixture_counts_all_its_experts(tmp_path: Path) -> None:
    config = MixtralConfig(**SHAPE, num_local_experts=8)
    config.save_pretrained(tmp_path)
    real = AutoModelForCausalLM.from_config(config)
    assert model_size(str(tmp_path)).parameters == sum(parameter.numel() for parameter in real.parameters())


def test_a_plan_reads_no_weights_and_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = saved(tmp_path / "policy", max_position_embeddings=64)
    reference = saved(tmp_path / "reference", hidden_size=256, intermediate_size=1024, max_position_embeddings=64)
    assert {path.name for path in (tmp_path / "policy").iterdir()} <= {"config.json", "generation_config.json"}
    flags = ["--model", policy, "--ref-model", reference, "--devices", "2", "--zero-stage", "2"]
    plan = planned(capsys, *flags, "--no-gradient-checkpointing", "--batch-size", "4")
    ways = plan["ways"]
    reference_bytes = 2 * plan["models"]["reference"]["parameters"]
    kept = activations(model_size(policy).config, sequences=2, length=64, dtype=torch.bfloat16)
    assert ways["stored"]["device"]["activations"] == 4 * kept.whole
    assert plan["settings"]["max_length"] == 64
    assert ways["running"]["device"]["reference: weights"] == reference_bytes
    assert "reference: weights" not in ways["stored"]["device"]
    assert ways["stored"]["device"] == ways["served"]["device"]
    assert ways["served"]["weights_on_the_servers_own_devices"] == reference_bytes
    assert plan["device_total_by_zero_stage"]["2"]["running"] == sum(ways["running"]["device"].values())
    whole = ways["running"]["host"]["loading, each process whole"]
    assert whole == 2 * (reference_bytes + 2 * plan["models"]["policy"]["parameters"])

    total = ways["stored"]["device_total"]
    room = str((total - 1) / 2**30)
    plan = planned(capsys, *flags, "--no-gradient-checkpointing", "--batch-size", "4", "--device-memory", room)
    stored = plan["ways"]["stored"]
    assert (stored["fits"], stored["change"]) == (False, ["--gradient-checkpointing"])
    again = planned(capsys, *flags, "--gradient-checkpointing", "--batch-size", "4", "--device-memory", room)
    assert again["ways"]["stored"]["fits"]
    assert again["ways"]["stored"]["device"]["activations"] == 4 * (kept.inputs + kept.layer)
    assert again["ways"]["stored"]["device_total"] == stored["device_total_then"]


def test_the_table_says_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = saved(tmp_path, max_position_embeddings=64)
    assert main(["plan", "--model", name, "--device-memory", "80"]) == 0
    assert "of 80 GiB" in (out := capsys.readouterr().out)
    assert out.split().count("fits") == 3
    assert main(["plan", "--model", name, "--device-memory", "0.0001"]) == 1
    assert "running: does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "0"], "devices must be at least 1; got 0"),
        (["--devices", "8", "--hosts", "3"], "8 devices on 3 hosts are not"),
        (["--device-memory", "-1"], "device_memory must be a number of GiB above 0"),
        (["--zero-stage", "2", "--offload-parameters"], "offload_parameters needs zero_stage 3; got 2"),
        (["--max-length", "100"], "is longer than the policy can read (64 tokens)"),
    ],
)
def test_options_out_of_range_are_named(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", saved(tmp_path, max_position_embeddings=64), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_a_causal_language_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    T5Config().save_pretrained(tmp_path / "t5")
    assert main(["plan", "--model", str(tmp_path / "empty")]) == 1
    assert "expected a config.json" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path / "t5")]) == 1
    assert "is no causal language model" in capsys.readouterr().err
