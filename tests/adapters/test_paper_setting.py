"""The page of the paper's own setting, rehearsed: its commands, in their order, with tiny models and few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from selective_pref_adapters.cli import main
from selective_pref_adapters.reference_store import ReferenceStore
from test_docs import FENCE, ROOT
from test_generate_formats import ARENA_1_NOW, MT, mt_bench_answer, write

PAGE = (ROOT / "docs" / "paper_setting.md").read_text(encoding="utf-8")
RECIPES = ROOT / "adapters" / "selective_pref_adapters" / "recipes"
IN_SMALL = dict(re.findall(r"^\| `(\w+)` \| `(--.+)` \|$", PAGE, re.MULTILINE))
"""Command → the flags that the page appends for a rehearsal."""


def commands() -> list[list[str]]:
    """The commands of the page's console blocks, from `train`, `score` or `generate` on."""
    blocks = [block["body"] for block in FENCE.finditer(PAGE) if block["kind"].strip() == "console"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    calls = [re.search(r"(?:selective_pref_adapters\.cli|^selective-pref) (.+)", line) for line in lines]
    return [shlex.split(call[1]) for call in calls if call]


@pytest.mark.slow
def test_the_commands_of_the_paper_fit_together(
    policy_folder: Path, reference_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of Table 1 is trained and answers; what one command writes, the next one reads."""
    monkeypatch.chdir(tmp_path)
    values = {"$SFT": str(policy_folder), "$STRONG": str(reference_folder), "$PAIRS": str(pairs_file)}
    questions = {"arena-hard-v0.1": ARENA_1_NOW, "mt-bench": MT}
    done = []
    for command in commands():
        name, *arguments = (values.get(word, word) for word in command)
        if name == "generate":
            folder = Path(arguments[arguments.index("--questions") + 1])
            folder.parent.mkdir(parents=True)
            write(folder, questions[arguments[arguments.index("--benchmark") + 1]])
        assert main([name, *arguments, *shlex.split(IN_SMALL[name])]) == 0, command
        done.append(name)
    assert done == ["train", "score", "score", "train", "train", "train", "generate", "generate"]
    configs = {path.parent.name: yaml.safe_load(path.read_text()) for path in Path("runs").glob("*/config.yaml")}
    assert {name: (c["objective"], c["reference_store"]) for name, c in configs.items()} == {
        "dpo": ("dpo", None),
        "selective-weak": ("selective_dpo", "refs/weak"),
        "selective-strong": ("selective_dpo", "refs/strong"),
        "distill-dpo": ("dpo", "refs/strong"),
    }
    summaries = [json.loads(path.read_text()) for path in Path("runs").glob("*/summary.json")]
    assert [summary["steps"] for summary in summaries] == [1] * 4
    weak, strong = (ReferenceStore.open(f"refs/{name}").space.identity for name in ("weak", "strong"))
    assert weak["weights"] != strong["weights"]
    (arena,) = Path("arena-hard-auto").rglob("selective-strong.jsonl")
    (mt_bench,) = Path("FastChat").rglob("selective-strong.jsonl")
    assert json.loads(arena.read_text())["metadata"].pop("token_len") is None
    assert mt_bench_answer(mt_bench.read_text())[0] == MT["question_id"]


def test_the_recipes_of_scoring_and_training_read_the_same_tokens() -> None:
    names = ("score/paper.yaml", "train/paper.yaml", "dpo/trl_paper.yaml")
    score, train, trl = (yaml.safe_load((RECIPES / name).read_text()) for name in names)
    assert score["max_length"] == train["max_length"] == trl["max_length"] == 4096
    assert score["dtype"] == train["dtype"] == trl["dtype"]
    assert score["truncation_mode"] == "keep_start" == trl["truncation_mode"]
    assert "truncation_mode" not in train  # whose default it is
