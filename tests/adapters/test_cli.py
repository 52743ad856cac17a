"""The command as a user types it: help, flags, a YAML file, wrong words, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import selective_pref_adapters
from selective_pref_adapters.cli import COMMANDS, _flags_of_file, main
from selective_pref_adapters.launching.launcher import PLACE

RECIPES = Path(selective_pref_adapters.__file__).parent / "recipes" / "train"


def flags(policy: Path, reference: Path, pairs: Path, output: Path) -> list[str]:
    named = {"--model": policy, "--ref-model": reference, "--pairs": pairs, "--output-dir": output}
    return [str(word) for item in named.items() for word in item]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("selective-pref ")
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in ("--selection-ratio", "--beta", "--ref-model", "--zero-stage", "--config"):
        assert name in text


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["tarin"]) == 2
    assert "no command 'tarin'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["train", "--model", "m", "--pairs", "p", "--selection-ration", "0.4"])
    assert end.value.code == 2
    assert "--selection-ratio" in capsys.readouterr().err


def test_flags_win_over_the_file(
    policy_folder: Path, reference_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "beta: 0.5\nselection_ratio: 0.25\nmax_steps: 2\nskip_malformed_rows: true\n"
        "loss_type: [ipo, sft]\nloss_weights: [1.0, 0.5]\n"
    )
    arguments = flags(policy_folder, reference_folder, pairs_file, tmp_path / "out")
    assert main(["train", "--config", str(recipe), *arguments, "--beta", "0.125"]) == 0
    written = (tmp_path / "out" / "config.yaml").read_text()
    for line in ("beta: 0.125", "selection_ratio: 0.25", "max_steps: 2", "skip_malformed_rows: true"):
        assert line in written
    assert main(["train", f"--config={tmp_path / 'out' / 'config.yaml'}", "--output-dir", str(tmp_path / "two")]) == 0
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "two"))
    assert one == two


def test_a_wrong_file_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\npairs: p\nselction_ratio: 0.4\n")
    assert main(["train", "--config", str(recipe)]) == 1
    assert (
        "recipe.yaml: there is no option 'selction_ratio': did you mean 'selection_ratio'?" in capsys.readouterr().err
    )
    recipe.write_text("xyz: 1\n")
    assert main(["train", "--config", str(recipe)]) == 1
    assert "there is no option 'xyz'. Options are model, pairs," in capsys.readouterr().err
    assert main(["train", "--config"]) == 1
    assert "the name of a YAML file, or of a recipe: paper, smoke" in capsys.readouterr().err
    recipe.write_text("- a\n- b\n")
    assert main(["train", "--config", str(recipe)]) == 1
    assert "name: value" in capsys.readouterr().err
    recipe.write_text("a: [")
    assert main(["train", "--config", str(recipe)]) == 1
    assert "not valid YAML" in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().err


def test_words_that_yaml_reads_as_true_or_false(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`no` and `off` mean that an option is not used; other words must be written as they are meant."""
    from selective_pref_adapters.options import TrainConfig

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tracker: no\neval_steps: off\nresume: no\neval_pairs: no\nfused_head: off\nforce_resume: no\n")
    flags = _flags_of_file(str(recipe), TrainConfig, "train")
    assert flags[:8] == ["--tracker", "none", "--eval-steps", "None", "--resume", "None", "--eval-pairs", "None"]
    assert flags[8:] == ["--no-fused-head", "--no-force-resume"]
    for line, message in (
        ("dtype: no", "recipe.yaml: dtype: expected one of float32, bfloat16, got false (as YAML reads yes, no,"),
        ("learning_rate: off", "learning_rate: expected a value, got false"),
        ("tracker: yes", "tracker: expected one of none, wandb, trackio, got true"),
        ("max_steps: on", "max_steps: expected a value, got true"),
        ("fused_head: 'off'", "fused_head: expected true or false, got 'off'"),
    ):
        recipe.write_text(f"{line}\n")
        assert main(["train", "--config", str(recipe)]) == 1
        assert message in capsys.readouterr().err


def test_an_error_in_the_input_is_one_line_and_status_1(
    policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags(policy_folder, policy_folder, tmp_path / "absent.jsonl", tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "selective-pref train: no preference pairs at" in error
    assert "Traceback" not in error


def test_the_shipped_recipes(
    policy_folder: Path, reference_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`smoke` runs; `paper` is the paper's setting, and the same in large."""
    small, large = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("smoke", "paper"))
    stated = {
        "objective": "selective_dpo",
        "beta": 0.01,
        "selection_ratio": 0.4,
        "epochs": 2,
        "global_batch_size": 1280,
        "batch_size": 1,
        "max_length": 4096,
        "dtype": "bfloat16",
        "zero_stage": 3,
    }
    assert stated.items() <= large.items()
    assert set(small) ^ set(large) == {"epochs", "max_steps"}
    monkeypatch.chdir(tmp_path)
    arguments = flags(policy_folder, reference_folder, pairs_file, tmp_path / "out")
    assert main(["train", "--config", "smoke", *arguments]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 4
    assert len(list((tmp_path / "out" / "checkpoints").glob("step-*"))) == 2
    (tmp_path / "smoke").write_text("beta: x\n")  # a file of one's own of that name comes first
    with pytest.raises(SystemExit):
        main(["train", "--config", "smoke", *arguments])


def test_the_adapters_package_imports_no_framework() -> None:
    code = "import sys, selective_pref_adapters, selective_pref_adapters.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "transformers", "trl", "deepspeed", "jax"} & set(loaded)


def test_launchers_put_a_flag_in_front(capsys: pytest.CaptureFixture[str]) -> None:
    """`deepspeed` without --no_local_rank; the number is in LOCAL_RANK, too."""
    assert main(["--local_rank=1", "--version"]) == 0
    assert main(["--local-rank=0", "tarin"]) == 2
    assert "no command 'tarin'" in capsys.readouterr().err
    assert main(["--local_rank=one", "--version"]) == 2


@pytest.mark.parametrize("command", ["train", "dpo"])
def test_the_place_of_the_process_is_looked_at_before_anything_is_loaded(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    assert main([command, "--model", "no such folder", "--pairs", "none"]) == 1
    assert "the environment has RANK=1, but not WORLD_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("train", "deepspeed", "deepspeed"),
        ("train", "torch", "deepspeed"),
        ("train", "peft", "peft"),
        ("dpo", "trl", "trl"),
        ("dpo", "deepspeed", "deepspeed"),
        ("plan", "torch", "score"),
        ("dpo", "mpi4py", None),  # what another package lacks is in none of our extras
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    command: str, missing: str, extra: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(_: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setitem(COMMANDS, command, (lacking, ""))
    assert main([command]) == 1
    hint = f": pip install 'selective-pref[{extra}]'" if extra else ""
    assert capsys.readouterr().err.endswith(f"No module named {missing!r}{hint}\n")
