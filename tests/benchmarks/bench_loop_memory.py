"""Peak memory of the training job with and without the fused head, each in a fresh process.

    python tests/benchmarks/bench_loop_memory.py [--steps 4]

The policy and the reference are Llamas with a small body under a vocabulary of 151,936, so that the head dominates as
it does in small-model training; eight pairs of up to 2 × 128 tokens a step.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapters"))
VOCABULARY, WORDS = 151_936, [f"w{number}" for number in range(1000)]


def prepare(folder: Path) -> None:
    from tiny import make_model, write_jsonl

    for seed, name in enumerate(("policy", "reference")):
        options = {"vocab_size": VOCABULARY, "hidden_size": 64, "max_position_embeddings": 128}
        make_model(folder / name, seed, WORDS, **options)
    pick = random.Random(0)

    def text(count: int) -> str:
        return " ".join(pick.choices(WORDS, k=count))

    rows = [{"prompt": text(8) + " ", "chosen": text(100), "rejected": text(110)} for _ in range(64)]
    write_jsonl(folder / "pairs.jsonl", rows)


def run(folder: Path, fused: bool, steps: int) -> None:
    from selective_pref_adapters.deepspeed_loop import TrainConfig, train

    start = time.perf_counter()
    train(
        TrainConfig(
            model=str(folder / "policy"),
            ref_model=str(folder / "reference"),
            pairs=str(folder / "pairs.jsonl"),
            output_dir=str(folder / f"fused-{fused}"),
            eval_fraction=0,
            max_steps=steps,
            fused_head=fused,
        )
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": round(peak), "seconds": round(time.perf_counter() - start, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run(Path(options.run[0]), options.run[1] == "True", options.steps)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        print("| head | peak MiB of the process | seconds |\n|---|---|---|")
        for fused in (False, True):
            command = [sys.executable, __file__, "--steps", str(options.steps), "--run", name, str(fused)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result = json.loads(printed.splitlines()[-1])
            print(f"| {'fused' if fused else 'logits'} | {result['peak_mib']} | {result['seconds']} |", flush=True)


if __name__ == "__main__":
    main()
