"""Selection, vectorised, against the authors' rule written as a loop over responses. Interleaved in one run.

    python tests/benchmarks/bench_selection.py [--threads 1] [--rounds 15]

Each round times every method once at every size, in shuffled order; a time is the mean of as many calls as fill
20 ms. The table gives medians over the rounds and the ratio loop / ours with its range over the rounds: only the
ratios mean anything on a shared machine. Both methods go from scores and masks to weights, in the trainers' stacked
layout: P pairs are 2P rows, chosen first.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from selective_pref import quantile_weights, top_fraction_weights

PAIRS, TOKENS, RATIO = (2, 8, 64), (512, 2048, 4096), 0.4
Stacked = tuple[torch.Tensor, torch.Tensor]


def released_rule(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the released code does: response by response, a float quantile of the unmasked scores."""
    weights = torch.zeros_like(scores)
    for row in range(scores.shape[0]):
        kept = scores[row][mask[row]]
        weights[row][mask[row]] = (kept >= torch.quantile(kept, 1 - RATIO)).to(scores.dtype)
    return weights


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "loop (authors' rule)": released_rule,
    "top_fraction_weights": lambda scores, mask: top_fraction_weights(scores, mask, RATIO),
    "quantile_weights": lambda scores, mask: quantile_weights(scores, mask, RATIO),
}


def stacked(pairs: int, tokens: int) -> Stacked:
    """Scores and mask of 2P responses; lengths vary from a quarter to the full width, as in a padded batch."""
    lengths = torch.randint(tokens // 4, tokens + 1, (2 * pairs, 1))
    return torch.randn(2 * pairs, tokens), torch.arange(tokens) < lengths


def milliseconds(method: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], data: Stacked) -> float:
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.02:
        method(*data)
        calls += 1
    return 1e3 * (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {(pairs, tokens): stacked(pairs, tokens) for pairs in PAIRS for tokens in TOKENS}
    cases = [(size, name) for size in sizes for name in METHODS]
    times: dict[tuple[tuple[int, int], str], list[float]] = {case: [] for case in cases}
    for turn in range(options.rounds + 1):  # the first round only warms up
        for size, name in random.sample(cases, len(cases)):
            elapsed = milliseconds(METHODS[name], sizes[size])
            if turn:
                times[size, name].append(elapsed)
    loop, *ours = METHODS
    print(f"torch {torch.__version__}, {options.threads} thread(s), float32, {options.rounds} rounds")
    columns = " | ".join(f"{name} ms | loop / ours (min to max)" for name in ours)
    print(f"| pairs × tokens | {loop} ms | {columns} |")
    print("|---|---|" + "---|---|" * len(ours))
    for size in sizes:
        row = [f"{size[0]} × {size[1]}", f"{statistics.median(times[size, loop]):.3f}"]
        for name in ours:
            ratios = [a / b for a, b in zip(times[size, loop], times[size, name], strict=True)]
            row += [
                f"{statistics.median(times[size, name]):.3f}",
                f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
