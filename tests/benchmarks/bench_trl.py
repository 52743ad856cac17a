"""A training step of SelectiveDPOTrainer against one of TRL's DPOTrainer: time, and peak memory of a fresh process.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_trl.py --rounds 5

The same two Llamas, rows, batches and optimiser for all; in every round each method trains for a few steps, in shuffled
order. Ratios are between times of the same round. Time from the end of one optimiser step to the end of the next, so
it holds data, reference, policy, backward pass, optimiser and logging. Memory is measured above a process that has its
trainer and has taken no step, the reference of the stored case being gone by then.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "adapters")]

METHODS = {
    "DPOTrainer": {},
    "ours, ratio 1": {"selection_ratio": 1.0},
    "ours, ratio 0.4": {"selection_ratio": 0.4},
    "ours, ratio 0.4, store": {"selection_ratio": 0.4, "precompute_ref_log_probs": True},
}


def models(folder: Path, options: argparse.Namespace) -> None:
    """Policy and reference, untrained, with one tokenizer."""
    from tiny import make_model

    shape = {
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2 * options.tokens,
        "initializer_range": 0.02,
    }
    words = [f"w{number}" for number in range(options.vocabulary)]
    layers = {"policy": options.layers, "reference": options.reference_layers or options.layers}
    for seed, (name, depth) in enumerate(layers.items()):
        make_model(folder / name, seed=seed, words=words, num_hidden_layers=depth, **shape)


def rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """Pairs of one prompt of a quarter of the tokens and answers of between half and all of the rest."""
    pick = random.Random(0)

    def some(count: int) -> str:
        return " ".join(f"w{pick.randrange(options.vocabulary)}" for _ in range(count))

    prompt, answer = options.tokens // 4, 3 * options.tokens // 4
    return [
        {
            "prompt": some(prompt) + " ",
            "chosen": some(pick.randint(answer // 2, answer)),
            "rejected": some(pick.randint(answer // 2, answer)),
        }
        for _ in range(4 * options.pairs)
    ]


def make(method: str, folder: Path, options: argparse.Namespace, **more: Any) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer

    stock = method == "DPOTrainer"
    settings = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": options.steps + 1,
        "per_device_train_batch_size": options.pairs,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **METHODS[method],
        **({"reference_store": str(folder / "store")} if "store" in method else {}),
    }
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("policy", "reference")
    )
    return (DPOTrainer if stock else SelectiveDPOTrainer)(
        model=policy,
        ref_model=reference,
        args=(DPOConfig if stock else SelectiveDPOConfig)(**settings),
        train_dataset=Dataset.from_list(rows(options)),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        **more,
    )


def clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Wall and CPU time at the end of every step."""

        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append((time.perf_counter(), time.process_time()))

    return Clock()


def seconds(trainer: Any, watch: Any) -> tuple[float, float]:
    """(wall, CPU) seconds of a step: the median over those of a short run, the first left out."""
    watch.times.clear()
    trainer.train()
    gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(watch.times, watch.times[1:], strict=False)]
    return statistics.median(gap[0] for gap in gaps), statistics.median(gap[1] for gap in gaps)


def quiet() -> None:
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.trainer_callback.PrinterCallback.on_log = lambda *_, **__: None


def peak_mib(method: str, folder: Path, options: argparse.Namespace) -> float:
    """Of a fresh process: how far two steps rise above what it held before the first."""
    command = [sys.executable, __file__, "--run", method, "--folder", str(folder)]
    for name in ("hidden", "layers", "vocabulary", "tokens", "pairs"):
        command += [f"--{name}", str(getattr(options, name))]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(out.stdout.splitlines()[-1])


def run_once(method: str, folder: Path, options: argparse.Namespace) -> None:
    """The child of `peak_mib`: prints MiB."""
    trainer = make(method, folder, options)
    gc.collect()
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    trainer.train()
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    print(round((peak - held) / 2**20, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--reference-layers", type=int, help="of the reference; default: as many as the policy has")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--run")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    if options.run:
        run_once(options.run, options.folder, options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models(folder, options)
        watches = {method: clock() for method in METHODS}
        trainers = {method: make(method, folder, options, callbacks=[watches[method]]) for method in METHODS}
        found: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
        for _ in range(options.rounds):
            order = list(METHODS)
            random.shuffle(order)
            for method in order:
                found[method].append(seconds(trainers[method], watches[method]))
        del trainers
        peaks = {method: peak_mib(method, folder, options) for method in METHODS}
    print("| method | wall s a step, median (min to max) | CPU s | to DPOTrainer (min to max) | peak MiB |")
    print("|---|---|---|---|---|")
    for method, times in found.items():
        walls, cpus = zip(*times, strict=True)
        ratios = [mine[1] / stock[1] for mine, stock in zip(times, found["DPOTrainer"], strict=True)]
        print(
            f"| {method} | {statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f}) | "
            f"{statistics.median(cpus):.2f} | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {peaks[method]:.0f} |"
        )


if __name__ == "__main__":
    main()
