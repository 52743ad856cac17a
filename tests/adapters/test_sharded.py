"""ZeRO-3 in one process: models are cut while they are loaded, read and saved in parts, or refused before that."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.deepspeed_loop.data import load_pairs
from selective_pref_adapters.deepspeed_loop.engine import (
    check_models,
    load,
    saving,
    start_processes,
)
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.models import load_model, load_tokenizer
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import collate
from selective_pref_adapters.reference_store.identity import model_identity
from selective_pref_adapters.sharded import is_sharded, same_weights, whole_tensors
from selective_pref_adapters.weight_files import checkpoint, checks
from tiny import make_model, text_rows, write_jsonl


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    settings = tmp_path / "deepspeed.json"  # DeepSpeed leaves small parameters whole: nothing here would be sharded
    settings.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    made = TrainConfig(
        model=str(make_model(tmp_path / "policy", seed=1, tie_word_embeddings=True)),
        ref_model=str(make_model(tmp_path / "reference", seed=2)),
        pairs=str(write_jsonl(tmp_path / "pairs.jsonl", text_rows(12))),
        output_dir=str(tmp_path / "out"),
        batch_size=4,
        max_steps=1,
        eval_fraction=0,
        zero_stage=3,
        deepspeed_config=str(settings),
    )
    start_processes(made)
    return made


def in_files(folder: str, parts: int) -> None:
    """Splits a checkpoint into so many files, with an index."""
    path = Path(folder) / "model.safetensors"
    weights = sorted(load_file(path).items())
    path.unlink()
    places = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file(dict(weights[part::parts]), path.with_name(file), metadata={"format": "pt"})
        places |= {name: file for name, _ in weights[part::parts]}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": places, "metadata": {}}))


def test_a_model_is_cut_while_it_is_loaded(config: TrainConfig) -> None:
    """No parameter is whole; its parts are those of the files, in one file or several; ties stay."""
    whole = load_model(config.model, dtype="float32")
    for parts in (1, 3):
        if parts > 1:
            in_files(config.model, parts)
        model: Any = load(config, config.model)
        assert is_sharded(model)
        assert sum(parameter.numel() for parameter in model.parameters()) == 0
        held = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
        assert held == sum(parameter.numel() for parameter in whole.parameters())  # of one process: the whole
        for name, tensor in whole_tensors(model):
            assert torch.equal(tensor, whole.state_dict()[name]), name
        assert model_identity(model) == model_identity(whole)
        assert same_weights(model, whole)
        assert same_weights(whole, model)
        assert not same_weights(model, load(config, str(config.ref_model)).requires_grad_(False))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.generation_config.to_dict() == whole.generation_config.to_dict()
        assert model.config._name_or_path == config.model


def test_one_tensor_of_the_files_is_in_memory_at_a_time(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the next one has let go of those before, and of their file."""
    alive: list[weakref.ref[Any]] = []
    most: list[int] = []
    open_file = checkpoint.safe_open

    class Watched:
        """A safetensors file; what is read from it is counted for as long as someone holds it."""

        def __init__(self, path: str, **options: Any) -> None:
            self.file = open_file(path, **options)
            alive.append(weakref.ref(self))

        def __enter__(self) -> Watched:
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inside, name)

        def get_tensor(self, key: str) -> torch.Tensor:
            tensor = self.inside.get_tensor(key)
            alive.append(weakref.ref(tensor))
            most.append(sum(isinstance(found(), torch.Tensor) for found in alive))
            assert sum(isinstance(found(), Watched) for found in alive) == 1
            return tensor

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    load(config, config.model)
    assert len(most) == len(load_file(Path(config.model) / "model.safetensors"))
    assert max(most) == 1


def test_the_model_is_written_file_after_file(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "FILE_SIZE", 4000)
    result = train(config)
    files = sorted(path.name for path in result.output_dir.glob("*.safetensors"))
    assert len(files) > 1
    saved = AutoModelForCausalLM.from_pretrained(result.output_dir)
    start = load_model(config.model, dtype="float32")
    assert saved.state_dict().keys() == start.state_dict().keys()
    assert any(not torch.equal(t, start.state_dict()[n]) for n, t in saved.state_dict().items())
    assert all(torch.allclose(t, start.state_dict()[n], atol=1e-4) for n, t in saved.state_dict().items())


def test_one_process_that_holds_all_parts(config: TrainConfig) -> None:
    """With a running reference, and with one that fills a store first: the losses of models that were never cut."""

    def losses(name: str, **options: Any) -> list[float]:
        named = str(Path(config.output_dir) / name)
        longer = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "output_dir": named}
        return [line["loss"] for line in train(dataclasses.replace(config, **longer, **options)).metrics]

    expected = pytest.approx(losses("whole", zero_stage=0), rel=1e-6)
    assert losses("running") == expected
    assert losses("stored", reference_store=str(Path(config.output_dir) / "store")) == expected


def test_what_cannot_be_loaded_in_parts_is_refused_before_anything_is(config: TrainConfig, tmp_path: Path) -> None:
    def refused(message: str, change: Any) -> None:
        folder = tmp_path / "refused"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(str(config.ref_model), folder)
        change(folder)
        with pytest.raises(ValueError, match=message):
            check_models(config, {"policy": config.model, "reference": str(folder)})

    def other_format(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def one_missing(folder: Path) -> None:
        in_files(str(folder), 2)
        (folder / "model-00002-of-00002.safetensors").unlink()

    def cut_off(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def configured(folder: Path, **values: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def several_files_of_another_format(folder: Path) -> None:
        other_format(folder)
        weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
        (folder / "pytorch_model.bin").unlink()
        places = {name: f"pytorch_model-{number % 2 + 1:05d}-of-00002.bin" for number, name in enumerate(weights)}
        for file in set(places.values()):
            torch.save({name: tensor for name, tensor in weights.items() if places[name] == file}, folder / file)
        index = {"weight_map": places, "metadata": {}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        AutoModelForCausalLM.from_pretrained(folder)  # as it is read whole

    refused("cannot be loaded in parts: expected model.safetensors", other_format)
    refused("cannot be loaded in parts: expected model.safetensors", several_files_of_another_format)
    refused("names files that are not there: model-00002-of-00002", one_missing)
    refused("model.safetensors cannot be read", cut_off)
    refused("has the shape", lambda folder: configured(folder, intermediate_size=48))
    refused("are quantised", lambda folder: configured(folder, quantization_config={"quant_method": "bitsandbytes"}))
    refused("there is no such folder", shutil.rmtree)


def test_models_larger_than_all_memory_are_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "room_for_weights", lambda *, offloaded: (1000.0, "on its host"))
    with pytest.raises(ValueError, match=r"larger than all memory together: .* for policy .* for reference"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_room_is_counted_in_the_dtype_that_the_weights_will_have(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.numel() for tensor in load_file(Path(config.model) / "model.safetensors").values())
    for dtype, each in ((torch.bfloat16, 2), (torch.float32, 4), (None, 4)):  # the files hold float32
        monkeypatch.setattr(checks, "room_for_weights", lambda *, offloaded, each=each: (size * each, "here"))
        checks.check_weight_files({"policy": config.model}, dtype)
        monkeypatch.setattr(checks, "room_for_weights", lambda *, offloaded, each=each: (size * each - 1, "here"))
        with pytest.raises(ValueError, match="larger than all memory together"):
            checks.check_weight_files({"policy": config.model}, dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"lora_r": 2, "lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_r": 2, "lora_alpha": -1.0}, "lora_alpha must be above 0"),
        ({"lora_alpha": 4.0}, "lora_alpha is read with lora_r only"),
        ({"lora_r": 2, "lora_target_modules": ("no_proj",)}, "no layer gets an adapter.*q_proj"),
    ],
)
def test_adapters_that_make_no_sense(config: TrainConfig, options: dict[str, Any], message: str) -> None:
    for name, value in options.items():
        setattr(config, name, value)
    config.zero_stage = 0
    with pytest.raises(ValueError, match=message):
        train(config)


def test_adapters_at_every_stage(config: TrainConfig) -> None:
    """The same losses; the base model is the reference; PEFT reads what is saved, and finds the policy's log-probs."""

    def run(name: str, zero_stage: int, **options: Any) -> Any:
        settings = config.deepspeed_config if zero_stage == 3 else None
        changed = {"zero_stage": zero_stage, "deepspeed_config": settings, "ref_model": None, "lora_r": 2, **options}
        longer = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "eval_fraction": 0.3}
        named = str(Path(config.output_dir) / name)
        return dataclasses.replace(config, objective="dpo", beta=0.5, output_dir=named, **longer, **changed)

    def losses(result: Any) -> list[float]:
        return [line["loss"] for line in result.metrics if "loss" in line]

    beside = train(run("beside", 0, ref_model=config.model))
    assert losses(beside)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(beside)[2] < math.log(2) - 1e-5
    for stage in range(4):
        adapted = run(f"stage {stage}", stage)
        result = train(adapted)
        assert losses(result) == pytest.approx(losses(beside), rel=1e-6), stage
        base = load_model(config.model, dtype="float32")
        loaded = PeftModel.from_pretrained(base, str(result.output_dir))
        _, held_out, _ = load_pairs(adapted, load_tokenizer(config.model), 64, progress=False)
        batch = collate(held_out, 0)
        with torch.no_grad():
            sums = model_per_token_logps(loaded, batch).masked_fill(batch["completion_mask"][:, 1:] == 0, 0.0).sum(1)
        mean = sums[: len(held_out)].mean().item()
        assert mean == pytest.approx(result.summary["after"]["eval_logps/chosen"], rel=1e-5), stage
        assert mean != pytest.approx(result.summary["before"]["eval_logps/chosen"], rel=1e-5)


FREES = """
import torch
import selective_pref_adapters.hf_trainer

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

torch.ones(30 << 18)  # 30 MiB: freed, they would raise the C library's threshold
large, small = [], []
for _ in range(32):
    large.append(torch.ones(2 << 20))
    small.append(torch.ones(2 << 12))
before = resident()
large.clear()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_a_script_of_several_processes_gives_freed_memory_back() -> None:
    """32 blocks of 8 MiB with small ones between them, as ZeRO-3 leaves them; first a script imports."""
    run = subprocess.run(
        [sys.executable, "-c", FREES], env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True, check=True
    )
    assert float(run.stdout.split()[-1]) > 200
