"""The question files of the benchmarks. In: a name and a file. Out: its questions, or the first line that is none.

Arena-Hard has had two forms of a line: {uid, category, prompt}, which its code reads today, and {question_id, category,
turns: [{content}]}, in which version 0.1 was published. Both are read for both versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selective_pref_adapters.generation.options import BenchmarkName

MT_BENCH_TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("stem", "humanities"), 0.1),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a benchmark asks for.

    Attributes:
        name: as the command calls it.
        temperatures: category → temperature; other categories are not of this benchmark.
        turns: what the user says one after the other, in one question.
        max_new_tokens: tokens of an answer to each of them.
        line: what a line of its question file is, in words.
    """

    name: BenchmarkName
    temperatures: Mapping[str, float]
    turns: int
    max_new_tokens: int
    line: str


_ARENA = '{"uid", "category", "prompt"} or {"question_id", "category", "turns": [{"content"}]}, with the category'
_V2 = ("hard_prompt", "creative_writing", "coding", "math")
BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    one.name: one
    for one in (
        Benchmark(
            name="arena-hard-v0.1",
            temperatures={"arena-hard-v0.1": 0.0},
            turns=1,
            max_new_tokens=4096,
            line=f"{_ARENA} arena-hard-v0.1",
        ),
        Benchmark(
            name="arena-hard-v2.0",
            temperatures=dict.fromkeys(_V2, 0.0),
            turns=1,
            max_new_tokens=4096,
            line=f"{_ARENA} {', '.join(_V2[:-1])} or {_V2[-1]}",
        ),
        Benchmark(
            name="mt-bench",
            temperatures=MT_BENCH_TEMPERATURES,
            turns=2,
            max_new_tokens=1024,
            line=f'{{"question_id", "category", "turns": [two strings]}}, with a category of '
            f"{', '.join(MT_BENCH_TEMPERATURES)}",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question.

    Attributes:
        id: as the file has it, a string or a number.
        turns: what the user says, one after the other.
        temperature: of the answer; 0 takes the likeliest token.
    """

    id: str | int
    turns: tuple[str, ...]
    temperature: float


def read_questions(path: str | Path, benchmark: Benchmark, temperature: float | None = None) -> list[Question]:
    """The questions of a file in their order; blank lines are none.

    Args:
        path: a file of JSON lines.
        benchmark: whose questions they are to be.
        temperature: of all answers; None for the benchmark's own.

    Raises:
        ValueError: a line that is none of this benchmark's, an id that stands twice, no question at all.
        OSError: no such file.
    """
    found: dict[str | int, Question] = {}
    places: dict[str | int, int] = {}
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            question = _question(line, benchmark, temperature)
            if question is None:
                raise ValueError(f"{path}:{number}: expected {benchmark.line}; got {_said_of(line)}")
            if question.id in places:
                raise ValueError(
                    f"{path}:{number}: the id {question.id!r} stands in line {places[question.id]} already: answers "
                    "are found by it, so each question must have its own"
                )
            found[question.id], places[question.id] = question, number
    if not found:
        raise ValueError(f"{path} holds no question: expected lines of {benchmark.line}")
    return list(found.values())


def digest(questions: list[Question]) -> str:
    """What changes whenever a question, their order or a temperature does."""
    rows = [[question.id, question.turns, question.temperature] for question in questions]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def draw_seed(question: Question, turn: int, seed: int) -> int:
    """A seed in [0, 2³¹) for the answer to one turn of a question."""
    name = json.dumps([question.id, turn, seed]).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


def _question(line: str, benchmark: Benchmark, temperature: float | None) -> Question | None:
    """The question that a line holds; None where it is none of this benchmark."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or row.get("category") not in list(benchmark.temperatures):
        return None
    name, turns = row.get("question_id"), row.get("turns")
    if benchmark.turns == 1:
        name = row.get("uid", name)
        turns = [row["prompt"]] if "prompt" in row else _contents(turns)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        return None
    if not isinstance(turns, list) or len(turns) != benchmark.turns:
        return None
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        return None
    own = benchmark.temperatures[row["category"]]
    return Question(id=name, turns=tuple(turns), temperature=own if temperature is None else temperature)


def _contents(turns: Any) -> Any:
    """[{content}] → [content], where it is that."""
    plain = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    return [turn.get("content") for turn in turns] if plain else turns


def _said_of(line: str) -> str:
    """What an error says of a line that is no question."""
    other = next((name for name, one in BENCHMARKS.items() if _question(line, one, None) is not None), None)
    shown = line.strip()[:160] + ("…" if len(line.strip()) > 160 else "")
    return f"{shown}. Give --benchmark {other}, whose question this is" if other else shown
