"""A reference that another process serves over HTTP fills the store.

In: the address of a server that speaks OpenAI's completions protocol, and rows of token ids. Out: the log-probs that
the served model gives to them, checked token by token. Two ways of asking:

    completions      `echo` and `logprobs`: the prompt comes back with a log-prob for each of its tokens
    prompt_logprobs  vLLM's own: for each position, log-probs by token id

Before the first row is scored a few short requests find out whether the server serves this model, with this tokenizer
(`served_probe`). Then few rows go into one request, few requests are under way at once. A request that fails (no answer
in time, a status of overload or error, an answer that is no JSON or not whole) is asked again in two halves, a single
row after a pause, and at last gives up with an error that names the row. An answer that is whole but wrong is an error
at once: other tokens than were sent, another number of them, no log-prob or −inf (which means "not returned"). So is a
status that blames the request and not a row: a key, an address or a model that is not there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial

from selective_pref_adapters.pairs import TokenizedPair, Tokenizer
from selective_pref_adapters.reference_store.fill import (
    Scored,
    Scorer,
    ScoringReport,
    compare_rows,
    fill_rows,
)
from selective_pref_adapters.reference_store.identity import SCORING_VERSION
from selective_pref_adapters.reference_store.served_answers import Texts, TryAgainError, ask
from selective_pref_adapters.reference_store.served_probe import check_server
from selective_pref_adapters.reference_store.server import Protocol, Server, ServerError
from selective_pref_adapters.reference_store.spaces import own_vocabulary, vocabulary_digest
from selective_pref_adapters.reference_store.store import ReferenceStore, Row, Space, StoreError, rows_of_pairs

__all__ = [
    "DRIFT",
    "Protocol",
    "Server",
    "ServerError",
    "fill_from_server",
    "served_scorer",
    "served_scores",
    "served_space",
    "steady",
]

logger = logging.getLogger(__name__)

DRIFT = 0.015
"""Nats: how far a served model may be from what it gave before, in the mean over the tokens of a few rows. A server's
own batches change 1e-5 in float32 and 7e-4 in bfloat16; a model that is served in bfloat16 instead of float32, 0.04."""

_COMPARED_ROWS = 8


def served_space(model: str, revision: str, tokenizer: Tokenizer) -> Space:
    """The identity of a served reference. Nobody can read its weights from here: its name and revision stand for them.

    Args:
        model: the name it is served under.
        revision: what changes whenever weights, adapters, dtype or quantisation of what is served there change.
        tokenizer: the served model's own.
    """
    vocabulary = own_vocabulary(tokenizer)
    identity = {
        "kind": "served model",
        "scoring_version": SCORING_VERSION,
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
) -> ScoringReport:
    """Scores the rows of `pairs` that the store lacks with a served model, and stores them; the others cost nothing.

    Where rows of these pairs are stored already, a few of them are asked for first: a server that gives other numbers
    than it gave before serves another model, and must have another revision.

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
        In every case what was scored before is stored.
    """
    named = store.space.identity.get("model")
    if store.space.identity.get("kind") != "served model" or named != server.model:
        raise StoreError(
            f"the space {store.space.name} ({store.space.label}) is not that of the served model {server.model!r}: "
            "open ReferenceStore.create(path, served_space(model, revision, tokenizer))"
        )
    rows = rows_of_pairs(pairs)
    return fill_rows(store, rows, steady(store, rows, served_scorer(server, tokenizer)), progress=progress)


def served_scorer(server: Server, tokenizer: Tokenizer) -> Scorer:
    """A served model as `fill_rows` and `compare_rows` ask it."""
    return partial(served_scores, server=server, tokenizer=tokenizer)


def steady(
    store: ReferenceStore, rows: Sequence[Row], scorer: Scorer, tell: Callable[[str], None] = logger.info
) -> Scorer:
    """A scorer that first compares what it gives to some of `rows` that are stored already with what is stored.

    Args:
        store: what is stored.
        rows: all that are wanted, those that are stored among them.
        scorer: who gave them.
        tell: is called with a sentence that says what was seen.

    Raises:
        StoreError: when asked, if the numbers differ by more than `DRIFT` in the mean: another model, or the same in
            another dtype, is served under the old name and revision.
    """

    def score(lacking: Sequence[Row]) -> Iterator[Scored]:
        absent = {row.key for row in lacking}
        stored = [row for row in rows if row.key not in absent and store.has(row)]
        if any(row.values for row in stored):
            seen = compare_rows(store, stored, scorer, sample=_COMPARED_ROWS, seed=0)
            differ = (
                f"differ by {seen.mean_difference:.2g} nats in the mean over {seen.rows} rows from those stored as "
                f"{store.space.label!r} (by {seen.max_difference:.2g} at most, at {seen.worst})"
            )
            if seen.mean_difference > DRIFT:
                raise StoreError(
                    f"the server gives log-probs that {differ}, and more than {DRIFT} in the mean is not noise: "
                    "another model is served there now. Give it another revision, also where only its dtype or "
                    "quantisation is another"
                )
            tell(f"the server's log-probs {differ}")
        yield from scorer(lacking)

    return score


def served_scores(rows: Sequence[Row], server: Server, tokenizer: Tokenizer) -> Iterator[Scored]:
    """The log-probs that a served model gives to rows, in the order in which requests are answered: a `Scorer`.

    An interruption does not wait for pauses, nor for answers that have not come.

    Raises:
        ServerError, NonFiniteError, StoreError: see `fill_from_server`.
    """
    todo = [
        list(rows[start : start + server.rows_per_request]) for start in range(0, len(rows), server.rows_per_request)
    ]
    todo.reverse()
    stop, texts = threading.Event(), Texts(tokenizer)
    under_way: dict[Future[Scored], tuple[list[Row], int]] = {}
    with server.client() as client:

        def start(group: list[Row], attempt: int) -> None:
            def work() -> Scored:
                stop.wait(server.pause_before(attempt))
                return [] if stop.is_set() else ask(client, server, texts, group)

            under_way[_in_a_thread(work)] = group, attempt

        try:
            if rows:
                check_server(client, server, rows, tokenizer, stop)
            while todo or under_way:
                while todo and len(under_way) < server.concurrency:
                    start(todo.pop(), 0)
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    group, attempt = under_way.pop(future)
                    try:
                        scored = future.result()
                    except TryAgainError as error:
                        if len(group) > 1:
                            todo += [group[len(group) // 2 :], group[: len(group) // 2]]
                        elif attempt + 1 < server.attempts:
                            start(group, attempt + 1)
                        else:
                            raise ServerError(
                                f"{server.url}: {group[0].place} ({len(group[0].ids)} tokens) was asked for "
                                f"{server.attempts} times, at last with {error}. What was scored before is stored: "
                                "run the same command again when the server is well"
                            ) from error
                    else:
                        yield scored
        finally:
            stop.set()


def _in_a_thread(work: Callable[[], Scored]) -> Future[Scored]:
    """The result of `work`, done in a thread that ends with the process: nothing waits for an answer that is not
    wanted any more, as a pool of threads would."""
    future: Future[Scored] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
