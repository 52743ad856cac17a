"""The three adapters on a GPU, beside the same runs on the CPU: losses of a few steps, float32 and bf16.

    python tests/gpu/trainers_gpu.py [--tiny]

A small Llama with random weights learns from made-up pairs beside another one as reference, with Selective-DPO. Each
run is a process of its own; those on the CPU do not see the GPU. The losses of float32 must agree; those of bf16 come
near. (The loop shuffles otherwise than the Trainers do.) `--tiny` runs the CPU alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapters"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
STEPS, PAIRS, RATE = 6, 4, 1e-3


def make_files(folder: Path) -> None:
    from tiny import make_model, write_jsonl

    words = [f"w{number}" for number in range(2000)]
    pick = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(pick.choices(words, k=pick.randint(low, high)))

    count = STEPS * PAIRS
    rows = [{"prompt": text(16, 48) + " ", "chosen": text(32, 64), "rejected": text(32, 64)} for _ in range(count)]
    write_jsonl(folder / "rows.jsonl", rows)
    more = {"max_position_embeddings": 256, "num_key_value_heads": None, "initializer_range": 0.05}
    for seed, name in enumerate(("policy", "reference")):
        make_model(folder / name, seed, words, **SHAPE, **more)


def with_trl(folder: Path, bf16: bool, gpu: bool) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer

    trainer = SelectiveDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "reference"),
        args=SelectiveDPOConfig(selection_ratio=0.4, max_length=256, **arguments(folder, bf16, gpu, 0.1)),
        train_dataset=Dataset.from_list([json.loads(line) for line in (folder / "rows.jsonl").open()]),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )
    trainer.train()
    return losses_of(trainer)


def with_hf(folder: Path, bf16: bool, gpu: bool) -> list[float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
    from selective_pref_adapters.pairs import read_rows, tokenize_pairs

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    pairs, _ = tokenize_pairs(read_rows(folder / "rows.jsonl"), tokenizer, max_length=256)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        args=TrainingArguments(remove_unused_columns=False, **arguments(folder, bf16, gpu)),
        train_dataset=pairs,
        data_collator=PreferenceCollator(tokenizer),
        compute_loss_func=SelectivePreferenceLoss(
            beta=0.1, selection_ratio=0.4, ref_model=AutoModelForCausalLM.from_pretrained(folder / "reference")
        ),
    )
    SelectionCallback().attach(trainer)
    trainer.train()
    return losses_of(trainer)


def with_the_loop(folder: Path, bf16: bool, gpu: bool) -> list[float]:
    from selective_pref_adapters.deepspeed_loop import train
    from selective_pref_adapters.options import TrainConfig

    train(
        TrainConfig(
            model=str(folder / "policy"),
            ref_model=str(folder / "reference"),
            pairs=str(folder / "rows.jsonl"),
            output_dir=str(folder / f"loop-{bf16}-{gpu}"),
            beta=0.1,
            selection_ratio=0.4,
            batch_size=PAIRS,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_schedule="constant",
            warmup_steps=0,
            logging_steps=1,
            dtype="bfloat16" if bf16 else "float32",
            zero_stage=3,
        )
    )
    lines = (folder / f"loop-{bf16}-{gpu}" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def arguments(folder: Path, bf16: bool, gpu: bool, beta: float | None = None) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "use_cpu": not gpu,
        "bf16": bf16,
        "per_device_train_batch_size": PAIRS,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    return chosen if beta is None else {**chosen, "beta": beta, "gradient_checkpointing": False}


def losses_of(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


RUNS = {"TRL": with_trl, "HF Trainer": with_hf, "loop, ZeRO-3": with_the_loop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, folder, dtype, device = options.run
        print(json.dumps(RUNS[name](Path(folder), dtype == "bfloat16", device == "GPU")))
        return
    settings = [("float32", "CPU"), *([] if options.tiny else [("float32", "GPU"), ("bfloat16", "GPU")])]
    print("| adapter | device | dtype | losses |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        for adapter in RUNS:
            for dtype, device in settings:
                command = [sys.executable, __file__, "--run", adapter, name, dtype, device]
                hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "CPU" else {}
                run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hidden}, check=False)
                if run.returncode:
                    said = run.stderr.strip().splitlines()
                    print(f"failed: {adapter}, {device}, {dtype}: {said[-1] if said else run.returncode}", flush=True)
                    print(run.stderr[-3000:], file=sys.stderr)
                    continue
                losses = next(json.loads(line) for line in reversed(run.stdout.splitlines()) if line.startswith("["))
                shown = ", ".join(f"{loss:.4f}" for loss in losses)
                print(f"| {adapter} | {device} | {dtype} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
