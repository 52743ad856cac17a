"""The comparison on real pairs, in small: what is held out, what is run, what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selective_pref_adapters.cli import main
from selective_pref_adapters.replication.real import start
from selective_pref_adapters.replication.real.runs import METHODS, RATES, cells_of
from selective_pref_adapters.replication.real.start import TINY_REAL, prepare_real
from tiny import write_jsonl

PROMPTS = [f"What is {number} plus one?\u2028" for number in range(24)]
PAIRS = [
    {"prompt": prompt, "chosen": f"It is {number + 1}.", "rejected": f"I say {number}, \u2028 or so."}
    for number, prompt in enumerate(PROMPTS)
]
SUPERVISED = [{"question": prompt.strip(), "answer": f"It is {n + 1}."} for n, prompt in enumerate(PROMPTS)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    pairs, supervised = tmp_path / "pairs.jsonl", tmp_path / "sft.jsonl"
    write_jsonl(pairs, PAIRS)
    write_jsonl(supervised, SUPERVISED)
    return ["--pairs", str(pairs), "--sft-data", str(supervised)]


@pytest.mark.slow
def test_the_command_on_real_pairs(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    arguments = ["replicate", "--tiny", *files, "--output-dir", str(folder), "--processes", "1"]
    assert main(arguments) == 0
    names = ("train", "held_out", "sft")
    asked = {name: {row["prompt"].strip() for row in lines(folder / f"{name}.jsonl")} for name in names}
    assert not asked["held_out"] & (asked["train"] | asked["sft"])
    assert asked["held_out"] | asked["sft"] == {prompt.strip() for prompt in PROMPTS}
    assert lines(folder / "sft.jsonl")[0]["prompt"].endswith("?\u2028")  # text with the end that prompts of pairs have
    runs = {path.stem for path in (folder / "runs").iterdir()}
    assert runs == {*start.MODELS, *(cell.name for cell in cells_of(RATES[:1], 1))}
    tables = (folder / "tables.md").read_text(encoding="utf-8")
    assert all(method.title in tables for method in METHODS.values())
    assert "| digits |" in tables
    for page in ("index.html", "selected/weak/page.html", "selected/teacher/page.html"):
        assert (folder / page).exists()
    capsys.readouterr()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    (folder / "runs" / "dpo.rate-3e-05.seed-0.json").write_text("{")
    assert main(arguments) == 1
    assert "is damaged" in capsys.readouterr().err
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_other_data_needs_another_folder(tmp_path: Path) -> None:
    (tmp_path / "made_from.json").write_text(json.dumps({"pairs": "others.jsonl"}))
    with pytest.raises(ValueError, match=r"pairs others.jsonl instead of mine.jsonl.*give another folder"):
        prepare_real(tmp_path, "mine.jsonl", "sft.jsonl", TINY_REAL)


def test_supervised_rows_that_are_all_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    prepare = [str(tmp_path / "pairs.jsonl"), str(tmp_path / "sft.jsonl")]
    write_jsonl(tmp_path / "sft.jsonl", SUPERVISED[:1])
    held_out = start.split_by_prompt(start.read_rows(prepare[0]), start.HELD_OUT, seed=0)[1][0]
    row = next(row for row in SUPERVISED if row["question"] == str(held_out.prompt).strip())
    write_jsonl(tmp_path / "sft.jsonl", [row])
    with pytest.raises(ValueError, match="no supervised row is left"):
        prepare_real(tmp_path / "out", *prepare, TINY_REAL)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pairs", "p.jsonl"], "pairs and sft_data go together"),
        (["--pairs", "p.jsonl", "--sft-data", "s.jsonl", "--quick"], "quick and strict belong to the made-up language"),
        (["--pairs", "absent.jsonl", "--sft-data", "s.jsonl"], "absent.jsonl"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = main(["replicate", *flags, "--output-dir", str(tmp_path / "out")])
    except SystemExit as error:  # of the parser
        status = error.code
    assert status in (1, 2)
    shown = capsys.readouterr()
    assert said in " ".join((shown.out + shown.err).replace("│", " ").split())
