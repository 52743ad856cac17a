"""What can be known of models that ZeRO-3 cuts, from their files alone: that they can be loaded so, and have room."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from selective_pref_adapters.weight_files.checkpoint import Checkpoint
from selective_pref_adapters.weight_files.memory import room_for_weights


def check_weight_files(
    models: Mapping[str, str], dtype: torch.dtype | None, *, offloaded: bool = False, shapes: bool = True
) -> None:
    """Refuses models that cannot be loaded in parts, or whose weights alone have no room; nothing is loaded.

    Every process must call it where there are several.

    Args:
        models: what it is, for the message → folder or hub id.
        dtype: in which the weights are held; None for the one of the files.
        offloaded: whether they lie in the memory of the hosts although there are devices.
        shapes: compare the shapes in the files with those of a causal language model of that configuration.

    Raises:
        ValueError: a model has no safetensors files, or they are incomplete, damaged, quantised or of another shape
            than its configuration says; or all of them are larger than all memory together.
    """
    sizes: dict[str, int] = {}
    for what, name in models.items():
        checkpoint = Checkpoint.open(name)
        if shapes:
            checkpoint.shell()
        sizes[f"{what} {name}"] = checkpoint.size(dtype)
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
