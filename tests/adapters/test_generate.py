"""`selective-pref generate` with a model on this process: batches, sampling, stops, limits, going on after a kill."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref_adapters.cli import main
from selective_pref_adapters.generation.answer_file import AnswerFile
from selective_pref_adapters.generation.local import _Draw, _Sampling, chat_tokenizer, local_answers, stop_ids
from selective_pref_adapters.generation.questions import Question
from small_tokenizers import small_tokenizer
from test_generate_formats import ARENA_2, MT, arena_answer, encoding, mt_bench_answer, write
from tiny import make_model

CATEGORIES = ("writing", "math", "stem", "roleplay", "coding")
MT_ROWS = [
    {**MT, "question_id": 80 + n, "category": CATEGORIES[n % 5], "turns": [" ".join(["w1"] * (n + 1)), f"w{n} w3"]}
    for n in range(7)
]
LIMIT = 6


@pytest.fixture(scope="module")
def mt_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("questions") / "question.jsonl", *MT_ROWS)


def generate(questions: Path, model: Path | str, out: Path, *more: str, benchmark: str = "mt-bench") -> int:
    flags = ["--benchmark", benchmark, "--model", str(model), "--questions", str(questions), "--out", str(out)]
    return main(["generate", *flags, "--max-new-tokens", str(LIMIT), *more])


def turns_of(out: Path) -> dict[int, tuple[str, str]]:
    return {name: (first, second) for name, first, second in map(mt_bench_answer, out.read_text().splitlines())}


def by_hand(folder: Path, rows: list[dict[str, Any]], limit: int) -> dict[int, tuple[str, ...]]:
    """Greedy answers, token by token, one question at a time, without padding and without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = {}
    for row in rows:
        text, answers = "", []
        for said in row["turns"]:
            text += f"user {said} assistant "
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            start = len(ids)
            while len(ids) < start + limit:
                with torch.no_grad():
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            answers.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
            text += f"{answers[-1]} </s> "
        found[row["question_id"]] = tuple(answers)
    return found


def test_greedy_answers_are_those_of_a_plain_loop(policy_folder: Path, tmp_path: Path, mt_questions: Path) -> None:
    """Padding, batches and the cache change nothing, and the second turn reads the first answer."""
    assert generate(mt_questions, policy_folder, tmp_path / "a.jsonl", "--temperature", "0", "--batch-size", "3") == 0
    assert turns_of(tmp_path / "a.jsonl") == by_hand(policy_folder, MT_ROWS, LIMIT)
    about = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    assert about["answers"] == 7
    assert about["settings"]["max_new_tokens"] == LIMIT


def test_what_is_sampled_depends_on_question_and_seed_alone(
    policy_folder: Path, tmp_path: Path, mt_questions: Path
) -> None:
    for name, flags in {
        "one": ("--batch-size", "1"),
        "three": ("--batch-size", "3"),
        "other": ("--seed", "1"),
        "greedy": ("--temperature", "0"),
    }.items():
        assert generate(mt_questions, policy_folder, tmp_path / f"{name}.jsonl", *flags) == 0
    one, three, other, greedy = (turns_of(tmp_path / f"{n}.jsonl") for n in ("one", "three", "other", "greedy"))
    assert list(one) == [row["question_id"] for row in MT_ROWS]  # though the longest were asked first
    assert one == three
    sampled = [row["question_id"] for row in MT_ROWS if row["category"] in ("writing", "roleplay")]
    fixed = [row["question_id"] for row in MT_ROWS if row["category"] in ("math", "coding")]
    assert all(one[name] == greedy[name] == other[name] for name in fixed)
    assert any(one[name] != other[name] for name in sampled)
    assert any(one[name] != greedy[name] for name in sampled)


def test_samples_have_the_probabilities_of_the_temperature() -> None:
    logits, temperature, draws = torch.tensor([1.0, 0.0, -1.0, -3.0]), 0.7, 4000
    rows = [
        _Draw(Question(id=n, turns=("?",), temperature=temperature), 0, 0, torch.device("cpu")) for n in range(draws)
    ]
    scores = logits.expand(draws, 4).clone()
    counts = Counter(_Sampling(rows)(torch.zeros(draws, 1), scores).argmax(-1).tolist())
    assert scores.equal(logits.expand(draws, 4))
    for token, probability in enumerate((logits / temperature).softmax(-1).tolist()):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) < 4 * deviation


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("headers", "</s>"), ("marked", "<|im_end|>")])
def test_eos_and_the_end_of_a_turn_both_stop(template: str, end: str) -> None:
    tokenizer = small_tokenizer("byte-level BPE", template=template)
    assert set(stop_ids(tokenizer, None)) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}


def test_an_answer_ends_where_the_template_ends_a_turn(policy_folder: Path, tmp_path: Path, mt_questions: Path) -> None:
    """A word that the model says is made the end of a turn: then it ends the answer, and does not stand in it."""
    said = by_hand(policy_folder, MT_ROWS, LIMIT)
    word = next(first.split()[0] for first, _ in said.values() if len(set(first.split())) > 1)
    folder = shutil.copytree(policy_folder, tmp_path / "ends")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", f"'{word}'")
    tokenizer.save_pretrained(folder)
    assert generate(mt_questions, folder, tmp_path / "a.jsonl", "--temperature", "0") == 0
    first = {name: turns[0] for name, turns in turns_of(tmp_path / "a.jsonl").items()}
    expected = {}
    for name, (text, _) in said.items():
        spoken = text.split()
        expected[name] = " ".join(spoken[: spoken.index(word)] if word in spoken else spoken)
    assert first == expected
    about = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    stopped = {name for name, (text, _) in said.items() if word in text.split()}
    assert stopped
    assert not stopped & {entry["id"] for entry in about["reached_the_limit"] if entry["turns"] == 2}


def test_answers_at_the_limit_are_counted_and_what_cannot_be_read_is_empty(
    policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model reads 64 tokens: a prompt of 61 leaves three, one of 64 or more none."""
    rows = [
        {**ARENA_2, "uid": name, "prompt": " ".join(["w1"] * words)}
        for name, words in (("a", 59), ("b", 62), ("c", 70))
    ]
    questions = write(tmp_path / "question.jsonl", *rows, {**ARENA_2, "uid": "d"})
    out = tmp_path / "a.jsonl"
    assert generate(questions, policy_folder, out, "--token-len", "none", benchmark="arena-hard-v2.0") == 0
    lengths = [
        len(json.loads(line)["messages"][-1]["content"]["answer"].split()) for line in out.read_text().splitlines()
    ]
    assert lengths[:3] == [3, 0, 0]
    about = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    cut = {entry["id"] for entry in about["reached_the_limit"]}
    assert {"a", "b", "c"} <= cut
    assert ("d" in cut) == (lengths[3] == LIMIT)
    assert about["empty"] == ["b", "c"]
    said = capsys.readouterr()
    assert "answered: 4 of 4 questions now: " in said.out
    assert f"{len(cut)} of 4 answers did not end within {LIMIT} tokens" in said.err
    assert "empty answers: to 2 of the questions (the first: 'b')" in said.err
    assert "token_len is null: style control fails" in said.err


def test_a_tokenizer_without_a_template_is_refused_before_the_weights_are_read(
    policy_folder: Path, tmp_path: Path, mt_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(
        policy_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja", "*.safetensors")
    )
    assert generate(mt_questions, folder, tmp_path / "a.jsonl") == 1
    assert "has no chat template" in (error := capsys.readouterr().err)
    assert "--chat-template FILE" in error
    bad = write(tmp_path / "bad.jinja", "{{ raise_exception('no system, no user') }}")
    assert generate(mt_questions, folder, tmp_path / "a.jsonl", "--chat-template", str(bad)) == 1
    assert "the chat template refuses a plain conversation: no system, no user" in capsys.readouterr().err
    template = tmp_path / "template.jinja"
    shutil.copy(policy_folder / "chat_template.jinja", template)
    assert chat_tokenizer(str(folder), str(template)).chat_template == template.read_text()
    assert not (tmp_path / "a.jsonl.partial").exists()


# --- going on --------------------------------------------------------------------------------------------------------


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "tstamp": 0} for line in path.read_text().splitlines()]


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    policy_folder: Path, tmp_path: Path, mt_questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(mt_questions, policy_folder, tmp_path / "whole.jsonl") == 0
    out, partial = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.partial"
    kept = AnswerFile.add

    def until(number: int) -> Any:
        def add(file: AnswerFile, record: dict[str, Any], cut: int) -> None:
            if len(file.records) == number:
                raise KeyboardInterrupt
            kept(file, record, cut)

        return add

    same = ("--model-id", "whole", "--batch-size", "2")
    for number in (3, 5):
        monkeypatch.setattr(AnswerFile, "add", until(number))
        assert generate(mt_questions, policy_folder, out, *same) == 130
        assert not out.exists()
        assert len([json.loads(line) for line in partial.read_text().splitlines()]) == number + 1
        with partial.open("a") as file:
            file.write('{"answer": {"question_id": 80, "ans')  # what a kill leaves of a line
    monkeypatch.undo()
    asked: list[int | str] = []
    real = local_answers

    def counting(questions: Any, *more: Any, **options: Any) -> Any:
        asked.extend(question.id for question in questions)
        return real(questions, *more, **options)

    monkeypatch.setattr("selective_pref_adapters.generation.local.local_answers", counting)
    assert generate(mt_questions, policy_folder, out, *same) == 0
    assert len(asked) == 2
    assert not partial.exists()
    assert without_times(out) == without_times(tmp_path / "whole.jsonl")
    whole, killed = (json.loads((tmp_path / f"{n}.jsonl.settings.json").read_text()) for n in ("whole", "killed"))
    assert killed == whole


def test_a_file_that_is_complete_loads_no_model_and_lengths_are_filled_in(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "model")
    questions = write(tmp_path / "question.jsonl", ARENA_2, {**ARENA_2, "uid": "other"})
    out, arena = tmp_path / "ours.jsonl", {"benchmark": "arena-hard-v2.0"}
    assert generate(questions, folder, out, "--token-len", "none", **arena) == 0
    before = without_times(out)
    assert [row["metadata"]["token_len"] for row in before] == [None, None]
    shutil.rmtree(folder)
    monkeypatch.setattr("tiktoken.encoding_for_model", lambda name: {"gpt-4o": encoding()}[name])
    assert generate(questions, folder, out, **arena) == 0
    assert "answered: 0 of 2 questions now, 2 before: " in capsys.readouterr().out
    for line, row in zip(out.read_text().splitlines(), before, strict=True):
        uid, model, answer, features = arena_answer(line)
        assert (uid, model, answer) == (row["uid"], "ours", row["messages"][-1]["content"]["answer"])
        assert features == [len(answer.encode()), 0, 0, 0]
    assert len(before[0]["messages"][-1]["content"]["answer"]) > 0


@pytest.mark.parametrize("complete", [True, False])
def test_answers_that_were_made_otherwise_are_never_mixed(
    complete: bool, policy_folder: Path, tmp_path: Path, mt_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, partial = tmp_path / "ours.jsonl", tmp_path / "ours.jsonl.partial"
    assert generate(mt_questions, policy_folder, out) == 0
    if not complete:
        settings = {"settings": json.loads((tmp_path / "ours.jsonl.settings.json").read_text())["settings"]}
        answer = {"answer": json.loads(out.read_text().splitlines()[0]), "cut": 0}
        out.unlink()
        write(partial, settings, answer)
    there = (out if complete else partial).read_bytes()
    fewer = write(tmp_path / "fewer.jsonl", *MT_ROWS[:3])
    for arguments, message in (
        ((mt_questions, "other", out), f"model was '{policy_folder}' and is 'other'"),
        ((mt_questions, policy_folder, out, "--seed", "3"), "seed was 0 and is 3"),
        ((mt_questions, policy_folder, out, "--max-new-tokens", "9"), "max_new_tokens was 6 and is 9"),
        ((mt_questions, policy_folder, out, "--temperature", "1"), "questions was"),
        ((fewer, policy_folder, out), "questions was"),
        ((mt_questions, policy_folder, out, "--model-id", "x"), "model_id was 'ours' and is 'x'"),
        ((mt_questions, policy_folder, out, "--base-url", "http://127.0.0.1:9/v1"), "served was False and is True"),
    ):
        assert generate(*arguments) == 1
        error = capsys.readouterr().err
        assert f"{out if complete else partial} holds answers that were made otherwise: {message}" in error
        assert (out if complete else partial).read_bytes() == there
    questions = write(tmp_path / "arena.jsonl", ARENA_2)
    arena = {"benchmark": "arena-hard-v2.0"}
    assert generate(questions, policy_folder, out, "--token-len", "none", **arena) == 1
    assert "benchmark was 'mt-bench' and is 'arena-hard-v2.0'" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_another_model(
    policy_folder: Path, tmp_path: Path, mt_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "model")
    out, partial = tmp_path / "ours.jsonl", tmp_path / "ours.jsonl.partial"
    assert generate(mt_questions, folder, out) == 0
    settings = json.loads((tmp_path / "ours.jsonl.settings.json").read_text())["settings"]
    answer = {"answer": json.loads(out.read_text().splitlines()[0]), "cut": 0}
    out.unlink()
    write(partial, {"settings": settings}, answer)
    make_model(folder, seed=5)
    assert generate(mt_questions, folder, out) == 1
    assert "made otherwise: weights was" in capsys.readouterr().err
    template = write(tmp_path / "t.jinja", "{{ messages[-1]['content'] }}")
    assert generate(mt_questions, folder, out, "--chat-template", str(template)) == 1
    assert "made otherwise: chat_template was" in capsys.readouterr().err


def test_files_that_nobody_can_vouch_for_are_refused(
    policy_folder: Path, tmp_path: Path, mt_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write(tmp_path / "ours.jsonl", {"question_id": 80})
    assert generate(mt_questions, policy_folder, out) == 1
    assert "ours.jsonl.settings.json, which says how it was made, is not" in capsys.readouterr().err
    out.unlink()
    write(tmp_path / "ours.jsonl.partial", "{}", "not JSON")
    assert generate(mt_questions, policy_folder, out) == 1
    assert "ours.jsonl.partial:1 is damaged" in capsys.readouterr().err
    for path, more, message in (
        (tmp_path / "ours.txt", (), "out must end in .jsonl: the benchmarks read no other files"),
        (out, ("--batch-size", "0"), "batch_size must be at least 1; got 0"),
        (out, ("--temperature", "-1"), "temperature must be in [0, 10]; got -1.0"),
        (
            out,
            ("--base-url", "http://127.0.0.1:9/v1", "--dtype", "float32"),
            "chat_template and dtype are the server's",
        ),
    ):
        with pytest.raises(SystemExit):
            generate(mt_questions, policy_folder, path, *more)
        assert message in " ".join(re.sub("[│╭╰─╮╯]", "", capsys.readouterr().err).split())
    with pytest.raises(SystemExit):
        generate(mt_questions, policy_folder, out, benchmark="arena-hard-v3")
    assert "arena-hard-v2.0" in capsys.readouterr().err
