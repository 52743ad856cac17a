"""What `selective-pref plan` computes, beside what one GPU holds: bfloat16, ZeRO 0 to 3 with offload, and FSDP2.

    python tests/gpu/plan_gpu.py [--tiny] [--only CASE ...]

ZeRO is the loop's; FSDP2 is the Trainer's, with float32 weights and bf16 autocast. The policy is a Llama of 374 M
parameters, a running reference in bfloat16 one of 528 M, both with random weights; a step has two pairs, of which every
sequence fills the maximum length. Each case is a process of its own. What is shown are bytes that PyTorch's allocator
gave out: between two steps, and the most during the third. `--tiny` runs the same on a CPU, where nothing is measured.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "adapters"), str(ROOT), str(ROOT / "adapters")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
MIB = 2**20
LASTING = ("policy: weights", "policy: gradients", "policy: optimizer", "reference: weights")
OFFLOAD = ("offload_optimizer", "offload_parameters")
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-3, checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
    "ZeRO-2, optimizer offloaded": {"zero_stage": 2, OFFLOAD[0]: True},
    "ZeRO-3, optimizer offloaded": {"zero_stage": 3, OFFLOAD[0]: True},
    "ZeRO-3, both offloaded": {"zero_stage": 3, **dict.fromkeys(OFFLOAD, True)},
    "FSDP2": {"zero_stage": 3},
    "FSDP2, checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
}
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


def measured(folder: Path, case: str, length: int) -> dict[str, int]:
    """Of this process: bytes that are allocated before the third step, the most during it, and host memory."""
    import torch

    seen = {"between": 0, "peak": 0}

    def begin() -> None:
        if torch.cuda.is_available():
            seen["between"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def end() -> None:
        if torch.cuda.is_available():
            seen["peak"] = torch.cuda.max_memory_allocated()

    (run_trainer if case.startswith("FSDP2") else run_loop)(folder, case, length, begin, end)
    return {**seen, "host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def run_loop(folder: Path, case: str, length: int, begin: Callable[[], None], end: Callable[[], None]) -> None:
    from selective_pref_adapters.deepspeed_loop import loop
    from selective_pref_adapters.options import TrainConfig

    step = loop.training_step

    def followed(*arguments: Any) -> Any:
        begin()
        result = step(*arguments)
        end()
        return result

    loop.training_step = followed
    loop.train(
        TrainConfig(
            model=str(folder / "policy"),
            ref_model=str(folder / "reference"),
            pairs=str(folder / "pairs.jsonl"),
            output_dir=str(folder / f"run {case}"),
            max_length=length,
            batch_size=PAIRS,
            max_steps=3,
            eval_fraction=0,
            dtype="bfloat16",
            share_prefix="off",
            **{"gradient_checkpointing": False, **CASES[case]},
        )
    )


def run_trainer(folder: Path, case: str, length: int, begin: Callable[[], None], end: Callable[[], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
    from selective_pref_adapters.pairs import read_rows, tokenize_pairs

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            end()

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    pairs, _ = tokenize_pairs(read_rows(folder / "pairs.jsonl"), tokenizer, max_length=length)
    gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder / f"run {case}"),
        remove_unused_columns=False,
        use_cpu=not gpu,
        bf16=gpu,
        gradient_checkpointing=CASES[case].get("gradient_checkpointing", False),
        per_device_train_batch_size=PAIRS,
        max_steps=3,
        save_strategy="no",
        report_to=[],
        fsdp=True,
        fsdp_config={"version": 2},
    )
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.bfloat16)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        args=args,
        train_dataset=pairs,
        data_collator=PreferenceCollator(tokenizer, share_prefix="off"),
        compute_loss_func=SelectivePreferenceLoss(ref_model=reference),
        callbacks=[Steps()],
    )
    SelectionCallback().attach(trainer)
    trainer.train()


def planned(folder: Path, case: str, length: int) -> dict[str, int]:
    from selective_pref_adapters.cli import main

    flags = ["--model", f"{folder / 'policy'}", "--ref-model", f"{folder / 'reference'}", "--devices", "1", "--json"]
    flags += ["--dtype", "bfloat16", "--max-length", str(length), "--batch-size", str(PAIRS)]
    asked = {"gradient_checkpointing": False, **CASES[case]}
    flags += ["--zero-stage", str(asked.pop("zero_stage"))]
    flags += [f"--{'' if on else 'no-'}{name.replace('_', '-')}" for name, on in asked.items()]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["plan", *flags])
    return json.loads(printed.getvalue())["ways"]["running"]["device"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    length = 64 if options.tiny else 1024
    if options.run:
        folder, case = options.run
        print(json.dumps(measured(Path(folder), case, length)))
        return
    print("| case | between steps: planned MiB | held | most in a step: planned | held | host |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as at_once:
        folder = Path(name)
        prepare(folder, options.tiny)
        plans = [planned(folder, case, length) for case in options.only]
        runs = at_once.map(lambda case: in_a_process(name, case, options.tiny), options.only)
        for case, parts, run in zip(options.only, plans, runs, strict=True):
            if run.returncode:
                print(f"failed: {case}: exit status {run.returncode}", flush=True)
                print(run.stderr[-3000:], file=sys.stderr)
                continue
            found = next(json.loads(line) for line in reversed(run.stdout.splitlines()) if line.startswith("{"))
            lasting = sum(size for part, size in parts.items() if part in LASTING)
            sizes = (lasting, found["between"], sum(parts.values()), found["peak"], found["host"])
            shown = " | ".join(f"{size / MIB:.0f}" for size in sizes)
            print(f"| {case} | {shown} |", flush=True)
            print({part: round(size / MIB) for part, size in parts.items()}, file=sys.stderr)


def in_a_process(folder: str, case: str, tiny: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, *(["--tiny"] if tiny else []), "--run", folder, case]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **place, "MASTER_PORT": str(29_600 + list(CASES).index(case))}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


if __name__ == "__main__":
    main()
