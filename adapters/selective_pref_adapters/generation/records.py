"""An answer → the line that a benchmark's code reads."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from selective_pref_adapters.generation.questions import Benchmark, Question
from selective_pref_adapters.generation.style import Length, style_of


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said to a question.

    Attributes:
        question: what it was asked.
        turns: its answer to each turn.
        cut: how many of them ended because they had reached the limit of tokens.
    """

    question: Question
    turns: tuple[str, ...]
    cut: int


def record_of(answer: Answer, benchmark: Benchmark, model_id: str, length: Length | None) -> dict[str, Any]:
    """The line of an answer file, as the benchmark's own code writes it.

    Args:
        answer: the answer.
        benchmark: whose line it is to be.
        model_id: what the model is called.
        length: see `style_of`; read for Arena-Hard alone.
    """
    question, turns = answer.question, list(answer.turns)
    name = hashlib.blake2b(json.dumps([model_id, question.id, turns]).encode(), digest_size=11).hexdigest()
    if benchmark.name == "mt-bench":
        return {
            "question_id": question.id,
            "answer_id": name,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }
    return {
        "uid": question.id,
        "ans_id": name,
        "model": model_id,
        "messages": [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": turns[0]}},
        ],
        "tstamp": time.time(),
        "metadata": style_of(turns[0], length),
    }


def id_of(record: dict[str, Any]) -> str | int:
    """The id of the question that a line answers."""
    return record["uid"] if "uid" in record else record["question_id"]


def texts_of(record: dict[str, Any]) -> list[str]:
    """What the model says in a line, turn by turn."""
    return record["choices"][0]["turns"] if "choices" in record else [record["messages"][-1]["content"]["answer"]]


def with_length(record: dict[str, Any], length: Length) -> dict[str, Any]:
    """A line of Arena-Hard with its `token_len`, if it has none yet."""
    if record["metadata"]["token_len"] is not None:
        return record
    return {**record, "metadata": {**record["metadata"], "token_len": length(texts_of(record)[0])}}
