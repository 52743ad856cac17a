"""The pages as a newcomer meets them: claims that have tests, links that lead somewhere, commands that exist, pages
that run as they stand."""

from __future__ import annotations

import contextlib
import html
import io
import re
import runpy
import shlex
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

from test_docs import FENCE, MUTATIONS, PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIMS = re.findall(
    r"^\| (?!claim|---)(.+?) \| (.+) \|$", (ROOT / "docs" / "claims.md").read_text(encoding="utf-8"), re.MULTILINE
)


def one_line(text: str) -> str:
    return " ".join(text.split())


def guarantees() -> list[str]:
    section = README.split("## What it guarantees\n")[1].split("\n## ")[0]
    return [one_line(item) for item in re.findall(r"^- ((?:.+\n?)+?)(?=^- |^\n|\Z)", section, re.MULTILINE)]


def test_every_claim_names_tests_that_exist_and_stands_in_the_readme() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    tests = {name for source in sources for name in re.findall(r"^def test_(\w+)", source, re.MULTILINE)}
    for claim, held_by in CLAIMS:
        assert claim in one_line(README), f"not in the README: {claim}"
        names = re.findall(r"`([a-z_0-9]+)`", held_by)
        assert names, claim
        assert not set(names) - tests, f"{claim}: {sorted(set(names) - tests)}"


def test_every_guarantee_is_listed_with_a_test_that_was_seen_to_fail() -> None:
    listed = dict(CLAIMS)
    seen = {name for *_, seen_by in MUTATIONS for name in re.findall(r"`(\w+)`", seen_by)}
    assert len(guarantees()) > 10
    for claim in guarantees():
        assert claim in listed, f"docs/claims.md lacks: {claim}"
        names = set(re.findall(r"`(\w+)`", listed[claim]))
        assert names & seen, f"{claim}: none of {sorted(names)} is in docs/mutations.md"


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as Python-Markdown makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    plain = [unicodedata.normalize("NFKD", line).encode("ascii", "ignore").decode() for line in plain]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", line).strip().lower()) for line in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md" and file.name != "api.md":
            assert anchor in headings(file), f"{page.name}: {target}"


def commands() -> dict[str, set[str]]:
    """Command of `selective-pref` → flags that a console block of some page gives it."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for block in FENCE.finditer(page.read_text(encoding="utf-8")):
            if not block["kind"].strip().startswith("console"):
                continue
            for line in block["body"].replace("\\\n", " ").splitlines():
                called = re.search(r"(?:selective-pref|selective_pref_adapters\.cli) ([a-z]+)(.*)", line.split(" #")[0])
                if called and "pip install" not in line:
                    flags = re.findall(r"(?<=\s)--[a-zA-Z][\w-]*", called[2])
                    found.setdefault(called[1], set()).update(flags)
    return found


@pytest.mark.parametrize("command", sorted(commands()))
def test_flags_in_console_blocks_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    from selective_pref_adapters.cli import main

    if command == "dpo":
        pytest.importorskip("trl")
    if command == "demo":
        return
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"--[a-zA-Z][\w-]*", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)))
    known |= {"--config"}  # read before the parser
    assert not {flag for flag in commands()[command] if flag not in known}


FIRST_PAGES = ["start/method.md", "start/jax.md", "start/torch.md", "start/trl.md", "tutorial.md"]
NOT_RUN_HERE = {
    "adapters/hf.md": "run by test_the_script_of_the_page_trains_on_real_pairs",
    "adapters/trl.md": "a script for TRL alone, to show the two names that change; start/trl.md has one that runs",
    "comparison.md": "a call of Liger, which is not installed; the block after it computes the same",
}
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


def test_scripts_are_run_or_it_is_said_why_not() -> None:
    pages = {
        str(page.relative_to(ROOT / "docs"))
        for page in PAGES
        if re.search(r"^``` \{ \.python", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert pages - set(FIRST_PAGES) == set(NOT_RUN_HERE)


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that playground.py leaves behind."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("playground")
    source = ROOT / "docs" / "start" / "playground.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), {"__name__": "__main__"})
    return folder


def programs(page: str) -> list[tuple[str, str]]:
    """("python", code) and ("command", its arguments) of a page, from top to bottom."""
    found: list[tuple[str, str]] = []
    for block in FENCE.finditer((ROOT / "docs" / page).read_text(encoding="utf-8")):
        kind = block["kind"].strip()
        if kind == "python" or re.match(r"\{ \.python title=", kind):
            found.append(("python", block["body"]))
        elif kind == "console":
            lines = block["body"].replace("\\\n", " ").splitlines()
            called = [line.removeprefix("selective-pref ") for line in lines if line.startswith("selective-pref ")]
            found += [("command", line) for line in called]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", FIRST_PAGES)
def test_a_newcomer_who_copies_the_page_succeeds(
    page: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in {"start/trl.md": ["trl"], "tutorial.md": ["deepspeed", "jinja2"]}.get(page, []):
        pytest.importorskip(module)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = io.StringIO()
    for kind, body in programs(page):
        if kind == "command":
            from selective_pref_adapters.cli import main

            with contextlib.redirect_stdout(printed):
                assert main(shlex.split(body, comments=True)) == 0, body
        elif SNIPPET.fullmatch(body.strip()):
            assert body.strip() == '--8<-- "docs/start/playground.py"'
            shutil.copytree(request.getfixturevalue("playground"), tmp_path, dirs_exist_ok=True)
        else:
            with contextlib.redirect_stdout(printed):
                exec(compile(body, str(ROOT / "docs" / page), "exec"), namespace)
    rises(printed.getvalue(), page)


def rises(text: str, page: str) -> None:
    """The pages promise that margin and accuracy of all tokens rise; what they print must show it."""
    if page == "start/method.md":
        return
    if page == "tutorial.md":
        assert "The full margin (eval_rewards/margins) rose" in one_line(text)
        return
    margins = [float(number) for number in re.findall(r"rewards/margins (-?[\d.]+)", text)]
    assert len(margins) >= 3
    assert margins[-1] > margins[0]


def test_formulas_become_mathml_and_a_broken_one_fails_the_build() -> None:
    pytest.importorskip("latex2mathml")
    pytest.importorskip("mkdocs")
    hook = runpy.run_path(str(ROOT / "docs" / "mathml.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="maths.md"))

    def shown(latex: str) -> str:
        return hook["on_page_content"](f'<span class="arithmatex">\\({html.escape(latex)}\\)</span>', page)

    assert "<math" in shown(r"a < \frac{1}{2}")
    assert "arithmatex" not in shown(r"a < \frac{1}{2}")
    for latex, said in (
        (r"\fraction{1}{2}", r"maths\.md: \\fraction is unknown"),
        (r"\left( x", "maths.md: no LaTeX formula"),
    ):
        with pytest.raises(hook["PluginError"], match=said):
            shown(latex)
