"""The answer file: what is there already, what comes in, and the whole at the end.

While answers come in they stand in `OUT.partial`, each flushed to the disk: a first line with the settings, then a line
for each answer. With the last one, `OUT` is written whole, in the order of the questions, beside `OUT.settings.json`,
and the partial file goes. A kill loses the answers under way, and nothing else: half a line is left out, and its
question asked again. What was made with other settings is never mixed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selective_pref_adapters.files import write_whole
from selective_pref_adapters.generation.questions import Question
from selective_pref_adapters.generation.records import id_of, texts_of


@dataclass(kw_only=True)
class AnswerFile:
    """The answers to some questions, on the disk and here.

    Attributes:
        out: where the whole file goes.
        settings: name → what the answers depend on.
        questions: all of them, in order.
        records: id → the line of the benchmark.
        cut: id → how many turns reached the limit of tokens, where any did.
    """

    out: Path
    settings: Mapping[str, Any]
    questions: Sequence[Question]
    records: dict[str | int, dict[str, Any]] = field(default_factory=dict[str | int, dict[str, Any]])
    cut: dict[str | int, int] = field(default_factory=dict[str | int, int])

    @property
    def partial(self) -> Path:
        """Where answers stand until all are there."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def about(self) -> Path:
        """What says how the whole file was made."""
        return self.out.with_name(self.out.name + ".settings.json")

    @property
    def missing(self) -> list[Question]:
        """The questions that have no answer yet."""
        return [question for question in self.questions if question.id not in self.records]

    def read(self) -> None:
        """Takes in the answers that are there already, and the settings that stand with them, of which `settings` may
        be a part.

        Raises:
            ValueError: they are of another model, benchmark or setting, or damaged. Nothing is changed.
        """
        if self.out.exists():
            self._read_whole()
        elif self.partial.exists():
            self._read_partial()

    def add(self, record: dict[str, Any], cut: int) -> None:
        """Keeps an answer, here and on the disk."""
        lines = [] if self.partial.exists() else [{"settings": dict(self.settings)}]
        lines.append({"answer": record, "cut": cut})
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.partial.open("ab") as file:
            file.write(b"".join(_line(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self._take(record, cut)

    def finish(self) -> None:
        """Writes the whole file, in the order of the questions, and what it was made with."""
        everything = [self.records[question.id] for question in self.questions]
        about = {
            "settings": dict(self.settings),
            "answers": len(everything),
            "reached_the_limit": self.cut_turns,
            "empty": self.empty,
        }
        write_whole(self.about, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        write_whole(self.out, b"".join(_line(record) for record in everything))
        self.partial.unlink(missing_ok=True)

    @property
    def cut_turns(self) -> list[dict[str, Any]]:
        """Questions, in order, with the number of answers that ended at the limit of tokens."""
        return [{"id": q.id, "turns": self.cut[q.id]} for q in self.questions if q.id in self.cut]

    @property
    def empty(self) -> list[str | int]:
        """Questions, in order, to which some answer is empty."""
        found = (q.id for q in self.questions if q.id in self.records)
        return [name for name in found if not all(text.strip() for text in texts_of(self.records[name]))]

    def _take(self, record: dict[str, Any], cut: int) -> None:
        self.records[id_of(record)] = record
        if cut:
            self.cut[id_of(record)] = cut

    def _read_whole(self) -> None:
        if not self.about.exists():
            raise ValueError(
                f"{self.out} is there already, and {self.about.name}, which says how it was made, is not: give another "
                "--out, or remove it"
            )
        about = _json(self.about.read_bytes(), str(self.about), "settings", "reached_the_limit")
        self._check(about["settings"], self.out)
        cut = {entry["id"]: entry["turns"] for entry in about["reached_the_limit"]}
        for number, line in enumerate(self.out.read_bytes().splitlines(), start=1):
            record = _json(line, f"{self.out}:{number}")
            self._take(record, cut.get(id_of(record), 0))

    def _read_partial(self) -> None:
        data = self.partial.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        first, *lines = whole.splitlines() or [b""]
        if first:
            self._check(_json(first, f"{self.partial}:1", "settings")["settings"], self.partial)
            for number, line in enumerate(lines, start=2):
                kept = _json(line, f"{self.partial}:{number}", "answer", "cut")
                self._take(kept["answer"], kept["cut"])
        if len(whole) < len(data):  # cut off by a kill
            os.truncate(self.partial, len(whole))
        if not first:
            self.partial.unlink()

    def _check(self, there: Mapping[str, Any], path: Path) -> None:
        differing = [
            f"{name} was {there.get(name)!r} and is {now!r}"
            for name, now in self.settings.items()
            if there.get(name) != now
        ]
        if differing:
            raise ValueError(
                f"{path} holds answers that were made otherwise: {'; '.join(differing)}. Give another --out, or remove "
                "the file"
            )
        self.settings = there


def _line(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _json(data: bytes, place: str, *needed: str) -> Any:
    """The object that a line holds, with the names that it needs."""
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or not set(needed) <= value.keys():
            raise ValueError(f"expected an object with {', '.join(needed)}" if needed else "expected an object")
    except ValueError as error:
        raise ValueError(f"{place} is damaged ({error}): give another --out, or remove the file") from error
    return value
