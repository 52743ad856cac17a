"""A run whose reference is the policy's own start: every token tied, no pair won, loss log 2, through every door.

Policy and reference are asked by the same call with the same shapes, so equal weights give equal bits; a store's
log-probs come from batches of other shapes, and what rounding makes of that counts as a tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, Trainer, TrainingArguments

from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
from selective_pref_adapters.pairs import read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space
from tiny import WORDS, make_tokenizer, text_rows

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
OFFLINE: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
ONE_STEP: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8, **OFFLINE}


@pytest.fixture
def store(tmp_path: Path, policy_folder: Path, pairs_file: Path) -> Path:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy_folder), AutoTokenizer.from_pretrained(policy_folder)
    pairs, _ = tokenize_pairs(read_rows(pairs_file), tokenizer, max_length=64)
    space = reference_space(model, tokenizer)
    fill_store(ReferenceStore.create(tmp_path / "store", space), pairs, model, pad_token_id=0, progress=False)
    return tmp_path / "store"


@pytest.mark.parametrize("way", ["model", "store"])
def test_in_the_loop(way: str, tmp_path: Path, policy_folder: Path, pairs_file: Path, store: Path) -> None:
    from selective_pref_adapters.deepspeed_loop import TrainConfig, train

    source = {"ref_model": str(policy_folder)} if way == "model" else {"reference_store": str(store)}
    config = TrainConfig(
        model=str(policy_folder), pairs=str(pairs_file), output_dir=str(tmp_path / "run"), max_steps=1, **source
    )
    result = train(config)
    assert_tied(result.summary["before"], "eval_")
    assert_tied(next(line for line in result.metrics if "loss" in line))


@pytest.mark.parametrize("way", ["model", "adapter off", "store"])
def test_in_the_plain_trainer(way: str, tmp_path: Path, policy_folder: Path, pairs_file: Path, store: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_folder)
    policy = get_peft_model(policy, LORA) if way == "adapter off" else policy
    copy = AutoModelForCausalLM.from_pretrained(policy_folder)
    reference = {"model": {"ref_model": copy}, "adapter off": {"ref_model": policy}, "store": {}}[way]
    stored = {"reference_store": ReferenceStore.open(store)} if way == "store" else {}
    trainer = Trainer(
        model=policy,
        args=TrainingArguments(output_dir=str(tmp_path / "run"), remove_unused_columns=False, **ONE_STEP),
        train_dataset=tokenize_pairs(read_rows(pairs_file), tokenizer, max_length=64)[0],
        data_collator=PreferenceCollator(tokenizer, **stored),
        compute_loss_func=SelectivePreferenceLoss(**reference),
        callbacks=[SelectionCallback()],
    )
    trainer.train()
    assert_tied(trainer.state.log_history[0])


@pytest.mark.parametrize("way", ["model", "adapter off"])
def test_in_the_plain_trainer_under_autocast(way: str, tmp_path: Path, policy_folder: Path, pairs_file: Path) -> None:
    """The Trainer calls its model in autocast; a reference that is called otherwise differs by bfloat16's rounding."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_folder, dtype="float32")
    policy = get_peft_model(policy, LORA) if way == "adapter off" else policy
    copy = AutoModelForCausalLM.from_pretrained(policy_folder, dtype="float32")
    pairs = tokenize_pairs(read_rows(pairs_file), tokenizer, max_length=64)[0]
    options: dict[str, Any] = {"remove_unused_columns": False, "bf16": True, "eval_on_start": True, **ONE_STEP}
    trainer = Trainer(
        model=policy,
        args=TrainingArguments(str(tmp_path / "run"), eval_strategy="steps", gradient_checkpointing=True, **options),
        train_dataset=pairs[:24],
        eval_dataset=pairs[24:],
        data_collator=PreferenceCollator(tokenizer),
        compute_loss_func=SelectivePreferenceLoss(ref_model=policy if way == "adapter off" else copy),
        callbacks=[SelectionCallback()],
    )
    trainer.train()
    evaluated, trained = trainer.state.log_history[:2]
    assert_tied(evaluated, "eval_")
    assert_tied(trained)


@pytest.mark.parametrize("way", ["model", "adapter off", "precomputed"])
def test_in_trl(way: str, tmp_path: Path, policy_folder: Path, make_trl: Callable[..., Any]) -> None:
    options: dict[str, Any] = {"peft_config": LORA} if way == "adapter off" else {}
    precomputed = {"precompute_ref_log_probs": True, "reference_store": str(tmp_path / "trl_store")}
    trainer = make_trl(tmp_path / "run", policy_folder, options, precomputed if way == "precomputed" else {})
    trainer.train()
    assert_tied(trainer.state.log_history[0])


def test_in_trl_without_the_dropout_that_is_no_module(tmp_path: Path, make_trl: Callable[..., Any]) -> None:
    """OPT keeps its rates as numbers, which TRL's `disable_dropout` does not reach."""
    words = make_tokenizer(WORDS)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=len(words), num_hidden_layers=1, max_position_embeddings=64, dropout=0.5, **sizes)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    words.save_pretrained(tmp_path / "opt")
    trainer = make_trl(tmp_path / "run", tmp_path / "opt", {}, {})
    trainer.train()
    assert_tied(trainer.state.log_history[0])


@pytest.fixture(scope="module")
def make_trl() -> Callable[..., Any]:
    from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer

    def make(out: Path, policy: Path, options: dict[str, Any], more: dict[str, Any]) -> Any:
        return SelectiveDPOTrainer(
            model=str(policy),
            args=SelectiveDPOConfig(str(out), bf16=False, max_length=64, **ONE_STEP, **more),
            train_dataset=Dataset.from_list(text_rows(24)),
            processing_class=AutoTokenizer.from_pretrained(policy),
            **options,
        )

    return make


def assert_tied(numbers: dict[str, float], prefix: str = "") -> None:
    """Exactly: ties share their budget, and a tie is not a win."""
    assert numbers[f"{prefix}selection/tied_fraction"] == 1
    assert numbers[f"{prefix}selection/threshold"] == 0
    for name in ("accuracies", "margins", "chosen", "rejected"):
        assert numbers[f"{prefix}rewards/{name}"] == 0
        assert numbers[f"{prefix}selection/rewards/{name}"] == 0
    assert numbers[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-4)
