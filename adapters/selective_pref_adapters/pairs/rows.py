"""One preference row as text or messages, and how rows are split into training and evaluation.

In: nothing. Out: `PreferenceRow`, what every schema is read into; `RowError`, what is said of a row that is none.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Messages: TypeAlias = list[Message]
Prose: TypeAlias = "str | Messages"
"""One side of a row, or its prompt: text that is tokenised as it is, or turns that go through a chat template."""


SKIP = "--skip-malformed-rows leaves such rows out and counts them"
"""What helps at one bad row among many."""


class RowError(ValueError):
    """A row that is no preference pair. The message names the file, the row, what was expected and what was got.

    Attributes:
        kind: a few words by which such rows are counted.
    """

    def __init__(self, message: str, kind: str = "malformed row") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class PreferenceRow:
    """One pair, with the place it came from (`file.jsonl:17`) for error messages.

    Attributes:
        prompt, chosen, rejected: all three text, or all three lists of messages (`role`, `content` as text, and what
            else a chat template reads, such as `tool_calls`). `rejected` is None for supervised training, which reads
            the chosen side alone.
        tools: functions that the chat template is told of, as JSON schemas; None for none.
        template_options: further variables of the chat template (`chat_template_kwargs` in TRL's rows).
        schema: the name of the schema that it was read by.
        weight: what its loss is multiplied by, at least 0; None where the row says nothing of it.
    """

    prompt: Prose
    chosen: Prose
    rejected: Prose | None
    place: str
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict[str, Any])
    schema: str = ""
    weight: float | None = None

    @property
    def answers(self) -> tuple[Prose, ...]:
        """Chosen and rejected, or the chosen one alone."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)

    @property
    def prompt_key(self) -> str:
        """What two rows with the same prompt share: rows are split for evaluation by it."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True)


def checked_weight(value: Any, place: str) -> float:
    """A row's weight as a number; text, as a .csv file has it, is read as one.

    Raises:
        RowError: it is no finite number, or negative.
    """
    try:
        no_number = isinstance(value, bool) or "_" in str(value)  # Python reads "1_0" as 10
        weight = math.nan if no_number else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise RowError(
            f"{place}: 'weight', what the loss of a row is multiplied by, must be a finite number, at least 0; got "
            f"{value!r:.80}. A column 'weight' of another meaning has to be renamed, or left out as --columns "
            "prompt=prompt,chosen=chosen,rejected=rejected,weight=none leaves it out",
            "a weight that is no number",
        )
    return weight


def split_by_prompt(
    rows: Sequence[PreferenceRow], fraction: float, seed: int
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """(training rows, evaluation rows): whole prompts are held out until `fraction` of the rows is reached.

    Pairs that share a prompt stay on one side, so no prompt of the evaluation was seen in training.

    Raises:
        ValueError: `fraction` is outside [0, 1), or the rows have a single prompt, so that nothing can be held out.
    """
    per_prompt = Counter(row.prompt_key for row in rows)
    prompts = sorted(per_prompt)
    held_out = {prompts[number] for number in held_out_prompts([per_prompt[p] for p in prompts], fraction, seed)}
    train = [row for row in rows if row.prompt_key not in held_out]
    return train, [row for row in rows if row.prompt_key in held_out]


def held_out_prompts(counts: Sequence[int], fraction: float, seed: int) -> list[int]:
    """The numbers of the prompts that are held out until `fraction` of the rows is reached.

    Args:
        counts: how many rows each prompt has; prompts in the order of their text.
        fraction, seed: as in `split_by_prompt`.

    Raises:
        ValueError: as `split_by_prompt`.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"eval_fraction must be in [0, 1); got {fraction!r}")
    if fraction == 0:
        return []
    rows = sum(counts)
    if len(counts) < 2:
        raise ValueError(
            f"cannot hold pairs out: all {rows} rows have the same prompt. Set eval_fraction to 0, or give eval_pairs"
        )
    numbers = list(range(len(counts)))
    random.Random(seed).shuffle(numbers)
    held_out: list[int] = []
    taken = 0
    for number in numbers[:-1]:
        if taken >= fraction * rows:
            break
        held_out.append(number)
        taken += counts[number]
    return held_out
