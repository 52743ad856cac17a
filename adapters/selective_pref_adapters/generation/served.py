"""Questions → answers of a server that speaks OpenAI's chat protocol.

In: questions and a `Server`. Out: the answers, in the order in which they come. A few questions are asked at once; a
request that fails in a way that may pass is sent again after a pause. A status that blames the request ends the run:
the answers before it are kept.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2

from selective_pref_adapters.generation.questions import Question, draw_seed
from selective_pref_adapters.generation.records import Answer
from selective_pref_adapters.reference_store.served import Server, ServerError
from selective_pref_adapters.reference_store.served.answers import RefusedError, TryAgainError, send
from selective_pref_adapters.reference_store.served.fill import in_a_thread

logger = logging.getLogger(__name__)

_TRIES_AT_FIRST = 3
"""How often a server is asked that has never answered: an address that is wrong is known within seconds."""


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """What all requests of a run share."""

    client: httpx2.Client
    server: Server
    max_new_tokens: int
    seed: int
    stop: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)
    told: threading.Event = field(default_factory=threading.Event)


def served_answers(
    questions: Sequence[Question], server: Server, *, max_new_tokens: int, seed: int
) -> Iterator[list[Answer]]:
    """The answers to some questions, as they come.

    Args:
        questions: what is asked, the first ones first.
        server: where, and how many at once.
        max_new_tokens: tokens of an answer.
        seed: sent with each request, mixed with the question's id; whether a server heeds it is its own affair.

    Raises:
        ServerError: the server does not answer, or refuses a question or every request.
    """
    todo, under_way = list(reversed(questions)), set[Future[Answer]]()
    with server.client() as client:
        asking = _Asking(client=client, server=server, max_new_tokens=max_new_tokens, seed=seed)
        try:
            while todo or under_way:
                while todo and len(under_way) < server.concurrency:
                    under_way.add(in_a_thread(partial(_converse, asking, todo.pop())))
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                if answers := [future.result() for future in done if future.exception() is None]:
                    yield answers
                for future in done:
                    future.result()  # raises the error of one that failed
        finally:
            asking.stop.set()


def _converse(asking: _Asking, question: Question) -> Answer:
    """The answers to one question, turn by turn."""
    messages: list[dict[str, str]] = []
    turns, cut = [], 0
    for turn, said in enumerate(question.turns):
        messages.append({"role": "user", "content": said})
        text, reason = _answer(asking, question, turn, messages)
        messages.append({"role": "assistant", "content": text})
        turns.append(text)
        cut += reason == "length"
    return Answer(question=question, turns=tuple(turns), cut=cut)


def _answer(asking: _Asking, question: Question, turn: int, messages: list[dict[str, str]]) -> tuple[str, Any]:
    """(what the server says next, why it stopped)."""
    server = asking.server
    body = {
        "model": server.model,
        "messages": messages,
        "temperature": question.temperature,
        "max_tokens": asking.max_new_tokens,
        "seed": draw_seed(question, turn, asking.seed),
    }
    attempt = 0
    while True:
        asking.stop.wait(server.pause_before(attempt))
        if asking.stop.is_set():
            return "", None  # nobody waits for it any more
        try:
            found = _read(server, send(asking.client, server, "POST", "chat/completions", body))
        except RefusedError as error:
            raise ServerError(
                f"{server.url} refuses question {question.id!r} with {error}. Where it is the length, give fewer "
                "--max-new-tokens or serve the model with a longer context"
            ) from error
        except TryAgainError as error:
            attempt += 1
            attempts = server.attempts if asking.answered.is_set() else min(server.attempts, _TRIES_AT_FIRST)
            if attempt >= attempts:
                raise ServerError(
                    f"{server.url}: question {question.id!r} was asked {attempt} times, at last with {error}. Run the "
                    "same command again when the server is well: what was answered before is kept"
                ) from error
            told = asking.told.is_set()
            asking.told.set()
            if not told:
                logger.warning("%s: %s. Asking again, up to %d times", server.url, error, attempts)
        else:
            asking.answered.set()
            asking.told.clear()
            return found


def _read(server: Server, answer: httpx2.Response) -> tuple[str, Any]:
    try:
        choice = answer.json()["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TryAgainError(f"an answer that is not whole: {server.shown(answer.text[:200])!r}") from error
    return (text if isinstance(text, str) else ""), reason  # no text: all tokens went into reasoning, or a refusal
