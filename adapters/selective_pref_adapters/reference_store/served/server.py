"""Where a served reference is, and how it is asked. In: an address, a name, headers. Out: a checked `Server`.

Whatever is secret (credentials in the address, header values) is taken out of the address, and `shown` takes it out of
whatever is printed: errors of the transport and answers of the server may repeat it.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import httpx2

Protocol: TypeAlias = Literal["completions", "prompt_logprobs"]

LONGEST_PAUSE = 30.0
"""Seconds: the pauses before a row is asked for again double until they are this long."""

_HIDDEN = "***"
_SHORTEST_SECRET = 4  # shorter ones would garble every message, and guard nothing


class ServerError(OSError):
    """A server that does not answer as asked. The message names address, row and answer; rows before it are stored."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where and how to ask.

    Attributes:
        url: the address up to and with `/v1`. Credentials in it (`http://user:password@host/v1`) are sent as basic
            authentication and taken out of it.
        model: the name it is served under.
        protocol: how log-probs of given tokens are asked for, see `served`.
        concurrency: requests under way at once.
        rows_per_request: rows in one of them.
        timeout: seconds to wait for an answer.
        attempts: how often a single row is asked for before it is given up. With the default pauses 20 attempts last
            seven and a half minutes: a server that is started again needs some of them to load its model.
        pause: seconds before a single row is asked for again; doubled each time, up to 30.
        headers: sent with every request, as an API key is; white space around a value is taken off.

    Raises:
        ValueError: an option makes no sense, or a header cannot be sent. No message shows a secret.
    """

    url: str
    model: str
    protocol: Protocol = "completions"
    concurrency: int = 4
    rows_per_request: int = 8
    timeout: float = 120.0
    attempts: int = 20
    pause: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        address = _address(self.url)
        headers = {name: sendable(value, f"the header {name}") for name, value in self.headers.items()}
        secrets = [part for value in headers.values() for part in (value, value.split()[-1])]
        if address.username or address.password:
            if any(name.lower() == "authorization" for name in headers):
                raise ValueError("give credentials in the address or as an API key, not both: only one can be sent")
            token = base64.b64encode(f"{address.username}:{address.password}".encode()).decode("ascii")
            headers["Authorization"] = f"Basic {token}"
            secrets += [f"{address.username}:{address.password}", address.password, token]
            object.__setattr__(self, "url", str(address.copy_with(userinfo=b"")))
        object.__setattr__(self, "headers", headers)
        longest_first = sorted({s for s in secrets if len(s) >= _SHORTEST_SECRET}, key=len, reverse=True)
        object.__setattr__(self, "secrets", tuple(longest_first))
        if self.protocol not in ("completions", "prompt_logprobs"):
            raise ValueError(f"protocol must be 'completions' or 'prompt_logprobs'; got {self.protocol!r}")
        for name in ("concurrency", "rows_per_request", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("timeout", "pause"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 seconds; got {getattr(self, name)}")

    def shown(self, text: str) -> str:
        """A text without the secrets that are sent to this server."""
        for secret in self.secrets:
            text = text.replace(secret, _HIDDEN)
        return text

    def pause_before(self, attempt: int) -> float:
        """Seconds to wait before a row is asked for again: 0 before the first attempt (0), at most 30."""
        return min(self.pause * 2 ** (attempt - 1), LONGEST_PAUSE) if attempt else 0.0

    def client(self) -> httpx2.Client:
        """An HTTP client that sends the headers and waits as long as it should."""
        return httpx2.Client(timeout=self.timeout, headers={"Content-Type": "application/json", **self.headers})


def sendable(value: str, what: str) -> str:
    """A header's value or a part of it without white space around it.

    Raises:
        ValueError: it is empty, or holds a character that no header may hold. Says where, and not what it is.
    """
    value = value.strip()
    if not value:
        raise ValueError(f"{what} is empty")
    for position, character in enumerate(value, start=1):
        if not (character.isascii() and character.isprintable()):
            kind = "a line break" if character in "\r\n" else "a character outside ASCII, or a control character"
            raise ValueError(
                f"{what} cannot be sent: {kind} stands at position {position} of {len(value)} (not shown here)"
            )
    return value


def _address(url: str) -> httpx2.URL:
    public = re.sub(r"//.*@", f"//{_HIDDEN}@", re.sub(r"[?#].*", "", url, flags=re.DOTALL), flags=re.DOTALL)
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        reason = "" if "@" in url else f": {error}"  # which may quote a part of a password
        raise ValueError(f"{public!r} is not an address{reason}. Expected one like http://host:port/v1") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(f"url must be like http://host:port/v1; got {public!r}")
    if address.query or address.fragment:
        raise ValueError(f"url must end with its path, like http://host:port/v1; got more after {public!r}")
    return address
