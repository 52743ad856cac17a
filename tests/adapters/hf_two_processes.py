"""What `test_hf_trainer.py` launches: trains in several ways and writes down what was logged.

Arguments: folders of policy and reference, a file of pairs, a folder for `rank0.json` and `rank1.json`. One process
alone trains under ZeRO-3 only.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from selective_pref import NonFiniteError
from selective_pref_adapters.batch import REF_LOGPS
from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
from selective_pref_adapters.pairs import read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space

faulthandler.dump_traceback_later(150, exit=True)  # one process that waits for the other for ever says where
POLICY, REFERENCE, PAIRS, OUT = (Path(argument) for argument in sys.argv[1:5])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TOKENIZER = AutoTokenizer.from_pretrained(POLICY)
ROWS = tokenize_pairs(read_rows(PAIRS), TOKENIZER, max_length=64)[0]


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def build(name: str, loss: SelectivePreferenceLoss, model: Any = None, collator: Any = None, **options: Any) -> Trainer:
    settings = {
        "output_dir": str(OUT / name),
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 4 // WORLD,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "train_sampling_strategy": "sequential",
    }
    return Trainer(
        args=TrainingArguments(**{**settings, **options}),
        model=model or model_of(POLICY),
        train_dataset=ROWS[:24],
        eval_dataset=ROWS[24:31],  # 7 pairs: 2 × 2, then 2 + 1 and one that is repeated
        data_collator=collator or PreferenceCollator(TOKENIZER),
        compute_loss_func=loss,
        callbacks=[SelectionCallback(picture_pairs=1)],
    )


def lines(trainer: Trainer, key: str) -> list[dict[str, float]]:
    found = [line for line in trainer.state.log_history if key in line]
    return [{n: v for n, v in line.items() if not any(w in n for w in ("runtime", "per_second"))} for line in found]


def both(trainer: Trainer) -> dict[str, Any]:
    return {"train": lines(trainer, "loss"), "eval": lines(trainer, "eval_loss")}


def ddp() -> dict[str, Any]:
    trainer = build("ddp", SelectivePreferenceLoss(ref_model=model_of(REFERENCE)))
    trainer.train()
    return both(trainer)


def one_broken_number(stored: ReferenceStore) -> str:
    """NaN among the reference log-probs of the second process's first batch: both processes must stop."""

    class Broken(PreferenceCollator):
        def __call__(self, rows: Any) -> dict[str, Any]:
            batch = super().__call__(rows)
            if ROWS[2] in rows:
                batch["labels"][REF_LOGPS].view(torch.float32)[0] = math.nan
            return batch

    trainer = build("nan", SelectivePreferenceLoss(), collator=Broken(TOKENIZER, reference_store=stored))
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error)
    return "it went on"


def store() -> ReferenceStore:
    reference = model_of(REFERENCE)
    made = ReferenceStore.create(OUT / "store", reference_space(reference, TOKENIZER))
    fill_store(made, ROWS, reference, pad_token_id=0, progress=False)  # the processes share the work
    return made


def zero3(dtype: str, **options: Any) -> dict[str, Any]:
    """Options that put the Trainer into DeepSpeed's ZeRO-3, really sharding the tiny model."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"deepspeed": config, "bf16": dtype == "bf16", **options}


def zero3_online() -> dict[str, Any]:
    """A reference that was loaded whole; then one that ZeRO-3 sharded while it was loaded, as the policy is."""
    whole = build("zero3", SelectivePreferenceLoss(ref_model=model_of(REFERENCE)), **zero3("fp32"))
    sharded = build("zero3", SelectivePreferenceLoss(ref_model=model_of(REFERENCE)), **zero3("fp32"))
    for trainer in (whole, sharded):
        trainer.train()
    assert both(whole) == both(sharded)
    return both(whole)


def zero3_stored(stored: ReferenceStore) -> dict[str, Any]:
    collator = PreferenceCollator(TOKENIZER, reference_store=stored)
    trainer = build("zero3-stored", SelectivePreferenceLoss(), collator=collator, **zero3("fp32"))
    trainer.train()
    return both(trainer)


def zero3_bf16(stored: ReferenceStore) -> dict[str, Any]:
    """Stored log-probs keep their float32 bits; a resumed run logs what the whole one does and loads its best model."""
    seen: list[bool] = []

    class Watched(SelectivePreferenceLoss):
        def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            seen.append(torch.equal(labels[REF_LOGPS].view(torch.float32), stored.lookup(labels)))
            return super().__call__(outputs, labels, num_items_in_batch)

    options = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "eval_rewards/margins", "greater_is_better": True}

    def start() -> Trainer:
        collator = PreferenceCollator(TOKENIZER, reference_store=stored)
        return build("bf16", Watched(), collator=collator, **zero3("bf16", **options))

    whole, resumed = start(), start()
    whole.train()
    resumed.train(resume_from_checkpoint=str(OUT / "bf16" / "checkpoint-1"))
    return {"bits": bool(seen) and all(seen), "whole": both(whole), "resumed": both(resumed)}


def zero3_lora() -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model_of(POLICY), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    trainer = build("lora", SelectivePreferenceLoss(ref_model=model), model=model, **zero3("fp32"))
    trainer.train()
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SelectionCallback)]
    return {"kinds": [warning["kind"] for warning in callback.warnings], **both(trainer)}


results: dict[str, Any] = {"ddp": ddp()} if WORLD > 1 else {}
stored = store()  # before a ZeRO-3 configuration is alive: models that are loaded then are sharded
if WORLD > 1:
    results["nan"] = one_broken_number(stored)
results |= {"zero3": zero3_online(), "zero3_stored": zero3_stored(stored)}
if WORLD > 1:
    results |= {"zero3_bf16": zero3_bf16(stored), "zero3_lora": zero3_lora()}
(OUT / f"rank{RANK}.json").write_text(json.dumps(results))
dist.destroy_process_group()
