"""A batch → the arguments of a model's forward: all in it that the model takes, and positions where it needs them.

In: a causal LM (bare, under PEFT, or wrapped by a training engine) and a batch in the trainers' layout. Out: keyword
arguments.
"""

from __future__ import annotations

import functools
import inspect
from itertools import takewhile
from typing import Any

import torch

from selective_pref_adapters.batch import Batch
from selective_pref_adapters.models import text_config

_IDS = ("input_ids", "attention_mask")
_NOT_INPUTS = {*_IDS, "completion_mask", "labels", "use_cache"}  # `labels` would make the model compute a loss


def inputs_of(model: Any, batch: Batch) -> dict[str, Any]:
    """The arguments of a model's forward for a batch: all that the batch holds and the forward names.

    Positions are counted from the first token that is attended to, where the model takes them and the batch has none:
    without that, a model with learned positions would read a row with padding on its left as a later part of a text.

    Args:
        model: a causal LM, or what wraps one.
        batch: `input_ids`, `attention_mask`, each [2B T+1], and anything else.
    """
    inputs: dict[str, Any] = {name: batch[name] for name in [*_IDS, *further_inputs(model, batch)]}
    if "position_ids" not in inputs and batch["attention_mask"].ndim == 2 and _counts_from_the_first_token(model):
        mask = batch["attention_mask"] != 0
        positions = torch.arange(mask.shape[1], device=mask.device)
        inputs["position_ids"] = torch.where(mask, mask.cumsum(-1) - 1, positions)
    return {**inputs, "use_cache": False}


def further_inputs(model: Any, batch: Batch) -> list[str]:
    """What a batch holds for the model's forward besides ids and mask, by name."""
    takes = _parameters(type(causal_lm(model)))
    return [name for name in batch if name not in _NOT_INPUTS and name in takes]


def check_stored_inputs(model: Any, batch: Batch) -> None:
    """Raises ValueError where a model reads more of a batch than a store of reference log-probs can be asked for."""
    if names := further_inputs(model, batch):
        raise ValueError(
            f"the collator also gives the model {', '.join(names)}, and a store holds log-probs of token ids alone: "
            "leave them out of the batch, or give a reference model that runs beside the policy instead of the store"
        )


def causal_lm(model: Any) -> Any:
    """The transformers model inside the wrappers of PEFT and of training engines; without one, what was given."""
    return next((module for module in model.modules() if hasattr(type(module), "get_output_embeddings")), model)


def _counts_from_the_first_token(model: Any) -> bool:
    """Whether position 0 is a row's first token to this model, and its forward can be told so."""
    causal = causal_lm(model)
    if "position_ids" not in _parameters(type(causal)) or text_config(causal) is not getattr(causal, "config", None):
        return False  # a model of text and images has a layout of its own
    embeddings = getattr(getattr(causal, "base_model", None), "embeddings", None)
    if getattr(embeddings, "padding_idx", None) is not None:
        return False  # RoBERTa and models derived from it count from the padding's id on
    return not has_soft_prompt(model)  # with one, PEFT sets the positions


def has_soft_prompt(model: Any) -> bool:
    """Whether PEFT prepends virtual tokens to every row (prompt tuning, prefix tuning)."""
    causal = causal_lm(model)
    wrappers = takewhile(lambda module: module is not causal, model.modules())
    configs = (getattr(module, "active_peft_config", None) for module in wrappers)
    return any(getattr(config, "is_prompt_learning", False) for config in configs)


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)
