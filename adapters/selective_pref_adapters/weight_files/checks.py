"""What can be known of a model from its files alone: that they are whole; for ZeRO-3 also that it has room in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from selective_pref_adapters.models import model_config, whole_model
from selective_pref_adapters.weight_files.checkpoint import Checkpoint, apart_from_training, safetensors_files
from selective_pref_adapters.weight_files.memory import room_for_weights


def check_weight_files(models: Mapping[str, str], dtype: torch.dtype | None, *, offloaded: bool = False) -> None:
    """Refuses causal language models that cannot be loaded in parts, or whose weights alone have no room.

    Nothing is loaded. Every process must call it where there are several.

    Args:
        models: what it is, for the message → folder or hub id.
        dtype: in which the weights are held; None for the one of the files.
        offloaded: whether they lie in the memory of the hosts although there are devices.

    Raises:
        ValueError: a model has no safetensors files, or they are incomplete, damaged, quantised, lack a weight or have
            another shape than its configuration says; or all of them are larger than all memory together.
    """
    check_room({what: in_parts(name) for what, name in models.items()}, dtype, offloaded=offloaded)


def in_parts(name: str, kind: Any = None, **options: Any) -> Checkpoint:
    """The files of a model that can be loaded in parts: safetensors, whole, and not quantised.

    Args:
        name: the folder or hub id.
        kind: the class of transformers that will load it; None for a causal language model.
        options: `revision` and `trust_remote_code`, as `from_pretrained` takes them.

    Raises:
        ValueError: it cannot.
    """
    if is_quantised(name, **options):
        raise ValueError(
            f"the weights of {name} are quantised, and ZeRO-3 cannot cut those: use zero_stage 2 or below, or a "
            "checkpoint that is not quantised"
        )
    checkpoint = Checkpoint.open(name, **options)
    checkpoint.check(kind)
    return checkpoint


def is_quantised(name: str, **options: Any) -> bool:
    """Whether the configuration of a model says that its files hold quantised weights."""
    return getattr(model_config(name, **options), "quantization_config", None) is not None


def check_room(models: Mapping[str, Checkpoint], dtype: torch.dtype | None, *, offloaded: bool) -> None:
    """Raises ValueError where the weights alone are larger than all memory together; arguments as above."""
    sizes = {f"{what} {checkpoint.name}": checkpoint.size(dtype) for what, checkpoint in models.items()}
    processes = dist.get_world_size() if dist.is_initialized() else 1
    room, where = room_for_weights(offloaded=offloaded)
    if sum(sizes.values()) / processes > room:
        held = "the dtype of the files" if dtype is None else str(dtype).removeprefix("torch.")
        listed = ", ".join(f"{size / 1e9:.4g} GB for {what}" for what, size in sizes.items())
        raise ValueError(
            f"the weights alone are larger than all memory together: {listed} in {held}, "
            f"over {processes} processes with {room / 1e9:.4g} GB each {where}. Use more processes on other machines, "
            "bfloat16, parameters that are offloaded, or a reference store instead of a reference model (it can be "
            "filled elsewhere, or from a server: selective-pref score)"
        )


def check_whole(name: str, kind: Any = None, **options: Any) -> None:
    """Refuses a model whose files are damaged or lack a weight, in whatever format; no values are kept.

    Args:
        name: the folder or hub id.
        kind: the class of transformers that will load it; None for a causal language model.
        options: `revision` and `trust_remote_code`, as `from_pretrained` takes them.

    Raises:
        ValueError: names the file or the weight. Of quantised weights only the configuration is looked at.
    """
    if is_quantised(name, **options):
        return
    if safetensors_files(name, revision=options.get("revision")):
        Checkpoint.open(name, **options).check(kind)
        return
    with apart_from_training():
        try:
            whole_model(kind or AutoModelForCausalLM, name, device_map="meta", **options)
        except Exception as error:  # a damaged file gives whatever error its reader has
            raise ValueError(f"cannot load the model of {name!r}: {error}") from error
