"""One run in three trainers: the same pairs in the same order, so that their losses can be laid side by side.

`one_epoch` are the pairs as the DeepSpeed loop draws them; any trainer that takes them one after the other (sequential
sampling, one epoch) makes the loop's steps. `hf_trajectory` and `trl_trajectory` are that run in the plain Hugging Face
Trainer and in TRL's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selective_pref_adapters.deepspeed_loop.sampling import make_order, pair_length
from selective_pref_adapters.pairs import TokenizedPair, read_rows, tokenize_pairs

STEPS, BATCH, ACCUMULATION, RATE = 20, 2, 2, 1e-2
COMPARED = ("loss", "grad_norm", "rewards/margins", "selection/rewards/margins", "selection/fraction")


def one_epoch(pairs_file: Path, tokenizer: Any, seed: int = 0) -> list[TokenizedPair]:
    """`STEPS` steps' pairs of a file, in the loop's order for that seed."""
    pairs, _ = tokenize_pairs(read_rows(pairs_file), tokenizer, max_length=64)
    order = make_order([pair_length(pair) for pair in pairs], BATCH * ACCUMULATION, seed)
    return [pairs[index] for step in range(1, STEPS + 1) for index in order(step)]


def loop_trajectory(policy: Path, reference: Path, pairs_file: Path, output_dir: Path) -> list[dict[str, float]]:
    """The metrics of each step in the DeepSpeed loop."""
    from selective_pref_adapters.deepspeed_loop import TrainConfig, train

    config = TrainConfig(
        model=str(policy),
        ref_model=str(reference),
        pairs=str(pairs_file),
        output_dir=str(output_dir),
        batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=RATE,
        logging_steps=1,
        eval_fraction=0,
        max_length=64,
    )
    return [line for line in train(config).metrics if "loss" in line]


def hf_arguments(output_dir: Path) -> dict[str, Any]:
    """What `TrainingArguments` (or a `DPOConfig`) needs to make the loop's steps."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "bf16": False,
    }


def hf_trajectory(policy: Path, reference: Path, pairs_file: Path, output_dir: Path) -> list[dict[str, float]]:
    """The metrics of each step in the plain Hugging Face Trainer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss

    tokenizer = AutoTokenizer.from_pretrained(policy)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        args=TrainingArguments(**hf_arguments(output_dir)),
        train_dataset=one_epoch(pairs_file, tokenizer),
        data_collator=PreferenceCollator(tokenizer),
        compute_loss_func=SelectivePreferenceLoss(ref_model=AutoModelForCausalLM.from_pretrained(reference)),
        callbacks=[SelectionCallback()],
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def trl_trajectory(policy: Path, reference: Path, pairs_file: Path, output_dir: Path) -> list[dict[str, float]]:
    """The metrics of each step in the TRL adapter, which tokenizes the same rows itself."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = {row.place: row for row in read_rows(pairs_file)}
    ordered = [rows[pair.place] for pair in one_epoch(pairs_file, tokenizer)]
    columns = {name: [getattr(row, name) for row in ordered] for name in ("prompt", "chosen", "rejected")}
    trainer = SelectiveDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=SelectiveDPOConfig(**hf_arguments(output_dir), gradient_checkpointing=False, max_length=64),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]
