"""What the store of reference log-probs costs, beside what it saves.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_store.py

Four questions, on models made on the spot (random weights cost what trained ones cost):
reading a batch, as a share of a training step of the policy; writing, as a share of computing; a training step with the
reference online against one that reads; and the size of 80,000 pairs of 2 × 550 tokens, with the time to open them in a
fresh process. Reading and training steps alternate in one run, in shuffled order; shares are medians over rounds with
minimum and maximum. The models are tiny: a larger one makes every share smaller.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head, model_per_token_logps
from selective_pref_adapters.objectives import loss_of_batch, make_objective
from selective_pref_adapters.pairs import TokenizedPair, collate
from selective_pref_adapters.reference_store import (
    ReferenceStore,
    Row,
    Space,
    model_identity,
    rows_of_pairs,
)
from selective_pref_adapters.reference_store.local import local_logps
from selective_pref_adapters.reference_store.spaces import vocabulary_digest

OPEN = """
import sys, time
import selective_pref_adapters.reference_store.store as cache
start = time.perf_counter()
store = cache.ReferenceStore.open(sys.argv[1])
print(time.perf_counter() - start, len(store.index.stored()[0]))
"""


def make_model(hidden: int, layers: int, vocabulary: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(hidden)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config)


def make_pairs(count: int, tokens: int, prompt: int) -> list[TokenizedPair]:
    pick = random.Random(0)
    pairs = []
    for number in range(count):
        start = pick.choices(range(3, 512), k=prompt)
        sides = [start + pick.choices(range(3, 512), k=tokens - prompt) for _ in range(2)]
        pairs.append(
            TokenizedPair(
                chosen_ids=sides[0],
                rejected_ids=sides[1],
                chosen_prompt_length=prompt,
                rejected_prompt_length=prompt,
                place=f"pair {number}",
            )
        )
    return pairs


def make_space(model: Any) -> Space:
    vocabulary = {str(number): number for number in range(512)}
    identity = {**model_identity(model), "vocabulary": vocabulary_digest(vocabulary)}
    return Space(identity=identity, vocabulary=vocabulary, label="benchmark")


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    shown = [f"{value * scale:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def reading(folder: Path, hidden: int, layers: int, tokens: int, rounds: int) -> None:
    """A step of eight pairs: reading alone, the step with a reference of the policy's size online, the step reading."""
    policy, reference = make_model(hidden, layers), make_model(hidden, layers).eval()
    for model in (policy, reference):
        install_fused_head(model)
    pairs = make_pairs(8 * rounds, tokens, tokens // 5)
    with ReferenceStore.create(folder, make_space(reference)) as store, store.writer() as writer:
        for row in rows_of_pairs(pairs):  # what they hold does not matter for the time
            writer.add(row, np.full(row.values, -1.0, dtype=np.float32))
    store = ReferenceStore.open(folder)
    objective = make_objective("selective_dpo", beta=0.01, selection_ratio=0.4)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    batches = [collate(pairs[at : at + 8], 0) for at in range(0, len(pairs), 8)]

    def step(batch: Any, reference_of: Callable[[Any], torch.Tensor]) -> None:
        loss_of_batch(objective, batch, model_per_token_logps(policy, batch), reference_of(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0], lambda batch: frozen_per_token_logps(reference, batch))
    times: dict[str, list[float]] = {"read": [], "step, stored": [], "step, online": []}
    order = list(times)
    for batch in batches[1:]:
        random.shuffle(order)
        for name in order:
            work = {
                "read": lambda batch=batch: store.lookup(batch),
                "step, stored": lambda batch=batch: step(batch, store.lookup),
                "step, online": lambda batch=batch: step(batch, lambda b: frozen_per_token_logps(reference, b)),
            }[name]
            times[name].append(seconds(work))
    share = [read / stored for read, stored in zip(times["read"], times["step, stored"], strict=True)]
    saved = [online / stored for online, stored in zip(times["step, online"], times["step, stored"], strict=True)]
    read, stored = spread(times["read"], 1e3), spread(times["step, stored"], 1e3, 0)
    print(
        f"| {millions(policy)} | 8 × 2 × {tokens} | {read} | {stored} | **{spread(share, 100)} %** | {spread(saved)} |"
    )


def writing(folder: Path, hidden: int, layers: int, tokens: int, rounds: int) -> None:
    """Log-probs of rows computed, then the same rows written and flushed to the disk, ten shards for a hundred rows."""
    model = make_model(hidden, layers).eval()
    rows = rows_of_pairs(make_pairs(50, tokens, tokens // 5))
    space = make_space(model)
    times: dict[str, list[float]] = {"compute": [], "write": []}
    for number in range(rounds):
        start = time.perf_counter()
        computed = [pair for call in local_logps(rows, model, pad_token_id=0) for pair in call]
        times["compute"].append(time.perf_counter() - start)
        store = ReferenceStore.create(folder / str(number), space)
        times["write"].append(seconds(partial(write, store, computed)))
        assert store.stat().shards == 10
    share = [write / compute for write, compute in zip(times["write"], times["compute"], strict=True)]
    print(
        f"| {millions(model)} | 100 × {tokens} | {spread(times['compute'])} | {spread(times['write'], 1e3)} | "
        f"**{spread(share, 100)} %** |"
    )


def write(store: ReferenceStore, computed: list[tuple[Row, np.ndarray]]) -> None:
    with store.writer(shard_bytes=computed[0][1].nbytes * 10) as writer:
        for row, values in computed:
            writer.add(row, values)


def millions(model: Any) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def size(folder: Path, pairs: int, tokens: int) -> None:
    """The size on disk, and the time to open in a fresh process and to check every value."""
    vocabulary = {"a": 0}
    space = Space(identity={"vocabulary": vocabulary_digest(vocabulary)}, vocabulary=vocabulary)
    store = ReferenceStore.create(folder, space)
    generator = np.random.default_rng(0)
    mask = np.arange(tokens + 1) > 0  # every token counts: the most that can be
    rows = []
    start = time.perf_counter()
    with store.writer() as writer:
        for _ in range(2 * pairs):
            row = Row(ids=generator.integers(0, 150_000, tokens + 1, dtype=np.int32), mask=mask)
            writer.add(row, -generator.random(tokens, dtype=np.float32))
            rows.append(row)
    written = time.perf_counter() - start
    megabytes = sum(file.stat().st_size for file in store.folder.iterdir()) / 1e6
    opened = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True)
        opened.append(float(done.stdout.split()[0]))
    checked = seconds(lambda: store.missing_rows(rows))
    print(
        f"| {pairs:,} × 2 × {tokens} | **{megabytes:.0f} MB** | **{spread(opened)}** | {checked:.1f} | {written:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=80_000)
    options = parser.parse_args()
    random.seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| policy | tokens of a step | reading, ms | step that reads, ms | share | step online / stored |")
        print("|---|---|---|---|---|---|")
        for hidden, layers, tokens in ((64, 5, 128), (64, 5, 512), (256, 6, 512)):
            reading(folder / f"reading-{hidden}-{tokens}", hidden, layers, tokens, options.rounds + 1)
        print("\n| reference | rows | computing, s | writing, ms | share |")
        print("|---|---|---|---|---|")
        for hidden, layers, tokens in ((64, 5, 512), (256, 6, 512)):
            writing(folder / f"writing-{hidden}", hidden, layers, tokens, min(options.rounds, 5))
        print("\n| pairs × tokens | on disk | open, s | find and check all rows, s | write, s |")
        print("|---|---|---|---|---|")
        size(folder / "size", options.pairs, 550)


if __name__ == "__main__":
    main()
