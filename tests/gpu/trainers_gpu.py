"""The three adapters on a GPU, beside the same runs on the CPU: losses of a few steps, float32 and bf16; and sharded.

    python tests/gpu/trainers_gpu.py [--tiny] [--only ADAPTER ...]

A small Llama with random weights learns from made-up pairs beside another one as reference, with Selective-DPO. Each
run is a process of its own; those on the CPU do not see the GPU. The losses of float32 must agree; those of bf16 come
near. (The loop shuffles otherwise than the Trainers do.) Under ZeRO-3 and FSDP2 the one process holds all shards, but
weights are gathered and gradients scattered as on many. `--tiny` runs the CPU alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapters"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
STEPS, PAIRS, RATE = 6, 4, 1e-3


def make_files(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

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
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    torch.manual_seed(2)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "initializer_range": 0.05}
    mixture = MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **{**SHAPE, **experts}))
    mixture.save_pretrained(folder / "mixture")
    tokenizer.save_pretrained(folder / "mixture")


def with_trl(folder: Path, bf16: bool, gpu: bool, policy: str = "policy", **sharded: Any) -> list[float]:
    from datasets import Dataset
    from transformers import AutoTokenizer

    from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer

    trainer = SelectiveDPOTrainer(
        model=str(folder / policy),
        ref_model=str(folder / "reference"),
        args=SelectiveDPOConfig(selection_ratio=0.4, max_length=256, **arguments(folder, bf16, gpu, 0.1), **sharded),
        train_dataset=Dataset.from_list([json.loads(line) for line in (folder / "rows.jsonl").open()]),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )
    trainer.train()
    return losses_of(trainer)


def with_hf(folder: Path, bf16: bool, gpu: bool, **sharded: Any) -> list[float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
    from selective_pref_adapters.pairs import read_rows, tokenize_pairs

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    pairs, _ = tokenize_pairs(read_rows(folder / "rows.jsonl"), tokenizer, max_length=256)
    # Made before the models, which are then born sharded under ZeRO-3.
    args = TrainingArguments(remove_unused_columns=False, **arguments(folder, bf16, gpu), **sharded)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        args=args,
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


ZERO_3: dict[str, Any] = {
    "deepspeed": {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
    }
}
FSDP2: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
RUNS: dict[str, Callable[[Path, bool, bool], list[float]]] = {
    "TRL": with_trl,
    "TRL, ZeRO-3": partial(with_trl, **ZERO_3),
    "TRL, FSDP2": partial(with_trl, **FSDP2),
    "TRL with experts": partial(with_trl, policy="mixture"),
    "TRL with experts, FSDP2": partial(with_trl, policy="mixture", **FSDP2),
    "HF Trainer": with_hf,
    "HF Trainer, ZeRO-3": partial(with_hf, **ZERO_3),
    "HF Trainer, FSDP2": partial(with_hf, **FSDP2),
    "loop, ZeRO-3": with_the_loop,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, folder, dtype, device = options.run
        print(json.dumps(RUNS[name](Path(folder), dtype == "bfloat16", device == "GPU")))
        return
    settings = [("float32", "CPU"), *([] if options.tiny else [("float32", "GPU"), ("bfloat16", "GPU")])]
    print("| adapter | device | dtype | losses |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 3)) as at_once:
        folder = Path(name)
        make_files(folder)
        cases = [(adapter, dtype, device) for adapter in options.only for dtype, device in settings]
        runs = at_once.map(lambda case: in_a_process(name, cases.index(case), *case), cases)
        for case, run in zip(cases, runs, strict=True):
            adapter, dtype, device = case
            if run.returncode:
                said = run.stderr.strip().splitlines()
                print(f"failed: {adapter}, {device}, {dtype}: {said[-1] if said else run.returncode}", flush=True)
                print(run.stderr[-3000:], file=sys.stderr)
                continue
            losses = next(json.loads(line) for line in reversed(run.stdout.splitlines()) if line.startswith("["))
            shown = ", ".join(f"{loss:.4f}" for loss in losses)
            print(f"| {adapter} | {device} | {dtype} | {shown} |", flush=True)


def in_a_process(folder: str, number: int, adapter: str, dtype: str, device: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "CPU" else {})}
    if "," in adapter:
        env |= {**ALONE, "MASTER_PORT": str(29_600 + number)}
    command = [sys.executable, __file__, "--run", adapter, folder, dtype, device]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


if __name__ == "__main__":
    main()
