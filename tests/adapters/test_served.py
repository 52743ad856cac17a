"""A reference behind HTTP: a real server in this process serves a real model, well and badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
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
    fill_store,
    reference_space,
    rows_of_pairs,
)
from selective_pref_adapters.reference_store.served import Protocol, Server, ServerError, fill_from_server, served_space
from tiny import text_rows

Fault = Callable[["ModelServer", dict[str, Any], dict[str, Any]], Any]


class ModelServer:
    """Serves a model under /v1/completions, with `echo` and with `prompt_logprobs`; `fault` may spoil an answer.

    A fault gets the request and the whole answer, and returns what to send instead: an object, bytes, or (status,
    text). It may sleep. Token ids are named as ids, as text or not at all, as `tokens` says.
    """

    def __init__(self, folder: Path, tokens: str = "ids", context: int = 10**6) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokens = tokens
        self.context = context
        self.fault: Fault | None = None
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
            elif any(len(ids) + 1 > self.context for ids in body["prompt"]):
                status, sent = 400, f"maximum context length is {self.context} tokens"
            elif self.fault is not None:
                spoiled = self.fault(self, body, sent)
                status, sent = spoiled if isinstance(spoiled, tuple) else (200, spoiled)
        finally:
            with self._lock:
                self._at_once -= 1
        data = sent if isinstance(sent, bytes) else (sent if isinstance(sent, str) else json.dumps(sent)).encode()
        try:
            request.send_response(status)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # who asked has hung up

    def whole_answer(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["max_tokens"] == 1
        assert body["temperature"] == 0
        choices = []
        for number, ids in enumerate(body["prompt"]):
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
                choice["logprobs"] = {"token_logprobs": [*per_token, logps[-1, best].item()]}
                if named is not None:
                    choice["logprobs"]["tokens"] = [named(i) for i in [*ids, best]]
            if body.get("prompt_logprobs") is not None:
                choice["prompt_logprobs"] = [
                    None
                    if logp is None
                    else {str(i): {"logprob": logp, "rank": 1, "decoded_token": "x"}, "3": {"logprob": -0.1}}
                    if str(i) != "3"
                    else {"3": {"logprob": logp}}
                    for i, logp in zip(ids, per_token, strict=True)
                ]
            choices.append(choice)
        return {"object": "text_completion", "model": body["model"], "choices": choices}

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
    return Server(
        **{"url": server.url, "model": "big", "pause": 0.01, "timeout": 20.0, "rows_per_request": 4, **options}
    )


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
    assert (report.rows, report.scored, report.hits) == (rows_in(pairs), rows_in(pairs), 0)
    assert report.forward_passes == len(served.bodies) == -(-rows_in(pairs) // 4)
    assert max(len(body["prompt"]) for body in served.bodies) == 4
    assert served.headers[0]["Authorization"] == "Bearer secret"
    assert same(ReferenceStore.open(tmp_path / "store"), pairs, expected)
    again = fill_from_server(store, pairs, server, tokenizer, progress=False)
    assert (again.scored, again.hits, len(served.bodies)) == (0, rows_in(pairs), report.forward_passes)


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
    served.fault = first(4 if name != "slow" else 1, PASSING[name])
    if name in ("a choice too few", "a choice twice"):
        served.fault = lambda s, body, answer: PASSING[name](s, body, answer) if len(body["prompt"]) > 1 else answer
    store = make_store(tmp_path, tokenizer)
    server = settings(served, timeout=0.3 if name == "slow" else 20.0, concurrency=2)
    report = fill_from_server(store, pairs, server, tokenizer, progress=False)
    assert report.scored == rows_in(pairs)
    assert same(store, pairs, expected)
    assert {len(body["prompt"]) for body in served.bodies} >= {4, 2}
    assert len(served.bodies) > report.forward_passes


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
    """A server that names tokens by their text has scored another one."""
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
        r"token 1 was sent as id \d+ .* the server scores 'token_id:",
    ),
    "wrong text": (
        "completions",
        ServerError,
        echoed(other_text),
        r"token 1 was sent as id \d+ .* scores '(user|assis)",
    ),
    "a token more": ("completions", ServerError, echoed(begun_twice), r"\d+ tokens were sent, \d+ log-probs came back"),
    "shifted": ("completions", ServerError, echoed(shifted), r"for the first \(nothing precedes it"),
    "no echo": ("completions", ServerError, echoed(lambda c: c.pop("logprobs")), "does the server support echo"),
    "other ids": (
        "completions",
        ServerError,
        echoed(lambda c: c.update(prompt_token_ids=[1, 2, 3])),
        r"scores the ids \[1, 2, 3\], not",
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
    "forbidden": ("completions", ServerError, lambda *_: (401, "wrong key"), "refuses .* with status 401: wrong key"),
    "always down": (
        "completions",
        ServerError,
        lambda *_: (500, "broken"),
        r"asked for 2 times, at last with status 500",
    ),
}


@pytest.mark.parametrize("name", LASTING)
def test_wrong_answers_are_errors_and_store_nothing_of_theirs(
    served: ModelServer, tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], expected: torch.Tensor, name: str
) -> None:
    protocol, kind, fault, message = LASTING[name]
    store = make_store(tmp_path, tokenizer)
    server = settings(served, protocol=protocol, concurrency=1, attempts=2)
    good = [0]

    def after_two(server: ModelServer, body: Any, answer: Any) -> Any:
        good[0] += 1
        return answer if good[0] <= 2 else fault(server, body, answer)

    served.fault = after_two
    with pytest.raises(kind, match=message) as caught:
        fill_from_server(store, pairs, server, tokenizer, progress=False)
    assert "pairs.jsonl:" in str(caught.value)
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
    with pytest.raises(ServerError, match=r"at last with ConnectError.*run the same command again"):
        fill_from_server(make_store(tmp_path, tokenizer), pairs, settings(gone, attempts=2), tokenizer, progress=False)


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
    assert "0 were stored, 80 scored" in capsys.readouterr().out
    assert served.headers[-1]["Authorization"] == "Bearer secret"
    asked = len(served.bodies)
    assert main(arguments) == 0
    assert "80 were stored, 0 scored" in capsys.readouterr().out
    assert len(served.bodies) == asked
    assert main([*arguments, "--verify", "--verify-tolerance", "1e-5"]) == 0
    store = ReferenceStore.open(tmp_path / "store", "big@1")
    store.check(tokenize_pairs(read_rows(pairs_file), tokenizer, max_length=63)[0])
    served.fault = lambda *_: (401, "no")
    other = [*arguments, "--revision", "2"]
    assert main(other) == 1
    assert "refuses" in capsys.readouterr().err
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
