"""A reference behind HTTP: a real server in this process serves a real model, well and badly."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref import NonFiniteError
from selective_pref_adapters.cli import main
from selective_pref_adapters.pairs import PreferenceRow, TokenizedPair, collate, read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import (
    ReferenceStore,
    StoreError,
    compare_rows,
    fill_store,
    reference_space,
    rows_of_pairs,
)
from selective_pref_adapters.reference_store.served import (
    Protocol,
    Server,
    ServerError,
    fill_from_server,
    served_logps,
    served_space,
)
from tiny import WORDS, make_tokenizer, text_rows

Fault = Callable[["ModelServer", dict[str, Any], dict[str, Any]], Any]


class ModelServer:
    """Serves a model under /v1/completions, with `echo` and with `prompt_logprobs`; `fault` may spoil an answer.

    A fault gets the request and the whole answer, and returns what to send instead: an object, bytes, (status, text),
    or None to hang up. It may sleep. Tokens are named as ids, as text or not at all, as `tokens` says. Prompts may be
    texts; `front` is put in front of every prompt. /v1/models answers with `models`, a status or a list.
    """

    def __init__(self, folder: Path, tokens: str = "text", context: int = 10**6) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokens = tokens
        self.context = context
        self.fault: Fault | None = None
        self.front: list[int] = []
        self.returns_ids = False
        self.generates = True
        self.models: Any = 404
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def do_GET(self) -> None:
                outer.list_models(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
        try:
            status, sent = 200, self.whole_answer(body)
            if request.path != "/v1/completions":
                status, sent = 404, "no such path"
            elif any(len(ids) + 1 > self.context for ids in self.ids_of(body["prompt"])):
                status, sent = 400, f"maximum context length is {self.context} tokens"
            elif self.fault is not None:
                spoiled = self.fault(self, body, sent)
                status, sent = spoiled if isinstance(spoiled, tuple) else (200, spoiled)
        finally:
            with self._lock:
                self._at_once -= 1
        self.reply(request, status, sent)

    def list_models(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.headers.append(dict(request.headers))
        if isinstance(self.models, int):
            return self.reply(request, self.models, "no models")
        return self.reply(request, 200, {"object": "list", "data": self.models})

    def reply(self, request: BaseHTTPRequestHandler, status: int, sent: Any) -> None:
        if sent is None:
            request.close_connection = True
            return
        data = sent if isinstance(sent, bytes) else (sent if isinstance(sent, str) else json.dumps(sent)).encode()
        try:
            request.send_response(status)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # who asked has hung up

    def ids_of(self, prompt: Any) -> list[list[int]]:
        """The rows of a prompt: one of text or several of ids, behind what the server puts in front."""
        rows = [self.tokenizer(prompt)["input_ids"]] if isinstance(prompt, str) else prompt
        return [[*self.front, *ids] for ids in rows]

    def scored(self) -> list[dict[str, Any]]:
        """The requests that were not made to try the server."""
        return [body for body in self.bodies if len(body["prompt"]) > 1 and not isinstance(body["prompt"], str)]

    def whole_answer(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["max_tokens"] == 1
        assert body["temperature"] == 0
        assert "return_tokens_as_token_ids" not in body  # would hide another tokenizer
        choices = []
        for number, ids in enumerate(self.ids_of(body["prompt"])):
            with self._lock, torch.no_grad():
                logps = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            per_token = [None, *(logps[t - 1, ids[t]].item() for t in range(1, len(ids)))]
            best = int(logps[-1].argmax())
            choice: dict[str, Any] = {"index": number, "text": "", "finish_reason": "length"}
            if body.get("echo"):
                named = {
                    "ids": lambda i: f"token_id:{i}",
                    "text": lambda i: self.tokenizer.decode([i]),
                    "pieces": self.tokenizer.convert_ids_to_tokens,
                }.get(self.tokens)
                more = [best] if self.generates else []
                choice["logprobs"] = {"token_logprobs": [*per_token, *(logps[-1, i].item() for i in more)]}
                if named is not None:
                    choice["logprobs"]["tokens"] = [named(i) for i in [*ids, *more]]
            if self.returns_ids:
                choice["prompt_token_ids"] = ids
            if body.get("prompt_logprobs") is not None:
                choice["prompt_logprobs"] = [
                    None
                    if logp is None
                    else {**({"3": {"logprob": -0.1}} if i != 3 else {}), str(i): self.entry(i, logp)}
                    for i, logp in zip(ids, per_token, strict=True)
                ]
            choices.append(choice)
        return {"object": "text_completion", "model": body["model"], "choices": choices}

    def entry(self, token_id: int, logp: float) -> dict[str, Any]:
        """What vLLM says of a token."""
        said = {"logprob": logp, "rank": 1}
        return {**said, "decoded_token": self.tokenizer.decode([token_id])} if self.tokens == "text" else said

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(10)


@pytest.fixture
def served(reference_folder: Path) -> Iterator[ModelServer]:
    server = ModelServer(reference_folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def tokenizer(reference_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(reference_folder)


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[TokenizedPair]:
    rows = [PreferenceRow(**row, place=f"pairs.jsonl:{n}") for n, row in enumerate(text_rows(12), start=1)]
    return tokenize_pairs(rows, tokenizer, max_length=64)[0]


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, reference_folder: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> torch.Tensor:
    """What the same model gives on this process."""
    model = AutoModelForCausalLM.from_pretrained(reference_folder)
    store = ReferenceStore.create(tmp_path_factory.mktemp("local"), reference_space(model, tokenizer))
    fill_store(store, pairs, model, pad_token_id=0, progress=False)
    return store.lookup(collate(pairs, 0))


def make_store(tmp_path: Path, tokenizer: Any, revision: str = "1") -> ReferenceStore:
    return ReferenceStore.create(tmp_path / "store", served_space("big", revision, tokenizer))


def settings(server: ModelServer, **options: Any) -> Server:
    usual = {"url": server.url, "model": "big", "pause": 0.01, "attempts": 5, "timeout": 20.0, "rows_per_request": 4}
    return Server(**{**usual, **options})


def same(store: ReferenceStore, pairs: list[TokenizedPair], expected: torch.Tensor) -> bool:
    return torch.allclose(store.lookup(collate(pairs, 0)), expected, atol=1e-5)


def rows_in(pairs: list[TokenizedPair]) -> int:
    return len({row.key for row in rows_of_pairs(pairs)})


@pytest.mark.parametrize("tokens", ["ids", "text", "pieces", "none"])
@pytest.mark.parametrize("protocol", ["completions", "prompt_logprobs"])
def test_a_served_model_gives_the_numbers_of_the_local_one(
    served: ModelServer,
    tmp_path: Path,
    tokenizer: Any,
    pairs: list[TokenizedPair],
    expected: torch.Tensor,
    protocol: Protocol,
    tokens: str,
) -> None:
    served.tokens = tokens
    store = make_store(tmp_path, tokenizer)
    server = settings(served, protocol=protocol, headers={"Authorization": "Bearer secret"})
    report = fill_from_server(store, pairs, server, tokenizer, progress=False)
    assert (report.rows, report.computed, report.hits) == (rows_in(pairs), rows_in(pairs), 0)
    assert report.forward_passes == -(-rows_in(pairs) // 4)
    named = tokens == "text" or (tokens == "pieces" and protocol == "completions")
    tries = 1 if named else {"completions": 5, "prompt_logprobs": 4}[protocol]
    assert len(served.bodies) == report.forward_passes + tries
    assert max(len(body["prompt"]) for body in served.bodies if isinstance(body["prompt"], list)) == 4
    assert served.headers[0]["Authorization"] == "Bearer secret"
    assert same(ReferenceStore.open(tmp_path / "store"), pairs, expected)
    asked = len(served.bodies)
    again = fill_from_server(store, pairs, server, tokenizer, progress=False)
    assert (again.computed, again.hits, len(served.bodies)) == (0, rows_in(pairs), asked)


def test_no_more_requests_at_once_than_allowed(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    def slow(_: ModelServer, __: Any, answer: Any) -> Any:
        time.sleep(0.02)
        return answer

    served.fault = slow
    server = settings(served, rows_per_request=1, concurrency=3)
    fill_from_server(make_store(tmp_path, tokenizer), pairs, server, tokenizer, progress=False)
    assert served.most_at_once == 3


def then(good: int, fault: Fault) -> Fault:
    """Spoils all answers but the first; the very first is to the request that tries the server."""
    seen = [0]

    def later(server: ModelServer, body: Any, answer: Any) -> Any:
        seen[0] += 1
        return answer if seen[0] <= good else fault(server, body, answer)

    return later


def first(times: int, fault: Fault) -> Fault:
    """Spoils the first answers only."""
    left = [times]

    def some(server: ModelServer, body: Any, answer: Any) -> Any:
        left[0] -= 1
        return fault(server, body, answer) if left[0] >= 0 else answer

    return some


def too_slow(_: ModelServer, __: Any, answer: Any) -> Any:
    time.sleep(0.6)
    return answer


PASSING: dict[str, Fault] = {
    "slow": too_slow,
    "hung up": lambda *_: None,
    "error 500": lambda *_: (500, "out of memory"),
    "overload": lambda *_: (429, "slow down"),
    "unavailable": lambda *_: (503, "starting"),
    "truncated JSON": lambda _, __, answer: json.dumps(answer)[:-40],
    "no JSON": lambda *_: "<html>busy</html>",
    "empty": lambda *_: b"",
    "no choices": lambda *_: {"error": {"message": "busy"}},
    "a choice too few": lambda _, __, answer: {**answer, "choices": answer["choices"][:-1]},
    "a choice twice": lambda _, __, answer: {**answer, "choices": [answer["choices"][0]] * len(answer["choices"])},
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_are_asked_again_in_halves(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], expected: torch.Tensor, name: str
) -> None:
    served.fault = then(1, first(4 if name != "slow" else 1, PASSING[name]))
    if name in ("a choice too few", "a choice twice"):
        served.fault = lambda s, body, answer: PASSING[name](s, body, answer) if len(body["prompt"]) > 1 else answer
    store = make_store(tmp_path, tokenizer)
    server = settings(served, timeout=0.3 if name == "slow" else 20.0, concurrency=2)
    report = fill_from_server(store, pairs, server, tokenizer, progress=False)
    assert report.computed == rows_in(pairs)
    assert same(store, pairs, expected)
    assert {len(body["prompt"]) for body in served.bodies} >= {4, 2}
    assert len(served.bodies) > report.forward_passes


def test_an_outage_is_said_once_while_it_lasts(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], caplog: pytest.LogCaptureFixture
) -> None:
    broken = {3, 4, 5, 8, 9}  # requests after the probe's: two outages, of three requests and of two
    counted = iter(range(1000))
    served.fault = lambda _, __, answer: (503, "starting") if next(counted) in broken else answer
    server = settings(served, concurrency=1, rows_per_request=1)
    fill_from_server(make_store(tmp_path, tokenizer), pairs, server, tokenizer, progress=False)
    said = [record.message for record in caplog.records if "Asking again" in record.message]
    assert len(said) == 2
    assert said[0] == f"{server.url}: status 503: starting. Asking again, up to {server.attempts} times"


def test_choices_may_come_in_any_order(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], expected: torch.Tensor
) -> None:
    served.fault = lambda _, __, answer: {**answer, "choices": answer["choices"][::-1]}
    store = make_store(tmp_path, tokenizer)
    fill_from_server(store, pairs, settings(served), tokenizer, progress=False)
    assert same(store, pairs, expected)


def echoed(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """Spoils the last choice of an answer."""

    def fault(_: ModelServer, __: Any, answer: Any) -> Any:
        change(answer["choices"][-1])
        return answer

    return fault


def set_last(value: Any) -> Fault:
    return echoed(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(-2, value))


def other_ids(choice: dict[str, Any]) -> None:
    choice["logprobs"]["tokens"][1] = (
        "token_id:17" if choice["logprobs"]["tokens"][1] != "token_id:17" else "token_id:18"
    )


def other_text(choice: dict[str, Any]) -> None:
    """A server that names tokens by their text has read another one."""
    tokens = choice["logprobs"]["tokens"]
    tokens[1] = "user" if tokens[1] == "assistant" else "assistant"


def begun_twice(choice: dict[str, Any]) -> None:
    """The server puts a token of its own in front."""
    choice["logprobs"]["token_logprobs"].insert(1, -1.0)
    choice["logprobs"]["tokens"].insert(0, "token_id:1")


def shifted(choice: dict[str, Any]) -> None:
    """The server leaves out the first token, which has no log-prob."""
    for name in ("token_logprobs", "tokens"):
        choice["logprobs"][name].pop(0)


def replaced_ids(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][1] = {"29": {"logprob": -1.0}, "28": {"logprob": -2.0}}


def without_numbers(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][1] = {token: {} for token in choice["prompt_logprobs"][1]}


LASTING: dict[str, tuple[Protocol, type[Exception], Fault, str]] = {
    "null": ("completions", NonFiniteError, set_last(None), r"returns no log-prob \(None\) for token \d+ \(id 2\)"),
    "-inf": ("completions", NonFiniteError, set_last(-float("inf")), r"returns no log-prob \(-inf\)"),
    "-inf in JSON": ("completions", NonFiniteError, set_last(-9999.0), r"returns no log-prob \(-9999\.0\)"),
    "NaN": ("completions", NonFiniteError, set_last(float("nan")), r"returns no log-prob \(nan\)"),
    "above 0": ("completions", ServerError, set_last(0.5), r"log-prob 0\.5 > 0"),
    "text": ("completions", ServerError, set_last("x"), "holds no log-probs of the prompt"),
    "wrong ids": (
        "completions",
        ServerError,
        echoed(other_ids),
        r"token 1 was sent as id \d+ .* the server read 'token_id:",
    ),
    "wrong text": (
        "completions",
        ServerError,
        echoed(other_text),
        r"token 1 was sent as id \d+ .* read '(user|assis)",
    ),
    "a token more": ("completions", ServerError, echoed(begun_twice), r"\d+ tokens were sent, \d+ log-probs came back"),
    "shifted": ("completions", ServerError, echoed(shifted), r"for the first \(nothing precedes it"),
    "no echo": ("completions", ServerError, echoed(lambda c: c.pop("logprobs")), "does the server support echo"),
    "other ids": (
        "completions",
        ServerError,
        echoed(lambda c: c.update(prompt_token_ids=[1, 2, 3])),
        r"read the ids \[1, 2, 3\], not",
    ),
    "vllm, none": (
        "prompt_logprobs",
        ServerError,
        echoed(lambda c: c.pop("prompt_logprobs")),
        "holds no prompt_logprobs",
    ),
    "vllm, wrong ids": (
        "prompt_logprobs",
        ServerError,
        echoed(replaced_ids),
        r"token 1 was sent as id \d+, the server",
    ),
    "vllm, one less": (
        "prompt_logprobs",
        ServerError,
        echoed(lambda c: c["prompt_logprobs"].pop()),
        "log-probs came back",
    ),
    "vllm, no number": (
        "prompt_logprobs",
        ServerError,
        echoed(without_numbers),
        "has no log-prob in",
    ),
    "forbidden": (
        "completions",
        ServerError,
        lambda *_: (401, "wrong key"),
        r"refuses every request with status 401: wrong key\. No row is to blame: is the key right",
    ),
    "not for this key": ("completions", ServerError, lambda *_: (403, "no"), "may this key use this model"),
    "gone": (
        "completions",
        ServerError,
        lambda *_: (404, "The model `big` does not exist."),
        r"status 404: The model .* does the address end in /v1, and is a model served as 'big'",
    ),
    "moved": ("completions", ServerError, lambda *_: (307, ""), "refuses every request with status 307"),
    "always down": (
        "completions",
        ServerError,
        lambda *_: (500, "broken"),
        r"asked for 2 times, at last with status 500",
    ),
}


OF_THE_REQUEST = ("forbidden", "not for this key", "gone", "moved")


@pytest.mark.parametrize("name", LASTING)
def test_wrong_answers_are_errors_and_store_nothing_of_theirs(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], expected: torch.Tensor, name: str
) -> None:
    protocol, kind, fault, message = LASTING[name]
    store = make_store(tmp_path, tokenizer)
    server = settings(served, protocol=protocol, concurrency=1, attempts=2)
    served.fault = then(3, fault)
    with pytest.raises(kind, match=message) as caught:
        fill_from_server(store, pairs, server, tokenizer, progress=False)
    assert ("pairs.jsonl:" in str(caught.value)) is (name not in OF_THE_REQUEST)
    reader = ReferenceStore.open(tmp_path / "store")
    assert reader.stat().rows == 8  # of the two good answers
    served.fault = None
    assert fill_from_server(reader, pairs, server, tokenizer, progress=False).hits == 8
    assert same(reader, pairs, expected)


def test_a_row_that_the_server_refuses_is_found_among_the_others(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    long = TokenizedPair(
        chosen_ids=[5] * 40, rejected_ids=[5, 6], chosen_prompt_length=1, rejected_prompt_length=1, place="long.jsonl:3"
    )
    served.context = 40
    with pytest.raises(
        ServerError, match=r"refuses long\.jsonl:3, chosen \(40 tokens, and one to generate\).*400.*maximum"
    ):
        fill_from_server(make_store(tmp_path, tokenizer), [*pairs, long], settings(served), tokenizer, progress=False)


def test_nobody_listens(tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], reference_folder: Path) -> None:
    gone = ModelServer(reference_folder)
    gone.close()
    with pytest.raises(ServerError, match=r"asked 3 times, at last with ConnectError.*run the same command again"):
        fill_from_server(make_store(tmp_path, tokenizer), pairs, settings(gone), tokenizer, progress=False)
    assert not (tmp_path / "store").exists()


# --- before the first row --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_tokenizer() -> Any:
    """As many words, other ids."""
    return make_tokenizer(["user", "assistant", *WORDS[5:], *WORDS[:5]])


@pytest.mark.parametrize("tokens", ["ids", "text", "pieces", "none"])
@pytest.mark.parametrize("protocol", ["completions", "prompt_logprobs"])
@pytest.mark.parametrize("returns_ids", [True, False])
def test_another_tokenizer_is_an_error_before_anything_is_stored(
    served: ModelServer, tmp_path: Path, other_tokenizer: Any, protocol: Protocol, tokens: str, returns_ids: bool
) -> None:
    """The server echoes the ids that it was sent, so only its texts tell, or what it makes of a text."""
    served.tokens, served.returns_ids = tokens, returns_ids
    rows = [PreferenceRow(**row, place=f"pairs.jsonl:{n}") for n, row in enumerate(text_rows(12), start=1)]
    pairs, _ = tokenize_pairs(rows, other_tokenizer, max_length=64)
    server = settings(served, protocol=protocol)
    with pytest.raises(ServerError, match="give the tokenizer of the served model") as caught:
        fill_from_server(make_store(tmp_path, other_tokenizer), pairs, server, other_tokenizer, progress=False)
    named = tokens in ("text", "pieces") and (tokens == "text" or protocol == "completions")
    assert ("was sent as id" if named else "makes other tokens") in str(caught.value)
    assert not (tmp_path / "store").exists()


def left_out(_: ModelServer, __: Any, answer: Any) -> Any:
    """The server leaves out the first token, and the one that it generates takes its place in the count."""
    for choice in answer["choices"]:
        logps = choice["logprobs"]["token_logprobs"]
        logps.pop(0)
        logps[0] = None
    return answer


@pytest.mark.parametrize("case", ["in front", "in front, named", "in front, generated, too", "left out"])
def test_a_server_that_adds_or_leaves_out_a_token_is_an_error_before_anything_is_stored(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], case: str
) -> None:
    served.tokens = "text" if case == "in front, named" else "none"
    if case == "left out":
        served.fault = left_out
    else:
        served.front = [1]
        served.generates = case == "in front, generated, too"
    message = {
        "in front": "Does it put a token of its own in front",
        "in front, named": r"token 0 was sent as id \d+ .* the server read '<s>' there",
        "in front, generated, too": r"24 tokens were sent, 26 log-probs|\d+ tokens were sent, \d+ log-probs came back",
        "left out": "returns log-probs that are not those of the tokens that were sent",
    }[case]
    with pytest.raises(ServerError, match=message):
        fill_from_server(make_store(tmp_path, tokenizer), pairs, settings(served), tokenizer, progress=False)
    assert not (tmp_path / "store").exists()


def test_a_server_whose_tokenizer_cannot_be_known(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    served.tokens = "none"
    served.fault = lambda _, body, answer: (400, "no text") if isinstance(body["prompt"], str) else answer
    with pytest.raises(ServerError, match="its tokenizer cannot be compared with the one given"):
        fill_from_server(make_store(tmp_path, tokenizer), pairs, settings(served), tokenizer, progress=False)


@pytest.mark.parametrize(
    ("status", "said"),
    [(422, "extra fields not permitted: echo"), (400, "prompt must be a string"), (401, "key"), (404, "path")],
)
def test_what_a_server_refuses_from_the_start_is_one_error_and_one_request(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], status: int, said: str
) -> None:
    served.fault = lambda *_: (status, said)
    with pytest.raises(ServerError, match=f"status {status}: {said}") as caught:
        fill_from_server(make_store(tmp_path, tokenizer), pairs, settings(served), tokenizer, progress=False)
    assert len(served.bodies) == 1
    assert ("What is needed: POST /completions with token ids" in str(caught.value)) is (status in (400, 422))
    assert "pairs.jsonl" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_server_that_takes_texts_only_and_calls_everything_else_an_error_of_its_own(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    served.fault = lambda _, body, answer: answer if isinstance(body["prompt"], str) else (500, "not a valid string")
    with pytest.raises(ServerError, match=r"a text, but not a short row of token ids \(status 500: not a valid"):
        fill_from_server(make_store(tmp_path, tokenizer), pairs, settings(served), tokenizer, progress=False)
    assert len(served.bodies) == 3


def test_a_server_that_is_starting_is_waited_for(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], expected: torch.Tensor
) -> None:
    served.fault = first(6, lambda *_: (500, "loading"))
    store = make_store(tmp_path, tokenizer)
    fill_from_server(store, pairs, settings(served), tokenizer, progress=False)
    assert same(store, pairs, expected)
    served.fault = lambda *_: (503, "loading")
    with pytest.raises(ServerError, match=r"asked 2 times, at last with status 503: loading"):
        fill_from_server(
            make_store(tmp_path, tokenizer, "2"), pairs, settings(served, attempts=2), tokenizer, progress=False
        )


def test_the_servers_list_of_models_is_read(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], expected: torch.Tensor
) -> None:
    longest = max(len(row.ids) for row in rows_of_pairs(pairs))
    served.models = [{"id": "small"}, {"id": "bigger", "max_model_len": 9}]
    store = make_store(tmp_path, tokenizer)
    with pytest.raises(ServerError, match=r"serves no model 'big'\. It serves: bigger, small"):
        fill_from_server(store, pairs, settings(served), tokenizer, progress=False)
    served.models = [{"id": "big", "max_model_len": longest}]
    with pytest.raises(StoreError, match=rf"pairs.*:\d+, \w+ has {longest} tokens.*give --max-length {longest - 1} "):
        fill_from_server(store, pairs, settings(served), tokenizer, progress=False)
    served.models = 401
    with pytest.raises(ServerError, match=r"status 401: no models\. No row is to blame"):
        fill_from_server(store, pairs, settings(served), tokenizer, progress=False)
    assert served.bodies == []
    assert not (tmp_path / "store").exists()
    for listed in ([{"id": "big", "max_model_len": longest + 1}], [{"id": "big"}], 404, 500, [{}]):
        served.models = listed
        again = make_store(tmp_path, tokenizer, revision=str(listed))
        fill_from_server(again, pairs, settings(served), tokenizer, progress=False)
        assert same(again, pairs, expected)


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_is_shown(
    served: ModelServer,
    tmp_path: Path,
    tokenizer: Any,
    pairs: list[TokenizedPair],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the address, in a header, in what the server repeats of them, in the log of the HTTP client, in the repr."""
    caplog.set_level(0)
    address = served.url.replace("http://", "http://some:pass%2Fword@")
    by_address = settings(served, url=address, attempts=2)
    by_key = settings(served, headers={"Authorization": " Bearer se-cret-key\n"}, attempts=2)
    sent = {"basic": f"Basic {base64.b64encode(b'some:pass/word').decode()}", "key": "Bearer se-cret-key"}
    for status in (401, 400, 500):
        for kind, server in (("basic", by_address), ("key", by_key)):
            served.fault = lambda *_, kind=kind, status=status: (status, f"wrong: {sent[kind]} (pass/word)")
            with pytest.raises(ServerError) as caught:
                fill_from_server(make_store(tmp_path, tokenizer), pairs, server, tokenizer, progress=False)
            assert served.headers[-1]["Authorization"] == sent[kind]
            assert f"status {status}: wrong: " in str(caught.value)
            assert "***" in str(caught.value)
            for text in (str(caught.value), repr(server), caplog.text, server.url):
                for secret in ("se-cret-key", "some:", sent["basic"][6:], *(["pass/word"] if kind == "basic" else [])):
                    assert secret not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"headers": {"Authorization": "Bearer se\ncret"}},
            "Authorization cannot be sent: a line break stands at position 10",
        ),
        ({"headers": {"Authorization": "Bearer se\x00cret"}}, "a character outside ASCII, or a control character"),
        ({"headers": {"Authorization": "Bearer sécret"}}, "a character outside ASCII"),
        ({"headers": {"X-Key": " \n"}}, "the header X-Key is empty"),
        ({"url": "http://some:se:cret/x@host:1/v1"}, r"'http://\*\*\*@host:1/v1' is not an address\. Expected"),
        ({"url": "ftp://some:secret@host/v1"}, r"must be like http://host:port/v1; got 'ftp://\*\*\*@host/v1'"),
        ({"url": "http://host/v1?key=secret"}, r"got more after 'http://host/v1'"),
        ({"url": "http://some:secret@host/v1", "headers": {"authorization": "secret"}}, "not both"),
    ],
)
def test_secrets_that_cannot_be_sent_are_refused_and_not_shown(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Server(**{"url": "http://host/v1", "model": "m", **options})
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "key", "message"),
    [
        ("SERVER_KEY", "se\ncret", "the key in the environment variable SERVER_KEY cannot be sent: a line break"),
        ("SERVER_KEY", "se cret", "SERVER_KEY holds a blank"),
        ("SERVER_KEY", "\n", "SERVER_KEY is empty"),
        ("SERVER_KEY", None, "SERVER_KEY is not set. The flag takes its name, not the key"),
        ("hf_secret", None, "the environment variable that --api-key-variable names is not set"),
    ],
)
def test_keys_that_the_command_refuses(
    reference_folder: Path,
    tmp_path: Path,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    key: str | None,
    message: str,
) -> None:
    if key is not None:
        monkeypatch.setenv(variable, key)
    arguments = ["score", "--url", "http://127.0.0.1:9/v1", "--ref-model", "big", "--revision", "1", "--pairs"]
    arguments += [str(pairs_file), "--store", str(tmp_path / "store"), "--tokenizer", str(reference_folder)]
    assert main([*arguments, "--api-key-variable", variable]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "cret" not in said


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_does_not_wait_for_answers(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    answered: list[bool] = []
    came, go_on = threading.Event(), threading.Event()

    def hang(_: ModelServer, __: Any, answer: Any) -> Any:
        came.set()
        go_on.wait(20)
        answered.append(go_on.is_set())
        return answer

    served.fault = then(2, hang)
    store = make_store(tmp_path, tokenizer)
    interrupt = threading.Thread(target=lambda: (came.wait(60), os.kill(os.getpid(), signal.SIGINT)))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        fill_from_server(store, pairs, settings(served, concurrency=1, timeout=60.0), tokenizer, progress=False)
    assert answered == []  # it would have waited for the answer, or for the server to give up
    go_on.set()
    interrupt.join()
    assert store.stat().rows == 4  # what was computed before is stored


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_does_not_wait_for_pauses(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    came = threading.Event()

    def busy(_: ModelServer, body: Any, answer: Any) -> Any:
        if len(body["prompt"]) == 1:
            came.set()
        return 503, "busy"

    served.fault = then(1, busy)
    interrupt = threading.Thread(target=lambda: (came.wait(60), time.sleep(0.2), os.kill(os.getpid(), signal.SIGINT)))
    interrupt.start()
    server = settings(served, concurrency=1, pause=4.0)
    with pytest.raises(KeyboardInterrupt):
        fill_from_server(make_store(tmp_path, tokenizer), pairs, server, tokenizer, progress=False)
    interrupt.join()
    rows = [tuple(body["prompt"][0]) for body in served.bodies if len(body["prompt"]) == 1][1:]
    assert len(rows) == len(set(rows)) == 1  # it would have asked for the row again after the pause


def test_pauses_grow_and_are_capped() -> None:
    server = Server(url="http://host/v1", model="m")
    pauses = [server.pause_before(attempt) for attempt in range(server.attempts)]
    assert pauses == [0, 1, 2, 4, 8, 16, *[30] * 14]
    assert sum(pauses) > 7 * 60  # a server that is started again loads its model meanwhile


# --- the same numbers as before --------------------------------------------------------------------------------------


def test_another_model_under_the_old_name_is_noticed(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    store = make_store(tmp_path, tokenizer)
    fill_from_server(store, pairs[:6], settings(served), tokenizer, progress=False)
    with torch.no_grad():
        served.model.lm_head.weight.mul_(-1)
    with pytest.raises(StoreError, match=r"another model is served there now\. Give it another revision"):
        fill_from_server(store, pairs, settings(served), tokenizer, progress=False)
    other = make_store(tmp_path, tokenizer, revision="2")
    assert fill_from_server(other, pairs, settings(served), tokenizer, progress=False).hits == 0
    with pytest.raises(StoreError, match="is not that of the served model 'small'"):
        fill_from_server(other, pairs, settings(served, model="small"), tokenizer, progress=False)


@pytest.mark.parametrize(("factor", "passes"), [(1.0005, True), (1.02, False)])
def test_a_server_may_differ_by_its_noise_and_what_was_seen_is_told(
    served: ModelServer,
    tmp_path: Path,
    tokenizer: Any,
    pairs: list[TokenizedPair],
    caplog: pytest.LogCaptureFixture,
    factor: float,
    passes: bool,
) -> None:
    """Batching changes 1e-5 to 7e-4 nats in the mean; the same weights in another dtype 0.04."""
    caplog.set_level("INFO", logger="selective_pref_adapters.reference_store.served")
    store = make_store(tmp_path, tokenizer)
    fill_from_server(store, pairs[:6], settings(served), tokenizer, progress=False)
    with torch.no_grad():
        served.model.lm_head.weight.mul_(factor)
    source = partial(served_logps, server=settings(served), tokenizer=tokenizer)
    seen = compare_rows(store, rows_of_pairs(pairs[:6]), source, sample=8, seed=0)
    assert seen.rows == 8
    assert (1e-5 < seen.mean_difference < 2e-3) if passes else (0.015 < seen.mean_difference < 0.06)
    said = f"differ by {seen.mean_difference:.2g} nats in the mean over 8 rows from those stored as 'big@1' (by"
    if passes:
        fill_from_server(store, pairs, settings(served), tokenizer, progress=False)
        assert f"the server's log-probs {said}" in caplog.text
        return
    with pytest.raises(StoreError, match=re.escape(said)) as caught:
        fill_from_server(store, pairs, settings(served), tokenizer, progress=False)
    assert "another model is served there now. Give it another revision, also where only its dtype" in str(caught.value)
    assert store.stat().rows == rows_in(pairs[:6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url must be like http://host:port/v1"),
        ({"url": "ftp://host/v1"}, "url must be like"),
        ({"url": "http://host:port/v1"}, "is not an address"),
        ({"protocol": "chat"}, "protocol must be 'completions' or 'prompt_logprobs'"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"attempts": 0}, "attempts must be at least 1"),
        ({"timeout": float("inf")}, "timeout must be at least 0 seconds"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Server(**{"url": "http://host/v1", "model": "m", **options})


def test_the_command_asks_a_server(
    served: ModelServer,
    tmp_path: Path,
    reference_folder: Path,
    tokenizer: Any,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVER_KEY", "secret")
    arguments = ["score", "--url", served.url, "--ref-model", "big", "--revision", "1", "--pairs", str(pairs_file)]
    arguments += ["--store", str(tmp_path / "store"), "--tokenizer", str(reference_folder), "--max-length", "63"]
    arguments += ["--api-key-variable", "SERVER_KEY"]
    assert main(arguments) == 0
    assert "0 were stored, 80 computed" in capsys.readouterr().out
    assert served.headers[-1]["Authorization"] == "Bearer secret"
    asked = len(served.bodies)
    assert main(arguments) == 0
    assert "80 were stored, 0 computed" in capsys.readouterr().out
    assert len(served.bodies) == asked
    assert main([*arguments, "--verify", "--verify-tolerance", "1e-5"]) == 0
    store = ReferenceStore.open(tmp_path / "store", "big@1")
    store.check(tokenize_pairs(read_rows(pairs_file), tokenizer, max_length=63)[0])
    served.fault = lambda *_: (401, "no")
    other = [*arguments, "--revision", "2"]
    assert main(other) == 1
    assert "refuses" in capsys.readouterr().err
    served.fault = None
    served.models = [{"id": "big"}]
    assert main([*arguments, "--ref-model", "bigg"]) == 1
    assert "serves no model 'bigg'. It serves: big" in capsys.readouterr().err
    assert ReferenceStore.open(tmp_path / "store").space.label == "big@1"  # the others left nothing behind

    with torch.no_grad():
        served.model.lm_head.weight.mul_(1.02)
    assert main([*arguments, "--verify"]) == 1
    assert "more than 0.015 in the mean is not noise: another model is served there now" in capsys.readouterr().err
    more = tmp_path / "more.jsonl"
    more.write_text(pairs_file.read_text() + json.dumps({"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}) + "\n")
    assert main([*arguments, "--pairs", str(more)]) == 1
    assert "nats in the mean over 8 rows from those stored as 'big@1'" in capsys.readouterr().err
    with torch.no_grad():
        served.model.lm_head.weight.div_(1.02)
    assert main([*arguments, "--pairs", str(more)]) == 0
    shown = capsys.readouterr()
    assert "the server's log-probs differ by" in shown.err
    assert "80 were stored, 2 computed" in shown.out
    monkeypatch.delenv("SERVER_KEY")
    assert main(arguments) == 1
    assert "SERVER_KEY is not set" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_is_served(shared: Path, tmp_path: Path) -> None:
    """Real pieces of text, byte tokens among them, named as ids and as text: the same numbers as on this process."""
    folder = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = read_rows(shared / "data" / "gsm8k_pairs.jsonl")[:12]
    pairs, _ = tokenize_pairs(rows, tokenizer, max_length=400)
    model = AutoModelForCausalLM.from_pretrained(folder)
    local = ReferenceStore.create(tmp_path / "local", reference_space(model, tokenizer))
    fill_store(local, pairs, model, pad_token_id=0, progress=False)
    for tokens in ("text", "pieces"):
        server = ModelServer(folder, tokens=tokens)
        try:
            store = ReferenceStore.create(tmp_path / tokens, served_space("big", "1", tokenizer))
            fill_from_server(store, pairs, settings(server), tokenizer, progress=False)
        finally:
            server.close()
        assert same(store, pairs, local.lookup(collate(pairs, 0)))
