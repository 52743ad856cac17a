"""Rows → log-probs of a served model → the store.

Few rows go into one request, few requests are under way at once. A request that fails (no answer in time, a status of
overload or error, an answer that is no JSON or not whole) is sent again as two halves, and a single row after a pause;
after the last attempt an error names the row. An answer that is whole but wrong is an error at once: other tokens than
were sent, another number of them, no log-prob or −inf (which means "not returned"). So is a status that blames the
request and not a row: a key, an address or a model that is not there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import TypeVar

from selective_pref_adapters.models import own_vocabulary
from selective_pref_adapters.pairs import TokenizedPair, Tokenizer
from selective_pref_adapters.reference_store.fill import Comparison, FillReport, compare_rows, fill_rows
from selective_pref_adapters.reference_store.identity import LOGPS_VERSION
from selective_pref_adapters.reference_store.rows import LogpSource, Row, RowLogps, as_rows, rows_of_pairs
from selective_pref_adapters.reference_store.served.answers import Texts, TryAgainError, ask
from selective_pref_adapters.reference_store.served.probe import check_server
from selective_pref_adapters.reference_store.served.server import Server, ServerError
from selective_pref_adapters.reference_store.shards import StoreError
from selective_pref_adapters.reference_store.spaces import Space, vocabulary_digest
from selective_pref_adapters.reference_store.store import ReferenceStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

DRIFT = 0.015
"""Nats: how far a served model may be from what it gave before, in the mean over the tokens of a few rows. A server's
own batches change 1e-5 in float32 and 7e-4 in bfloat16; a model that is served in bfloat16 instead of float32, 0.04."""

_COMPARED_ROWS = 8


def served_space(model: str, revision: str, tokenizer: Tokenizer) -> Space:
    """The identity of a served reference. Its weights cannot be read over HTTP: its name and revision stand for them.

    Args:
        model: the name it is served under.
        revision: what changes whenever weights, adapters, dtype or quantisation of what is served there change.
        tokenizer: the served model's own.
    """
    vocabulary = own_vocabulary(tokenizer)
    identity = {
        "kind": "served model",
        "scoring_version": LOGPS_VERSION,
        "model": model,
        "revision": revision,
        "vocabulary": vocabulary_digest(vocabulary),
    }
    return Space(identity=identity, vocabulary=vocabulary, label=f"{model}@{revision}" if revision else model)


def fill_from_server(
    store: ReferenceStore,
    pairs: Sequence[TokenizedPair],
    server: Server,
    tokenizer: Tokenizer,
    *,
    progress: bool = True,
) -> FillReport:
    """Asks a served model for the log-probs of those rows of `pairs` that the store lacks, and stores them.

    Where rows of these pairs are stored already, a few of them are asked for first: a server that gives other numbers
    than it gave before serves another model, and must have another revision. Whatever error ends it, the rows that were
    computed before are stored.

    Args:
        store: `ReferenceStore.create(path, served_space(...))`.
        pairs: token ids.
        server: where and how to ask.
        tokenizer: the served model's own, to compare with what the server makes of tokens and texts.
        progress: show a bar with an estimate of the time left.

    Raises:
        ServerError: the server cannot be reached, refuses, answers something else than was asked, or has another
            tokenizer.
        NonFiniteError: a log-prob is missing or infinite; names the row.
        StoreError: the server gives other numbers than are stored, or reads less than the longest row has.
        StoreWriteError: a shard could not be written.
    """
    named = store.space.identity.get("model")
    if store.space.identity.get("kind") != "served model" or named != server.model:
        raise StoreError(
            f"the space {store.space.name} ({store.space.label}) is not that of the served model {server.model!r}: "
            "open ReferenceStore.create(path, served_space(model, revision, tokenizer))"
        )
    rows = rows_of_pairs(pairs)
    source = partial(served_logps, server=server, tokenizer=tokenizer)
    return fill_rows(store, rows, compared_first(store, rows, source), progress=progress)


def compared_first(
    store: ReferenceStore, rows: Sequence[Row], source: LogpSource, tell: Callable[[str], None] = logger.info
) -> LogpSource:
    """A source that first asks again for some of the `rows` that are stored already, and compares.

    Args:
        store: what is stored.
        rows: all that are wanted, those that are stored among them.
        source: the served model.
        tell: is called with a sentence that says how much they differ.

    Raises:
        StoreError: when asked, if the numbers differ by more than `DRIFT` in the mean: another model, or the same in
            another dtype, is served under the old name and revision.
    """

    def logps(lacking: Sequence[Row]) -> Iterator[RowLogps]:
        different = as_rows(rows).different()
        stored = different.some(store.held(different))
        if len(stored):
            tell(check_drift(compare_rows(store, stored, source, sample=_COMPARED_ROWS, seed=0), store.space.label))
        yield from source(lacking)

    return logps


def check_drift(seen: Comparison, label: str) -> str:
    """A sentence that says how far a server's log-probs are from those stored as `label`.

    Raises:
        StoreError: more than `DRIFT` in the mean.
    """
    differ = (
        f"differ by {seen.mean_difference:.2g} nats in the mean over {seen.rows} rows from those stored as {label!r} "
        f"(by {seen.max_difference:.2g} at most, at {seen.worst})"
    )
    if seen.mean_difference > DRIFT:
        raise StoreError(
            f"the server gives log-probs that {differ}, and more than {DRIFT} in the mean is not noise: another model "
            "is served there now. Give it another revision, also where only its dtype or quantisation is another"
        )
    return f"the server's log-probs {differ}"


def served_logps(rows: Sequence[Row], server: Server, tokenizer: Tokenizer) -> Iterator[RowLogps]:
    """The log-probs that a served model gives to rows, as requests are answered: a `LogpSource` with its options bound.

    An interruption does not wait for pauses, nor for answers that have not come.

    Raises:
        ServerError, NonFiniteError, StoreError: see `fill_from_server`.
    """
    at_once = server.rows_per_request
    fresh = (list(rows[start : start + at_once]) for start in range(0, len(rows), at_once))
    again: list[list[Row]] = []  # halves of what failed
    stop, texts = threading.Event(), Texts(tokenizer)
    under_way: dict[Future[RowLogps], tuple[list[Row], int]] = {}
    told = False  # of an outage that still lasts
    with server.client() as client:

        def start(group: list[Row], attempt: int) -> None:
            def work() -> RowLogps:
                stop.wait(server.pause_before(attempt))
                return [] if stop.is_set() else ask(client, server, texts, group)

            under_way[in_a_thread(work)] = group, attempt

        try:
            if rows:
                check_server(client, server, rows, tokenizer, stop)
            while True:
                while len(under_way) < server.concurrency and (group := again.pop() if again else next(fresh, None)):
                    start(group, 0)
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    group, attempt = under_way.pop(future)
                    try:
                        computed = future.result()
                    except TryAgainError as error:
                        if len(group) > 1:
                            again += [group[len(group) // 2 :], group[: len(group) // 2]]
                        elif attempt + 1 < server.attempts:
                            if not told:
                                logger.warning(
                                    "%s: %s. Asking again, up to %d times", server.url, error, server.attempts
                                )
                            told = True
                            start(group, attempt + 1)
                        else:
                            raise ServerError(
                                f"{server.url}: {group[0].place} ({len(group[0].ids)} tokens) was asked for "
                                f"{server.attempts} times, at last with {error}. What was computed before is stored: "
                                "run the same command again when the server is well"
                            ) from error
                    else:
                        told = False
                        yield computed
        finally:
            stop.set()


def in_a_thread(work: Callable[[], T]) -> Future[T]:
    """The result of `work`, done in a thread that ends with the process. A pool of threads would wait, at the
    end, for answers that are no longer wanted."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
