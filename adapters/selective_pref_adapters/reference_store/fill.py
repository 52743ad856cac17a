"""Who fills the store of reference log-probs: a local model here, a served one in `served.py`.

In: a reference, and pairs as token ids. Out: rows in a `ReferenceStore`, and a report of what was scored and what was
there already. A reference is asked for each row once, whatever the runs that read it later do; where several processes
fill a store together, each asks its own copy for its own share.

    store = ReferenceStore.create(path, reference_space(model, tokenizer))
    fill_store(store, pairs, model, pad_token_id=tokenizer.pad_token_id)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from selective_pref import NonFiniteError
from selective_pref_adapters.heads import (
    frozen_per_token_logps,
    install_fused_head,
    row_per_token_logps,
    scores_rows_by_themselves,
)
from selective_pref_adapters.models import context_length
from selective_pref_adapters.pairs import TokenizedPair
from selective_pref_adapters.reference_store.identity import model_identity
from selective_pref_adapters.reference_store.store import (
    FLUSH_SECONDS,
    ReferenceStore,
    Row,
    StoreError,
    rows_of_pairs,
)

Scored: TypeAlias = list[tuple[Row, np.ndarray]]
"""What one call of a reference gives: rows, each with float32 log-probs of its completion tokens."""
Scorer: TypeAlias = Callable[[Sequence[Row]], Iterable[Scored]]
"""A reference as `fill_rows` asks it: all rows that are lacking, the longest first, in; calls' results, in any order,
out."""

BATCH_TOKENS = 16384


@dataclass(frozen=True, kw_only=True)
class ScoringReport:
    """What filling a store took, over all processes.

    Attributes:
        rows: different rows (sides of pairs) that were asked for.
        hits: those that were stored already.
        scored: those that were scored now.
        forward_passes: batches that the model was given, or requests that were answered.
        tokens: token positions of the rows that were scored.
        seconds: wall time of all of it, on this process.
    """

    rows: int
    hits: int
    scored: int
    forward_passes: int
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Stored log-probs beside those that a reference gives now.

    Attributes:
        rows: how many were compared.
        identical: how many are equal bit by bit.
        max_difference, mean_difference: of their log-probs, in nats.
        worst: the place of the row with the largest difference.
    """

    rows: int
    identical: int
    max_difference: float
    mean_difference: float
    worst: str


# --- filling ---------------------------------------------------------------------------------------------------------


def fill_store(
    store: ReferenceStore,
    pairs: Sequence[TokenizedPair],
    model: nn.Module,
    *,
    pad_token_id: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> ScoringReport:
    """Scores the rows of `pairs` that the store lacks, and stores them; the others cost nothing.

    The model is in evaluation mode and outside of autocast meanwhile, and every random state is afterwards as it was
    before. On a CPU each row is computed by itself, so that its log-probs depend on the row alone, and a prompt once
    for all rows that begin with it. On a GPU rows of like length share a batch, and rows with the same prompt do. A
    reference that runs beside the policy reads batches of other shapes, whose log-probs differ in their last digits:
    `objectives.without_rounding` makes ties of such differences.

    With an initialised process group every process must call this with the same pairs; each scores its share, and all
    of them wait for the last and find all rows.

    Args:
        store: of this model: `ReferenceStore.create(path, reference_space(model, tokenizer))`.
        pairs: token ids.
        model: the reference.
        pad_token_id: what fills the ends of shorter rows.
        batch_tokens: token positions of one batch on a GPU, padding included.
        progress: show a bar with an estimate of the time left.

    Raises:
        StoreError: the model is not the one that the store's space names, or cannot read a row.
        NonFiniteError: the model gave NaN or an infinity; names the row. What was scored before is stored.
        StoreWriteError: a shard could not be written. What was written before is stored.
    """

    def score(rows: Sequence[Row]) -> Iterator[Scored]:
        _check_identity(store, model)
        yield from local_scores(rows, model, pad_token_id=pad_token_id, batch_tokens=batch_tokens)

    return fill_rows(store, rows_of_pairs(pairs), score, progress=progress)


def fill_rows(
    store: ReferenceStore,
    rows: Iterable[Row],
    scorer: Scorer,
    *,
    flush_seconds: float = FLUSH_SECONDS,
    progress: bool = True,
) -> ScoringReport:
    """Asks `scorer` for the rows that the store lacks, and stores what it gives: `fill_store` for any reference.

    Args:
        store: where to.
        rows: what is wanted; the same on every process.
        scorer: the reference.
        flush_seconds: what was scored is written at least this often.
        progress: show a bar with an estimate of the time left.

    Raises:
        StoreError: another process failed, or does not share the folder; and whatever the scorer raises. What was
            scored before is stored.
    """
    started = time.monotonic()
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    unique = {row.key: row for row in rows if row.values}
    # The longest first: what does not fit fails at once. Dealt in this order, shares are alike.
    ordered = sorted(unique.values(), key=lambda row: (-len(row.ids), row.key))
    share = ordered[rank::world]
    lacking = store.missing_rows(share)
    calls, failure = 0, None
    bar = tqdm(
        total=sum(len(row.ids) for row in lacking),
        desc="scoring" if world == 1 else f"scoring, process 1 of {world}",
        unit="tok",
        unit_scale=True,
        disable=not progress or rank > 0 or not lacking,
    )
    try:
        if lacking:
            with bar, store.writer(flush_seconds=flush_seconds) as writer:
                for scored in scorer(lacking):
                    for row, values in scored:
                        check_finite(row, values)
                        writer.add(row, values)
                    calls += 1
                    bar.update(sum(len(row.ids) for row, _ in scored))
    except Exception as error:
        if world == 1:
            raise
        failure = error  # raised below, when the other processes know
    tokens = sum(len(row.ids) for row in lacking)
    totals = _sums([len(share) - len(lacking), len(lacking), calls, tokens, failure is not None])
    if failure is not None:
        raise failure
    if totals[-1]:
        raise StoreError(f"scoring failed on {totals[-1]} other processes; see their messages. What was scored is kept")
    still = store.missing_rows(ordered)
    if still:
        raise StoreError(
            f"{len(still)} of {len(ordered)} rows are not in {store.folder} after scoring (the first: "
            f"{still[0].place}). Do all processes have the same pairs, and the same folder?"
        )
    return ScoringReport(
        rows=len(ordered),
        hits=totals[0],
        scored=totals[1],
        forward_passes=totals[2],
        tokens=totals[3],
        seconds=time.monotonic() - started,
    )


def compare_rows(store: ReferenceStore, rows: Iterable[Row], scorer: Scorer, *, sample: int, seed: int) -> Comparison:
    """Asks `scorer` again for a random sample of those `rows` that are stored, and compares. Stores nothing.

    Raises:
        StoreError: none of the rows is stored.
    """
    unique = {row.key: row for row in rows if row.values}
    lacking = {row.key for row in store.missing_rows(unique.values())}
    stored = sorted((row for key, row in unique.items() if key not in lacking), key=lambda row: row.key)
    if not stored:
        raise StoreError(f"none of {len(unique)} rows is stored in {store.folder}: there is nothing to compare")
    drawn = random.Random(seed).sample(stored, min(sample, len(stored)))
    drawn.sort(key=lambda row: len(row.ids), reverse=True)
    differences: list[np.ndarray] = []
    worst, worst_place, identical = -1.0, "", 0
    for scored in scorer(drawn):
        for row, values in scored:
            check_finite(row, values)
            (old,) = store.values_of([row])
            if old is None:
                raise StoreError(f"{row.place} was damaged or removed while it was compared: run the command again")
            difference = np.abs(old.astype(np.float64) - values)
            differences.append(difference)
            identical += old.tobytes() == values.tobytes()
            if difference.max() > worst:
                worst, worst_place = float(difference.max()), row.place
    return Comparison(
        rows=len(drawn),
        identical=identical,
        max_difference=worst,
        mean_difference=float(np.concatenate(differences).mean()),
        worst=worst_place,
    )


def check_finite(row: Row, values: np.ndarray) -> None:
    """Raises NonFiniteError, which names row and token, where a log-prob is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        at = np.flatnonzero(row.mask[1:])[bad[0]] + 1
        raise NonFiniteError(
            f"{row.place}: the reference gives {values[bad[0]]} to token {at} (id {row.ids[at]}); {len(bad)} of "
            f"{len(values)} log-probs of this row are not finite. It is not stored; what was scored before is"
        )


def _check_identity(store: ReferenceStore, model: nn.Module) -> None:
    ours = model_identity(model)
    stored = {name: store.space.identity.get(name) for name in ours}
    if ours != stored:
        differ = ", ".join(f"{name} ({stored[name]}, not {ours[name]})" for name in ours if ours[name] != stored[name])
        raise StoreError(
            f"the space {store.space.name} ({store.space.label}) belongs to another reference. Different: {differ}. "
            "Open the store of this model: ReferenceStore.create(path, reference_space(model, tokenizer))"
        )


def _sums(counts: Sequence[int]) -> list[int]:
    """Of every count, over all processes; one message, so that nobody waits for a process that failed."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(counts)
    total = torch.tensor(counts, dtype=torch.int64, device="cpu" if "gloo" in dist.get_backend() else "cuda")
    dist.all_reduce(total)
    return total.tolist()


# --- a local model ---------------------------------------------------------------------------------------------------


def local_scores(
    rows: Sequence[Row], model: nn.Module, *, pad_token_id: int, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Scored]:
    """The log-probs that a model on this process gives to rows: a `Scorer`, once its options are bound.

    Raises:
        StoreError: a row is longer than the model can read, or holds ids that it does not have; before any is scored.
    """
    _check_readable(rows, model)
    with _as_before(model):
        install_fused_head(model)
    device = next(model.parameters()).device
    if device.type == "cuda":
        score, groups = frozen_per_token_logps, _groups(chain.from_iterable(_by_prompt(rows)), batch_tokens)
    elif scores_rows_by_themselves(model):
        score = row_per_token_logps
        groups = chain.from_iterable(_groups(some, batch_tokens) for some in _by_prompt(rows))
    else:
        score, groups = frozen_per_token_logps, ([row] for some in _by_prompt(rows) for row in some)
    for group in groups:
        with _as_before(model), torch.autocast(device.type, enabled=False):
            logps = score(model, _collate(group, pad_token_id, device)).float().cpu().numpy()
        yield [(row, line[: len(row.ids) - 1][row.mask[1:]]) for row, line in zip(group, logps, strict=True)]


def _check_readable(rows: Sequence[Row], model: Any) -> None:
    """Raises StoreError for the first row that the model cannot read."""
    context = context_length(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for row in rows:
        if context is not None and len(row.ids) > context:
            raise StoreError(
                f"{row.place}: {len(row.ids)} tokens are more than the reference can read ({context}): truncate the "
                f"pairs to what both models can read (max_length {context} or less), the same for scoring and for "
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
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
