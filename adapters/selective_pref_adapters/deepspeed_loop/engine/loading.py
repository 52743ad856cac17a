"""Model folders → models in this process, or this process's part of them (ZeRO-3).

In: the folder or hub id of a causal LM. Out: the model. Under ZeRO-3 each parameter is cut when it is made, and filled
from the safetensors files one tensor after another: a process holds its part, the largest layer, and what it has read
of one file. What cannot be loaded so is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from selective_pref_adapters.deepspeed_loop.engine.engine import shared_settings
from selective_pref_adapters.models import load_model
from selective_pref_adapters.monitoring import anywhere
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.weight_files import Checkpoint, check_weight_files, check_whole_models


def load(config: TrainConfig, name: str) -> nn.Module:
    """The model of a folder or hub id, whole; under ZeRO-3 this process's part of it, and every process must call it.

    Raises:
        ValueError: there is no such model, or it cannot be loaded so; on every process.
    """
    if config.zero_stage < 3:
        return load_model(name, dtype=config.dtype)
    return load_model(name, dtype=config.dtype, loader=partial(_from_parts, config))


@contextmanager
def born_sharded(config: TrainConfig) -> Iterator[None]:
    """Inside, transformers and PEFT know of ZeRO-3: models are cut while they are made."""
    settings = HfDeepSpeedConfig(shared_settings(config))  # transformers keeps a weak reference, so it must live on
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del settings


def _from_parts(config: TrainConfig, name: str, *, dtype: torch.dtype) -> nn.Module:
    checkpoint = Checkpoint.open(name)
    kind, settings = checkpoint.check()
    tensors = checkpoint.tensors(values=dist.get_rank() == 0)
    failure, model = None, None
    try:
        with born_sharded(config):
            model = kind.from_pretrained(None, config=settings, state_dict=tensors, dtype=dtype)
    except Exception as error:  # of the first process, which alone reads values; the others must hear of it
        failure = error
    if anywhere(failure is not None, torch.device(deepspeed.get_accelerator().current_device_name())) or model is None:
        raise ValueError(f"{failure or 'see the message of the first process'}")
    model.name_or_path = model.config._name_or_path = name
    with suppress(OSError):  # none is there: what transformers made of the configuration stays
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model


def check_models(config: TrainConfig, names: Mapping[str, str | None]) -> None:
    """What can be known of models before any is loaded: that they are there, can be loaded, and have room.

    Args:
        config: of the run.
        names: what it is, for the message → folder or hub id; None for what is not used.

    Raises:
        ValueError: on every process.
    """
    used = {what: name for what, name in names.items() if name is not None}
    if config.zero_stage == 3:
        check_weight_files(used, getattr(torch, config.dtype), offloaded=config.offload_parameters)
        return
    check_whole_models(used, getattr(torch, config.dtype))
