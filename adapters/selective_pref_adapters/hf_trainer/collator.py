"""Preference pairs → one batch for a plain Hugging Face `Trainer`: the first of the three objects of `hf_trainer`.

In: pairs as token ids or as raw rows. Out: a padded batch whose `labels` hold all that the loss needs.

A `Trainer` hands a loss function the model's outputs and the batch's `labels`, nothing else, and expects the loss to be
divided by a count that it takes from the labels of the whole accumulated batch, on all processes. `PreferenceLabels`
is therefore a dict that counts as one item per pair: the sum of losses over that count is the mean over all pairs of
an optimiser step, however they are split into micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selective_pref_adapters.batch import PAIR_WEIGHTS, REF_LOGPS, SCORING_REF_LOGPS, labels_of, to_bits
from selective_pref_adapters.models import pad_token_id
from selective_pref_adapters.options import PAPER_MAX_LENGTH, SharePrefix, Truncation
from selective_pref_adapters.pairs import (
    Columns,
    RowError,
    TokenizedPair,
    Tokenizer,
    checked_weight,
    collate,
    pair_weights,
    preference_row,
    tokenize_pairs,
)
from selective_pref_adapters.reference_store.store import ReferenceStore

_IDS = ("chosen_ids", "rejected_ids", "chosen_prompt_length", "rejected_prompt_length")
_SPANS = ("chosen_uncounted", "rejected_uncounted")


class PreferenceLabels(dict[str, Any]):
    """The `labels` of a batch: its three tensors [2B T+1], stored log-probs and weights as bits, and the rows' places.

    The `Trainer` counts ``labels[..., 1:].ne(-100).sum()`` to learn what a loss has to be divided by: here, one per
    pair.
    """

    def __getitem__(self, key: Any) -> Any:
        return self if isinstance(key, tuple) else super().__getitem__(key)

    def ne(self, _: int) -> Tensor:
        """bool [B], all True. It stands in for ``labels.ne(-100)``, by which the `Trainer` counts items: B pairs."""
        return torch.ones(self.pairs, dtype=torch.bool, device=self["completion_mask"].device)

    @property
    def pairs(self) -> int:
        """B."""
        return self["places"].shape[0]

    @property
    def chosen_only(self) -> bool:
        """Whether the batch has no rejected rows: B rows instead of 2B."""
        return self["completion_mask"].shape[0] == self.pairs

    @property
    def places(self) -> list[str]:
        """Where each pair came from."""
        return [bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in self["places"].tolist()]


def _as_tensor(texts: list[str]) -> Tensor:
    """UTF-8 [B L], padded with 0: whatever carries a batch to its process carries tensors, not always strings."""
    raw = [text.encode("utf-8") for text in texts]
    width = max(map(len, raw))
    return torch.tensor([list(text.ljust(width, b"\0")) for text in raw], dtype=torch.uint8)


@dataclass
class PreferenceCollator:
    """Pairs → one batch, chosen rows first, padded on the right: ``Trainer(data_collator=PreferenceCollator(tok))``.

    It takes `TokenizedPair`s, dicts with the same fields (a `datasets.Dataset` of them), or raw rows of any schema that
    `preference_row` reads, which it tokenises as `tokenize_pairs` does. For supervised training (objective "sft") it
    leaves the rejected sides out, and rows of a prompt and one answer will do: the batch then has B rows.

    Attributes:
        tokenizer: the policy's.
        max_length: tokens of prompt + completion of a raw row; None for what policy and references can read, at most
            the paper's 4096. `SelectionCallback` sets it, and refuses more than they can read.
        truncation_mode: of raw rows, as in `tokenize_pairs`.
        columns: of raw rows, as in `preference_row`: ``{"prompt": "question", "chosen": "answer", ...}``.
        reference_store: where stored reference log-probs are looked up; None for a reference that runs.
        scoring_reference_store: likewise, of a second reference from which scores are made (Eq. 6).
        share_prefix: `auto` computes a pair's prompt once, and no padding, for policy and references, where their fused
            heads and the models allow it; `off` does not.
        chosen_only: leave rejected sides out; `SelectionCallback` sets it beside objective "sft".
        fused_head: whether to ask the model for log-probs instead of logits; `SelectionCallback` sets it.
    """

    tokenizer: Tokenizer
    max_length: int | None = None
    truncation_mode: Truncation = "keep_start"
    columns: Columns | None = field(default=None, kw_only=True)
    reference_store: ReferenceStore | None = None
    scoring_reference_store: ReferenceStore | None = None
    share_prefix: SharePrefix = "auto"
    chosen_only: bool = False
    fused_head: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.share_prefix not in ("auto", "off"):
            raise ValueError(f"share_prefix must be 'auto' or 'off'; got {self.share_prefix!r}")
        for name, store in self.stores.items():
            if not isinstance(store, ReferenceStore):
                raise TypeError(
                    f"{name} must be a ReferenceStore; got {type(store).__name__}: ReferenceStore.open(path)"
                )
            store.check_tokenizer(self.tokenizer)

    @property
    def stores(self) -> dict[str, ReferenceStore]:
        """The stores that there are, by name."""
        both = {"reference_store": self.reference_store, "scoring_reference_store": self.scoring_reference_store}
        return {name: store for name, store in both.items() if store is not None}

    def __call__(self, rows: Iterable[Any]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` [2B T+1] (or [B T+1], see `chosen_only`) for the model, `labels` for the loss.

        Raises:
            RowError, TypeError: a row is no preference pair, or nothing of it is left to train on.
            MissingRowsError: a store lacks a row.
        """
        pairs = self.pairs(rows)
        batch = collate(pairs, pad_token_id(self.tokenizer))
        labels = PreferenceLabels(batch, places=_as_tensor([pair.place for pair in pairs]))
        if (weights := pair_weights(pairs)) is not None:
            labels[PAIR_WEIGHTS] = to_bits(weights)
        for key, store in ((REF_LOGPS, self.reference_store), (SCORING_REF_LOGPS, self.scoring_reference_store)):
            if store is not None:
                labels[key] = to_bits(store.lookup(batch))
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        return inputs | ({"completion_labels": labels_of(batch)} if self.fused_head else {})

    def pairs(self, rows: Iterable[Any], name: str = "batch") -> list[TokenizedPair]:
        """Each row as token ids; `name` is where they stand, for error messages. Raises as `__call__` does."""
        return [self._pair(row, f"{name}, row {number}") for number, row in enumerate(rows)]

    def _pair(self, row: Any, place: str) -> TokenizedPair:
        pair = self._tokenized(row, place)
        return pair.chosen_only() if self.chosen_only else pair

    def _tokenized(self, row: Any, place: str) -> TokenizedPair:
        if isinstance(row, TokenizedPair):
            return row
        if not isinstance(row, Mapping):
            raise TypeError(
                "a row must be a TokenizedPair or a dict (with prompt, chosen, rejected as text or messages, or with "
                f"{', '.join(_IDS)}); got {type(row).__name__}"
            )
        place = str(row.get("place", place))
        given = {"rejected_ids": [], "rejected_prompt_length": 0, **row} if self.chosen_only else row
        if set(_IDS) <= given.keys():
            spans = {name: tuple((start, end) for start, end in row.get(name) or ()) for name in _SPANS}
            weight = None if row.get("weight") is None else checked_weight(row["weight"], place)
            return TokenizedPair(**{name: given[name] for name in _IDS}, **spans, place=place, weight=weight)
        if not row:
            raise RowError(f"{place} has no columns left: set remove_unused_columns=False in TrainingArguments")
        limit = self.max_length or min(PAPER_MAX_LENGTH, self.tokenizer.model_max_length)
        read = preference_row(dict(row), place, self.columns, chosen_only=self.chosen_only)
        try:
            (pair,), _ = tokenize_pairs([read], self.tokenizer, max_length=limit, truncation_mode=self.truncation_mode)
        except ValueError as error:
            raise RowError(
                f"{place} cannot be trained on: {error}. (tokenize_pairs, run beforehand, leaves such rows out and "
                "counts them)"
            ) from error
        return pair
