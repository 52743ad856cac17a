"""`selective-pref generate --base-url`: a real server in this process serves a real model, well and badly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref_adapters.cli import main
from test_generate import LIMIT, MT_ROWS, turns_of, without_times
from test_generate_formats import write

Fault = Callable[[dict[str, Any]], Any]


class ChatServer:
    """Serves a model under /v1/chat/completions, greedily. `fault` may return (status, text), None to hang up, or ...
    to let the request pass; it may sleep."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), None
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.fault: Fault = lambda _: ...
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._at_once = 0
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
            self.bodies.append(body)
            self.keys.append(request.headers["Authorization"])
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            spoiled = (404, "no such path") if request.path != "/v1/chat/completions" else self.fault(body)
            status, text = (200, json.dumps(self.said(body))) if spoiled is ... else spoiled or (0, "")
        finally:
            with self._lock:
                self._at_once -= 1
        if status == 0:
            request.close_connection = True
            return
        request.send_response(status)
        request.send_header("Content-Length", str(len(text.encode())))
        request.end_headers()
        request.wfile.write(text.encode())

    def said(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with self._lock, torch.no_grad():
            out = self.model.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        reason = "stop" if new[-1] == self.tokenizer.eos_token_id else "length"
        content = self.tokenizer.decode(new, skip_special_tokens=True)
        return {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": reason}]}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(10)


@pytest.fixture
def server(policy_folder: Path) -> Iterator[ChatServer]:
    server = ChatServer(policy_folder)
    yield server
    server.close()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "question.jsonl", *MT_ROWS)


def flags(questions: Path, model: Path | str, out: Path) -> list[str]:
    asked = ["--benchmark", "mt-bench", "--questions", str(questions), "--max-new-tokens", str(LIMIT)]
    return ["generate", *asked, "--model", str(model), "--out", str(out)]


def test_a_server_gives_the_answers_that_the_model_gives_here(
    server: ChatServer, policy_folder: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", " sk-secret\n")
    served = [*flags(questions, "served-name", tmp_path / "served.jsonl"), "--base-url", server.url]
    assert main([*served, "--temperature", "0", "--api-key-variable", "THE_KEY", "--concurrency", "3"]) == 0
    assert main([*flags(questions, policy_folder, tmp_path / "here.jsonl"), "--temperature", "0"]) == 0
    assert turns_of(tmp_path / "served.jsonl") == turns_of(tmp_path / "here.jsonl")
    assert list(turns_of(tmp_path / "served.jsonl")) == [row["question_id"] for row in MT_ROWS]
    served_said, here = (json.loads((tmp_path / f"{n}.jsonl.settings.json").read_text()) for n in ("served", "here"))
    assert served_said["reached_the_limit"] == here["reached_the_limit"] != []
    assert set(server.keys) == {"Bearer sk-secret"}
    assert {body["model"] for body in server.bodies} == {"served-name"}
    assert 1 < server.most_at_once <= 3
    assert set(server.bodies[0]) == {"model", "messages", "temperature", "max_tokens", "seed"}
    assert "secret" not in "".join(path.read_text() for path in tmp_path.glob("served*"))


def test_each_turn_is_asked_with_its_temperature_and_what_was_said_before(
    server: ChatServer, tmp_path: Path, questions: Path
) -> None:
    assert main([*flags(questions, "m", tmp_path / "a.jsonl"), "--base-url", server.url]) == 0
    said = turns_of(tmp_path / "a.jsonl")
    asked = {(body["messages"][0]["content"], len(body["messages"])): body for body in server.bodies}
    stated = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "math": 0, "coding": 0}
    for row in MT_ROWS:
        first, second = (asked[row["turns"][0], length] for length in (1, 3))
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
        assert second["messages"][1]["content"] == said[row["question_id"]][0]
        assert second["messages"][2]["content"] == row["turns"][1]
        assert first["temperature"] == second["temperature"] == stated[row["category"]]
        assert first["seed"] != second["seed"]
    assert len(server.bodies) == 2 * len(MT_ROWS)


@pytest.mark.parametrize("wrong", [(503, "busy"), (429, "slower"), None, (200, "<html>"), (200, '{"choices": []}')])
def test_what_may_pass_is_asked_again(
    wrong: Any, server: ChatServer, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selective_pref_adapters.reference_store.served.server.LONGEST_PAUSE", 0.01)
    count = Counter[str]()

    def once(body: dict[str, Any]) -> Any:
        count[json.dumps(body["messages"])] += 1
        return wrong if count[json.dumps(body["messages"])] == 1 and len(body["messages"]) == 3 else ...

    server.fault = once
    assert main([*flags(questions, "m", tmp_path / "a.jsonl"), "--base-url", server.url]) == 0
    assert len(turns_of(tmp_path / "a.jsonl")) == len(MT_ROWS)
    assert len(server.bodies) == 3 * len(MT_ROWS)


def test_an_outage_ends_the_run_after_its_attempts_and_the_same_command_goes_on(
    server: ChatServer, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("selective_pref_adapters.reference_store.served.server.LONGEST_PAUSE", 0.01)
    command = [*flags(questions, "m", tmp_path / "a.jsonl"), "--base-url", server.url, "--concurrency", "1"]
    server.fault = lambda _: ... if len(server.bodies) <= 7 else (503, "busy")
    assert main([*command, "--attempts", "5"]) == 1
    error = capsys.readouterr().err
    assert "question 83 was asked 5 times, at last with status 503: busy" in error
    assert "what was answered before is kept" in error
    assert len(server.bodies) == 7 + 5
    assert not (tmp_path / "a.jsonl").exists()
    server.fault = lambda _: ...
    server.bodies.clear()
    assert main(command) == 0
    assert len(server.bodies) == 2 * 4  # the first turn of 83 is asked again
    assert len(turns_of(tmp_path / "a.jsonl")) == 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((400, "context length is 64"), "refuses question 80 with status 400: context length is 64"),
        ((401, "who?"), "is the key right"),
        ((404, "no model m"), "is a model served as 'm'?"),
    ],
)
def test_a_refusal_is_an_error_that_says_what_to_do(
    wrong: Any, message: str, server: ChatServer, tmp_path: Path, questions: Path, capsys: Any
) -> None:
    server.fault = lambda _: wrong
    command = [*flags(questions, "m", tmp_path / "a.jsonl"), "--base-url", server.url, "--concurrency", "1"]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert len(server.bodies) == 1


def test_a_server_that_is_not_there_is_known_soon(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("selective_pref_adapters.reference_store.served.server.LONGEST_PAUSE", 0.01)
    assert main([*flags(questions, "m", tmp_path / "a.jsonl"), "--base-url", "http://127.0.0.1:9/v1"]) == 1
    assert re.search(r"question 8\d was asked 3 times, at last with ConnectError", capsys.readouterr().err)
    assert main([*flags(questions, "m", tmp_path / "a.jsonl"), "--base-url", "ftp://x"]) == 1
    assert "url must be like http://host:port/v1" in capsys.readouterr().err


def test_no_text_is_an_empty_answer_and_half_a_character_breaks_nothing(
    server: ChatServer, tmp_path: Path, questions: Path
) -> None:
    def odd(body: dict[str, Any]) -> Any:
        content = None if len(body["messages"]) == 1 else "\ud83d"
        return 200, json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "length"}]})

    server.fault = odd
    assert main([*flags(questions, "m", tmp_path / "a.jsonl"), "--base-url", server.url]) == 0
    assert set(turns_of(tmp_path / "a.jsonl").values()) == {("", "?")}
    about = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    assert about["empty"] == [row["question_id"] for row in MT_ROWS]
    assert about["reached_the_limit"] == [{"id": name, "turns": 2} for name in about["empty"]]


def test_after_kill_9_the_missing_questions_are_asked_and_no_other(
    server: ChatServer, tmp_path: Path, questions: Path
) -> None:
    """A process is killed while a question is under way: what it had answered stays, once and whole."""
    out, partial = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.partial"
    command = [*flags(questions, "m", out), "--base-url", server.url, "--concurrency", "1"]
    reached, over = threading.Event(), threading.Event()

    def hangs(body: dict[str, Any]) -> Any:
        if len(server.bodies) > 7:
            reached.set()
            over.wait(240)
            return None
        return ...

    server.fault = hangs
    process = subprocess.Popen([sys.executable, "-m", "selective_pref_adapters.cli", *command], env={**os.environ})
    try:
        assert reached.wait(240)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        over.set()
    assert not out.exists()
    assert [json.loads(line)["answer"]["question_id"] for line in partial.read_text().splitlines()[1:]] == [80, 81, 82]
    server.fault = lambda _: ...
    server.bodies.clear()
    assert main(command) == 0
    assert len(server.bodies) == 2 * 4
    whole = [*flags(questions, "m", tmp_path / "whole.jsonl"), "--base-url", server.url, "--model-id", "killed"]
    assert main(whole) == 0
    assert without_times(out) == without_times(tmp_path / "whole.jsonl")
    assert not partial.exists()
