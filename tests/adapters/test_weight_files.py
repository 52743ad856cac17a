"""Checkpoints that are damaged, or lack a weight: every door refuses them by name, none draws weights at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration, logging
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from selective_pref_adapters.cli import main
from selective_pref_adapters.models import load_model
from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer
from selective_pref_adapters.weight_files import (
    Checkpoint,
    check_weight_files,
    check_whole,
    checkpoint,
    checks,
    in_parts,
)
from tiny import make_mixture, make_model, make_text_and_image_model, text_rows, write_jsonl

NORM = "model.norm.weight"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lacks_a_weight(folder: Path) -> None:
    write(folder, {name: tensor for name, tensor in weights_of(folder).items() if name != NORM})


def lacks_a_weight_in_another_format(folder: Path) -> None:
    weights = weights_of(folder)
    del weights[NORM]
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def other_shape(folder: Path) -> None:
    weights = weights_of(folder)
    write(folder, weights | {NORM: weights[NORM][:-1].clone()})


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def part_missing(folder: Path) -> None:
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    file = "model-00001-of-00002.safetensors"
    save_file({name: tensor for name, tensor in weights.items() if name != NORM}, folder / file, {"format": "pt"})
    places = dict.fromkeys(weights, file) | {NORM: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places, "metadata": {}}))


def cut_off_in_another_format(folder: Path) -> None:
    lacks_a_weight_in_another_format(folder)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:500])


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (lacks_a_weight, f"lack {NORM}, of 12 weights of LlamaForCausalLM: what is absent would be random"),
    (lacks_a_weight_in_another_format, f"lack {NORM}"),
    (other_shape, rf"{NORM} has the shape \(15,\) in the files and \(16,\) by config.json"),
    (cut_off, "incomplete metadata"),
    (empty, "header too small"),
    (index_of_nothing, "weight_map"),
    (part_missing, "model-00002-of-00002.safetensors"),
    (cut_off_in_another_format, "."),
]


@pytest.fixture
def broken(tmp_path: Path, damage: Callable[[Path], None]) -> Path:
    folder = make_model(tmp_path / "broken", seed=1)
    damage(folder)
    return folder


@pytest.fixture
def zero_3() -> Iterator[None]:
    """transformers makes models in parts, as in a script after its `TrainingArguments`."""
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    yield
    unset_hf_deepspeed_config()
    del settings


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(broken: Path, message: str) -> None:
    for look in (lambda name: load_model(name, dtype="float32"), check_whole):
        with pytest.raises(ValueError, match=rf"{broken}.*{message}"):
            look(str(broken))
    with pytest.raises(ValueError, match=str(broken)):
        check_weight_files({"policy": str(broken)}, torch.float32)


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_so_does_the_trainer_of_models_that_are_named(
    broken: Path, message: str, tmp_path: Path, policy_folder: Path
) -> None:
    """Before one of the two is loaded, as policy and as reference."""
    args = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": []}
    for policy, reference in ((broken, policy_folder), (policy_folder, broken)):
        with pytest.raises(ValueError, match=rf"{broken}.*{message}"):
            SelectiveDPOTrainer(
                model=str(policy),
                ref_model=str(reference),
                args=SelectiveDPOConfig(**args),
                train_dataset=Dataset.from_list(text_rows(4)),
            )


@pytest.mark.parametrize(("damage", "message"), DAMAGE[:1])
def test_every_command_says_it_in_one_line_and_writes_nothing(
    broken: Path, message: str, tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, out = str(write_jsonl(tmp_path / "pairs.jsonl", text_rows(8))), str(tmp_path / "out")
    cpu = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--eval_strategy", "no", "--max_steps", "1"]
    dpo = ["dpo", "--dataset_name", pairs, "--output_dir", out, *cpu]
    loop = ["train", "--pairs", pairs, "--output-dir", out, "--max-steps", "1"]
    good = str(policy_folder)
    for words in (
        [*loop, "--model", str(broken), "--ref-model", good],
        [*loop, "--model", good, "--ref-model", str(broken)],
        [*loop, "--model", good, "--ref-model", str(broken), "--zero-stage", "3"],
        ["score", "--ref-model", str(broken), "--pairs", pairs, "--store", out],
        [*dpo, "--model_name_or_path", str(broken)],
        [*dpo, "--model_name_or_path", good, "--ref_model_name_or_path", str(broken)],
    ):
        capsys.readouterr()
        assert main(words) == 1, words
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"selective-pref {words[0]}: "), words
        assert f"lack {NORM}" in said, words
        assert str(broken) in said, words
        assert not Path(out).exists(), words


@pytest.mark.usefixtures("zero_3")
def test_under_zero_3_named_models_must_be_safetensors_although_a_revision_is_always_given(
    tmp_path: Path, policy_folder: Path
) -> None:
    """`selective-pref dpo` passes the revision "main" for every model."""
    from selective_pref_adapters.trl_trainer.checks import check_named_models

    folder = make_model(tmp_path / "model", seed=1)
    args: Any = SelectiveDPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False)
    args.model_init_kwargs = {"revision": "main", "dtype": "float32"}
    check_named_models(args, str(folder), str(policy_folder), twice=True)
    assert is_deepspeed_zero3_enabled()  # as before
    weights = weights_of(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check_whole(str(folder))  # it is whole, but can be read whole only
    for policy, reference in ((folder, policy_folder), (policy_folder, folder)):
        with pytest.raises(ValueError, match=f"{folder} cannot be loaded in parts"):
            check_named_models(args, str(policy), str(reference), twice=True)


def test_whole_checkpoints_of_many_kinds_pass(tmp_path: Path) -> None:
    """Ties, names that transformers changes while it loads, parts that a causal language model does not have."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folders = {
        "tied": make_model(tmp_path / "tied", seed=1, tie_word_embeddings=True),
        "experts": make_mixture(tmp_path / "experts", seed=1),
        "images": make_text_and_image_model(tmp_path / "images", seed=1),
    }
    for kind in ("gpt2", "gpt_neox", "opt", "qwen3", "bloom", "olmo2", "phi3"):
        known = {name: size for name, size in sizes.items() if hasattr(AutoConfig.for_model(kind), name)}
        config = AutoConfig.for_model(kind, vocab_size=32, pad_token_id=0, **known)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        folders[kind] = tmp_path / kind
    shown, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    for kind, folder in folders.items():
        check_whole(str(folder))
        check_weight_files({kind: str(folder)}, torch.float32)
        load_model(str(folder), dtype="float32")
        checkpoint = Checkpoint.open(str(folder))
        assert checkpoint.check()[0].__name__ in type(AutoModelForCausalLM.from_pretrained(folder)).__name__
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (shown, bars)


def test_an_expert_that_is_not_there_is_missed(tmp_path: Path) -> None:
    """Files name every expert's matrices; a model holds them as one tensor, which is made of all of them."""
    folder = make_mixture(tmp_path / "mixture", seed=1)
    whole = weights_of(folder)
    gone = [name for name in whole if "experts" in name and "w2" in name]
    assert len(gone) == 4
    write(folder, {name: tensor for name, tensor in whole.items() if name not in gone})
    for look in (lambda name: load_model(name, dtype="float32"), check_whole):
        with pytest.raises(ValueError, match=r"lack .*experts\.down_proj"):
            look(str(folder))
    for one in (gone[2], gone[2].replace("w2", "w1")):  # one expert's matrix; one that is joined with another, too
        write(folder, {name: tensor for name, tensor in whole.items() if name != one})
        for look in (lambda name: load_model(name, dtype="float32"), check_whole):
            with pytest.raises(ValueError, match=str(folder)):
                look(str(folder))


def test_what_is_quantised_is_left_to_transformers(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "quantised", seed=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    lacks_a_weight(folder)
    check_whole(str(folder))
    with pytest.raises(ValueError, match="are quantised"):
        check_weight_files({"policy": str(folder)}, None)


def test_adapters_that_were_saved_beside_a_model_are_no_missing_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", seed=1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, folder)
    assert any("lora_A" in name for name, _ in load_model(str(folder), dtype="float32").named_parameters())
    check_whole(str(folder))


def test_an_output_layer_that_differs_from_the_embedding_to_which_it_is_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers keeps both apart, with or without a word; under ZeRO-3 it would drop one, so it is refused there."""
    folder = make_model(tmp_path / "model", seed=1, tie_word_embeddings=True)
    weights = weights_of(folder)
    embedding = weights["model.embed_tokens.weight"]
    write(folder, weights | {"lm_head.weight": embedding.clone()})
    check_weight_files({"policy": str(folder)}, None)
    assert not caplog.records
    other = embedding.clone()
    other[-1, -1] += 1
    write(folder, weights | {"lm_head.weight": other})
    with pytest.raises(ValueError, match=rf"{folder}: its files hold lm_head.weight and .*embed_tokens.* ties the two"):
        check_weight_files({"policy": str(folder)}, None)
    model: Any = load_model(str(folder), dtype="float32")
    assert torch.equal(model.lm_head.weight, other)
    assert "both are kept" in caplog.text
    images = make_text_and_image_model(tmp_path / "images", seed=1)  # whose files name its parts otherwise
    weights = weights_of(images)
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    check_weight_files({"policy": str(images)}, None)
    write(images, weights | {"language_model.lm_head.weight": weights[name] + 1})
    with pytest.raises(ValueError, match=r"its files hold language_model\.lm_head\.weight and"):
        in_parts(str(images), Gemma3ForConditionalGeneration)


def test_weights_that_nothing_reads_are_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model", seed=1, num_hidden_layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    for look in (lambda name: load_model(name, dtype="float32"), check_whole):
        caplog.clear()
        look(str(folder))
        assert len(caplog.records) == 1
        assert f"{folder}: its files also hold model.layers.1.input_layernorm.weight and 8 more" in caplog.text
    monkeypatch.setenv("RANK", "1")  # the first process says it
    caplog.clear()
    check_whole(str(folder))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_that_would_need_a_scale_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_model(tmp_path / "model", seed=1)
    weights = weights_of(folder)
    write(folder, weights | {NORM: weights[NORM].to(dtype)})
    with pytest.raises(ValueError, match=rf"{folder}.*{NORM} is of the type .*quantization_config"):
        check_whole(str(folder))


def test_what_lies_in_the_place_of_weights_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", seed=1)
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for look in (lambda name: load_model(name, dtype="float32"), check_whole):
        with pytest.raises(ValueError, match="holds a pointer of Git LFS"):
            look(str(folder))
    path.unlink()
    path.symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a link to nothing"):
        check_whole(str(folder))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter \(PEFT\) alone"):
        check_whole(str(adapter))


def test_models_larger_than_the_machine_are_refused(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before one is loaded, in every command that loads them whole."""
    monkeypatch.setattr(checks, "memory_of_machine", lambda: 1000.0)
    pairs, out = str(write_jsonl(tmp_path / "pairs.jsonl", text_rows(8))), str(tmp_path / "out")
    cpu = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--eval_strategy", "no"]
    name = str(policy_folder)
    for words in (
        ["train", "--pairs", pairs, "--output-dir", out, "--model", name, "--ref-model", name],
        ["score", "--ref-model", name, "--pairs", pairs, "--store", out],
        ["dpo", "--dataset_name", pairs, "--output_dir", out, *cpu, "--model_name_or_path", name],
    ):
        capsys.readouterr()
        assert main(words) == 1, words
        assert "larger than all memory of this machine" in capsys.readouterr().err, words
        assert not Path(out).exists(), words


def test_a_file_that_cannot_be_mapped_as_a_whole(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 68485962176 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(checkpoint, "safe_open", unable)
    with pytest.raises(ValueError, match=r"too large for this machine to map .*max_shard_size"):
        check_weight_files({"policy": str(policy_folder)}, None)
