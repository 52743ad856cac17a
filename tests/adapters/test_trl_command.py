"""`selective-pref dpo` as it is started: alone or by a launcher, with DeepSpeed, with files that hold nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranks import run_cli, run_ranks, start
from selective_pref_adapters.cli import main
from selective_pref_adapters.trl_trainer.command import GATHER
from tiny import text_rows, write_jsonl


@pytest.fixture
def words(tmp_path: Path, policy_folder: Path) -> list[str]:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(8))
    options = {
        "model_name_or_path": policy_folder,
        "dataset_name": pairs,
        "output_dir": tmp_path / "out",
        "use_cpu": "true",
        "bf16": "false",
        "max_steps": 1,
        "report_to": "none",
        "eval_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
    }
    return ["dpo", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def settings(folder: Path, **further: bool) -> str:
    """A file of DeepSpeed settings for ZeRO-3."""
    path = folder / "zero3.json"
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **further}, **dict.fromkeys(sizes, "auto")}))
    return str(path)


def changed(folder: Path, policy: Path) -> bool:
    """Whether a whole model was saved, which is not the one that was trained."""
    saved, start = load_file(folder / "model.safetensors"), load_file(policy / "model.safetensors")
    assert saved.keys() == start.keys()
    return any(not torch.equal(saved[name], start[name]) for name in saved)


@pytest.mark.slow
def test_zero_3_in_a_process_that_no_launcher_started(
    words: list[str], tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the losses of a process without DeepSpeed, and saves a whole model."""
    longer = ["--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2", "--disable_tqdm", "true"]
    process = start(run_cli, [*words, *longer, f"--deepspeed={settings(tmp_path)}"], log=tmp_path / "log")
    process.join(200)
    printed = (tmp_path / "log").read_text()
    assert process.exitcode == 0, printed
    assert changed(tmp_path / "out", policy_folder)
    assert main([*words, *longer, "--output_dir", str(tmp_path / "plain")]) == 0
    found, expected = (re.findall(r"'loss': '?([\d.]+)", text) for text in (printed, capsys.readouterr().out))
    assert len(expected) == 3
    assert list(map(float, found)) == pytest.approx(list(map(float, expected)), rel=1e-3)


@pytest.mark.slow
def test_zero_3_saves_a_whole_model_unless_the_settings_say_no(
    words: list[str], tmp_path: Path, policy_folder: Path
) -> None:
    """As two processes; what is saved in parts is not said to be a model."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    codes = run_ranks(run_cli, [*words, "--deepspeed", settings(tmp_path), "--output_dir", str(whole)])
    assert codes == [0, 0]
    assert changed(whole, policy_folder)
    given = settings(tmp_path, **{GATHER: False})
    log = tmp_path / "log"
    codes = run_ranks(run_cli, [*words, "--deepspeed", given, "--output_dir", str(parts)], log=log)
    printed = log.read_text()
    assert codes == [0, 0], printed
    assert "\nmodel saved to" not in printed
    assert f"DeepSpeed's parts of the model saved to {parts}: no program loads them as they are" in printed
    assert not list(parts.glob("*.safetensors"))


def test_a_file_of_settings_that_is_not_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--deepspeed", "absent.json"], ["--deepspeed=absent.json"]):
        assert main([*words, *given]) == 1
        assert "--deepspeed absent.json cannot be read (No such file or directory)" in capsys.readouterr().err


def test_a_file_without_rows_is_named(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert main([*words, "--dataset_name", str(tmp_path / "empty.jsonl")]) == 1
    assert f"{tmp_path / 'empty.jsonl'} holds no rows" in capsys.readouterr().err
