"""The built site: no warning, no network; in a browser nothing wider than its window, and code copied as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from browser import CHROMIUM, opened
from test_docs import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_site_builds_without_a_warning_and_needs_no_network(site: Path) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > 20
    for path, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//[^\s>]+", text)
        loaded += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*href=\"?(?:https?:)?//[^\s>]+", text
        )
        assert not loaded, f"{path.name} asks the network: {loaded}"
        assert "arithmatex" not in text, f"{path}: a formula is still LaTeX"


MEASURE = """
const found = {};
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    found[frame.width + " " + frame.getAttribute("src")] = {
      over: root.scrollWidth - root.clientWidth,
      copied: [...page.querySelectorAll("pre > code")].filter((code) => code.innerText !== code.textContent).length,
      blocks: page.querySelectorAll("pre > code").length,
    };
  }
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_no_page_is_wider_than_a_phone_or_a_desktop_and_code_is_copied_as_written(site: Path, tmp_path: Path) -> None:
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("index.html"))]
    kind = "height=900 sandbox=allow-same-origin"  # no scripts: those of 50 pages at once take minutes
    frames = [f'<iframe src="{page}" width={width} {kind}></iframe>' for page in pages for width in (390, 1280)]
    (site / "frames.html").write_text(f"<body>{''.join(frames)}<script>{MEASURE}</script></body>", encoding="utf-8")
    shown = opened(site / "frames.html", tmp_path / "profile").html
    found = json.loads(re.findall(r'<pre id="found">(.*)</pre>', shown)[0])
    assert len(found) == 2 * len(pages)
    assert not [page for page, measured in found.items() if measured["over"] > 0]
    assert not [page for page, measured in found.items() if measured["copied"]]
    assert sum(measured["blocks"] for measured in found.values()) > 200
