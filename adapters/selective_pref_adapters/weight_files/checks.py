"""What can be known of a model from its files alone: that they are whole; for ZeRO-3 also that it has room in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from selective_pref_adapters.models import model_config, whole_model
from selective_pref_adapters.weight_files.checkpoint import Checkpoint, apart_from_training, safetensors_files
from selective_pref_adapters.weight_files.memory import memory_of_machine, room_for_weights


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
    loaded, _ = checkpoint.check(kind)
    if untied := checkpoint.untied(loaded):
        raise ValueError(untied)
    return checkpoint


def is_quantised(name: str, **options: Any) -> bool:
    """Whether the configuration of a model says that its files hold quantised weights."""
    return getattr(model_config(name, **options), "quantization_config", None) is not None


def check_room(models: Mapping[str, Checkpoint], dtype: torch.dtype | None, *, offloaded: bool) -> None:
    """Raises ValueError where the weights alone are larger than the memory of all processes together.

    Every process must call it where there are several. For the arguments see `check_weight_files`.
    """
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


def check_whole_models(models: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Refuses causal language models that `check_whole` refuses, or that no memory of this machine holds.

    Args:
        models: what it is, for the message → folder or hub id.
        dtype: in which the weights are held; None for the one of the files.

    Raises:
        ValueError: names the model.
    """
    check_fits({what: check_whole(name) for what, name in models.items()}, dtype)


def check_fits(models: Mapping[str, Checkpoint | None], dtype: torch.dtype | None) -> None:
    """Raises ValueError where models that are loaded whole are larger than all memory of this machine together."""
    sizes = {f"{what} {files.name}": files.size(dtype) for what, files in models.items() if files is not None}
    if sum(sizes.values()) > (memory := memory_of_machine()):
        listed = ", ".join(f"{size / 1e9:.4g} GB for {what}" for what, size in sizes.items())
        raise ValueError(
            f"the weights alone are larger than all memory of this machine, {memory / 1e9:.4g} GB with its devices: "
            f"{listed}, and each process loads them whole. Cut them over processes on several machines (ZeRO-3), or "
            "use a reference store that is filled elsewhere, or from a server (selective-pref score --url)"
        )


def check_whole(name: str, kind: Any = None, **options: Any) -> Checkpoint | None:
    """Refuses a model whose files are damaged or lack a weight, in whatever format; no values are kept.

    Args:
        name: the folder or hub id.
        kind: the class of transformers that will load it; None for a causal language model.
        options: `revision` and `trust_remote_code`, as `from_pretrained` takes them.

    Returns:
        Its files, where they are safetensors that are not quantised.

    Raises:
        ValueError: names the file or the weight. Of quantised weights only the configuration is looked at.
    """
    if is_quantised(name, **options):
        return None
    if safetensors_files(name, revision=options.get("revision")):
        checkpoint = Checkpoint.open(name, **options)
        checkpoint.check(kind)
        return checkpoint
    with apart_from_training():
        try:
            whole_model(kind or AutoModelForCausalLM, name, device_map="meta", **options)
        except Exception as error:  # a damaged file gives whatever error its reader has
            why = "the folder is incomplete, or a file in it is damaged"
            raise ValueError(f"cannot load the model of {name!r} ({why}): {' '.join(str(error).split())}") from error
    return None
