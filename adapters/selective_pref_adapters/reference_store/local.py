"""The log-probs that a model on this process gives to rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from selective_pref_adapters.heads import (
    computes_rows_by_themselves,
    frozen_per_token_logps,
    install_fused_head,
    row_per_token_logps,
)
from selective_pref_adapters.models import context_length, evaluating
from selective_pref_adapters.reference_store.in_step import in_step
from selective_pref_adapters.reference_store.rows import Row, RowLogps
from selective_pref_adapters.reference_store.shards import StoreError
from selective_pref_adapters.sharded import is_sharded, whole_shape

BATCH_TOKENS = 16384
"""Token positions of one batch on a GPU, padding included."""


def local_logps(
    rows: Sequence[Row], model: nn.Module, *, pad_token_id: int, batch_tokens: int = BATCH_TOKENS
) -> Iterator[RowLogps]:
    """The log-probs that a model on this process gives to rows: a `LogpSource`, once its options are bound.

    On a CPU each row is computed by itself, and a prompt once for all rows that begin with it; on a GPU, and where the
    model is sharded, rows of like length share a batch, and rows with the same prompt do. Of a sharded model every
    process takes part in every batch of each process.

    Raises:
        StoreError: a row is longer than the model can read, or holds ids that it does not have; before any is computed.
    """
    device = next(model.parameters()).device
    if is_sharded(model):
        install_fused_head(model, at_first_call=True)
        logps_of = partial(_logps_of, model, frozen_per_token_logps, pad_token_id, device)
        yield from in_step(_batches(rows, model, batch_tokens), logps_of, [_FILLER], device)
        return
    _check_readable(rows, model)
    with _undisturbed(model):
        install_fused_head(model)
    if device.type == "cuda":
        source, groups = frozen_per_token_logps, _groups(chain.from_iterable(_by_prompt(rows)), batch_tokens)
    elif computes_rows_by_themselves(model):
        source = row_per_token_logps
        groups = chain.from_iterable(_groups(some, batch_tokens) for some in _by_prompt(rows))
    else:
        source, groups = frozen_per_token_logps, ([row] for some in _by_prompt(rows) for row in some)
    for group in groups:
        yield _logps_of(model, source, pad_token_id, device, group)


_FILLER = Row(ids=np.zeros(2, dtype=np.int32), mask=np.array([False, True]))


def _batches(rows: Sequence[Row], model: nn.Module, batch_tokens: int) -> Iterator[list[Row]]:
    _check_readable(rows, model)
    yield from _groups(chain.from_iterable(_by_prompt(rows)), batch_tokens)


def _logps_of(
    model: nn.Module, source: Callable[..., Tensor], pad_token_id: int, device: torch.device, rows: list[Row]
) -> RowLogps:
    """The log-probs of rows that share a batch."""
    with _undisturbed(model), torch.autocast(device.type, enabled=False):
        logps = source(model, _collate(rows, pad_token_id, device)).float().cpu().numpy()
    return [(row, line[: len(row.ids) - 1][row.mask[1:]]) for row, line in zip(rows, logps, strict=True)]


def _check_readable(rows: Sequence[Row], model: Any) -> None:
    """Raises StoreError for the first row that the model cannot read."""
    context = context_length(model)
    vocabulary = whole_shape(model.get_input_embeddings().weight)[0]
    for row in rows:
        if context is not None and len(row.ids) > context:
            raise StoreError(
                f"{row.place}: {len(row.ids)} tokens are more than the reference can read ({context}): truncate the "
                f"pairs to what both models can read (max_length {context} or less), the same for this and for "
                "training"
            )
        if int(row.ids.max()) >= vocabulary or int(row.ids.min()) < 0:
            raise StoreError(
                f"{row.place}: token id {int(row.ids.max())} is outside the reference's vocabulary of {vocabulary}: "
                "tokenizer and reference do not belong together"
            )


def _by_prompt(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows that begin with the same prompt, prompt by prompt; the longest first."""
    found: dict[bytes, list[Row]] = {}
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        found.setdefault(row.ids[: int(row.mask.argmax())].tobytes(), []).append(row)
    yield from found.values()


def _groups(rows: Iterable[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Consecutive rows whose padded batch has at most `batch_tokens` positions (or one row)."""
    group: list[Row] = []
    for row in rows:
        widest = max(len(one.ids) for one in [*group, row])
        if group and (len(group) + 1) * widest > batch_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _collate(rows: Sequence[Row], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Rows as a batch, padded on the right."""

    def padded(sequences: Sequence[np.ndarray], value: int = 0) -> Tensor:
        tensors = [torch.from_numpy(sequence).to(torch.int64) for sequence in sequences]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    return {
        "input_ids": padded([row.ids for row in rows], pad_token_id),
        "attention_mask": padded([np.ones_like(row.mask) for row in rows]),
        "completion_mask": padded([row.mask for row in rows]),
    }


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's mode and every random state is what it was before."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())), evaluating(model):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
