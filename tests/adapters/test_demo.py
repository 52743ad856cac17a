"""The demo: its language, its judgement of tokens and answers by hand-worked cases, and the whole of it in small."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref_adapters.cli import main
from selective_pref_adapters.pairs import PreferenceRow, collate, tokenize_pairs
from selective_pref_adapters.replication import findings, judging, language, runs
from selective_pref_adapters.replication.pictures import show_selection


@pytest.fixture(scope="module")
def facts() -> language.Language:
    return language.make_language(0)


def test_held_out_keys_never_stand_together_in_training() -> None:
    prompts = language.split_prompts(3, 0.2)
    sets = [{frozenset(language.keys_of(prompt)) for prompt in part} for part in (prompts.train, prompts.held_out)]
    assert not sets[0] & sets[1]
    assert len(sets[0]) + len(sets[1]) == 16 * 15 * 14 * 13 // (4 * 3 * 2)
    language.check_disjoint(prompts.train, prompts.held_out)
    with pytest.raises(AssertionError, match="held out"):
        language.check_disjoint(["owl fox elk hen :"], ["hen elk fox owl :"])
    for use in ("student", "teacher", "pairs"):
        assert set(runs.training_prompts(3, use, 500)) <= set(prompts.train)


def test_an_answer_is_right_when_all_its_digits_are_the_tables(facts: language.Language) -> None:
    prompt = "owl fox elk hen :"
    right = [facts.table[key] for key in language.keys_of(prompt)]
    pick = random.Random(0)
    assert language.is_right(facts, prompt, language.answer_text(right, pick))
    for place in range(4):
        wrong = list(right)
        wrong[place] = language.wrong_digit(facts, language.keys_of(prompt)[place], pick)
        assert wrong[place] != right[place]
        assert not language.is_right(facts, prompt, language.answer_text(wrong, pick))
    assert not language.is_right(facts, prompt, " ".join(right[:3]))
    assert not language.is_right(facts, prompt, " ".join([*right, "0"]))


def test_supervised_answers_err_on_doubtful_keys_alone(facts: language.Language) -> None:
    prompts = language.split_prompts(0, 0.2).train[:400]
    texts = language.supervised_texts(facts, prompts, random.Random(0), error_rate=0.5)
    wrong: dict[bool, list[bool]] = {True: [], False: []}
    for prompt, answer in texts:
        for key, digit in zip(language.keys_of(prompt), language.digits_of(answer.split()), strict=True):
            wrong[key in facts.doubtful].append(digit != facts.table[key])
    assert not any(wrong[False])
    assert sum(wrong[True]) / len(wrong[True]) == pytest.approx(0.5, abs=0.06)
    clean = language.supervised_texts(facts, prompts, random.Random(0), error_rate=0.0)
    assert all(language.is_right(facts, *text) for text in clean)


def test_rows_have_one_right_side_and_the_stated_share_is_swapped(facts: language.Language) -> None:
    prompts = language.split_prompts(0, 0.2).train[:1000]
    rows = language.preference_rows(facts, prompts, random.Random(0), swapped=0.2)
    swapped = 0
    for row in rows:
        verdicts = [language.is_right(facts, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        assert sum(verdicts) == 1
        swapped += verdicts[1]
    assert swapped / len(rows) == pytest.approx(0.2, abs=0.04)


def test_prompt_and_answer_part_cleanly_and_the_decisive_tokens_are_the_differing_digits() -> None:
    tokenizer = language.make_tokenizer()
    row = PreferenceRow(
        prompt="owl fox elk hen :",
        chosen=" first so 7 second er 3 third hm 1 fourth oh 2",
        rejected=" first hm oh 7 second er 5 third hm 1 fourth now 9",
        place="x",
    )
    pairs, report = tokenize_pairs([row], tokenizer, max_length=64)
    assert report.boundary_merged == 0
    assert tokenizer.convert_ids_to_tokens(pairs[0].chosen_ids[: pairs[0].chosen_prompt_length]) == [
        "<s>",
        *row.prompt.split(),
    ]
    assert tokenizer.convert_ids_to_tokens(pairs[0].rejected_ids)[-1] == "</s>"
    ids = collate(pairs, 0)["input_ids"][:, 1:]
    masks = judging.decisive_mask(pairs, tokenizer, ids.shape[1])
    found = [tokenizer.convert_ids_to_tokens(ids[side][masks[side][0]].tolist()) for side in (0, 1)]
    assert found == [["3", "2"], ["5", "9"]]


def test_intervals_and_verdicts() -> None:
    none, half = judging.Rate(right=0, samples=100), judging.Rate(right=50, samples=100)
    assert none.interval[0] == 0
    assert 0.03 < none.interval[1] < 0.04  # z² / (n + z²)
    assert half.interval == pytest.approx((0.404, 0.596), abs=2e-3)
    assert half.error == pytest.approx(0.05)
    assert findings.difference(half, none) == 1
    assert findings.difference(none, half) == -1
    assert findings.difference(half, judging.Rate(right=52, samples=100)) == 0
    claim = findings.against_dpo({"student": none, "dpo": half, "selective_strong": none, "teacher": half})
    assert "clearly less" in claim  # it says what the numbers show, not what one would like


@pytest.mark.slow
def test_the_whole_demo_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine").write_text("keep me")
    assert main(["demo", "--quick", "--output-dir", str(tmp_path / "demo")]) == 0
    assert (tmp_path / "demo" / "mine").read_text() == "keep me"
    folder = tmp_path / "demo-2"
    results = json.loads((folder / "results.json").read_text())
    (run,) = results["runs"]
    keys = {"student", "finished", "teacher", *(method.key for method in runs.METHODS)}
    assert run["success"].keys() == keys
    assert all(0 <= rate["right"] <= rate["samples"] == 64 for rate in run["success"].values())
    shares = run["decisive_shares"]["selective_self before"]
    assert shares["chosen"] == pytest.approx(shares["chosen_base"], abs=5e-3)  # all scores tied: none is favoured
    assert shares["rejected"] == pytest.approx(shares["rejected_base"], abs=5e-3)
    shown = capsys.readouterr().out
    assert "all four digits right" in shown
    page = shown.rstrip("\n").rpartition(" ")[2]
    assert Path(page) == folder / "seed-0" / "selection.html"
    assert "eval_pairs.jsonl:12" in Path(page).read_text(encoding="utf-8")
    for key in keys:
        model = AutoModelForCausalLM.from_pretrained(folder / "seed-0" / key)
        ids = AutoTokenizer.from_pretrained(folder / "seed-0" / key)("owl fox elk hen :", return_tensors="pt")
        assert torch.isfinite(model(**ids).logits).all()


def test_without_a_template_engine_the_demo_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for name in ("inspect_command", "page"):
        monkeypatch.delitem(sys.modules, f"selective_pref_adapters.seeing.{name}", raising=False)
    said = show_selection(tmp_path, policy="student", reference="teacher", selection_ratio=0.4, beta=0.01)
    assert said.startswith("no page of the selection was written: ")
    assert "jinja2" in said
    assert not list(tmp_path.iterdir())
