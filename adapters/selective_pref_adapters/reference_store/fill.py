"""Fills the store: asks a reference for the log-probs of the rows that are lacking, and writes them.

In: a reference, and pairs as token ids. Out: rows in a `ReferenceStore`, and a report of what was computed and what was
there already. A reference is asked for each row once, whatever the runs that read it later do; where several processes
fill a store together, each asks its own copy for its own share. A model on this process is asked by `local`, a server
by `served`.

    store = ReferenceStore.create(path, reference_space(model, tokenizer))
    fill_store(store, pairs, model, pad_token_id=tokenizer.pad_token_id)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from selective_pref import NonFiniteError
from selective_pref_adapters.pairs import TokenizedPair
from selective_pref_adapters.reference_store.identity import model_identity
from selective_pref_adapters.reference_store.local import BATCH_TOKENS, check_readable, local_logps, most_of_all
from selective_pref_adapters.reference_store.rows import WINDOW, LogpSource, Row, RowLogps, Rows, as_rows, rows_of_pairs
from selective_pref_adapters.reference_store.shards import StoreError, StoreWriteError, writing
from selective_pref_adapters.reference_store.spaces import note_filling
from selective_pref_adapters.reference_store.store import ReferenceStore
from selective_pref_adapters.reference_store.writer import FLUSH_SECONDS
from selective_pref_adapters.sharded import is_sharded


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """What filling a store took, over all processes.

    Attributes:
        rows: different rows (sides of pairs) that were asked for.
        hits: those that were stored already.
        computed: those whose log-probs were computed now.
        forward_passes: batches that the model was given, or requests that were answered.
        tokens: token positions of the rows that were computed.
        seconds: wall time of all of it, on this process.
    """

    rows: int
    hits: int
    computed: int
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
        worst: where the row with the largest difference came from.
    """

    rows: int
    identical: int
    max_difference: float
    mean_difference: float
    worst: str


def fill_store(
    store: ReferenceStore,
    pairs: Iterable[TokenizedPair],
    model: nn.Module,
    *,
    pad_token_id: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
    engine: Callable[[], Any] | None = None,
    cut: tuple[int, str] | None = None,
) -> FillReport:
    """Computes the log-probs of those rows of `pairs` that the store lacks, and stores them; the others cost nothing.

    The model is in evaluation mode and outside of autocast meanwhile, and every random state is afterwards as it was
    before. On a CPU each row is computed by itself, so that its log-probs depend on the row alone, and a prompt once
    for all rows that begin with it. On a GPU rows of like length share a batch, and rows with the same prompt do. A
    reference that runs beside the policy reads batches of other shapes, whose log-probs differ in their last digits:
    `objectives.without_rounding` makes ties of such differences.

    With an initialised process group every process must call this with the same pairs; each computes its share, and all
    of them wait for the last and find all rows. A model may be sharded over them (ZeRO-3, FSDP2): all processes then
    call it equally often, and end together where one of them cannot go on.

    Args:
        store: of this model: `ReferenceStore.create(path, reference_space(model, tokenizer))`.
        pairs: token ids; of a `PairTable` some thousand rows are in memory at a time.
        model: the reference.
        pad_token_id: what fills the ends of shorter rows.
        batch_tokens: token positions of one batch on a GPU, padding included.
        progress: show a bar with an estimate of the time left.
        engine: gives what is called in place of the model, where an engine wraps it; asked only if rows are lacking.
        cut: max_length and truncation_mode of the pairs, which a later error about a lacking row can say then.

    Raises:
        StoreError: the model is not the one that the store's space names, or cannot read a row.
        NonFiniteError: the model gave NaN or an infinity; names the row. What was computed before is stored.
        StoreWriteError: a shard could not be written. What was written before is stored.
    """

    wanted, together = rows_of_pairs(pairs), is_sharded(model)

    def logps(rows: Sequence[Row]) -> Iterator[RowLogps]:
        _check_identity(store, model)
        if together:  # the same error on every process, whoever's row it is
            check_readable(wanted, model)
        running = None if engine is None else engine()
        yield from local_logps(rows, model, pad_token_id=pad_token_id, batch_tokens=batch_tokens, running=running)

    report = fill_rows(store, wanted, logps, progress=progress, together=together)
    if cut is not None and report.computed and not (dist.is_initialized() and dist.get_rank()):
        with writing(store.folder):
            note_filling(store.folder, *cut)
    return report


def fill_rows(
    store: ReferenceStore,
    rows: Iterable[Row],
    source: LogpSource,
    *,
    flush_seconds: float = FLUSH_SECONDS,
    progress: bool = True,
    together: bool = False,
) -> FillReport:
    """Asks `source` for the rows that the store lacks, and stores what it gives: `fill_store` for any reference.

    Args:
        store: where to.
        rows: what is wanted; the same on every process.
        source: the reference.
        flush_seconds: what was computed is written at least this often.
        progress: show a bar with an estimate of the time left.
        together: every process has to ask `source` if one of them lacks rows, and it yields equally often on all of
            them (nothing where it has no rows); else each process asks for itself.

    Raises:
        StoreError: another process failed, or does not share the folder; and whatever the source raises. What was
            computed before is stored.
    """
    started = time.monotonic()
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    wanted = as_rows(rows).different()
    share = wanted.some(_longest_first(wanted)[rank::world])  # dealt in this order, shares are alike
    lacking = share.some(~store.held(share))
    tokens = int(lacking.tokens.sum())
    bar = tqdm(
        total=tokens,
        desc="log-probs" if world == 1 else f"log-probs, process 1 of {world}",
        unit="tok",
        unit_scale=True,
        disable=not progress or rank > 0 or not len(lacking),
    )
    calls, failure = 0, None
    if len(lacking) or (together and most_of_all(len(lacking))):
        calls, failure = _store_what_it_gives(store, lacking, source, flush_seconds, bar, together)
    if failure is not None and world == 1:
        raise failure
    totals = _sums([len(share) - len(lacking), len(lacking), calls, tokens, failure is not None])
    if failure is not None:
        raise failure
    if totals[-1]:
        raise StoreError(
            f"computing log-probs failed on {totals[-1]} other processes: see their messages. What was computed before "
            "is stored"
        )
    still = np.flatnonzero(~store.known(wanted))
    if len(still):
        raise StoreError(
            f"{len(still)} of {len(wanted)} rows are not in {store.folder} after all were computed (the first: "
            f"{wanted[int(still[0])].place}). Do all processes have the same pairs, and the same folder?"
        )
    return FillReport(
        rows=len(wanted),
        hits=totals[0],
        computed=totals[1],
        forward_passes=totals[2],
        tokens=totals[3],
        seconds=time.monotonic() - started,
    )


def _longest_first(rows: Rows) -> np.ndarray:
    """The order in which rows are asked for, int64 [N]: `WINDOW` neighbours after the other, the longest row first.

    Neighbours often share a prompt. The window with the longest row comes first: what does not fit fails at once.
    """
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    longest = np.maximum.reduceat(rows.tokens, np.arange(0, len(rows), WINDOW))
    place = np.argsort(np.argsort(-longest, kind="stable"))  # of each window
    return np.lexsort((rows.keys, -rows.tokens, np.repeat(place, WINDOW)[: len(rows)]))


def _store_what_it_gives(
    store: ReferenceStore, lacking: Rows, source: LogpSource, flush_seconds: float, bar: Any, together: bool
) -> tuple[int, Exception | None]:
    """(calls of the source that gave rows, what went wrong); what was computed before an error is stored."""
    calls, failure = 0, None
    try:
        with bar, ExitStack() as opened:
            writer = None
            try:
                writer = opened.enter_context(store.writer(flush_seconds=flush_seconds))
            except StoreError as error:
                failure = error
            stopped = most_of_all(failure is not None) if together else failure is not None
            if writer is None or stopped:
                return calls, failure
            for computed in source(lacking):
                try:
                    for row, values in computed:
                        check_finite(row, values)
                        writer.add(row, values)
                    calls += bool(computed)
                    bar.update(sum(len(row.ids) for row, _ in computed))
                except Exception as error:
                    failure = error
                if most_of_all(failure is not None) if together else failure is not None:
                    break
    except Exception as error:
        if together and not isinstance(error, StoreWriteError):
            raise  # by all, or in a forward, inside of which the others wait: they end when this process does
        failure = error
    return calls, failure


def compare_rows(
    store: ReferenceStore, rows: Iterable[Row], source: LogpSource, *, sample: int, seed: int
) -> Comparison:
    """Asks `source` again for a random sample of those `rows` that are stored, and compares. Stores nothing.

    Raises:
        StoreError: none of the rows is stored.
    """
    different = as_rows(rows).different()
    stored = different.some(store.held(different))
    if not len(stored):
        raise StoreError(f"none of {len(different)} rows is stored in {store.folder}: there is nothing to compare")
    drawn = random.Random(seed).sample(range(len(stored)), min(sample, len(stored)))
    drawn = list(stored.some(np.argsort(stored.keys)[drawn]))
    drawn.sort(key=lambda row: len(row.ids), reverse=True)
    differences: list[np.ndarray] = []
    worst, worst_place, identical = -1.0, "", 0
    for computed in source(drawn):
        for row, values in computed:
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
            f"{len(values)} log-probs of this row are not finite. It is not stored; what was computed before is"
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
    """The sum of each count over all processes. A process that failed counts, too, so that no other waits for it."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(counts)
    total = torch.tensor(counts, dtype=torch.int64, device="cpu" if "gloo" in dist.get_backend() else "cuda")
    dist.all_reduce(total)
    return total.tolist()
