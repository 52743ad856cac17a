"""A batch and a model → how the batch is laid out, and the hidden states of its completion tokens.

In: the body's inputs and labels. Out: a `Layout`, or None where the rows go through the body as they are.

Rows are `packed` where that is exact for the model: it takes the fewest calls and is the fastest on a CPU and a GPU
alike. The layout depends on the batch and the model, not on gradients, so that policy and reference are computed with
the same shapes. Where several processes train together the packed rows go through the body in one call, as the padded
ones would, so that every process calls it equally often: ZeRO-3 and FSDP gather weights for each call. Rows are
`continued` on a CPU where the caller wants bits that depend on a row alone, or where packed rows are not exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from selective_pref_adapters.models import text_config
from selective_pref_adapters.sharded import is_sharded
from selective_pref_adapters.shared_prefix.continued import continued_states
from selective_pref_adapters.shared_prefix.exact import (
    Verdict,
    examine,
    multiple_of,
    packed_states,
    takes_positions,
)
from selective_pref_adapters.shared_prefix.groups import Group, groups_of, one_by_one
from selective_pref_adapters.shared_prefix.packed import Packed, first_fit, pack

logger = logging.getLogger(__name__)

CPU_ROW_TOKENS, ROW_TOKENS = 256, 2048
"""Tokens that groups of a batch may fill in a packed row; a longer group has a row to itself. Attention over a packed
row computes all pairs of its tokens, so rows are kept short where a call of the body costs little."""
CALL_TOKENS = 36
"""What a call of the body costs on a CPU besides its tokens, in tokens: weights are read, and their gradients added up.
A prompt that is not longer than this is not worth a call of its own."""
LEAST_SAVING = 0.05
"""The share of this cost that another layout must save."""
_KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache"}
_VERDICTS, _SAID = "_shared_prefix_verdicts", "_shared_prefix_said"  # attributes of a model that was examined


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of a batch."""

    rows: Tensor
    """int64 [M]: the rows of its completion tokens, ascending."""
    columns: Tensor
    """int64 [M]: where in [T] they stand."""
    counts: list[int]
    """How many of them each row has, for the rows that have any."""
    predictors: Tensor
    """int64 [M]: the states that predict them."""
    groups: list[Group]
    """What goes through the body, in the continued layout."""
    packed: list[Packed]
    """What goes through the body in the packed layout, call by call; empty for the continued one."""

    @property
    def cost(self) -> int:
        """Tokens that go through the body, and what its calls cost besides."""
        calls = len(self.packed) or sum(bool(len(one.prompt)) + len(one.responses) for one in self.groups)
        return sum(group.tokens for group in self.groups) + CALL_TOKENS * calls

    def states(self, causal: Any) -> Tensor:
        """The hidden states [M D] from which the completion tokens are predicted, in the order of the batch."""
        if self.packed:
            return torch.cat([packed_states(causal, packed) for packed in self.packed])[self.predictors]
        body, device = causal.base_model, self.rows.device
        states = continued_states(body, self.groups, device, positions=takes_positions(body))
        return states[self.predictors]

    @torch.compiler.disable
    def outputs(
        self, states: Tensor, head: Callable[[Tensor, Tensor], Any], labels: Tensor, *, by_row: bool
    ) -> Tensor | tuple[Tensor, ...]:
        """What the head gives for the completion tokens, each at its position and 0 elsewhere: [2B T].

        Args:
            states: of the completion tokens, as `states` gives them.
            head: from hidden states [1 N D] and labels [1 N] to one tensor [1 N], or several.
            labels: int64 [2B T+1], as `lay_out` was given them.
            by_row: the head, too, is called for each row by itself.
        """
        targets = labels[self.rows, self.columns + 1]
        sizes = self.counts if by_row else [len(targets)]
        pieces = zip(states.split(sizes), targets.split(sizes), strict=True)
        parts = [head(some[None], wanted[None]) for some, wanted in pieces]

        def spread(values: Sequence[Tensor]) -> Tensor:
            found = torch.cat([*values], dim=1)[0]
            indices = (self.rows.to(found.device), self.columns.to(found.device))
            return found.new_zeros(labels.shape[0], labels.shape[1] - 1).index_put(indices, found)

        if isinstance(parts[0], Tensor):
            return spread(parts)
        return tuple(spread(column) for column in zip(*parts, strict=True))


def prepare(causal: Any) -> None:
    """Runs the examination of a model now; else `lay_out` does so at the first batch."""
    _verdict(causal, "packed")


@torch.compiler.disable
def lay_out(
    causal: Any, inputs: dict[str, Any], labels: Tensor, *, by_row: bool = False, compiled: bool = False
) -> Layout | None:
    """How to lay out a batch; None: as it is.

    Args:
        causal: a causal LM of transformers, without wrappers.
        inputs: of its forward: `input_ids`, `attention_mask` [2B T+1], and what else the caller has.
        labels: int64 [2B T+1], -100 where no completion token stands; not shifted.
        by_row: the bits of a row's states are to depend on that row alone.
        compiled: whether this call is being compiled: then the body is called once.
    """
    together = is_sharded(causal) or (dist.is_initialized() and dist.get_world_size() > 1)
    if together:  # every process examines the model at its first batch, whatever that holds
        prepare(causal)
    reason = _not_plain_rows(inputs)
    if reason:
        return _as_it_is(causal, reason)
    device = inputs["input_ids"].device
    groups = groups_of(*(tensor.detach().cpu() for tensor in (inputs["input_ids"], inputs["attention_mask"], labels)))
    if not any(len(response.columns) for group in groups for response in group.responses):
        return None
    if by_row:
        return _continued(groups, _verdict(causal, "continued")[0], device)
    limit, reason = _verdict(causal, "packed")
    longest = max(group.longest for group in groups)
    if limit and longest > limit:
        reason = f"it is known to be exact for rows of {limit} tokens at most, and a row is longer"
    if not reason:
        found = _packed(groups, device, causal, one_call=compiled or together or device.type != "cpu")
    elif not compiled and continues(causal):
        found = _continued(groups, _verdict(causal, "continued")[0], device)
    else:
        return _as_it_is(causal, reason)
    return found if _pays(found, labels) else None


def continues(causal: Any) -> bool:
    """Whether rows can be computed by themselves, from the continued keys and values of their prompt."""
    body = causal.base_model
    if next(body.parameters()).device.type != "cpu" or is_sharded(causal):
        return False
    if getattr(body, "_compiled_call_impl", None) is not None:
        return False
    if causal.training and any(getattr(module, "gradient_checkpointing", False) for module in causal.modules()):
        return False  # it drops a cache
    return _verdict(causal, "continued")[0] > 0


def _continued(groups: list[Group], limit: int, device: torch.device) -> Layout:
    """Prompts that are worth it go through the body once; other rows by themselves."""
    laid: list[Group] = []
    for group in groups:
        split = len(group.prompt) > CALL_TOKENS and group.longest <= limit
        laid += [group] if split else one_by_one(group)
    predictors: dict[int, Tensor] = {}
    start = 0
    for group in laid:
        predictors |= group.predictors(start)
        start += group.tokens
    return _layout(laid, predictors, device, [])


def _packed(groups: list[Group], device: torch.device, causal: Any, *, one_call: bool) -> Layout:
    rows = first_fit(groups, CPU_ROW_TOKENS if device.type == "cpu" else ROW_TOKENS)
    calls, predictors, start = [], {}, 0
    for some in [rows] if one_call else [[row] for row in rows]:
        packed = pack(some, multiple=multiple_of(causal), device=device)
        predictors |= {row: start + indices for row, indices in packed.predictors.items()}
        start += packed.input_ids.numel()
        calls.append(packed)
    return _layout(groups, predictors, device, calls)


def _pays(found: Layout, labels: Tensor) -> bool:
    return found.cost < (1 - LEAST_SAVING) * (labels.numel() + CALL_TOKENS)


def _layout(groups: list[Group], predictors: dict[int, Tensor], device: torch.device, packed: list[Packed]) -> Layout:
    """The completion tokens in the order of the batch."""
    responses = (response for group in groups for response in group.responses)
    found = sorted(((one.row, one.columns) for one in responses if len(one.columns)), key=lambda one: one[0])
    return Layout(
        rows=torch.cat([torch.full_like(columns, row) for row, columns in found]).to(device),
        columns=torch.cat([columns for _, columns in found]).to(device),
        counts=[len(columns) for _, columns in found],
        predictors=torch.cat([predictors[row] for row, _ in found]).to(device),
        groups=groups,
        packed=packed,
    )


def _not_plain_rows(inputs: dict[str, Any]) -> str:
    """What of a call's inputs cannot be laid out anew."""
    given = {name for name, value in inputs.items() if value is not None}
    if not {"input_ids", "attention_mask"} <= given:
        return "its body is given embeddings instead of ids, as in prompt tuning"
    if given - _KNOWN:
        return f"its body is also given {', '.join(sorted(given - _KNOWN))}"
    mask, positions = inputs["attention_mask"], inputs.get("position_ids")
    if mask.shape != inputs["input_ids"].shape:
        return "its attention mask is not one of rows of tokens"
    if positions is not None and not torch.equal(
        (mask.cumsum(-1) - 1)[mask != 0], positions.expand_as(mask)[mask != 0]
    ):
        return "the positions in a batch are not counted from the first token of each row"
    return ""


def _verdict(causal: Any, layout: str) -> Verdict:
    """What `examine` found, once for each implementation of attention that the model is set to."""
    known = vars(causal).setdefault(_VERDICTS, {})
    key = f"{layout} {text_config(causal)._attn_implementation}"
    if key not in known:
        known[key] = examine(causal, layout)
    return known[key]


def _as_it_is(causal: Any, reason: str) -> None:
    """Says once why the prompt of a pair is computed twice."""
    said = vars(causal).setdefault(_SAID, [])
    if reason not in said:
        said.append(reason)
        logger.warning("%s computes a pair's prompt once for each side: %s", type(causal).__name__, reason)
