"""The trained weights → a folder that `from_pretrained` reads, file after file: no process holds all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from selective_pref_adapters.deepspeed_loop.engine import lora
from selective_pref_adapters.monitoring import anywhere
from selective_pref_adapters.sharded import whole, whole_shape

FILE_SIZE = 2 << 30
"""Bytes of one file of weights, unless a single one is larger."""


def save_model(engine: Any, tokenizer: Any, output_dir: Path) -> None:
    """Weights (of LoRA the adapters'), configuration and tokenizer into `output_dir`, written aside first: no half is
    ever there.

    Raises:
        OSError: on every process, where the first one could not write. If transformers refused to save the model for
            another reason than the disk, its weights are in `rescued.safetensors` (or several such files).
    """
    first, model, aside = dist.get_rank() == 0, engine.module, output_dir / ".saving"
    failure: Exception | None = None
    if first:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed here
        aside.mkdir(parents=True)
    adapted = hasattr(model, "peft_config")
    tensors = lora.trained(model) if adapted else _savable(model)
    plan = {lora.WEIGHTS: list(tensors)} if adapted else files_of(model)
    placed: dict[str, str] = {}
    for file, names in plan.items():  # every process takes part in each, whatever became of the ones before
        part: dict[str, Tensor] = {}
        for name in names:
            with whole(tensors[name]) as tensor:
                if first and failure is None:
                    part[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        if first and failure is None:
            try:
                part = lora.saved_names(model, part) if adapted else revert_weight_conversion(model, part)
                save_file(part, aside / file, metadata={"format": "pt"})
                placed |= dict.fromkeys(part, file)
            except (OSError, SafetensorError) as error:
                failure = error
    if first and failure is None:
        failure = _finish(model, tokenizer, aside, output_dir, placed)
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    if anywhere(failure is not None, engine.device):
        raise OSError(f"the trained model could not be written to {output_dir}: {failure or 'see the first process'}")


def _finish(model: Any, tokenizer: Any, aside: Path, output_dir: Path, placed: dict[str, str]) -> Exception | None:
    """Everything but the weights, then all of it under its own name; what went wrong, if anything."""
    files = sorted(set(placed.values()))
    try:
        rest = aside / "rest"
        model.save_pretrained(rest, state_dict={})
        for empty in rest.glob("*.safetensors"):
            empty.unlink()
        tokenizer.save_pretrained(rest)
        if len(files) > 1:
            index = {"metadata": {"total_size": sum((aside / f).stat().st_size for f in files)}, "weight_map": placed}
            (rest / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
        for file in files:
            (aside / file).replace(output_dir / file)
        for file in sorted(rest.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(output_dir / file.name)
    except OSError as error:
        return error
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        rescued = [file.replace("model", "rescued") for file in files]
        for file, name in zip(files, rescued, strict=True):
            (aside / file).replace(output_dir / name)
        return ValueError(f"{' '.join(str(error).split())} Its weights are in {', '.join(rescued)} there")
    return None


def files_of(model: nn.Module) -> dict[str, list[str]]:
    """File → names of the model's tensors in it.

    Some models (mixtures of experts) are saved under other names than they have. Where a conversion needs weights of
    several files, all weights go into one.
    """
    shapes = {name: _outline(tensor) for name, tensor in _savable(model).items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=FILE_SIZE)
    parts = split.filename_to_tensors
    apart = [name for names in parts.values() for name in _saved_names(model, {n: shapes[n] for n in names})]
    return parts if sorted(apart) == sorted(_saved_names(model, shapes)) else {"model.safetensors": list(shapes)}


def _saved_names(model: Any, shapes: dict[str, Tensor]) -> list[str]:
    try:
        return list(revert_weight_conversion(model, shapes))
    except (RuntimeError, ValueError, KeyError):
        return []


def _savable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once however often it is used, and the buffers that are saved, by name."""
    parameters = dict(model.named_parameters())
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in shared and isinstance(t, Tensor)}
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {name: tensor for name, tensor in {**parameters, **buffers}.items() if name not in left_out}


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
