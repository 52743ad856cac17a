"""A causal LM → whether a layout of a shared prompt gives its own hidden states, and for rows of which length.

In: a model and a layout. Out: the longest row that the layout is exact for (0: for none) and why no longer one.

The model's body is run on one made-up pair, both sides by themselves and then in the layout; nothing is decided by a
model's name. A layout is exact where the hidden states agree. For the packed row that is not enough: rounding in bf16
is large, so other positions and another mask must also be seen to change the states.

A sliding window or an attention chunk changes nothing in rows that fit inside it. One of up to `LONGEST_WINDOW`
positions is shorter than the made-up pair, and so is tried; a larger one is not, and then the layouts are used only for
rows that fit inside it. The same holds for rotary frequencies that change with the length of the
text (`dynamic`, `longrope`): rows beyond the length where they change keep the padded layout.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selective_pref_adapters.models import evaluating, text_config
from selective_pref_adapters.pairs import IGNORE_INDEX
from selective_pref_adapters.shared_prefix.continued import continued_states
from selective_pref_adapters.shared_prefix.groups import Group, groups_of
from selective_pref_adapters.shared_prefix.packed import Packed, attention_masks, pack

LONGEST_WINDOW = 1024
UNLIMITED = 2**62
_REACH = "(window|chunk|local)(?!.*(layers|pattern|experts))"
"""Names of settings that may say how far back a layer looks: `sliding_window`, `attention_chunk_size`, …"""
_PROMPT, _RESPONSES = 20, (11, 8)  # tokens of the made-up pair, where nothing asks for more

Verdict = tuple[int, str]
"""(the longest row that a layout is exact for, 0 for none; why the layout is not exact, or nothing)"""


def examine(causal: Any, layout: str) -> Verdict:
    """The verdict on one layout. Costs a few short forward passes, without gradients.

    Args:
        causal: a causal LM of transformers, without wrappers.
        layout: `continued` or `packed`.
    """
    try:
        device = causal.get_input_embeddings().weight.device.type
        with torch.no_grad(), evaluating(causal), torch.autocast(device, enabled=False):
            pair, limit = _made_up_pair(causal)
            alone = torch.cat([_plain(causal, pair, number) for number in range(len(pair.responses))])
            reason = {"continued": _continued, "packed": _packed}[layout](causal, pair, alone)
    except ValueError as error:
        reason = str(error)
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        reason = f"its forward cannot be taken apart: {type(error).__name__}: {error}"
    return (0, reason) if reason else (limit, "")


def takes_positions(body: Any) -> bool:
    """Whether a body's forward names `position_ids`."""
    return "position_ids" in inspect.signature(type(body).forward).parameters


def packed_states(
    causal: Any, packed: Packed, *, seen_by: Packed | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """The states of packed rows, [R·W D]; under the mask of others, or at other positions, where these are given."""
    dtype = causal.get_input_embeddings().weight.dtype
    return causal.base_model(
        input_ids=packed.input_ids,
        attention_mask=attention_masks(seen_by or packed, text_config(causal), dtype),
        position_ids=packed.position_ids if position_ids is None else position_ids,
        use_cache=False,
    )[0].flatten(0, 1)


# --- the two layouts of the made-up pair -----------------------------------------------------------------------------


def _continued(causal: Any, pair: Group, alone: Tensor) -> str:
    body, device = causal.base_model, alone.device
    states = continued_states(body, [pair], device, positions=takes_positions(body))
    indices = pair.predictors(0)
    return _differs(torch.cat([states[some] for some in indices.values()]), alone)


def _packed(causal: Any, pair: Group, alone: Tensor) -> str:
    if not takes_positions(causal.base_model):
        return "its forward takes no position ids"
    packed = pack([[pair]], multiple=multiple_of(causal), device=alone.device)
    rows = torch.cat(list(packed.predictors.values()))
    found = packed_states(causal, packed)[rows]
    onward = torch.arange(packed.position_ids.shape[1], device=alone.device).expand_as(packed.position_ids)
    if torch.equal(packed_states(causal, packed, position_ids=onward)[rows], found):
        return "it ignores position ids"
    one_side = replace(packed, side=torch.zeros_like(packed.side))
    if torch.equal(packed_states(causal, packed, seen_by=one_side)[rows], found):
        return "it ignores a mask for every pair of tokens"
    return _differs(found, alone)


def _plain(causal: Any, pair: Group, number: int) -> Tensor:
    """The states that predict the tokens of one side, from a call of its own."""
    response = pair.responses[number]
    ids = torch.cat([pair.prompt, response.ids]).unsqueeze(0).to(causal.get_input_embeddings().weight.device)
    states = causal.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0][0]
    return states[response.predictors]


def _differs(found: Tensor, expected: Tensor) -> str:
    """What to say where states differ by more than rounding; otherwise nothing."""
    if found.shape != expected.shape:
        return f"its hidden states have the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    distance = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    if distance <= rounding(found):
        return ""
    return f"its hidden states differ from those of rows by themselves by {distance:.0e} of the largest"


def rounding(states: Tensor) -> float:
    """The relative difference between two ways to compute the same states that is taken for rounding."""
    if states.dtype == torch.float32 and states.is_cuda:
        return 1e-2  # products of float32 matrices may be computed in TF32
    if states.dtype in (torch.float32, torch.float64):
        return 1e-4  # of float64, too: parts of many models compute in float32 whatever their dtype
    return 8 * torch.finfo(states.dtype).eps


# --- how long rows may be --------------------------------------------------------------------------------------------


def _made_up_pair(causal: Any) -> tuple[Group, int]:
    """A prompt with two responses, and the longest row for which what is found with it holds."""
    config = text_config(causal)
    context = getattr(config, "max_position_embeddings", None) or UNLIMITED
    named = [value for name, value in vars(config).items() if type(value) is int and re.search(_REACH, name)]
    reach = [size for size in named if size < context]
    more = max((size for size in reach if size <= LONGEST_WINDOW), default=0)
    limit = min((size for size in reach if size > LONGEST_WINDOW), default=UNLIMITED)
    limit = min(limit, _length_of_fixed_frequencies(config))
    if _PROMPT + max(_RESPONSES) > context:
        raise ValueError(f"its context ({context} tokens) is too short to try a pair in it")
    lengths = [_PROMPT, *(min(length + more, context - _PROMPT) for length in _RESPONSES)]
    vocabulary = causal.get_input_embeddings().num_embeddings  # a sharded weight has no shape here
    ids = (torch.arange(sum(lengths)) * 7 + 3) % vocabulary
    prompt, chosen, rejected = ids.split(lengths)
    rows = [torch.cat([prompt, side]) for side in (chosen, rejected)]
    width = max(len(row) for row in rows)
    table, present = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)], present[number, : len(row)] = row, 1
    labels = table.masked_fill(present == 0, IGNORE_INDEX)
    labels[:, :_PROMPT] = IGNORE_INDEX
    return groups_of(table, present, labels)[0], limit


def _length_of_fixed_frequencies(config: Any) -> int:
    """Tokens up to which rotary frequencies do not depend on the length of the text."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    context = getattr(config, "max_position_embeddings", None) or UNLIMITED
    lengths = [
        int(one.get("original_max_position_embeddings") or context)
        for one in nested
        if one.get("rope_type", one.get("type")) in ("dynamic", "longrope")
    ]
    return min(lengths, default=UNLIMITED)


def multiple_of(causal: Any) -> int:
    """What the width of packed rows is rounded up to: flex attention is compiled for a number of whole blocks."""
    return 128 if text_config(causal)._attn_implementation == "flex_attention" else 1
