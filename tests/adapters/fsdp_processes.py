"""What `test_fsdp.py` runs: processes under FSDP2, and one without it that they are compared with.

    fsdp_processes.py POLICY REFERENCE FOLDER

It imports everything once and forks, as often as `WORLDS` says, processes that are started as `torchrun` starts them.
Each writes what it saw of each run into FOLDER/WORLD-RANK.json, and weights beside it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from selective_pref import NonFiniteError
from selective_pref_adapters import heads
from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
from selective_pref_adapters.pairs import preference_row, tokenize_pairs
from selective_pref_adapters.reference_store import ReferenceStore, StoreError
from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer
from tiny import make_mixture, text_rows

PATIENCE = 900  # seconds after which a process counts as hanging: on a busy machine every exchange waits its turn
POLICY, REFERENCE, FOLDER = (Path(argument) for argument in sys.argv[1:4])
MIXTURE = FOLDER / "mixture"  # whose layers are of another class than the reference's
ROWS = text_rows(48)
EVALUATED = ROWS[:5]  # on two processes with two each: the last batch is filled up with repeated pairs
LAYERS = Version(transformers.__version__) >= Version("5.10")  # are units of their own without being asked for
SHARDED: dict[str, Any] = {"fsdp": True if LAYERS else "full_shard auto_wrap", "fsdp_config": {"version": 2}}


def settings(name: str, **changed: Any) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    common: dict[str, Any] = {
        "output_dir": str(FOLDER / name),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 4 // world,
        "per_device_eval_batch_size": 4 // world,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "report_to": "none",
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }
    return {**common, **(SHARDED if "WORLD_SIZE" in os.environ else {}), **changed}


def trl(name: str, *, ref_model: Path | None = REFERENCE, peft_config: Any = None, **changed: Any) -> Any:
    rows = changed.pop("rows", ROWS)
    return SelectiveDPOTrainer(
        model=str(changed.pop("policy", POLICY)),
        ref_model=None if ref_model is None else str(ref_model),
        args=SelectiveDPOConfig(**settings(name, **changed)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(EVALUATED),
        processing_class=AutoTokenizer.from_pretrained(POLICY),
        peft_config=peft_config,
    )


def hf(name: str, *, store: ReferenceStore | None = None, adapter: bool = False, **changed: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    read = [preference_row(row, f"row {number}") for number, row in enumerate(ROWS)]
    pairs, _ = tokenize_pairs(read, tokenizer, max_length=64)
    args = TrainingArguments(**settings(name, **changed))
    model: Any = AutoModelForCausalLM.from_pretrained(POLICY)
    if adapter:
        model = get_peft_model(model, lora())
    reference = model if adapter else AutoModelForCausalLM.from_pretrained(REFERENCE)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=pairs,
        eval_dataset=pairs[:5],
        data_collator=PreferenceCollator(tokenizer, reference_store=store),
        compute_loss_func=SelectivePreferenceLoss(ref_model=None if store else reference),
    )
    SelectionCallback(picture_pairs=1).attach(trainer)
    return trainer


def lora() -> LoraConfig:
    torch.manual_seed(0)
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


# --- runs ------------------------------------------------------------------------------------------------------------


def seen_of(trainer: Any, folder: Path | None = None) -> dict[str, Any]:
    """What a trained trainer has logged, and how it holds its models; its weights go to a folder."""
    if folder is not None:
        trainer.save_model(str(folder))
    models = {"policy": trainer.model}
    if isinstance(trainer, SelectiveDPOTrainer):
        models |= {} if trainer.ref_model is None else {"reference": trainer.ref_model}
    else:
        models |= {str(key): ref.model for key, ref in trainer.compute_loss_func.references.items()}
    parts = {
        name: {isinstance(weight, DTensor) for key, weight in model.named_parameters() if ".layers." in key} == {True}
        for name, model in models.items()
    }
    units = {name: sum(type(m).__name__.startswith("FSDP") for m in model.modules()) for name, model in models.items()}
    return {"log": trainer.state.log_history, "sharded": parts, "units": units}


def run(trainer: Any, folder: Path | None = None) -> dict[str, Any]:
    trainer.train()
    trainer.evaluate()
    return seen_of(trainer, folder)


def evaluated_first() -> dict[str, Any]:
    trainer = trl("evaluated-first", picture_pairs=1)
    before = trainer.evaluate()["eval_loss"]
    return {"before": before, **run(trainer)}


def make_broken(folder: Path) -> None:
    """A reference that cannot read the last word."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE)
    with torch.no_grad():
        model.model.embed_tokens.weight[-1] = math.nan
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)


def broken_on_one_process() -> str:
    """The one row that the reference cannot read is in the share of one process; what this process raises."""
    rows = json.loads(json.dumps(ROWS).replace("w23", "w22"))
    rows[7]["chosen"] += " w23 w1"
    try:
        trl("broken", ref_model=FOLDER / "broken", rows=rows, reference_store=str(FOLDER / "broken-store"))
    except (NonFiniteError, StoreError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def count_shared() -> list[int]:
    """How many batches have shared their prompts so far, from now on."""
    shared, lay_out = [0], heads.lay_out

    def counted(*args: Any, **options: Any) -> Any:
        found = lay_out(*args, **options)
        shared[0] += found is not None
        return found

    heads.lay_out = counted
    return shared


def plain() -> dict[str, Any]:
    return {
        "trl": run(trl("plain"), FOLDER / "weights-plain"),
        "trl self": run(trl("self", ref_model=None)),
        "trl lora": run(trl("lora", ref_model=None, peft_config=lora()), FOLDER / "lora-plain"),
        "trl experts": run(trl("experts", policy=MIXTURE)),
        "hf": run(hf("hf"), FOLDER / "hf-weights-plain"),
    }


def alone() -> dict[str, Any]:
    """FSDP2 over one process."""
    stored = {"ref_model": REFERENCE, "reference_store": str(FOLDER / "store-alone")}
    return {
        "trl": run(trl("one")),
        "trl store": run(trl("one-store", **stored)),
        "trl experts": run(trl("one-experts", policy=MIXTURE)),
        "hf": run(hf("hf-one")),
    }


class KillsItself(TrainerCallback):
    """As `kill -9` of every process would, when the third step begins."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


SAVING = {"save_strategy": "steps", "save_steps": 1}
IN_PARTS = {"fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}


def resumable(door: str) -> Any:
    """A trainer with checkpoints: of whole weights, and, in the other door, of each process's part."""
    return trl("killed-trl", **SAVING) if door == "trl" else hf("killed-hf", **SAVING, **IN_PARTS)


def killed(door: str) -> None:
    trainer = resumable(door)
    trainer.add_callback(KillsItself())
    trainer.train()


def resumed(door: str) -> dict[str, Any]:
    trainer = resumable(door)
    trainer.train(resume_from_checkpoint=True)
    return seen_of(trainer, FOLDER / f"resumed-{door}")


def two() -> dict[str, Any]:
    """FSDP2 over two processes."""
    shared = count_shared()
    seen = {"trl": run(trl("two"), FOLDER / "weights-two")}
    seen["trl"]["shared"] = shared[0]
    stored, checkpoints = str(FOLDER / "store"), {"version": 2, "activation_checkpointing": True}
    seen |= {
        "trl store": run(trl("store", reference_store=stored)),
        "trl self": run(trl("self-two", ref_model=None)),
        "trl lora": run(trl("lora-two", ref_model=None, peft_config=lora()), FOLDER / "lora-two"),
        "trl bf16": run(trl("bf16-two", bf16=True)),
        "trl layers": run(trl("layers", gradient_checkpointing=False, fsdp_config=checkpoints, fused_head=False)),
        "trl evaluated first": evaluated_first(),
        "hf": run(hf("hf-two"), FOLDER / "hf-weights-two"),
        "hf store": run(hf("hf-store", store=ReferenceStore.open(stored))),
        "hf lora": run(hf("hf-lora", adapter=True)),
        "trl resumed": resumed("trl"),
        "hf resumed": resumed("hf"),
        "broken": broken_on_one_process(),
    }
    return seen


# --- processes -------------------------------------------------------------------------------------------------------


def processes(name: str, function: Callable[..., Any], *arguments: Any, world: int) -> list[Any]:
    """Starts processes that run a function as a launcher would start them; without a launcher where `world` is 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(max(world, 1)):
        process = context.Process(target=_as_rank, args=(name, rank, world, port, function, arguments))
        process.start()
        started.append(process)
    return started


def _as_rank(name: str, rank: int, world: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    if world:
        os.environ |= {name: str(value) for name, value in local.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (FOLDER / f"{name}-{rank}.json").write_text(json.dumps(function(*arguments)))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def ended(started: list[Any]) -> list[int]:
    """Exit codes; who still runs after PATIENCE is killed."""
    for process in started:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    make_broken(FOLDER / "broken")
    make_mixture(MIXTURE, seed=1)
    codes = {"plain and alone": ended([*processes("plain", plain, world=0), *processes("alone", alone, world=1)])}
    for door in ("trl", "hf"):
        codes[f"killed {door}"] = ended(processes(f"killed-{door}", killed, door, world=2))
    codes["two"] = ended(processes("two", two, world=2))
    (FOLDER / "codes.json").write_text(json.dumps(codes))
