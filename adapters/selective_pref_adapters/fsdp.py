"""FSDP2 under a `Trainer`: whether it is asked for, and references that are sharded as accelerate shards the policy.

In: the arguments of a `Trainer` (or what `accelerate launch` has put into the environment), and models. Out: the same
models, each process holding its part of every parameter as a DTensor; or an error before a model is loaded.

accelerate shards the policy when training begins. It has no call for a second model, and on CPUs it trains data
parallel instead, without a word: both are done here.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp_utils
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp import StateDictType
from transformers.training_args import ParallelMode

from selective_pref_adapters.sharded import is_sharded


def asks_for_fsdp(args: Any) -> bool:
    """Whether FSDP is to shard the models: by `TrainingArguments(fsdp=True)`, or as `accelerate launch` was told.

    Raises:
        ValueError: it is the first FSDP, there is no launcher, or processes would evaluate unequal numbers of batches.
        ImportError: torch or accelerate are too old for FSDP2.
    """
    version = _version(args)
    if version is None:
        return False
    if version != 2:
        raise ValueError(
            "FSDP1 is not supported: it flattens weights, from which the fused head, the store and the check of the "
            "reference cannot be served. Use FSDP2: TrainingArguments(fsdp=True, fsdp_config={'version': 2}), or "
            "fsdp_version: 2 in accelerate's configuration"
        )
    if not hasattr(fsdp, "fully_shard") or not hasattr(fsdp_utils, "fsdp2_prepare_model"):
        raise ImportError(
            "FSDP2 needs torch.distributed.fsdp.fully_shard and an accelerate that calls it: pip install --upgrade "
            "torch accelerate"
        )
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(
            "FSDP2 shards models over processes that a launcher starts, and this one runs alone: torchrun "
            "--nproc_per_node N (or accelerate launch), and use_cpu=True where there are no GPUs"
        )
    if not args.accelerator_config.even_batches:
        raise ValueError(
            "under FSDP2 every process takes part in every forward: without even_batches a process with fewer batches "
            "would leave the others waiting. Set even_batches to True in accelerator_config"
        )
    return True


def _version(args: Any) -> int | None:
    """Of the FSDP that is asked for; None for none."""
    if (given := getattr(args, "fsdp_plugin_args", None)) is not None:
        return int(given["fsdp_version"])
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    return int(os.environ.get("FSDP_VERSION", "1"))


def enable_fsdp(trainer: Any) -> bool:
    """Whether FSDP2 shards this trainer's models; on CPUs, too, where accelerate would not. For a trainer not yet used.

    Raises:
        ValueError, ImportError: see `asks_for_fsdp`.
    """
    if not asks_for_fsdp(trainer.args):
        return False
    state = trainer.accelerator.state
    if not trainer.is_fsdp_enabled and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin(**(trainer.args.fsdp_plugin_args or {}))
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = plugin
        trainer.is_fsdp_enabled = True
    if trainer.is_fsdp_enabled:
        _keep_outputs(state.fsdp_plugin)
        if state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            state.fsdp_plugin.transformer_cls_names_to_wrap = _layers_of(trainer.model)
        _within(trainer, "evaluation_loop", _evaluation)
        _within(trainer, "create_optimizer", _learning)
        _within(trainer, "save_model", _saving)
    return trainer.is_fsdp_enabled


def _keep_outputs(plugin: Any) -> None:
    """Log-probs leave a model as they were computed, in float32: accelerate would round them to bf16 with its outputs.

    Rounded, they select other tokens.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype is not None and policy.output_dtype.itemsize < 4:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def shard_reference(model: nn.Module, accelerator: Any, *, mixed_precision: bool = True) -> nn.Module:
    """A model that does not learn, sharded in place as the policy will be: layer by layer, each gathered for its call.

    Every process must call it, with the same model. With `cpu_ram_efficient_loading` only the first process holds
    weights, and the others get theirs from it.

    Args:
        model: a causal LM, in evaluation mode, without gradients.
        accelerator: of a trainer that FSDP2 is enabled for.
        mixed_precision: whether it computes in the policy's precision (`bf16=True`); else in that of its weights.
    """
    with _plugin_of_its_own(accelerator.state, model) as plugin:
        if not mixed_precision:
            plugin.mixed_precision_policy = None
        sharded: Any = fsdp_utils.fsdp2_prepare_model(accelerator, model)
    sharded.set_reshard_after_forward(True)  # accelerate leaves the head whole for a backward pass, and there is none
    return sharded


def _layers_of(model: Any) -> list[str] | None:
    """The classes of layers to shard by, of those that the model's class names: accelerate wants all to be there.

    A model of text and images names the parts of its image encoder's text model, too, which it does not have.
    """
    named = getattr(model, "_no_split_modules", None)
    if named is None:
        return None
    there = {type(module).__name__ for module in model.modules()}
    return [name for name in named if name in there]


@contextmanager
def _plugin_of_its_own(state: Any, model: nn.Module) -> Iterator[Any]:
    """While a model is sharded: settings that remember its classes of layers, and not those of the policy."""
    kept = state.fsdp_plugin
    state.fsdp_plugin = plugin = copy.copy(kept)
    if isinstance(plugin.auto_wrap_policy, functools.partial):  # bound to the policy's classes
        plugin.auto_wrap_policy = plugin.auto_wrap_policy.func
    plugin.transformer_cls_names_to_wrap = _layers_of(model)
    try:
        yield plugin
    finally:
        state.fsdp_plugin = kept


# --- what a Trainer does not do under FSDP2 by itself ----------------------------------------------------------------


def _within(trainer: Any, name: str, context: Callable[..., AbstractContextManager[None]]) -> None:
    """Has a method of a trainer run inside of a context, which is made of the trainer and the method's arguments."""
    method = getattr(trainer, name)
    if hasattr(method, "context"):
        return

    @functools.wraps(method)
    def within(*args: Any, **kwargs: Any) -> Any:
        with context(trainer, *args, **kwargs):
            return method(*args, **kwargs)

    within.context = context  # type: ignore[attr-defined]
    setattr(trainer, name, within)


@contextmanager
def _evaluation(trainer: Any, *_: Any, **__: Any) -> Iterator[None]:
    """Around an evaluation, which may also come before training.

    accelerate shards a policy only beside an optimiser: this one is never used.
    """
    if not is_sharded(trainer.model):
        unused = torch.optim.SGD(trainer.model.parameters())
        trainer.model, _ = trainer.accelerator.prepare(trainer.model, unused)
        trainer.model_wrapped = trainer.model
    yield


@contextmanager
def _learning(trainer: Any, *_: Any, **__: Any) -> Iterator[None]:
    """Around the making of an optimiser.

    After a forward without a backward pass the head is whole, and an optimiser made then would learn a copy of it.
    """
    for module in trainer.model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
    yield


@contextmanager
def _saving(trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> Iterator[None]:
    """Around `save_model`, which writes whole weights: with `SHARDED_STATE_DICT` a Trainer would write none.

    Not where it saves a checkpoint, whose weights are then in a folder of their own.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    kind = plugin.state_dict_type
    if not _internal_call:
        plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind
