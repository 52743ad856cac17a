"""How long a run on many pairs takes to start, and how much memory: the whole command, in a fresh process each time.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_million.py [--pairs 1000000] [--keep FOLDER] [--only NAME ...]

`selective-pref train`, four steps of four pairs, with the policy of `../shared/models/stories260k` (or `--model`), on
made-up pairs: SimPO without a reference, the first time and the second, and Selective-DPO that reads a store. The store
is filled as by `score`, but with made-up log-probs, since what they are does not matter. With `--dpo` the same for
`selective-pref dpo`. Printed are the seconds by the clock, processor seconds of all its processes, and the largest
resident memory of any of them.
With `--keep` a second call finds pairs, ids and store where the first left them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"
WORDS = ["a", "cat", "dog", "tree", "sun", "girl", "boy", "house", "red", "big", "small"]
WORDS += ["happy", "ran", "saw", "went", "play", "found", "loved", "little", "day", "time"]
MAX_LENGTH = 512

STORE = """
import sys
import numpy as np
from selective_pref_adapters.models import load_tokenizer, own_vocabulary
from selective_pref_adapters.pairs.large import Making, tokenized_rows
from selective_pref_adapters.reference_store import ReferenceStore, Space, fill_rows, rows_of_pairs
from selective_pref_adapters.reference_store.spaces import vocabulary_digest

model, source, cache, store, length = sys.argv[1:]
tokenizer = load_tokenizer(model)
pairs, _ = tokenized_rows(source, tokenizer, Making(max_length=int(length)), cache=cache).pairs()
vocabulary = own_vocabulary(tokenizer)
space = Space(identity={"vocabulary": vocabulary_digest(vocabulary)}, vocabulary=vocabulary, label="made up")
values = -np.random.default_rng(0).random(int(length), dtype=np.float32)


def made_up(rows):
    for start in range(0, len(rows), 1000):
        yield [(row, values[: row.values]) for row in rows[start : start + 1000]]


print(fill_rows(ReferenceStore.create(store, space), rows_of_pairs(pairs), made_up))
"""


def write_pairs(path: Path, count: int) -> None:
    """Rows of a question and two answers, none like another."""
    pick = random.Random(0)

    def text(words: int) -> str:
        return " ".join(pick.choices(WORDS, k=words))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"prompt": f"{number}: {text(8)} ", "chosen": text(pick.randint(15, 25)), "rejected": text(20)}
            file.write(json.dumps(row) + "\n")


def measured(name: str, command: list[str], folder: Path) -> None:
    """Prints a line of the table for a command that is run to its end."""
    start = time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - start
    if status:
        sys.exit(f"{name} failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    print(f"| {name} | {taken:.1f} | {cpu:.1f} | {usage.ru_maxrss / 1e6:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260k"))
    parser.add_argument("--keep", type=Path, help="a folder for pairs, ids and store, which stay there")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--dpo", action="store_true", help="measure `selective-pref dpo`, too")
    parser.add_argument("--only", nargs="+", help="rows of the table, by the beginning of their names")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source, cache, store = folder / f"{options.pairs}.jsonl", folder / "ids", folder / f"store-{options.pairs}"
        if not source.exists():
            write_pairs(source, options.pairs)

        main = "from selective_pref_adapters.cli import main; main()"
        run = ["train", "--model", options.model, "--pairs", str(source), "--output-dir", str(folder / "run")]
        run += ["--data-cache", str(cache), "--data-workers", options.workers, "--max-length", str(MAX_LENGTH)]
        run += ["--max-steps", "4", "--batch-size", "4", "--gradient-accumulation-steps", "1", "--dtype", "float32"]
        run += ["--eval-fraction", "0", "--learning-rate", "1e-6"]
        simpo, stored = ["--objective", "simpo"], ["--reference-store", str(store)]
        alone = [sys.executable, "-c", main, *run]
        two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        two += ["--no-python", *alone]
        dpo = [sys.executable, "-c", main, "dpo", "--model_name_or_path", options.model, "--dataset_name", str(source)]
        dpo += ["--reference_store", str(store), "--max_length", str(MAX_LENGTH), "--output_dir", str(folder / "run")]
        dpo += ["--max_steps", "4", "--per_device_train_batch_size", "4", "--dataset_num_proc", options.workers]
        dpo += ["--use_cpu", "--bf16", "false", "--report_to", "none"]
        made = [sys.executable, "-c", STORE, options.model, str(source), str(cache), str(store), str(MAX_LENGTH)]
        commands = {
            "first run, which tokenises": [*alone, *simpo],
            "second run, ids from the cache": [*alone, *simpo],
            "filling the store": made,
            "filling it again, nothing is lacking": made,
            "run that reads the store": [*alone, *stored],
            "run that reads the store, two processes": [*two, *stored],
        }
        if options.dpo:
            commands |= {"`dpo` from the store": dpo, "`dpo` from the store, again": dpo}
        print("| | clock, s | processor, s | largest resident memory, GB |\n|---|---|---|---|")
        for name, command in commands.items():
            if options.only and not any(name.startswith(some) for some in options.only):
                continue
            shutil.rmtree(folder / "run", ignore_errors=True)
            measured(name, command, folder)


if __name__ == "__main__":
    main()
