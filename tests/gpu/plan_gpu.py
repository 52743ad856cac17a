"""What `selective-pref plan` computes, beside what one GPU holds: the loop in bfloat16, ZeRO 0 to 3.

    python tests/gpu/plan_gpu.py [--tiny]

The policy is a Llama of 374 M parameters, a running reference one of 528 M, both with random weights; a step has two
pairs, of which every sequence fills the maximum length. Each case is a process of its own. What is shown are
bytes that PyTorch's allocator gave out: between two steps, and the most during the third. `--tiny` runs the same on a
CPU, where nothing is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "adapters"), str(ROOT), str(ROOT / "adapters")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
MIB = 2**20
LASTING = ("policy: weights", "policy: gradients", "policy: optimizer", "reference: weights")
CASES = [(0, False), (1, False), (2, False), (3, False), (3, True)]  # stage of ZeRO, gradient checkpointing
PAIRS = 2


def prepare(folder: Path, tiny: bool) -> None:
    from tiny import make_model, write_jsonl

    width, vocabulary = (64, 500) if tiny else (1024, 31_980)
    words = [f"w{number}" for number in range(vocabulary)]
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 11 * width // 4, "initializer_range": 0.02}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    for seed, (name, layers) in enumerate({"policy": 24, "reference": 36}.items()):
        make_model(folder / name, seed, words, num_hidden_layers=2 if tiny else layers, **shape)
    pick = random.Random(0)

    def text(count: int) -> str:
        return " ".join(pick.choices(words, k=count))

    rows = [{"prompt": text(8) + " ", "chosen": text(2048), "rejected": text(2048)} for _ in range(3 * PAIRS)]
    write_jsonl(folder / "pairs.jsonl", rows)


def measured(folder: Path, stage: int, checkpointing: bool, length: int) -> dict[str, int]:
    """Of this process: bytes that are allocated before the third step, the most during it, and host memory."""
    import torch

    from selective_pref_adapters.deepspeed_loop import loop
    from selective_pref_adapters.options import TrainConfig

    step, seen = loop.training_step, {"between": 0, "peak": 0}

    def followed(*arguments: Any) -> Any:
        if not torch.cuda.is_available():
            return step(*arguments)
        seen["between"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = step(*arguments)
        seen["peak"] = torch.cuda.max_memory_allocated()
        return result

    loop.training_step = followed
    loop.train(
        TrainConfig(
            model=str(folder / "policy"),
            ref_model=str(folder / "reference"),
            pairs=str(folder / "pairs.jsonl"),
            output_dir=str(folder / f"run-{stage}-{checkpointing}"),
            max_length=length,
            batch_size=PAIRS,
            max_steps=3,
            eval_fraction=0,
            dtype="bfloat16",
            zero_stage=stage,
            gradient_checkpointing=checkpointing,
            share_prefix="off",
        )
    )
    return {**seen, "host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def planned(folder: Path, stage: int, checkpointing: bool, length: int) -> dict[str, int]:
    from selective_pref_adapters.cli import main

    flags = ["--model", f"{folder / 'policy'}", "--ref-model", f"{folder / 'reference'}", "--devices", "1", "--json"]
    flags += ["--dtype", "bfloat16", "--zero-stage", str(stage), "--max-length", str(length)]
    flags += ["--batch-size", str(PAIRS)]
    flags += ["--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["plan", *flags])
    return json.loads(printed.getvalue())["ways"]["running"]["device"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    length = 64 if options.tiny else 1024
    if options.run:
        folder, stage, checkpointing = options.run
        print(json.dumps(measured(Path(folder), int(stage), checkpointing == "True", length)))
        return
    print(
        "| ZeRO | gradient checkpointing | between steps: planned MiB | held | most in a step: planned | held | host |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as at_once:
        folder = Path(name)
        prepare(folder, options.tiny)
        plans = [planned(folder, *case, length) for case in CASES]
        runs = at_once.map(lambda case: in_a_process(name, *case, options.tiny), CASES)
        for (stage, checkpointing), parts, run in zip(CASES, plans, runs, strict=True):
            if run.returncode:
                print(run.stderr[-3000:], file=sys.stderr)
                raise SystemExit(f"ZeRO-{stage}, gradient checkpointing {checkpointing}: exit status {run.returncode}")
            found = next(json.loads(line) for line in reversed(run.stdout.splitlines()) if line.startswith("{"))
            lasting = sum(size for part, size in parts.items() if part in LASTING)
            sizes = (lasting, found["between"], sum(parts.values()), found["peak"], found["host"])
            shown = " | ".join(f"{size / MIB:.0f}" for size in sizes)
            print(f"| {stage} | {'on' if checkpointing else 'off'} | {shown} |", flush=True)
            print({part: round(size / MIB) for part, size in parts.items()}, file=sys.stderr)


def in_a_process(folder: str, stage: int, checkpointing: bool, tiny: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, *(["--tiny"] if tiny else []), "--run", folder, str(stage), str(checkpointing)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    main()
