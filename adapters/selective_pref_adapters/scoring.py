"""Who fills the store of reference log-probs: a local model.

In: a reference, and pairs as token ids. Out: rows in a `ReferenceStore`, and a report of what was scored and what was
there already. A reference is asked for every row once, whatever the runs that read it later do.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from selective_pref import NonFiniteError
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head
from selective_pref_adapters.pairs import TokenizedPair, Tokenizer
from selective_pref_adapters.reference_cache import (
    ReferenceStore,
    Row,
    Space,
    StoreError,
    digest_of_json,
    rows_of_pairs,
    vocabulary_digest,
)

SCORING_VERSION = 1
"""Part of every reference's identity: raised whenever a change of this code changes the numbers it gives."""

_UNREAD_BY_LOGPS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True, kw_only=True)
class ScoringReport:
    """What `fill_store` did.

    Attributes:
        rows: different rows (sides of pairs) that were asked for.
        hits: those that were stored already.
        scored: those that were scored now.
        forward_passes: calls of the model.
        tokens: token positions that went through the model.
        seconds: wall time of all of it.
    """

    rows: int
    hits: int
    scored: int
    forward_passes: int
    tokens: int
    seconds: float


def reference_space(model: nn.Module, tokenizer: Tokenizer, *, label: str = "reference") -> Space:
    """The identity of a local reference: everything that decides the log-probs it gives.

    Args:
        model: a causal LM, or a PEFT model around one with its adapters on or off as they will be while it scores;
            whole, not sharded over processes.
        tokenizer: the reference's own.
        label: what people call it; decides nothing.

    Raises:
        StoreError: weights are not here to be digested (sharded, or on the meta device).
    """
    vocabulary = dict(tokenizer.get_vocab())
    identity = {**model_identity(model), "vocabulary": vocabulary_digest(vocabulary)}
    return Space(identity=identity, vocabulary=vocabulary, label=label)


def model_identity(model: nn.Module) -> dict[str, Any]:
    """The part of a space's identity that the model alone decides."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = {k: v for k, v in causal.config.to_dict().items() if k not in _UNREAD_BY_LOGPS and not k.startswith("_")}
    weights, adapter = _weights_digests(model)
    return {
        "kind": "local model",
        "scoring_version": SCORING_VERSION,
        "architecture": type(causal).__name__,
        "config": digest_of_json(config),
        "weights": weights,
        "adapter": adapter,
        "dtype": str(causal.dtype).removeprefix("torch."),
        "attention": str(causal.config._attn_implementation),
    }


def _weights_digests(model: nn.Module) -> tuple[str, str]:
    """(digest of the base weights, digest of what adapters add to them or "none")."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        _digest_tensor(digest, name, tensor)
    return digest.hexdigest(), "none"


def _digest_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta or hasattr(tensor, "ds_id"):
        raise StoreError(f"the weights of {name} are not here: give a reference that is loaded whole on this process")
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), 64 << 20):  # from the device piece by piece
        digest.update(flat[start : start + (64 << 20)].cpu().numpy())


def fill_store(
    store: ReferenceStore,
    pairs: Sequence[TokenizedPair],
    model: nn.Module,
    *,
    pad_token_id: int,
    batch_tokens: int = 16384,
    progress: bool = True,
) -> ScoringReport:
    """Scores the rows of `pairs` that the store lacks, and stores them; the others cost nothing.

    The model is in evaluation mode meanwhile, and every random state is afterwards as it was before. On a CPU row
    after row goes through `frozen_per_token_logps`, so that what is stored equals, bit by bit, what a reference gives
    that runs beside the policy. On a GPU rows of like length share a batch.

    Args:
        store: opened by `ReferenceStore.create(path, reference_space(model, tokenizer))`.
        pairs: token ids.
        model: the reference.
        pad_token_id: what fills the ends of shorter rows.
        batch_tokens: token positions of one batch on a GPU, padding included.
        progress: show a bar with an estimate of the time left.

    Raises:
        StoreError: the model is not the one that the store's space names, or a row does not fit into it.
        NonFiniteError: the model gave NaN or an infinity; names the row. What was scored before is stored.
        StoreWriteError: a shard could not be written. What was written before is stored.
    """
    started = time.monotonic()
    rows = {row.key: row for row in rows_of_pairs(pairs) if row.values}
    lacking = store.missing_rows(rows.values())
    forward_passes = tokens = 0
    if lacking:
        _check_identity(store, model)
        _check_rows(lacking, model)
        install_fused_head(model)
        lacking.sort(key=lambda row: len(row.ids), reverse=True)  # the longest first: what does not fit fails at once
        device = next(model.parameters()).device
        total = sum(len(row.ids) for row in lacking)
        with (
            _as_before(model),
            store.writer() as writer,
            tqdm(total=total, desc="scoring", unit="tok", unit_scale=True, disable=not progress) as bar,
        ):
            for group in _groups(lacking, batch_tokens if device.type == "cuda" else 1):
                logps = frozen_per_token_logps(model, _collate(group, pad_token_id, device)).float().cpu().numpy()
                forward_passes += 1
                for row, values in zip(group, logps, strict=True):
                    values = values[: len(row.ids) - 1][row.mask[1:]]
                    _check_finite(row, values)
                    writer.add(row, values)
                    tokens += len(row.ids)
                bar.update(sum(len(row.ids) for row in group))
    return ScoringReport(
        rows=len(rows),
        hits=len(rows) - len(lacking),
        scored=len(lacking),
        forward_passes=forward_passes,
        tokens=tokens,
        seconds=time.monotonic() - started,
    )


def _check_identity(store: ReferenceStore, model: nn.Module) -> None:
    ours = model_identity(model)
    stored = {name: store.space.identity.get(name) for name in ours}
    if ours != stored:
        differs = ", ".join(f"{n} ({stored[n]} stored, {ours[n]} given)" for n in ours if ours[n] != stored[n])
        raise StoreError(
            f"the space {store.space.name} ({store.space.label}) belongs to another reference; different: "
            f"{differs}. Give the store of this model: ReferenceStore.create(path, reference_space(model, tokenizer))"
        )


def _check_rows(rows: Sequence[Row], model: Any) -> None:
    """Raises StoreError for the first row that the model cannot read."""
    config = model.config
    context = getattr(config, "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().num_embeddings
    for row in rows:
        if context is not None and len(row.ids) > context:
            raise StoreError(
                f"{row.place}: {len(row.ids)} tokens are more than the reference can read ({context}): truncate pairs "
                "to what both models can read (max_length), the same in scoring and in training"
            )
        if int(row.ids.max()) >= vocabulary or int(row.ids.min()) < 0:
            raise StoreError(
                f"{row.place}: token ids up to {int(row.ids.max())} are outside the reference's vocabulary of "
                f"{vocabulary}: tokenizer and reference do not belong together"
            )


def _check_finite(row: Row, values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        at = np.flatnonzero(row.mask[1:])[bad[0]] + 1
        raise NonFiniteError(
            f"{row.place}: the reference gives {values[bad[0]]} to token {at} (id {row.ids[at]}); {len(bad)} of "
            f"{len(values)} log-probs of this row are not finite. It is not stored; what was scored before is"
        )


def _groups(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Consecutive rows, the longest first, whose padded batch has at most `batch_tokens` positions (or one row)."""
    group: list[Row] = []
    for row in rows:
        if group and (len(group) + 1) * len(group[0].ids) > batch_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _collate(rows: Sequence[Row], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Rows as a batch, padded on the right."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "completion_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for number, row in enumerate(rows):
        batch["input_ids"][number, : len(row.ids)] = torch.from_numpy(row.ids)
        batch["attention_mask"][number, : len(row.ids)] = 1
        batch["completion_mask"][number, : len(row.ids)] = torch.from_numpy(row.mask)
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's mode and every random state is what it was."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
