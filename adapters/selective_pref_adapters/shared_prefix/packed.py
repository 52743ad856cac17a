"""Groups of rows with the same prompt → rows `[prompt | response | response]` for one call of the body.

In: groups. Out: ids, positions that restart after the prompt, and a mask under which a token sees the prompt of its
group and what precedes it in its own response. Several groups share a row, placed by first fit, longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selective_pref_adapters.shared_prefix.groups import Group

_NEAR = {
    "full_attention": lambda query, key, size: key >= 0,
    "sliding_attention": lambda query, key, size: query - key < size,
    "chunked_attention": lambda query, key, size: query // size == key // size,
}
"""By the kind of an attention layer: whether a token at position `query` sees that far back."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows for the body: R of them, each W wide."""

    input_ids: Tensor
    """int64 [R W]; 0 where a row ends before the others."""
    position_ids: Tensor
    """int64 [R W]: as the token has it in its own padded row, counted from the first token."""
    group: Tensor
    """int64 [R W]: which of the row's prompts the token belongs to; -1 behind the row's end."""
    side: Tensor
    """int64 [R W]: 0 in the prompt, 1, 2, … in the responses to it."""
    predictors: dict[int, Tensor]
    """Row of the batch → indices of the R·W states that predict its completion tokens."""

    def sees(self, kind: str = "full_attention", size: int = 0) -> Callable[[Any, Any, Any], Any]:
        """A function of (row, query, key) that says whether the token `query` attends to the token `key`.

        Args:
            kind: of the attention layer, as `layer_types` of a configuration names it.
            size: of its window or chunk, in positions.
        """
        group, side, position, near = self.group, self.side, self.position_ids, _NEAR[kind]

        def visible(row: Any, query: Any, key: Any) -> Any:
            same = (group[row, query] == group[row, key]) & (query >= key)
            shared = (side[row, key] == 0) | (side[row, key] == side[row, query])
            return same & shared & near(position[row, query], position[row, key], size)

        return visible


def pack(rows: Sequence[Sequence[Group]], *, multiple: int = 1, device: Any = "cpu") -> Packed:
    """Puts groups into rows.

    Args:
        rows: the groups of each row, one behind the other.
        multiple: rows are made a multiple of this wide.
        device: where the tensors are wanted.
    """
    widest = max(sum(group.tokens for group in groups) for groups in rows)
    widest = -(-widest // multiple) * multiple
    filled = {"input_ids": 0, "position_ids": 0, "group": -1, "side": 0}
    tables = {name: torch.full((len(rows), widest), value) for name, value in filled.items()}
    predictors: dict[int, Tensor] = {}
    for row, groups in enumerate(rows):
        at = 0
        for number, group in enumerate(groups):
            predictors |= group.predictors(row * widest + at)
            for name, values in _columns(group, number).items():
                tables[name][row, at : at + len(values)] = values
            at += group.tokens
    return Packed(**{name: table.to(device) for name, table in tables.items()}, predictors=predictors)


def first_fit(groups: Sequence[Group], width: int) -> list[list[Group]]:
    """Groups, row by row: the longest first, each into the first row that has room for it, or else into a new one.

    Args:
        groups: what is put into rows.
        width: tokens that a row may hold; a group that is longer has a row to itself.
    """
    rows: list[list[Group]] = []
    room: list[int] = []
    for group in sorted(groups, key=lambda group: -group.tokens):
        fitting = next((row for row, free in enumerate(room) if free >= group.tokens), len(rows))
        if fitting == len(rows):
            rows.append([])
            room.append(width)
        rows[fitting].append(group)
        room[fitting] -= group.tokens
    return rows


def _columns(group: Group, number: int) -> dict[str, Tensor]:
    """Ids, positions, group and side of a group's tokens, one behind the other."""
    prompt = len(group.prompt)
    parts = [group.prompt, *(response.ids for response in group.responses)]
    starts = [0] + [prompt] * len(group.responses)
    return {
        "input_ids": torch.cat(parts),
        "position_ids": torch.cat([torch.arange(len(part)) + start for part, start in zip(parts, starts, strict=True)]),
        "group": torch.full((group.tokens,), number),
        "side": torch.cat([torch.full((len(part),), side) for side, part in enumerate(parts)]),
    }


# --- masks as a model's attention takes them -------------------------------------------------------------------------


def attention_masks(packed: Packed, config: Any, dtype: torch.dtype) -> Any:
    """The mask of packed rows, as the body's `attention_mask`: one, or one for each kind of layer, by name.

    Args:
        packed: the rows.
        config: of the model's text part.
        dtype: of the attention scores, for implementations that add the mask to them.

    Raises:
        ValueError: the attention takes no mask of its own for every pair of tokens, or a kind of layer is unknown.
    """
    implementation = config._attn_implementation
    if implementation not in _BUILDERS:
        raise ValueError(
            f"its attention ({implementation}) takes no mask for every pair of tokens; "
            f"{', '.join(sorted(_BUILDERS))} do"
        )
    build = _BUILDERS[implementation]
    sizes = kinds_of_layers(config)
    masks = {kind: build(packed, packed.sees(kind, size), dtype) for kind, size in sizes.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def kinds_of_layers(config: Any) -> dict[str, int]:
    """Kind of attention layer → positions of its window or chunk (0 for full attention).

    Raises:
        ValueError: a kind that attention over packed rows cannot express, such as a recurrent layer.
    """
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        kinds = ["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"]
    unknown = sorted({kind for kind in kinds if kind not in _NEAR})
    if unknown:
        raise ValueError(f"layers of the kind {', '.join(unknown)} do not look back through a mask")
    sizes = {"full_attention": 0, "sliding_attention": int(window or 0), "chunked_attention": int(chunk or 0)}
    return {kind: sizes[kind] for kind in dict.fromkeys(kinds)}


def _boolean(packed: Packed, visible: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    rows, width = packed.input_ids.shape
    index = torch.arange(width, device=packed.group.device)
    return visible(torch.arange(rows, device=index.device).view(-1, 1, 1), index.view(1, -1, 1), index)[:, None]


def _additive(packed: Packed, visible: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    seen = _boolean(packed, visible, dtype)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _blocks(packed: Packed, visible: Callable[..., Tensor], dtype: torch.dtype) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = packed.input_ids.shape

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(row, query, key)

    return create_block_mask(mask_mod, rows, None, width, width, device=packed.group.device)


_BUILDERS = {"sdpa": _boolean, "eager": _additive, "flex_attention": _blocks}
