"""What is known of a model from its configuration: numbers of parameters, and bytes that a backward pass needs.

In: the folder or hub id of a causal LM, of which config.json alone is read. Out: sizes. The model is built without
values (meta and fake tensors), so that tied embeddings and experts are counted as they are, and its forward pass is
followed operation by operation: what autograd would keep is added up, and nothing is computed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from selective_pref_adapters.models import model_config, switch_off_dropout


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model in numbers. Parameters that are used twice, as tied embeddings, count once."""

    name: str
    config: Any
    parameters: int
    largest_layer: int
    """Parameters of the largest decoder layer, or of the embedding or head, if one of those is larger."""
    hidden: int
    """Width of the hidden states."""
    vocabulary: int
    """Rows of the head."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a forward pass of a model's body leaves for its backward pass; those of the head do not count."""

    whole: int
    """Without gradient checkpointing."""
    inputs: int
    """With it: the inputs of the layers."""
    layer: int
    """Of the layer that leaves the most: what a layer takes that is computed again."""


def model_size(name: str) -> ModelSize:
    """Counts the parameters of the model of a folder or hub id.

    Raises:
        ValueError: there is no configuration, or it is not that of a causal language model.
    """
    config = model_config(name)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{name} is no causal language model: expected a config.json that AutoModelForCausalLM can build, got "
            f"model_type {getattr(config, 'model_type', None)!r} ({reason})"
        ) from error
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        raise ValueError(f"{name} is no causal language model: {type(model).__name__} has no embedding or no head")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return ModelSize(
        name=name,
        config=config,
        parameters=_count(model),
        largest_layer=max(map(_count, [head, embedding, *layers])),
        hidden=head.weight.shape[1],
        vocabulary=head.weight.shape[0],
    )


def activations(
    config: Any, *, sequences: int, length: int, dtype: torch.dtype, checkpointing: bool = True
) -> Activations:
    """What autograd keeps of one forward pass of a model's body, with every position filled and no dropout.

    Attention is what transformers chooses (scaled_dot_product_attention), whose scores are not kept.

    Args:
        config: of a causal language model.
        sequences: rows of the batch; a pair makes two.
        length: tokens of each row.
        dtype: of the weights.
        checkpointing: False leaves out the second pass, and `inputs` is `whole`.

    Raises:
        ValueError: the forward pass depends on values, so that it cannot be followed without them.
    """
    try:
        try:
            return _followed(config, sequences, length, dtype, checkpointing)
        except RuntimeError:  # experts: their product is known for bf16 alone where there are no values
            if dtype != torch.float32:
                raise
            half = _followed(config, sequences, length, torch.bfloat16, checkpointing)
            return Activations(whole=2 * half.whole, inputs=2 * half.inputs, layer=2 * half.layer)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"the forward pass of {type(config).__name__} cannot be followed without values: "
            f"{str(error).partition(chr(10))[0][:200]}"
        ) from error


def _followed(config: Any, sequences: int, length: int, dtype: torch.dtype, checkpointing: bool) -> Activations:
    """`activations`, from passes over tensors without values."""
    with FakeTensorMode():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        switch_off_dropout(model)
        ids = torch.zeros(sequences, length, dtype=torch.long)
        whole, layer = saved_bytes(model.train(), ids)
        inputs = whole
        if model.supports_gradient_checkpointing and checkpointing:
            with warnings.catch_warnings():  # newer versions of transformers have another name for it, too
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
            inputs, _ = saved_bytes(model, ids)
    return Activations(whole=whole, inputs=inputs, layer=layer)


def saved_bytes(model: Any, ids: Tensor) -> tuple[int, int]:
    """(bytes that autograd keeps of a forward pass of the body, those of the layer with the most).

    Memory that several tensors share counts once, that of parameters and buffers not at all.
    """
    own = {_place(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    places: set[int] = set()
    total = 0
    alive: list[Tensor] = []  # a place in memory means one thing while nothing is freed
    before: list[int] = []
    layers: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        place = _place(tensor)
        if place not in own and place not in places:
            alive.append(tensor)
            places.add(place)
            total += tensor.untyped_storage().nbytes()
        return tensor

    def enter(*_: Any) -> None:
        before.append(total)

    def leave(*_: Any) -> None:
        layers.append(total - before.pop())

    hooks = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return total, max(layers, default=total)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
