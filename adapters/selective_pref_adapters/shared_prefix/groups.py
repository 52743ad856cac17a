"""Padded rows → the prompts in them, each once, with its responses.

In: `input_ids`, `attention_mask` and labels, each [2B T+1], on the CPU. Out: groups of rows with the same prompt.

The prompt of a row is what stands before its first completion token. Rows share a prompt where all of it is equal, be
they the two sides of a pair or not. Prompts that differ share nothing, not even the tokens with which both begin: how a
row is computed then depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selective_pref_adapters.pairs import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What follows the prompt in one row of a batch, and which of its tokens are completion tokens (M of them)."""

    row: int
    ids: Tensor
    """int64 [R]: from the first completion token to the row's end."""
    columns: Tensor
    """int64 [M]: where their log-probs stand in the row's [T]."""
    predictors: Tensor
    """int64 [M]: the token that predicts each of them, counted from the start of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that start with the same prompt."""

    prompt: Tensor
    """int64 [P]"""
    responses: Sequence[Continuation]

    @property
    def tokens(self) -> int:
        """How many tokens go through the body: those of the prompt once, and those of every response."""
        return len(self.prompt) + sum(len(response.ids) for response in self.responses)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return len(self.prompt) + max(len(response.ids) for response in self.responses)

    def predictors(self, start: int) -> dict[int, Tensor]:
        """Row → the indices of the states that predict its completion tokens.

        Args:
            start: the index of the group's first state; those of the prompt come first, then response by response.
        """
        found, at, prompt = {}, start + len(self.prompt), len(self.prompt)
        for response in self.responses:
            own = response.predictors
            found[response.row] = torch.where(own < prompt, start + own, at + own - prompt)
            at += len(response.ids)
        return found


def groups_of(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[Group]:
    """The rows of a batch by their prompts, in the order of their first row. Rows without a token are left out.

    Args:
        input_ids: int64 [2B T+1]; padding may stand anywhere.
        attention_mask: [2B T+1], 0 at padding.
        labels: int64 [2B T+1], -100 where no completion token stands; not shifted.
    """
    prompts: dict[bytes, tuple[Tensor, list[Continuation]]] = {}
    for row, (ids, present, targets) in enumerate(zip(input_ids, attention_mask != 0, labels, strict=True)):
        columns = present.nonzero().squeeze(-1)
        ids = ids[columns]
        if not len(ids):
            continue
        counted = (targets[columns] != IGNORE_INDEX).nonzero().squeeze(-1)
        length = int(counted[0]) if len(counted) else len(ids)
        counted = counted[counted > 0]  # nothing predicts a first token
        response = Continuation(row=row, ids=ids[length:], columns=columns[counted] - 1, predictors=counted - 1)
        prompt = ids[:length]
        prompts.setdefault(prompt.numpy().tobytes(), (prompt, []))[1].append(response)
    return [Group(prompt=prompt, responses=responses) for prompt, responses in prompts.values()]


def one_by_one(group: Group) -> Iterable[Group]:
    """The rows of a group, each as a group without a prompt: nothing shared, nothing split."""
    for response in group.responses:
        whole = Continuation(
            row=response.row,
            ids=torch.cat([group.prompt, response.ids]),
            columns=response.columns,
            predictors=response.predictors,
        )
        yield Group(prompt=group.prompt[:0], responses=[whole])
