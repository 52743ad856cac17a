"""How fast rows become token ids, beside the tokenizer's own batch speed.

    python tests/benchmarks/bench_tokenize.py --tokenizer MODEL --pairs pairs.jsonl [--rows 100000]

The rows of the file are repeated, each with a prompt of its own, until there are enough. The tokenizer alone is given
prompt + chosen and prompt + rejected of all rows, in batches: the least that any reader must do. This library reads
the rows, finds the boundary of the prompt (which takes the ids of the prompt alone, too), cuts, and reports. Both
alternate, in rounds; shown are the medians and the ratio of speeds, above 1 where this library is faster: by the clock,
and by the processor's time, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer

from selective_pref_adapters.pairs import PreferenceRow, preference_row, read_rows, tokenize_pairs

BATCH = 1000


def main() -> None:
    """Prints rows per second of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=4096)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    raw = made_rows(read_rows(options.pairs), options.rows)
    rows = [preference_row(row, f"row {number}") for number, row in enumerate(raw)]

    def reader() -> None:
        read = [preference_row(row, f"row {number}") for number, row in enumerate(raw)]
        tokenize_pairs(read, tokenizer, max_length=options.max_length, truncation_mode="keep_end", progress=True)

    taken: dict[str, list[tuple[float, float]]] = {"tokenizer": [], "reader": []}
    for _ in range(options.rounds):
        taken["tokenizer"].append(seconds(lambda: tokenizer_alone(rows, tokenizer)))
        taken["reader"].append(seconds(reader))
    for number, clock in enumerate(("by the clock", "by processor time")):
        print(f"{clock}:")
        times = {name: [both[number] for both in some] for name, some in taken.items()}
        for name, some in times.items():
            median = statistics.median(some)
            spread = f"{min(some):.2f} to {max(some):.2f}"
            print(f"{name:>11}: {len(rows) / median:8,.0f} rows per second ({median:.2f} s, {spread})")
        ratios = [one / two for one, two in zip(times["tokenizer"], times["reader"], strict=True)]
        print(
            f"      ratio: {statistics.median(ratios):.2f} of the tokenizer's ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def made_rows(rows: list[PreferenceRow], count: int) -> list[dict[str, Any]]:
    """So many rows, none with the prompt of another."""
    made = []
    for number in range(count):
        row = rows[number % len(rows)]
        prompt: Any = f"{number}. {row.prompt}"
        if not isinstance(row.prompt, str):
            prompt = json.loads(json.dumps(row.prompt))
            prompt[-1]["content"] = f"{number}. {prompt[-1]['content']}"
        made.append({"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected})
    return made


def tokenizer_alone(rows: list[PreferenceRow], tokenizer: Any) -> None:
    """Both sides of every row, as text or through the chat template, in the tokenizer's own batches."""
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        for sides in ([row.chosen for row in some], [row.rejected for row in some]):
            if isinstance(some[0].prompt, str):
                texts = [f"{row.prompt}{side}{tokenizer.eos_token}" for row, side in zip(some, sides, strict=True)]
                tokenizer(texts, verbose=False)
            else:
                talks = [[*row.prompt, *side] for row, side in zip(some, sides, strict=True)]
                tokenizer.apply_chat_template(talks, return_dict=True, tokenizer_kwargs={"verbose": False})


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """How long some work takes: by the clock, and of the processor's time."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - used


if __name__ == "__main__":
    main()
