"""The checks of a server before its first answer is stored.

In: a server, the rows it will be asked for, and the tokenizer that made them. Out: nothing, or an error that says what
does not fit: the address, the key, the name of the model, the length of the rows, requests that the server does not
understand, a tokenizer that is not the served model's, a token that the server adds by itself.

Most servers name each token by its text, which is compared for every row. Where they do not, a short
text is sent beside its token ids: the same model must give the same log-probs to both. Then the last id is replaced:
only the last log-prob may change, or the server puts a token of its own in front.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx2
import numpy as np

from selective_pref_adapters.pairs import Tokenizer
from selective_pref_adapters.reference_store.rows import Row, as_rows
from selective_pref_adapters.reference_store.served.answers import (
    ForbiddenError,
    RefusedError,
    Texts,
    TryAgainError,
    choices_of,
    echoed_logps,
    prompt_positions,
    read,
    send,
)
from selective_pref_adapters.reference_store.served.server import Server, ServerError
from selective_pref_adapters.reference_store.shards import StoreError

_PROBE_TOKENS = 24
_PROBE_TEXT = "The cat sat on the mat."
_SAME = 0.05  # nats: what a server's own batches may change in the mean
_TRIES = 3  # of a server that has never answered
_NEEDED = (
    "What is needed: POST /completions with token ids as prompt, max_tokens 1, and log-probs of the prompt (echo with "
    "logprobs, or vLLM's prompt_logprobs); fields that a server does not know must be ignored"
)

T = TypeVar("T")


def check_server(
    client: httpx2.Client, server: Server, rows: Sequence[Row], tokenizer: Tokenizer, stop: threading.Event
) -> None:
    """Raises unless the server answers, serves the model and has this tokenizer, as far as a few requests can show.

    Raises:
        ServerError: it is not there, does not serve the model, or not as it is asked, or with another tokenizer.
        StoreError: a row is longer than it can read.
    """
    _check_model(_patiently(server, stop, lambda: _models(client, server)), server, rows)
    row = _beginning(rows[0])
    choice = _patiently(server, stop, lambda: _choice(client, server, row))
    _, compared = read(server, Texts(tokenizer), row, choice)
    if 2 * compared < len(row.ids):
        _patiently(server, stop, lambda: _check_by_text(client, server, row, tokenizer))


def _patiently(server: Server, stop: threading.Event, call: Callable[[], T]) -> T:
    """The result of a call. It is repeated after failures that may pass, a few times only where no server answers."""
    attempt = 0
    while True:
        try:
            return call()
        except TryAgainError as error:
            attempt += 1
            unreachable = isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)
            if attempt >= (min(server.attempts, _TRIES) if unreachable else server.attempts):
                raise ServerError(
                    f"{server.url} was asked {attempt} times, at last with {error}. Nothing was computed: run the same "
                    "command again when the server is well"
                ) from error
            stop.wait(server.pause_before(attempt))


def _models(client: httpx2.Client, server: Server) -> list[dict[str, Any]]:
    """What the server says it serves; empty where it does not say."""
    try:
        listed = send(client, server, "GET", "models").json()["data"]
        return [model for model in listed if isinstance(model.get("id"), str)]
    except ForbiddenError:
        raise
    except TryAgainError as error:
        if isinstance(error.__cause__, httpx2.TransportError):
            raise
        return []
    except (RefusedError, ServerError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _check_model(models: Sequence[dict[str, Any]], server: Server, rows: Sequence[Row]) -> None:
    """Raises where the server lists its models and ours is not among them, or reads less than a row has."""
    names = {model["id"]: model for model in models}
    if names and server.model not in names:
        raise ServerError(f"{server.url} serves no model {server.model!r}. It serves: {', '.join(sorted(names))}")
    context = names.get(server.model, {}).get("max_model_len")
    known = as_rows(rows)
    longest = known[int(known.tokens.argmax())]
    if isinstance(context, int) and len(longest.ids) >= context:
        raise StoreError(
            f"{longest.place} has {len(longest.ids)} tokens, and {server.model!r} reads {context}, one of which is for "
            f"the token that it must generate: give --max-length {context - 1} (or less) to `score` and to training "
            "alike, or serve it with a longer context"
        )


def _beginning(row: Row) -> Row:
    """The first tokens of a row: a request that no server can find too long."""
    return Row(
        ids=row.ids[:_PROBE_TOKENS],
        mask=row.mask[:_PROBE_TOKENS],
        place=f"{row.place} (its first {_PROBE_TOKENS} tokens, to try the server)",
    )


def _choice(client: httpx2.Client, server: Server, row: Row) -> dict[str, Any]:
    """The answer to one short row of ids; an error that names the cause where the server takes texts only."""
    try:
        return choices_of(client, server, [row.ids.tolist()])[0]
    except RefusedError as error:
        raise ServerError(f"{server.url} refuses a short row of token ids with {error}. {_NEEDED}") from error
    except TryAgainError as error:
        if "status 500" in str(error) and _takes_texts_only(client, server, row):
            raise ServerError(
                f"{server.url} answers a text, but not a short row of token ids ({error}). {_NEEDED}"
            ) from error
        raise


def _takes_texts_only(client: httpx2.Client, server: Server, row: Row) -> bool:
    """Whether a text is answered, and a row of ids directly afterwards is not."""
    try:
        choices_of(client, server, _PROBE_TEXT)
    except (TryAgainError, RefusedError):
        return False
    try:
        choices_of(client, server, [row.ids.tolist()])
    except (TryAgainError, RefusedError):
        return True
    return False


# --- a server that names no tokens -----------------------------------------------------------------------------------


def _check_by_text(client: httpx2.Client, server: Server, row: Row, tokenizer: Tokenizer) -> None:
    """Raises unless a text and its token ids get the same log-probs, token by token."""
    text = str(tokenizer.decode(row.ids.tolist(), skip_special_tokens=True)).strip() or _PROBE_TEXT
    ways = [list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (True, False)]
    try:
        asked = choices_of(client, server, text)[0]
        answers = [(ids, choices_of(client, server, [ids])[0]) for ids in ways if len(ids) > 1]
    except RefusedError as error:
        raise ServerError(
            f"{server.url} does not return the text of each token, and refuses a short text with "
            f"{error}: so its tokenizer cannot be compared with the one given. Serve the model with its tokenizer"
        ) from error
    same = [ids for ids, answer in answers if _alike(server, row, ids, asked, answer)]
    if not same:
        raise ServerError(
            f"{server.url} makes other tokens ({str(asked.get('prompt_token_ids', 'without saying which'))[:60]}) of "
            f"the text {text[:60]!r} than the tokenizer given ({ways[0][:12]}). Log-probs of other tokens are of no "
            "use: give the tokenizer of the served model, or serve a model with this one"
        )
    if server.protocol == "completions":
        _check_nothing_in_front(client, server, row, same[0], len(tokenizer))


def _alike(server: Server, row: Row, ids: list[int], of_text: dict[str, Any], of_ids: dict[str, Any]) -> bool:
    """Whether the server made these ids of the text, by what it answered to both."""
    if of_text.get("prompt_token_ids") is not None:
        return list(of_text["prompt_token_ids"]) == ids
    if server.protocol == "prompt_logprobs":
        positions = prompt_positions(row, of_text)
        return len(positions) == len(ids) and all(
            isinstance(position, dict) and str(i) in position
            for i, position in zip(ids[1:], positions[1:], strict=True)
        )
    if of_text["logprobs"].get("tokens") != of_ids["logprobs"].get("tokens"):
        return False
    ours, theirs = (echoed_logps(row, answer)[1 : len(ids)] for answer in (of_ids, of_text))
    lengths_equal = len(echoed_logps(row, of_text)) == len(echoed_logps(row, of_ids)) >= len(ids)
    if not lengths_equal or None in ours or None in theirs:
        return False
    return bool(np.abs(np.array(ours, dtype=float) - np.array(theirs, dtype=float)).mean() <= _SAME)


def _check_nothing_in_front(client: httpx2.Client, server: Server, row: Row, ids: list[int], vocabulary: int) -> None:
    """Raises unless the last id decides the last log-prob, and no other."""
    others = [(ids[-1] + step) % vocabulary for step in (1, vocabulary // 3, vocabulary // 2)]
    answers = choices_of(client, server, [[*ids[:-1], last] for last in (ids[-1], *others)])
    logps = np.array([echoed_logps(row, answer)[1 : len(ids)] for answer in answers], dtype=float)
    spread = logps.max(axis=0) - logps.min(axis=0)
    if spread[-1] <= _SAME or (spread[:-1] > 4 * _SAME).any():  # of single tokens, where _SAME is of a mean
        raise ServerError(
            f"{server.url} returns log-probs that are not those of the tokens that were sent: with another last token "
            f"they differ by {np.round(spread, 3).tolist()} nats, and should differ at the last token only. Does it "
            "put a token of its own in front? It must read the ids as they are"
        )
