"""One request for a few rows, and the checks of its answer.

In: rows of token ids. Out: for each a float32 log-prob per completion token; or an error, because an answer that is
whole but wrong (other tokens, another number of them, no log-prob) must not be stored. Three kinds of
failure are told apart: one that may pass (`TryAgainError`: ask again), one that a row causes (it is named), and one
that the request causes (address, model, key, fields: every row would be refused).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import numpy as np

from selective_pref import NonFiniteError
from selective_pref_adapters.pairs import Tokenizer
from selective_pref_adapters.reference_store.rows import Row, RowLogps
from selective_pref_adapters.reference_store.served.server import Protocol, Server, ServerError

_NOT_RETURNED = -9999.0  # what servers write where JSON has no −inf
_AGAIN = (408, 409, 425, 429)  # besides every status from 500 on
_REFUSES_A_ROW = (400, 413, 422)

_ASKS: dict[Protocol, dict[str, Any]] = {
    # The last makes servers that know it return the ids of the prompt; tokens are named by their text, so that a
    # wrong tokenizer is seen. Others ignore it.
    "completions": {"echo": True, "logprobs": 1, "return_token_ids": True},
    "prompt_logprobs": {"prompt_logprobs": 0, "return_token_ids": True},
}


class TryAgainError(Exception):
    """A failure that may pass: the same request may succeed later. The message says what came."""


class ForbiddenError(ServerError):
    """A server that does not know the key, or does not allow it this model."""


class RefusedError(Exception):
    """A request that the server refuses for what is in it: for another row it may answer. The message is its answer."""


class Texts:
    """The texts that stand for a token id: as the tokenizer holds it, and as it writes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, str]] = {}

    def of(self, token_id: int) -> tuple[str, str]:
        """(the token, what it decodes to)."""
        if token_id not in self._known:
            token = str(self.tokenizer.convert_ids_to_tokens(token_id))
            self._known[token_id] = token, str(self.tokenizer.decode([token_id]))
        return self._known[token_id]


def ask(client: httpx2.Client, server: Server, texts: Texts, group: Sequence[Row]) -> RowLogps:
    """The log-probs of a few rows.

    Raises:
        TryAgainError: a failure that may pass, or that one row among several has caused.
        ServerError: the server refuses the one row, or every request, or returns log-probs of other tokens.
        NonFiniteError: a log-prob is missing or infinite.
    """
    try:
        choices = choices_of(client, server, [row.ids.tolist() for row in group])
    except RefusedError as error:
        if len(group) > 1:  # asking for each half alone shows which row it is
            raise TryAgainError(str(error)) from error
        what = f"{group[0].place} ({len(group[0].ids)} tokens, and one to generate)"
        raise ServerError(f"{server.url} refuses {what} with {error}") from error
    computed = []
    for row, choice in zip(group, choices, strict=True):
        logps, _ = read(server, texts, row, choice)
        computed.append((row, _values(row, logps)))
    return computed


def choices_of(client: httpx2.Client, server: Server, prompt: str | list[list[int]]) -> list[dict[str, Any]]:
    """One request: the choices for rows of token ids, or the one for a text.

    Raises:
        TryAgainError, ServerError: as `ask`.
        RefusedError: the server refuses what is in the request.
    """
    wanted = 1 if isinstance(prompt, str) else len(prompt)
    body = {"model": server.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **_ASKS[server.protocol]}
    answer = send(client, server, "POST", "completions", body)
    try:
        choices = answer.json()["choices"]
        by_index = {int(choice["index"]): choice for choice in choices}
    except (ValueError, KeyError, TypeError) as error:
        raise TryAgainError(f"an answer that is not whole: {server.shown(answer.text[:200])!r}") from error
    if len(choices) != wanted or set(by_index) != set(range(wanted)):
        raise TryAgainError(f"{len(choices)} choices (of {sorted(by_index)}) for {wanted} rows")
    return [by_index[number] for number in range(wanted)]


def send(client: httpx2.Client, server: Server, method: str, path: str, body: Any = None) -> httpx2.Response:
    """An answer of status 200.

    Raises:
        TryAgainError: no answer, or a status of overload or failure.
        RefusedError: a status that blames what is in the request.
        ServerError: one that blames the request as such.
    """
    try:
        answer = client.request(method, f"{server.url.rstrip('/')}/{path}", json=body)
    except httpx2.TransportError as error:
        raise TryAgainError(server.shown(f"{type(error).__name__}: {error}")) from error
    if answer.status_code == 200:
        return answer
    said = f"status {answer.status_code}: {server.shown(answer.text[:500])}"
    if answer.status_code in _AGAIN or answer.status_code >= 500:
        raise TryAgainError(said)
    if answer.status_code in _REFUSES_A_ROW:
        raise RefusedError(said)
    kind = ForbiddenError if answer.status_code in (401, 403) else ServerError
    hint = {
        401: "is the key right, and its variable named by --api-key-variable?",
        403: "may this key use this model?",
        404: f"does the address end in /v1, and is a model served as {server.model!r}?",
    }.get(answer.status_code, "is this the address of a server with OpenAI's completions protocol?")
    raise kind(f"{server.url} refuses every request with {said}. No row is to blame: {hint}")


# --- reading ---------------------------------------------------------------------------------------------------------


def read(server: Server, texts: Texts, row: Row, choice: Mapping[str, Any]) -> tuple[list[float | None], int]:
    """(the log-prob of every token of a row, how many of its tokens the server named by a text that was compared).

    Raises:
        ServerError: they are not there, or are those of other tokens.
    """
    logps, named = _READERS[server.protocol](row, choice)
    if choice.get("prompt_token_ids") is not None and list(choice["prompt_token_ids"]) != row.ids.tolist():
        raise ServerError(
            f"{row.place}: the server read the ids {str(choice['prompt_token_ids'])[:80]}, not "
            f"{str(row.ids.tolist())[:80]}"
        )
    return logps, sum(_same_token(row, at, token, texts) for at, token in enumerate(named[: len(row.ids)]))


def _read_echo(row: Row, choice: Mapping[str, Any]) -> tuple[list[float | None], list[str | None]]:
    """(log-probs, names) of an echoed prompt."""
    logps = echoed_logps(row, choice)
    named = choice["logprobs"].get("tokens") or []
    _check_positions(row, logps, (len(row.ids), len(row.ids) + 1))  # with the one generated token, or without
    return logps, [str(token) for token in named]


def echoed_logps(row: Row, choice: Mapping[str, Any]) -> list[float | None]:
    """The log-probs of an echoed prompt, as many as there are."""
    try:
        logps = [None if value is None else float(value) for value in choice["logprobs"]["token_logprobs"]]
        choice["logprobs"].get("tokens")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"{row.place}: the answer holds no log-probs of the prompt ({str(choice)[:200]}): does the server support "
            "echo with logprobs? vLLM's prompt_logprobs is the other protocol"
        ) from error
    return logps


def _read_prompt_logprobs(row: Row, choice: Mapping[str, Any]) -> tuple[list[float | None], list[str | None]]:
    """(log-probs, names) of vLLM's prompt_logprobs."""
    logps: list[float | None] = []
    named: list[str | None] = []
    for at, position in enumerate(prompt_positions(row, choice)):
        if position is None:
            logps.append(None)
            named.append(None)
            continue
        if at >= len(row.ids) or not isinstance(position, dict) or str(row.ids[at]) not in position:
            sent = f"id {row.ids[at]}" if at < len(row.ids) else "nothing"
            raise ServerError(
                f"{row.place}: token {at} was sent as {sent}, the server read {str(position)[:120]} there. Log-probs "
                "of other tokens are of no use: serve a model with the same tokenizer"
            )
        entry = position[str(row.ids[at])]
        try:
            logps.append(float(entry["logprob"] if isinstance(entry, dict) else entry))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{row.place}: token {at} has no log-prob in {str(entry)[:120]}") from error
        named.append(entry.get("decoded_token") if isinstance(entry, dict) else None)
    _check_positions(row, logps, (len(row.ids),))
    return logps, named


def prompt_positions(row: Row, choice: Mapping[str, Any]) -> list[Any]:
    """What vLLM returns for each position of a prompt."""
    positions = choice.get("prompt_logprobs")
    if not isinstance(positions, list):
        raise ServerError(
            f"{row.place}: the answer holds no prompt_logprobs ({str(choice)[:200]}): does the server support them? "
            "completions with echo is the other protocol"
        )
    return positions


_READERS = {"completions": _read_echo, "prompt_logprobs": _read_prompt_logprobs}


# --- checking --------------------------------------------------------------------------------------------------------


def _values(row: Row, logps: list[float | None]) -> np.ndarray:
    """The float32 values of a row's completion tokens, of which none may be missing."""
    positions = np.flatnonzero(row.mask[1:]) + 1
    for at in positions:
        value = logps[at]
        if value is None or not math.isfinite(value) or value <= _NOT_RETURNED:
            raise NonFiniteError(
                f"{row.place}: the server returns no log-prob ({value}) for token {at} (id {row.ids[at]}). The row is "
                "not stored; what was computed before is"
            )
        if value > 1e-3:
            raise ServerError(f"{row.place}: the server gives token {at} (id {row.ids[at]}) the log-prob {value} > 0")
    return np.array([logps[at] for at in positions], dtype=np.float32)


def _check_positions(row: Row, logps: Sequence[float | None], lengths: Sequence[int]) -> None:
    if len(logps) not in lengths or logps[0] is not None:
        first = "no log-prob for the first" if not logps or logps[0] is None else f"{logps[0]} for the first"
        raise ServerError(
            f"{row.place}: {len(row.ids)} tokens were sent, {len(logps)} log-probs came back, {first} (nothing "
            "precedes it, so it has none). The server must read the ids as they are, without adding any"
        )


def _same_token(row: Row, at: int, token: str | None, texts: Texts) -> bool:
    """Whether the text of a token was compared and is the one that was sent; raises where it is another.

    A token alone may be part of a character, or white space, which servers write in their own ways: then there is
    nothing to compare. An id that comes back (`token_id:17`) does not show which tokenizer the server
    has, but must be the one sent.
    """
    if token is None:
        return False
    sent = int(row.ids[at])
    if token.startswith("token_id:"):
        same, compared = token == f"token_id:{sent}", False
    else:
        ours = texts.of(sent)
        plain = {_plain(text) for text in ours}
        compared = bool(_plain(token)) and not token.startswith("bytes:")
        compared = compared and not any("\ufffd" in text for text in (token, *ours))
        same = not compared or _plain(token) in plain
    if not same:
        raise ServerError(
            f"{row.place}: token {at} was sent as id {sent} ({texts.of(sent)[0]!r}), the server read {token!r} "
            "there. Log-probs of other tokens are of no use: give the tokenizer of the served model, or serve a model "
            "with this one"
        )
    return compared


def _plain(text: str) -> str:
    """Without white space, which servers write in their own ways."""
    return "".join(text.replace("▁", " ").replace("Ġ", " ").replace("Ċ", " ").split())
