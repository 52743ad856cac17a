"""`selective-pref rows`: what is shown of a file is what would be trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selective_pref_adapters.cli import main
from selective_pref_adapters.pairs import read_rows, tokenize_pairs
from small_tokenizers import small_tokenizer
from tiny import write_jsonl

GOOD = {"prompt": "the egg ", "chosen": "boils in a pot", "rejected": "is hard"}
TURNS = [
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "it is hard"},
]
NO = {"role": "assistant", "content": "no"}
ROWS: list[Any] = [
    GOOD,
    {"prompt": "the egg ", "chosen": "boils"},
    {"prompt": [{"role": "user", "content": "so long?"}], "chosen": TURNS, "rejected": [NO]},
    {"question": "why?", "chosen": "yes", "rejected": "yes"},
    GOOD,
    {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
    {"prompt": "the egg ", "chosen": " ", "rejected": "is hard"},
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer("WordLevel", adds_bos=True).save_pretrained(folder)
    return str(folder)


def command(path: Path, tokenizer: str, *more: str) -> list[str]:
    return ["rows", "--pairs", str(path), "--tokenizer", tokenizer, *more]


def test_rows_and_summary(tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert main(command(path, tokenizer_folder)) == 0
    text = capsys.readouterr().out
    assert "rows.jsonl:1: TRL standard" in text
    assert "<s> the egg ┃ boils in a pot </s>" in text
    assert "3 prompt tokens, 5 of 5 completion tokens count; special tokens: <s> 1, </s> 1" in text
    assert "malformed: rows.jsonl:2: no 'rejected'" in text
    assert "yes <|im_end|> (<|im_start|>) (<unk>) (why) (?) (<|im_end|>) (<|im_start|>) (<unk>) it is hard" in text
    assert "rows.jsonl:4" not in text.split("can be trained on")[0]  # three rows are shown
    assert "3 of 7 rows can be trained on (max_length 4096, keep_start)" in text
    assert "schemas: TRL standard rows: 3, TRL conversational rows: 1, Orca rows: 1" in text
    for line in ("duplicates: 1", "equal sides: 1", "prompts that differ: 1", "truncated: 0"):
        assert f"  {line}\n" in text
    assert "left out: 1, completion of white space alone (first: rows.jsonl:7): there is nothing to learn from" in text


def test_json_holds_the_ids_of_training(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    cut = ["--max-length", "6", "--truncation-mode", "keep_end", "--rows", "9", "--json"]
    assert main(command(path, tokenizer_folder, *cut)) == 0
    out = json.loads(capsys.readouterr().out)
    tokenizer = small_tokenizer("WordLevel", adds_bos=True)
    pairs, report = tokenize_pairs(read_rows(path, []), tokenizer, max_length=6, truncation_mode="keep_end")
    shown = {row["place"]: row for row in out["rows"] if "place" in row}
    assert [row["place"] for row in shown.values() if row["left_out"] is None] == [pair.place for pair in pairs]
    for pair in pairs:
        for side, ids, mask in pair.sides():
            assert shown[pair.place][side]["ids"] == ids
            assert shown[pair.place][side]["counts"] == mask.tolist()
    assert shown["rows.jsonl:1"]["chosen"]["cut_off"] == 2
    assert (out["max_length"], out["truncation_mode"], len(out["rows"])) == (6, "keep_end", 7)
    assert out["summary"]["trained_on"] == report.kept == 3
    assert out["summary"]["malformed"]["prompts that differ"]["rows"] == 1
    assert out["summary"]["left_out"]["chosen and rejected are equal"]["first"] == "rows.jsonl:4"
    assert out["summary"]["tokens"]["chosen"]["largest"] == 13


def test_nothing_to_train_on_is_exit_status_1(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[3:4])
    assert main(command(path, tokenizer_folder)) == 1
    assert "0 of 1 rows can be trained on" in capsys.readouterr().out
    assert main(command(write_jsonl(tmp_path / "bad.jsonl", ROWS[1:2]), tokenizer_folder, "--json")) == 1
    assert json.loads(capsys.readouterr().out)["summary"]["malformed"]
    columns = write_jsonl(tmp_path / "columns.jsonl", [{"q": "the egg ", "good": "boils", "bad": "is hard"}])
    assert main(command(columns, tokenizer_folder)) == 1
    assert main(command(columns, tokenizer_folder, "--columns", "prompt=q,chosen=good,rejected=bad")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rows", "-1"], "rows must be at least 0"),
        (["--max-length", "1"], "max_length must be at least 2"),
        (["--columns", "answer=a"], "columns must be like prompt=question"),
        (["--tokenizer", "absent/model"], "cannot load the tokenizer of 'absent/model'"),
        (["--pairs", "absent.jsonl"], "no preference pairs at absent.jsonl"),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    assert main(command(path, tokenizer_folder, *more)) == 1
    assert message in capsys.readouterr().err


def test_help_imports_no_framework() -> None:
    code = (
        "import sys; from selective_pref_adapters.options import RowsConfig; "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
