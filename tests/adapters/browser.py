"""Chromium without a window, where one is installed: pages are opened as people open them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=60000",
    "--run-all-compositor-stages-before-draw",
)


@dataclass(frozen=True)
class Token:
    """A token of a page: what it shows, and what the page says of it."""

    text: str
    weight: float
    classes: frozenset[str]


@dataclass(frozen=True)
class Opened:
    """A page after its script has run: its elements as text, and what the console said."""

    html: str
    console: list[str]

    def tokens(self) -> list[list[Token]]:
        """The tokens of each response, in the order of the page."""
        reader = _Tokens()
        reader.feed(self.html)
        return reader.responses


def opened(path: Path, profile: Path, *, rule: str = "", width: int = 1280, script: str = "") -> Opened:
    """The page as Chromium has it after its script has run, in a window high enough for all of it.

    Args:
        path: of the page.
        profile: an empty folder for the browser's own files.
        rule: what stands behind the # of its address.
        script: run at the page's end, in a copy of it.
    """
    assert CHROMIUM is not None
    if script:
        copy = profile / f"copy-{path.name}"
        profile.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"))
        path = copy
    address = path.resolve().as_uri() + (f"#{rule}" if rule else "")
    options = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},6000", "--dump-dom", address]
    run = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in run.stderr.splitlines() if re.search(r"CONSOLE|Refused|net::ERR", line)]
    return Opened(html=run.stdout, console=console)


class _Tokens(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.responses: list[list[Token]] = []
        self._open: dict[str, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if given.get("role") == "listbox":
            self.responses.append([])
        if "data-w" in given:
            self._open = given
            self.responses[-1].append(Token("", float(given["data-w"]), frozenset(given["class"].split())))

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            last = self.responses[-1][-1]
            self.responses[-1][-1] = Token(last.text + data, last.weight, last.classes)
