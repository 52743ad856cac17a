"""Pairs of token ids → one batch in the trainers' layout, and what a pair of token ids is.

In: `TokenizedPair`s. Out: tensors [2B T], chosen rows first; [B T] where pairs have no rejected side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

IGNORE_INDEX = -100
"""The label of tokens that are not trained: prompt and padding."""

KEY_BYTES = 16
"""Of the digest by which one side of a pair is known."""

Spans: TypeAlias = tuple[tuple[int, int], ...]
"""Runs of tokens [start, end) in a row of token ids, in order."""


@dataclass(frozen=True, kw_only=True)
class TokenizedPair:
    """Token ids of one pair.

    Attributes:
        chosen_ids, rejected_ids: prompt and completion of each side.
        chosen_prompt_length, rejected_prompt_length: the prompt tokens that stand before each completion.
        chosen_uncounted, rejected_uncounted: spans of the completion that do not count, as they are not the
            assistant's: turns of users and tools between its own. Mostly there are none.
        place: where the row came from (`file.jsonl:17`), for error messages.
        weight: what the pair's loss is multiplied by, at least 0; None for a pair of rows without weights.

    Supervised training reads the chosen side alone: `rejected_ids` is then empty.
    """

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_prompt_length: int
    rejected_prompt_length: int
    chosen_uncounted: Spans = ()
    rejected_uncounted: Spans = ()
    place: str = "?"
    weight: float | None = None

    @property
    def chosen_mask(self) -> np.ndarray:
        """True on the chosen side's completion tokens that count: bool [L]."""
        return completion_mask(len(self.chosen_ids), self.chosen_prompt_length, self.chosen_uncounted)

    @property
    def rejected_mask(self) -> np.ndarray:
        """Likewise of the rejected side."""
        return completion_mask(len(self.rejected_ids), self.rejected_prompt_length, self.rejected_uncounted)

    def sides(self) -> Iterator[tuple[str, list[int], np.ndarray]]:
        """(name, ids, mask) of chosen and rejected, or of the chosen side alone."""
        yield "chosen", self.chosen_ids, self.chosen_mask
        if self.rejected_ids:
            yield "rejected", self.rejected_ids, self.rejected_mask

    def chosen_only(self) -> TokenizedPair:
        """The pair without its rejected side."""
        return replace(self, rejected_ids=[], rejected_prompt_length=0, rejected_uncounted=())


def completion_mask(length: int, prompt_length: int, uncounted: Spans = ()) -> np.ndarray:
    """True on the completion tokens of a row, without those of other speakers: bool [length]."""
    mask = np.arange(length) >= prompt_length
    for start, end in uncounted:
        mask[start:end] = False
    return mask


def row_key(ids: np.ndarray, mask: np.ndarray) -> bytes:
    """The 16-byte digest of attended token ids [L] and completion mask [L]: how a reference store finds a row."""
    digest = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=KEY_BYTES, person=b"row")
    digest.update(np.ascontiguousarray(ids, dtype="<i4"))
    digest.update(np.ascontiguousarray(mask, dtype=np.bool_))
    return digest.digest()


def scored_tokens(mask: np.ndarray) -> int:
    """How many log-probs a row with the completion mask [L] has: none for its first token, which nothing precedes."""
    return int(mask[1:].sum())


def pair_weights(pairs: Sequence[TokenizedPair]) -> torch.Tensor | None:
    """The pairs' weights, float32 [B]; None where no pair has one."""
    if all(pair.weight is None for pair in pairs):
        return None
    return torch.tensor([1.0 if pair.weight is None else pair.weight for pair in pairs])


def uncounted_spans(counts: Sequence[bool], start: int) -> Spans:
    """The runs of tokens from `start` on that do not count, as [start, end): what `completion_mask` is made from."""
    spans: list[tuple[int, int]] = []
    for at in range(start, len(counts)):
        if counts[at]:
            continue
        if spans and spans[-1][1] == at:
            spans[-1] = (spans[-1][0], at + 1)
        else:
            spans.append((at, at + 1))
    return tuple(spans)


def collate(pairs: Sequence[TokenizedPair], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One batch in the trainers' layout: [2B T] with the chosen rows first, padded on the right.

    Returns:
        input_ids int64 [2B T]; attention_mask int64 [2B T], 1 on tokens; completion_mask int64 [2B T], 1 on the tokens
        of the completions that count. [B T] each where the pairs have no rejected side.

    Raises:
        ValueError: some of the pairs have a rejected side, and some have none.
    """
    sides = [(pair.chosen_ids, pair.chosen_mask) for pair in pairs]
    sides += [(pair.rejected_ids, pair.rejected_mask) for pair in pairs if pair.rejected_ids]
    if len(sides) not in (len(pairs), 2 * len(pairs)):
        alone = next(pair.place for pair in pairs if not pair.rejected_ids)
        raise ValueError(f"{alone} has a chosen side alone, and other pairs of the batch have both: give one kind")
    shape = (len(sides), max(len(ids) for ids, _ in sides))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask, completion = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (ids, mask) in enumerate(sides):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        completion[row, : len(ids)] = torch.from_numpy(mask)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion}
