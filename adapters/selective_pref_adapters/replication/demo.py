"""`selective-pref demo`: the training job on a language in which it is known which tokens decide.

In: a seed. Out: a folder with the data, the models, `results.json` and a page of what the loss read; two tables and, in
plain sentences, what they show.

    facts → supervised student (half of its facts doubtful) and teacher (clean) → preference runs → sampled answers

The preference runs are `deepspeed_loop.train`, the library's own job; only data, supervised start and judging are here.
Every sentence is made from the numbers of this run, and says so when they do not show what one would expect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.options import DemoConfig
from selective_pref_adapters.pairs import read_rows, tokenize_pairs
from selective_pref_adapters.replication.findings import Findings, sentences, show, spread_table
from selective_pref_adapters.replication.judging import decisive_share, sample_answers, success_rate
from selective_pref_adapters.replication.language import make_language, make_tokenizer, supervised_texts
from selective_pref_adapters.replication.pictures import show_selection
from selective_pref_adapters.replication.runs import (
    BATCH,
    BETA,
    FULL,
    MAIN,
    METHODS,
    QUICK,
    RATIO,
    SUPERVISED_BATCH,
    SUPERVISED_ERRORS,
    SWAPPED_LABELS,
    Scale,
    load,
    make_model,
    preference_config,
    save,
    supervised_models,
    train_supervised,
    training_prompts,
    write_data,
)

SHOWN: dict[str, Any] = {"policy": "student", "reference": "teacher", "selection_ratio": RATIO, "beta": BETA}
"""What the page shows: the run with the strong reference, at its first step."""


def demo(config: DemoConfig) -> None:
    """Runs the demo.

    Raises:
        ValueError: fewer seeds than one.
    """
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1; got {config.seeds}")
    scale = QUICK if config.quick else FULL
    output_dir = free_folder(Path(config.output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    disable_progress_bar()  # of loading and saving models; ours are those of training
    seeds = range(config.seed, config.seed + config.seeds)
    start = time.monotonic()
    runs: dict[int, Findings] = {}
    with one_thread():
        for seed in seeds:
            console.print(opening(seed, scale), soft_wrap=True)
            runs[seed] = run(output_dir / f"seed-{seed}", seed, scale)
            show(console, runs[seed], seed)
            write_results(output_dir / "results.json", runs, scale)  # after every seed: none is lost
    if len(runs) > 1:
        console.print(spread_table(runs))
    console.print(f"{time.monotonic() - start:.0f} s; data, models and results.json: {output_dir}", soft_wrap=True)
    for seed in seeds:
        console.print(show_selection(output_dir / f"seed-{seed}", **SHOWN), soft_wrap=True)


def run(folder: Path, seed: int, scale: Scale) -> Findings:
    """Everything for one seed, in order; writes data and models into `folder`."""
    language = make_language(seed)
    tokenizer = make_tokenizer()
    held_out = write_data(folder, language, seed, scale)
    seconds = {}

    for supervised in supervised_models(scale):
        with clock(seconds, supervised.key):
            prompts = training_prompts(seed, supervised.key, supervised.steps * SUPERVISED_BATCH)
            rng = random.Random(f"supervised answers {supervised.key} {seed}")
            texts = supervised_texts(language, prompts, rng, error_rate=supervised.error_rate)
            model = make_model(tokenizer, supervised.size, seed)
            train_supervised(model, tokenizer, texts, supervised.key)
            save(model, tokenizer, folder / supervised.key)

    evaluations = {}
    with (folder / "training.log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        for number, method in enumerate(METHODS, start=1):
            tqdm.write(f"run {number} of {len(METHODS)}: {method.named()}", file=sys.stderr)
            with clock(seconds, method.key):
                result = train(preference_config(method, folder, seed, scale))
            evaluations[method.key] = {"before": result.summary["before"], "after": result.summary["after"]}

    success = {}
    with clock(seconds, "answers"):
        for name in ("student", "finished", "teacher", *(method.key for method in METHODS)):
            answers = sample_answers(load(folder / name), tokenizer, held_out, seed)
            success[name] = success_rate(language, held_out, answers)
    shares = {}
    with clock(seconds, "selection"):
        pairs, _ = tokenize_pairs(read_rows(folder / "eval_pairs.jsonl"), tokenizer, max_length=64)
        for method in MAIN:
            if method.selective:
                reference = load(folder / method.ref_model)
                for when, policy in (("before", method.start), ("after", method.key)):
                    shares[f"{method.key} {when}"] = decisive_share(load(folder / policy), reference, pairs, tokenizer)
    return Findings(success=success, shares=shares, evaluations=evaluations, seconds=seconds)


def opening(seed: int, scale: Scale) -> str:
    """What is about to happen."""
    text = (
        f"seed {seed}: supervised training of a student (half of its facts wrong half of the time; once stopped early, "
        f"once to the end) and of a larger teacher (clean); then {len(METHODS)} preference runs, "
        f"{scale.preference_steps} steps of {BATCH} pairs each, {100 * SWAPPED_LABELS:.0f} % of the labels swapped. "
        "(What the training job prints goes to training.log.)"
    )
    return text if scale is FULL else f"{text} Too few steps to learn anything: this only shows that it runs."


def write_results(path: Path, runs: Mapping[int, Findings], scale: Scale) -> None:
    """Everything that was shown, as JSON."""
    results = {
        "settings": {
            "scale": dataclasses.asdict(scale),
            "methods": [dataclasses.asdict(method) for method in METHODS],
            "beta": BETA,
            "selection_ratio": RATIO,
            "batch_size": BATCH,
            "swapped_labels": SWAPPED_LABELS,
            "supervised_errors": SUPERVISED_ERRORS,
        },
        "runs": [
            {
                "seed": seed,
                "success": {key: rate.record() for key, rate in findings.success.items()},
                "decisive_shares": {key: dataclasses.asdict(share) for key, share in findings.shares.items()},
                "held_out_pairs": findings.evaluations,
                "sentences": sentences(findings),
                "seconds": findings.seconds,
            }
            for seed, findings in runs.items()
        ],
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def free_folder(path: Path) -> Path:
    """`path` if it is absent or empty, else the first of `path`-2, `path`-3, … that is."""

    def free(folder: Path) -> bool:
        return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))

    number = 1
    while not free(folder := path if number == 1 else path.with_name(f"{path.name}-{number}")):
        number += 1
    return folder


@contextlib.contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes how long the block took."""
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 2)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are faster on one thread, and the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
