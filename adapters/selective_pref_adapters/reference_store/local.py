"""The log-probs that a model on this process gives to rows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from selective_pref_adapters.heads import (
    computes_rows_by_themselves,
    frozen_per_token_logps,
    install_fused_head,
    row_per_token_logps,
)
from selective_pref_adapters.models import context_length, evaluating
from selective_pref_adapters.reference_store.rows import WINDOW, Row, RowLogps
from selective_pref_adapters.reference_store.shards import StoreError
from selective_pref_adapters.sharded import is_sharded, whole_shape

BATCH_TOKENS = 16384
"""Token positions of one batch on a GPU, padding included."""


def local_logps(
    rows: Sequence[Row],
    model: nn.Module,
    *,
    pad_token_id: int,
    batch_tokens: int = BATCH_TOKENS,
    running: Any = None,
) -> Iterator[RowLogps]:
    """The log-probs that a model gives to rows: a `LogpSource`, once its options are bound.

    On a CPU each row is computed by itself, and a prompt once for all rows that begin with it; on a GPU rows of like
    length share a batch, and rows with the same prompt do. A model that is sharded takes every process for each of its
    calls: one that has no more rows takes part with a made-up one, and yields nothing for it.

    Args:
        rows: this process's.
        model: a causal LM.
        pad_token_id: what fills the ends of shorter rows.
        batch_tokens: token positions of one batch on a GPU, padding included.
        running: what is called, where an engine wraps the model; None for the model itself.

    Raises:
        StoreError: a row is longer than the model can read, or holds ids that it does not have; before any is computed.
    """
    together, running = is_sharded(model), model if running is None else running
    if not together:
        check_readable(rows, model)
    with _undisturbed(model):
        install_fused_head(model, at_first_call=together)
    device = next(model.parameters()).device
    by_themselves = device.type != "cuda" and not together and computes_rows_by_themselves(model)
    source = row_per_token_logps if by_themselves else frozen_per_token_logps

    def groups_of(some: Sequence[Row]) -> Iterator[list[Row]]:
        if device.type == "cuda":
            return _groups(chain.from_iterable(_by_prompt(some)), batch_tokens)
        if by_themselves:
            return chain.from_iterable(_groups(alike, batch_tokens) for alike in _by_prompt(some))
        return ([row] for alike in _by_prompt(some) for row in alike)

    windows = -(-len(rows) // WINDOW)
    for start in range(0, WINDOW * (most_of_all(windows) if together else windows), WINDOW):
        groups = groups_of(rows[start : start + WINDOW])
        for group in _as_often_everywhere(groups) if together else groups:
            asked = group or [_MADE_UP]
            with _undisturbed(model), torch.autocast(device.type, enabled=False):
                logps = source(running, _collate(asked, pad_token_id, device)).float().cpu().numpy()
            yield [(row, line[: len(row.ids) - 1][row.mask[1:]]) for row, line in zip(group, logps, strict=bool(group))]


_MADE_UP = Row(ids=np.zeros(2, dtype=np.int32), mask=np.array([False, True]))


def _as_often_everywhere(groups: Iterable[list[Row]]) -> Iterator[list[Row]]:
    """The groups of this process, then empty ones, until every process has had as many as the one with the most."""
    own = list(groups)
    most = most_of_all(len(own))
    yield from own
    for _ in range(most - len(own)):
        yield []


def most_of_all(count: int) -> int:
    """The largest count of any process; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    largest = torch.tensor(count, device="cpu" if "gloo" in dist.get_backend() else "cuda")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def check_readable(rows: Sequence[Row], model: Any) -> None:
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
