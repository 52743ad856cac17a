"""A server on this machine that answers as the Hugging Face hub does for data sets: what `datasets` asks, no more."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

REVISION = "a" * 40


@contextmanager
def hub(datasets: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """Serves data sets (owner/name → path → content) for as long as the context lasts; gives the endpoint."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            _, *parts = self.path.partition("?")[0].split("/")
            if parts[0] == "api":
                parts = parts[1:]
            name, what, rest = "/".join(parts[1:3]), parts[3:4], "/".join(parts[5:])
            files = datasets.get(name)
            if files is None:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif what == ["resolve"]:
                body = files.get(rest)
                found = {"X-Error-Code": "EntryNotFound"} if body is None else {"ETag": f'"{digest(body)}"'}
                self.answer(404 if body is None else 200, body or b"", {"X-Repo-Commit": REVISION, **found})
            elif what == ["tree"]:
                self.answer(200, json.dumps([entry(path, files[path]) for path in files]).encode())
            else:
                siblings = [{"rfilename": path} for path in files]
                self.answer(200, json.dumps({"id": name, "sha": REVISION, "siblings": siblings, "tags": []}).encode())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            files = datasets["/".join(self.path.split("/")[3:5])]
            self.answer(200, json.dumps([entry(path, files[path]) for path in asked if path in files]).encode())

        def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for header, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def digest(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


def entry(path: str, body: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(body), "oid": digest(body)}
