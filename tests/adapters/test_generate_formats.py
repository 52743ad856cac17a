"""Question files in, answer files out: the formats of Arena-Hard and MT-Bench, written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selective_pref_adapters.cli import main
from selective_pref_adapters.generation.questions import BENCHMARKS, Question, draw_seed, read_questions
from selective_pref_adapters.generation.records import Answer, record_of, with_length
from selective_pref_adapters.generation.style import gpt_4o_length, length_by, style_of

ARENA_1 = {
    "question_id": "328c149ed45a41c0b9d6f14659e63599",
    "category": "arena-hard-v0.1",
    "cluster": "Puzzles",
    "turns": [{"content": "w1 w2"}],
}
ARENA_1_NOW = {"uid": "b43c", "category": "arena-hard-v0.1", "cluster": "Puzzles", "prompt": "w3"}
ARENA_2 = {"uid": "2edbb5f36f5b42be", "category": "hard_prompt", "subcategory": "coding", "prompt": "w4 w5"}
MT = {"question_id": 81, "category": "writing", "turns": ["w1", "w2"]}
MATH = {"question_id": 111, "category": "math", "turns": ["w1", "w2"], "reference": ["w3", "w4"]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_the_questions_of_each_benchmark_are_read(tmp_path: Path) -> None:
    found = read_questions(write(tmp_path / "q", ARENA_1, "", ARENA_1_NOW), BENCHMARKS["arena-hard-v0.1"])
    assert found == [
        Question(id=ARENA_1["question_id"], turns=("w1 w2",), temperature=0.0),
        Question(id="b43c", turns=("w3",), temperature=0.0),
    ]
    found = read_questions(write(tmp_path / "q", ARENA_2), BENCHMARKS["arena-hard-v2.0"])
    assert found == [Question(id="2edbb5f36f5b42be", turns=("w4 w5",), temperature=0.0)]
    found = read_questions(write(tmp_path / "q", ARENA_2), BENCHMARKS["arena-hard-v2.0"], temperature=0.6)
    assert found[0].temperature == 0.6


def test_the_temperature_of_mt_bench_depends_on_the_category(tmp_path: Path) -> None:
    stated = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    stated |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
    rows = [{**MT, "question_id": number, "category": name} for number, name in enumerate(stated)]
    found = read_questions(write(tmp_path / "q", *rows), BENCHMARKS["mt-bench"])
    assert [question.temperature for question in found] == list(stated.values())
    assert [question.turns for question in found] == [("w1", "w2")] * 8


@pytest.mark.parametrize(
    ("benchmark", "line", "got"),
    [
        ("mt-bench", "not JSON", "got not JSON"),
        ("mt-bench", "[1]", "got [1]"),
        ("mt-bench", {**MT, "turns": ["one alone"]}, "one alone"),
        ("mt-bench", {**MT, "turns": ["w1", " "]}, "two strings"),
        ("mt-bench", {**MT, "turns": ["w1", {"content": "w2"}]}, "two strings"),
        ("mt-bench", {**MT, "category": "generic"}, "got "),
        ("mt-bench", {**MT, "category": ["writing"]}, "got "),
        ("mt-bench", {"category": "writing", "turns": ["w1", "w2"]}, "question_id"),
        ("mt-bench", ARENA_2, "Give --benchmark arena-hard-v2.0"),
        ("arena-hard-v0.1", ARENA_2, "Give --benchmark arena-hard-v2.0"),
        ("arena-hard-v2.0", ARENA_1, "Give --benchmark arena-hard-v0.1"),
        ("arena-hard-v2.0", MT, "Give --benchmark mt-bench"),
        ("arena-hard-v2.0", {**ARENA_2, "prompt": ""}, "uid"),
        ("arena-hard-v2.0", {**ARENA_2, "prompt": None}, "uid"),
        ("arena-hard-v2.0", {**ARENA_2, "uid": True}, "uid"),
        ("arena-hard-v0.1", {**ARENA_1, "turns": [{"content": "a"}, {"content": "b"}]}, "turns"),
    ],
)
def test_a_line_that_is_no_question_is_named(
    benchmark: str, line: Any, got: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"mt-bench": MT, "arena-hard-v0.1": ARENA_1, "arena-hard-v2.0": ARENA_2}[benchmark]
    path = write(tmp_path / "question.jsonl", good, line)
    out = tmp_path / "out.jsonl"
    flags = ["--benchmark", benchmark, "--model", "absent", "--questions", str(path), "--out", str(out)]
    assert main(["generate", *flags, "--token-len", "none"]) == 1
    error = capsys.readouterr().err
    assert f"{path}:2: expected {BENCHMARKS[benchmark].line}; got " in error
    assert got in error
    assert sorted(tmp_path.iterdir()) == [path]


def test_ids_that_stand_twice_and_files_without_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q:3: the id 81 stands in line 1 already"):
        read_questions(write(tmp_path / "q", MT, MATH, MT), BENCHMARKS["mt-bench"])
    with pytest.raises(ValueError, match="holds no question: expected lines of"):
        read_questions(write(tmp_path / "q", ""), BENCHMARKS["mt-bench"])


def test_every_answer_has_a_seed_of_its_own() -> None:
    questions = [Question(id=name, turns=("w1", "w2"), temperature=0.7) for name in (1, 2, "1")]
    seeds = {draw_seed(q, turn, seed) for q in questions for turn in (0, 1) for seed in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)


# --- what the benchmarks' own code reads -----------------------------------------------------------------------------


def arena_answer(line: str) -> tuple[str, str, str, list[int]]:
    """(uid, model, answer, the numbers of style control), as Arena-Hard's code takes them from a line."""
    row = json.loads(line)
    assert list(row) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert isinstance(row["messages"][0]["content"], str)
    assert list(row["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]  # the first is the length
    features = [v if isinstance(v, int) else sum(v.values()) for v in row["metadata"].values()]
    return row["uid"], row["model"], row["messages"][-1]["content"]["answer"], features


def mt_bench_answer(line: str) -> tuple[int, str, str]:
    """(question_id, first answer, second answer), as FastChat's code takes them from a line."""
    row = json.loads(line)
    assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert [choice["index"] for choice in row["choices"]] == [0]
    first, second = row["choices"][0]["turns"]
    return row["question_id"], first, second


def test_the_lines_are_those_that_the_benchmarks_read() -> None:
    asked = Question(id="2edb", turns=("w4 w5",), temperature=0.0)
    text = "# Plan\n\n1. **a**\n2. b\n\n```\n# no header\n```\n"
    record = record_of(Answer(question=asked, turns=(text,), cut=0), BENCHMARKS["arena-hard-v2.0"], "ours", len)
    assert record["messages"][0]["content"] == "w4 w5"
    assert arena_answer(json.dumps(record)) == ("2edb", "ours", text, [len(text), 1, 2, 1])
    assert record["tstamp"] > 1.6e9
    asked = Question(id=81, turns=("w1", "w2"), temperature=0.7)
    record = record_of(Answer(question=asked, turns=("a", "b"), cut=0), BENCHMARKS["mt-bench"], "ours", None)
    assert mt_bench_answer(json.dumps(record)) == (81, "a", "b")
    assert record["model_id"] == "ours"


def test_the_name_of_an_answer_is_that_of_its_content() -> None:
    asked = Question(id=81, turns=("w1", "w2"), temperature=0.7)
    names = [
        record_of(Answer(question=asked, turns=turns, cut=0), BENCHMARKS["mt-bench"], model, None)["answer_id"]
        for turns, model in ((("a", "b"), "x"), (("a", "b"), "x"), (("a", "c"), "x"), (("a", "b"), "y"))
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("text", "headers", "lists", "bold"),
    [
        ("", (0,) * 6, (0, 0), (0, 0)),
        ("# a\n## b\n## c\n###### d\n####### e\n#f\n # g\n#\n", (2, 2, 0, 0, 0, 1), (0, 0), (0, 0)),
        ("1. a\n  2. b\n3.c\n- d\n * e\n+ f\n-g\n\n\n- h", (0,) * 6, (2, 4), (0, 0)),
        ("**a** __b__ **c\nd** *e* **f*g** ____", (0,) * 6, (0, 0), (1, 1)),
        ("# a\n```\n# b\n- c\n**d**\n```\n- e", (1, 0, 0, 0, 0, 0), (0, 1), (0, 0)),
        ("```# a\n```\n\n`# b`\n```\n# c", (1, 0, 0, 0, 0, 0), (0, 0), (0, 0)),  # the last fence has no end
        ("say\n# hi\n\n```say\n# hi\n```", (0,) * 6, (0, 0), (0, 0)),  # the same text outside goes with it
        ("a\n# b\n```\n```\n# c", (0,) * 6, (0, 0), (0, 0)),  # a fence around a line break takes out all of them
    ],
)
def test_style_is_counted_outside_code_fences(text: str, headers: Any, lists: Any, bold: Any) -> None:
    assert style_of(text, None) == {
        "token_len": None,
        "header_count": {f"h{level}": number for level, number in enumerate(headers, start=1)},
        "list_count": dict(zip(("ordered", "unordered"), lists, strict=True)),
        "bold_count": dict(zip(("**", "__"), bold, strict=True)),
    }


def encoding() -> Any:
    """A real encoding of tiktoken, made on the spot: bytes, and "ab" as one token."""
    import tiktoken

    ranks = {bytes([value]): value for value in range(256)} | {b"ab": 256}
    return tiktoken.Encoding("made", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|end|>": 257})


def test_the_length_is_in_tokens_and_special_tokens_are_text() -> None:
    length = length_by(encoding())
    assert (length(""), length("abab b"), length("é")) == (0, 4, 2)
    assert length("<|end|>") == 7
    assert style_of("abab", length)["token_len"] == 2


def test_a_length_that_was_left_open_is_filled_in_and_others_stay() -> None:
    record = {"messages": [{}, {"content": {"answer": "abab"}}], "metadata": {"token_len": None, "bold_count": {}}}
    filled = with_length(record, length_by(encoding()))
    assert filled["metadata"] == {"token_len": 2, "bold_count": {}}
    assert next(iter(filled["metadata"])) == "token_len"
    assert with_length({**filled, "messages": []}, len) == {**filled, "messages": []}
    assert record["metadata"]["token_len"] is None


def test_without_the_encoding_nothing_is_generated_and_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiktoken.registry

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        gpt_4o_length()
    path = write(tmp_path / "question.jsonl", ARENA_2)
    flags = ["--model", "absent", "--questions", str(path), "--out", str(tmp_path / "out.jsonl")]
    assert main(["generate", "--benchmark", "arena-hard-v2.0", *flags]) == 1
    assert "o200k_base, which is downloaded at its first use" in (error := capsys.readouterr().err)
    assert "--token-len none" in error
