"""Groups of rows with the same prompt → hidden states, the prompt's keys and values continued by each response.

This is how a model generates several answers to one prompt, with gradients. Every call of the body has the shape of one
prompt or of one response: the bits of a row's states depend on that row alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from selective_pref_adapters.shared_prefix.groups import Group


def continued_states(body: Any, groups: Sequence[Group], device: Any, *, positions: bool) -> Tensor:
    """The states of all tokens [N D], group by group: first the prompt's, then those of each response.

    Args:
        body: what maps ids to hidden states.
        groups: with a prompt, to be continued; or without, for a row that is computed in one call.
        device: of the body's inputs.
        positions: whether the body takes `position_ids`.

    Raises:
        ValueError: the body keeps something else than the keys and values of the tokens.
    """
    return torch.cat([states for group in groups for states in _states(body, group, device, positions)])


def _states(body: Any, group: Group, device: Any, positions: bool) -> list[Tensor]:
    if not len(group.prompt):
        return [_call(body, response.ids, 0, device, positions)[0][0] for response in group.responses]
    prompt = _call(body, group.prompt, 0, device, positions, use_cache=True)
    states, cache = [prompt[0][0]], prompt.past_key_values
    for response in group.responses:
        if len(response.ids):
            before = len(group.prompt)
            states.append(
                _call(body, response.ids, before, device, positions, past_key_values=_fork(cache), use_cache=True)[0][0]
            )
    return states


def _call(body: Any, ids: Tensor, before: int, device: Any, positions: bool, **options: Any) -> Any:
    """One call of the body for tokens that follow `before` others."""
    if positions:
        options["position_ids"] = torch.arange(before, before + len(ids), device=device).unsqueeze(0)
    mask = torch.ones(1, before + len(ids), dtype=torch.int64, device=device)
    return body(input_ids=ids.unsqueeze(0).to(device), attention_mask=mask, **{"use_cache": False, **options})


def _fork(cache: Any) -> Any:
    """A cache that can be continued while the original stays as it is; its tensors are shared, and keep their graph."""
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):  # others may write into their tensors
            raise ValueError(f"its cache holds more than keys and values ({type(layer).__name__})")
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
