"""What each of two processes runs for `test_trl_trainer.py::test_two_processes`: one trainer after another.

    torchrun --nproc_per_node 2 trl_two_processes.py POLICY REFERENCE MIXTURE FOLDER

Writes FOLDER/runs.jsonl, a line [name, what was seen] for each run.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from selective_pref import NonFiniteError
from selective_pref_adapters import heads
from selective_pref_adapters.batch import REF_LOGPS, from_bits
from selective_pref_adapters.shared_prefix import layout
from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer
from tiny import text_rows, weighted

ROWS = text_rows(48)


def zero(stage: int, bf16: bool = False) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def make(
    policy: str, folder: Path, ref_model: Any = None, peft_config: Any = None, rows: Any = ROWS, **changed: Any
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = SelectiveDPOConfig(**{**settings, **changed})  # before any model: under ZeRO-3 it says how they are loaded
    if callable(ref_model):
        ref_model = ref_model()
    return SelectiveDPOTrainer(
        model=policy,
        ref_model=ref_model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(ROWS[:5]),
        processing_class=AutoTokenizer.from_pretrained(policy),
        peft_config=peft_config,
    )


def count_shared() -> list[int]:
    """How many batches have shared their prompts so far, from now on."""
    shared, lay_out = [0], heads.lay_out
    layout.CPU_ROW_TOKENS = 0  # a row for each prompt: in a single process they would be several calls

    def counted(*args: Any, **options: Any) -> Any:
        found = lay_out(*args, **options)
        shared[0] += found is not None
        return found

    heads.lay_out = counted
    return shared


def main(policy: str, reference: str, mixture: str, folder: Path) -> None:
    def note(name: str, seen: Any) -> None:
        if dist.get_rank() == 0:
            with (folder / "runs.jsonl").open("a") as file:
                file.write(json.dumps([name, seen]) + "\n")

    def broken() -> Any:
        """A reference whose weights are broken on the second process alone (DeepSpeed would send the first one's)."""
        model = AutoModelForCausalLM.from_pretrained(reference)
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.lm_head.weight[20] = math.nan
        return model

    shared = count_shared()
    trainer, error = make(policy, folder, ref_model=broken), ""
    try:
        trainer.train()
    except NonFiniteError as caught:
        error = str(caught)
    errors: list[Any] = [None, None]
    dist.all_gather_object(errors, error)
    note("nan", {"raised": [bool(text) for text in errors], "own": ["ref_per_token_logps" in text for text in errors]})

    store = str(folder / "store")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    runs: dict[str, dict[str, Any]] = {
        "ddp": {"ref_model": reference},
        "ddp checkpointing": {
            "ref_model": reference,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "store": {"ref_model": reference, "reference_store": store, "precompute_ref_log_probs": True},
        "zero2": {"ref_model": reference, "deepspeed": zero(2)},
        "zero3": {"ref_model": reference, "deepspeed": zero(3), "picture_pairs": 3},
        "zero3 store": {"reference_store": store, "deepspeed": zero(3)},
        "zero3 filled": {"ref_model": reference, "reference_store": str(folder / "filled"), "deepspeed": zero(3)},
        "zero3 resumed": {"ref_model": reference, "deepspeed": zero(3), "save_strategy": "steps", "save_steps": 2},
        "zero3 bf16": {"ref_model": reference, "deepspeed": zero(3, bf16=True), "bf16": True},
        "zero3 bf16 store": {"reference_store": store, "deepspeed": zero(3, bf16=True), "bf16": True},
        "zero3 self": {"deepspeed": zero(3)},
        "zero3 lora": {"peft_config": lora, "deepspeed": zero(3)},
        "weights": {"ref_model": reference, "rows": weighted(ROWS), "use_weighting": True},
        "experts": {"policy": mixture, "ref_model": reference, "router_aux_loss_coef": 0.5},
    }
    for name, changed in runs.items():
        before = shared[0]
        if name == "zero3":
            other_format = folder / f"other_format{dist.get_rank()}"
            AutoConfig.from_pretrained(reference).save_pretrained(other_format)  # and no safetensors
            with pytest.raises(ValueError, match=r"cannot be loaded in parts: expected model\.safetensors"):
                make(folder=folder, policy=policy, **{**changed, "ref_model": str(other_format)})
        trainer = make(folder=folder, **{"policy": policy, **changed})
        trainer.train()
        if name == "zero3 resumed":  # from the second of four steps, with weights and optimiser in DeepSpeed's parts
            trainer = make(folder=folder, policy=policy, **changed)
            trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
        sharded = any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())
        steps = [line for line in trainer.state.log_history if "loss" in line]
        every_rank: list[Any] = [None, None]
        dist.all_gather_object(every_rank, steps)
        assert every_rank[0] == every_rank[1], "ranks log different numbers"
        trainer.evaluate()  # 5 pairs on two processes with 4 each: the last batch is filled up with 3 repeated ones
        seen = {"steps": steps, "sharded": sharded, "shared": shared[0] - before, "eval": trainer.state.log_history[-1]}
        if changed.get("picture_pairs") and dist.get_rank() == 0:  # which has written them
            drawn = json.loads((folder / "out" / "selection" / "step-000004.json").read_text())["pairs"]
            seen["kept"] = [[sum(pair[side]["weights"]) for side in ("chosen", "rejected")] for pair in drawn]
        if "store" in name:  # what the collator looked up reaches the loss bit by bit, whatever the engine casts
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
            looked_up = trainer.reference.source().store.lookup(batch)
            prepared = trainer._prepare_inputs(batch)
            seen["bits"] = torch.equal(from_bits(prepared[REF_LOGPS]), looked_up)
        note(name, seen)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute otherwise
    deepspeed.init_distributed("gloo", verbose=False)
    main(*sys.argv[1:4], Path(sys.argv[4]))
