"""Peak memory of the training job under ZeRO-3: policy and reference, several processes, one step and the export.

    python tests/benchmarks/bench_sharded_loading.py [--processes 2] [--layers 8] [--door train|dpo|hf]

`--door dpo` is TRL's trainer (`selective-pref dpo`) in place of the loop (`selective-pref train`), `--door hf` a script
with the HF Trainer, which saves the model at the end, too.

Llamas of about 420 MiB in float32 with random weights are made on the spot. What tiny models take in the same job is
subtracted, and the rest is given in multiples of a model's size, for the process that takes the most. Two readings:

resident    the largest resident set (`VmHWM`), with the pages of mapped files, which others share and the system
            takes back when it needs them
private     the largest amount of anonymous memory (`RssAnon`, read every 5 ms), which nothing but this process can free
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapters"))
MIB = 2**20


def prepare(folder: Path, layers: int) -> float:
    """Models and pairs; the size of a large model in MiB."""
    from tiny import WORDS, make_model, write_jsonl

    words = [f"w{number}" for number in range(4090)]
    large = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "initializer_range": 0.02}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    for seed, name in enumerate(("policy", "reference")):
        make_model(folder / "large" / name, seed, words, **large, **heads)
        make_model(folder / "tiny" / name, seed, words)
    pick = random.Random(0)

    def text(count: int) -> str:
        return " ".join(pick.choices(WORDS, k=count))

    rows = [{"prompt": text(4) + " ", "chosen": text(8), "rejected": text(8)} for _ in range(8)]
    write_jsonl(folder / "pairs.jsonl", rows)
    return (folder / "large" / "policy" / "model.safetensors").stat().st_size / MIB


def job(folder: str, models: str, options: list[str]) -> None:
    """What each process runs."""
    from selective_pref_adapters.cli import main

    models_of = Path(folder) / models
    if options[0] == "hf":
        hf_script(Path(folder), models_of)
        return finish(0)
    if options[0] == "dpo":
        return finish(main(["dpo", *dpo_flags(Path(folder), models_of), *options[1:]]))
    flags = ["--model", f"{models_of / 'policy'}", "--ref-model", f"{models_of / 'reference'}"]
    flags += ["--pairs", f"{folder}/pairs.jsonl", "--output-dir", f"{folder}/run-{models}"]
    flags += ["--eval-fraction", "0", "--max-steps", "1", "--batch-size", "1", "--zero-stage", "3"]
    return finish(main(["train", *flags, *options[1:]]))


def hf_script(folder: Path, models: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
    from selective_pref_adapters.pairs import read_rows, tokenize_pairs

    args = TrainingArguments(
        output_dir=str(folder / f"hf-{models.name}"),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        deepspeed=zero_settings(stage3_gather_16bit_weights_on_model_save=True),
    )
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in ("policy", "reference")
    )
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    pairs, _ = tokenize_pairs(read_rows(folder / "pairs.jsonl"), tokenizer, max_length=64)
    trainer = Trainer(
        model=policy,
        args=args,
        train_dataset=pairs,
        data_collator=PreferenceCollator(tokenizer),
        compute_loss_func=SelectivePreferenceLoss(ref_model=reference),
        processing_class=tokenizer,
    )
    SelectionCallback().attach(trainer)
    trainer.train()
    trainer.save_model()


def zero_settings(**more: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 20_000_000,  # as in the loop
            **dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto"),
            **more,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def dpo_flags(folder: Path, models: Path) -> list[str]:
    (folder / f"zero-{os.environ['RANK']}.json").write_text(json.dumps(zero_settings()))
    flags = ["--model_name_or_path", f"{models / 'policy'}", "--ref_model_name_or_path", f"{models / 'reference'}"]
    flags += ["--dataset_name", f"{folder}/pairs.jsonl", "--output_dir", f"{folder}/dpo-{models.name}"]
    flags += ["--use_cpu", "--bf16", "false", "--max_steps", "1", "--per_device_train_batch_size", "1"]
    flags += ["--dtype", "float32", "--gradient_checkpointing", "false", "--save_strategy", "no", "--report_to", "none"]
    return [*flags, "--deepspeed", f"{folder}/zero-{os.environ['RANK']}.json"]


def finish(status: int) -> None:
    """Ends this process, or says how much memory it took; `ru_maxrss` would begin with that of the parent."""
    if status:
        sys.exit(status)
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(f"peak {int(peak) / 1024}", flush=True)


def peaks(folder: Path, models: str, processes: int, options: list[str]) -> tuple[float, float]:
    """(resident, private) MiB of the process that took the most of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--job", str(folder), models, *options]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=(folder / f"errors-{rank}").open("w"),
            text=True,
        )
        for rank in range(processes)
    ]
    private = 0.0
    while any(process.poll() is None for process in started):
        for process in started:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                continue
            found = re.search(r"RssAnon:\s+(\d+)", status)
            private = max(private, int(found[1]) / 1024 if found else 0.0)
        time.sleep(0.005)
    resident = 0.0
    for rank, process in enumerate(started):
        printed = process.stdout.read() if process.stdout else ""
        found = re.search(r"^peak ([\d.]+)", printed, re.MULTILINE)
        if not found:
            raise SystemExit((folder / f"errors-{rank}").read_text()[-3000:])
        resident = max(resident, float(found[1]))
    return resident, private


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--door", choices=["train", "dpo", "hf"], default="train")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options, further = parser.parse_known_args()
    if options.job:
        return job(*options.job[:2], [*options.job[2:], *further])
    further = [options.door, *further]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = prepare(folder, options.layers)
        tiny = peaks(folder, "tiny", options.processes, further)
        large = peaks(folder, "large", options.processes, further)
        print(
            f"{options.processes} processes, policy and reference of {size:.0f} MiB each, ZeRO-3, float32, one step\n"
        )
        print("\n| memory of the largest process | tiny models, MiB | these, MiB | less tiny, in models |")
        print("|---|---|---|---|")
        for what, small, big in zip(("resident", "private"), tiny, large, strict=True):
            print(f"| {what} | {small:.0f} | {big:.0f} | {(big - small) / size:.2f} |")


if __name__ == "__main__":
    main()
