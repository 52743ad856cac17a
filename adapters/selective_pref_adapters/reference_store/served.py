"""A reference that another process serves over HTTP fills the store.

In: the address of a server that speaks OpenAI's completions protocol, and rows of token ids. Out: the log-probs that
the served model gives to them, checked token by token. Two ways of asking:

    completions      `echo` and `logprobs`: the prompt comes back with a log-prob for each of its tokens
    prompt_logprobs  vLLM's own: for each position, log-probs by token id

Few rows go into one request, few requests are under way at once. A request that fails (no answer in time, a status of
overload or error, an answer that is no JSON or not whole) is asked again in two halves, a single row after a pause, and
at last gives up with an error that names the row. An answer that is whole but wrong is an error at once: other tokens
than were sent, another number of them, no log-prob or −inf (which means "not returned").
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import httpx2
import numpy as np

from selective_pref import NonFiniteError
from selective_pref_adapters.pairs import TokenizedPair, Tokenizer
from selective_pref_adapters.reference_store.fill import (
    Scored,
    Scorer,
    ScoringReport,
    compare_rows,
    fill_rows,
)
from selective_pref_adapters.reference_store.identity import SCORING_VERSION
from selective_pref_adapters.reference_store.spaces import vocabulary_digest
from selective_pref_adapters.reference_store.store import ReferenceStore, Row, Space, StoreError, rows_of_pairs

Protocol: TypeAlias = Literal["completions", "prompt_logprobs"]

_NOT_RETURNED = -9999.0  # what servers write where JSON has no −inf
_DRIFT = 0.5  # nats: how far a served model may be from what it gave before, in the mean over a few rows
_AGAIN = (408, 409, 425, 429)  # besides every status from 500 on
_REFUSES_A_ROW = (400, 413, 422)


class ServerError(OSError):
    """A server that does not answer as asked. The message names address, row and what came; what was scored is kept."""


class _TryAgainError(Exception):
    """An answer that another attempt may better; the message says what came."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where and how to ask.

    Attributes:
        url: the address up to and with `/v1`.
        model: the name it is served under.
        protocol: how log-probs of given tokens are asked for, see the module.
        concurrency: requests under way at once.
        rows_per_request: rows in one of them.
        timeout: seconds to wait for an answer.
        attempts: how often a single row is asked for before it is given up.
        pause: seconds before a single row is asked for again; doubled each time.
        headers: sent with every request, as an API key is.
    """

    url: str
    model: str
    protocol: Protocol = "completions"
    concurrency: int = 4
    rows_per_request: int = 8
    timeout: float = 120.0
    attempts: int = 5
    pause: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        try:
            address = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"{self.url!r} is not an address: {error}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"url must be like http://host:port/v1; got {self.url!r}")
        if self.protocol not in ("completions", "prompt_logprobs"):
            raise ValueError(f"protocol must be 'completions' or 'prompt_logprobs'; got {self.protocol!r}")
        for name in ("concurrency", "rows_per_request", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("timeout", "pause"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 seconds; got {getattr(self, name)}")


def served_space(model: str, revision: str, tokenizer: Tokenizer) -> Space:
    """The identity of a served reference. Nobody can read its weights from here: its name and revision stand for them.

    Args:
        model: the name it is served under.
        revision: what changes whenever weights, adapters, dtype or quantisation of what is served there change.
        tokenizer: the served model's own.
    """
    vocabulary = dict(tokenizer.get_vocab())
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
        tokenizer: the served model's own, to compare tokens that the server names by their text.
        progress: show a bar with an estimate of the time left.

    Raises:
        ServerError: the server cannot be reached, refuses, or answers something else than was asked.
        NonFiniteError: a log-prob is missing or infinite; names the row.
        StoreError: the server gives other numbers than are stored.
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


def steady(store: ReferenceStore, rows: Sequence[Row], scorer: Scorer) -> Scorer:
    """A scorer that first compares what it gives to some of `rows` that are stored already with what is stored.

    Raises:
        StoreError: when asked, if the numbers differ: another model is served under the old name and revision.
    """

    def score(lacking: Sequence[Row]) -> Iterator[Scored]:
        absent = {row.key for row in lacking}
        stored = [row for row in rows if row.key not in absent and store.has(row)]
        if any(row.values for row in stored):
            seen = compare_rows(store, stored, scorer, sample=2, seed=0)
            if seen.mean_difference > _DRIFT:
                raise StoreError(
                    f"the server gives log-probs that differ by {seen.mean_difference:.3g} nats in the mean (most at "
                    f"{seen.worst}) from those stored as {store.space.label!r}: another model is served there now. "
                    "Give it another revision"
                )
        yield from scorer(lacking)

    return score


def served_scores(rows: Sequence[Row], server: Server, tokenizer: Tokenizer) -> Iterator[Scored]:
    """The log-probs that a served model gives to rows, in the order in which requests are answered: a `Scorer`.

    Raises:
        ServerError, NonFiniteError: see `fill_from_server`.
    """
    todo = [
        list(rows[start : start + server.rows_per_request]) for start in range(0, len(rows), server.rows_per_request)
    ]
    todo.reverse()
    headers = {"Content-Type": "application/json", **server.headers}
    with (
        httpx2.Client(timeout=server.timeout, headers=headers) as client,
        ThreadPoolExecutor(server.concurrency) as threads,
    ):
        under_way: dict[Future[Scored], tuple[list[Row], int]] = {}

        def ask(group: list[Row], attempt: int) -> None:
            pause = server.pause * 2 ** (attempt - 1) if attempt else 0.0
            under_way[threads.submit(_ask, client, server, tokenizer, group, pause)] = group, attempt

        try:
            while todo or under_way:
                while todo and len(under_way) < server.concurrency:
                    ask(todo.pop(), 0)
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    group, attempt = under_way.pop(future)
                    try:
                        scored = future.result()
                    except _TryAgainError as error:
                        if len(group) > 1:
                            todo += [group[len(group) // 2 :], group[: len(group) // 2]]
                        elif attempt + 1 < server.attempts:
                            ask(group, attempt + 1)
                        else:
                            raise ServerError(
                                f"{server.url}: {group[0].place} ({len(group[0].ids)} tokens) was asked for "
                                f"{server.attempts} times, at last with {error}. What was scored before is stored: "
                                "run the same command again when the server is well"
                            ) from error
                    else:
                        yield scored
        finally:
            for future in under_way:
                future.cancel()


def _ask(client: httpx2.Client, server: Server, tokenizer: Tokenizer, group: list[Row], pause: float) -> Scored:
    """One request for a few rows."""
    time.sleep(pause)
    body = {
        "model": server.model,
        "prompt": [row.ids.tolist() for row in group],
        "max_tokens": 1,
        "temperature": 0,
        **_ASKS[server.protocol],
    }
    try:
        answer = client.post(f"{server.url.rstrip('/')}/completions", json=body)
    except httpx2.TransportError as error:
        raise _TryAgainError(f"{type(error).__name__}: {error}") from error
    refused = answer.status_code in _REFUSES_A_ROW and len(group) > 1  # which one, the halves will tell
    if refused or answer.status_code in _AGAIN or answer.status_code >= 500:
        raise _TryAgainError(f"status {answer.status_code}: {answer.text[:200]}")
    if answer.status_code != 200:
        raise ServerError(
            f"{server.url} refuses {group[0].place} ({len(group[0].ids)} tokens, and one to generate) with status "
            f"{answer.status_code}: {answer.text[:500]}"
        )
    try:
        choices = answer.json()["choices"]
        by_index = {int(choice["index"]): choice for choice in choices}
    except (ValueError, KeyError, TypeError) as error:
        raise _TryAgainError(f"an answer that is not whole: {answer.text[:200]!r}") from error
    if len(choices) != len(group) or set(by_index) != set(range(len(group))):
        raise _TryAgainError(f"{len(choices)} choices (of {sorted(by_index)}) for {len(group)} rows")
    read = _READERS[server.protocol]
    return [(row, _values(row, read(row, by_index[number], tokenizer))) for number, row in enumerate(group)]


_ASKS: dict[Protocol, dict[str, Any]] = {
    # The last two make servers that know them name tokens by their ids; others ignore them.
    "completions": {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True},
    "prompt_logprobs": {"prompt_logprobs": 0, "return_token_ids": True},
}


def _values(row: Row, logps: list[float | None]) -> np.ndarray:
    """The float32 values of a row's completion tokens, of which none may be missing."""
    places = np.flatnonzero(row.mask[1:]) + 1
    for at in places:
        value = logps[at]
        if value is None or not math.isfinite(value) or value <= _NOT_RETURNED:
            raise NonFiniteError(
                f"{row.place}: the server returns no log-prob ({value}) for token {at} (id {row.ids[at]}). The row is "
                "not stored; what was scored before is"
            )
        if value > 1e-3:
            raise ServerError(f"{row.place}: the server gives token {at} (id {row.ids[at]}) the log-prob {value} > 0")
    return np.array([logps[at] for at in places], dtype=np.float32)


def _read_echo(row: Row, choice: Mapping[str, Any], tokenizer: Tokenizer) -> list[float | None]:
    """The log-prob of every token of a row, from an echoed prompt."""
    try:
        logps = [None if value is None else float(value) for value in choice["logprobs"]["token_logprobs"]]
        tokens = choice["logprobs"].get("tokens")
        prompt_ids = choice.get("prompt_token_ids")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"{row.place}: the answer holds no log-probs of the prompt ({str(choice)[:200]}): does the server support "
            "echo with logprobs? vLLM's prompt_logprobs is the other protocol"
        ) from error
    _check_positions(row, logps, (len(row.ids), len(row.ids) + 1))  # with the one generated token, or without
    if prompt_ids is not None:
        _check_ids(row, prompt_ids)
    for at, token in enumerate((tokens or [])[: len(row.ids)]):
        _check_token(row, at, str(token), tokenizer)
    return logps


def _read_prompt_logprobs(row: Row, choice: Mapping[str, Any], tokenizer: Tokenizer) -> list[float | None]:
    """The log-prob of every token of a row, from vLLM's prompt_logprobs."""
    positions = choice.get("prompt_logprobs")
    if not isinstance(positions, list):
        raise ServerError(
            f"{row.place}: the answer holds no prompt_logprobs ({str(choice)[:200]}): does the server support them? "
            "completions with echo is the other protocol"
        )
    if choice.get("prompt_token_ids") is not None:
        _check_ids(row, choice["prompt_token_ids"])
    logps: list[float | None] = []
    for at, position in enumerate(positions):
        if position is None:
            logps.append(None)
            continue
        if at >= len(row.ids) or not isinstance(position, dict) or str(row.ids[at]) not in position:
            sent = f"id {row.ids[at]}" if at < len(row.ids) else "nothing"
            raise ServerError(
                f"{row.place}: token {at} was sent as {sent}, the server scores {str(position)[:120]} there. Log-probs "
                "of other tokens are of no use: serve a model with the same tokenizer"
            )
        entry = position[str(row.ids[at])]
        try:
            logps.append(float(entry["logprob"] if isinstance(entry, dict) else entry))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{row.place}: token {at} has no log-prob in {str(entry)[:120]}") from error
    _check_positions(row, logps, (len(row.ids),))
    return logps


_READERS = {"completions": _read_echo, "prompt_logprobs": _read_prompt_logprobs}


def _check_positions(row: Row, logps: Sequence[float | None], lengths: Sequence[int]) -> None:
    if len(logps) not in lengths or logps[0] is not None:
        first = "no log-prob for the first" if not logps or logps[0] is None else f"{logps[0]} for the first"
        raise ServerError(
            f"{row.place}: {len(row.ids)} tokens were sent, {len(logps)} log-probs came back, {first} (nothing "
            "precedes it, so it has none). The server must score the ids as they are, without adding any"
        )


def _check_ids(row: Row, ids: Any) -> None:
    if list(ids) != row.ids.tolist():
        raise ServerError(f"{row.place}: the server scores the ids {str(ids)[:80]}, not {str(row.ids.tolist())[:80]}")


def _check_token(row: Row, at: int, token: str, tokenizer: Tokenizer) -> None:
    """Raises where a token that the server names, by id or by text, is not the one that was sent."""
    sent = int(row.ids[at])
    if token.startswith("token_id:"):
        same = token == f"token_id:{sent}"
    else:
        texts = [str(tokenizer.convert_ids_to_tokens(sent)), str(tokenizer.decode([sent]))]
        half = any("\ufffd" in text for text in (token, *texts))  # a token alone may be part of a character
        same = half or not _plain(token) or _plain(token) in map(_plain, texts)
    if not same:
        raise ServerError(
            f"{row.place}: token {at} was sent as id {sent} ({tokenizer.convert_ids_to_tokens(sent)!r}), the server "
            f"scores {token!r} there. Log-probs of other tokens are of no use: serve a model with the same tokenizer"
        )


def _plain(text: str) -> str:
    """Without white space, which servers write in their own ways."""
    return "".join(text.replace("▁", " ").replace("Ġ", " ").replace("Ċ", " ").split())
