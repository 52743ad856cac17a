"""What the pages say is run: every ```python block of the README and of docs/, in order, one namespace a page.

A ```python title="name.py" block is a script for several processes: those of a page are saved beside each other and run
in two processes, as `torchrun` would. Where a ```text block directly follows, the printed output must equal it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import selective_pref
from selective_pref import testing

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])
OUTPUTS = ("text", "console output")
PYTHON = re.compile(r'python(?: title="(?P<title>[\w.]+)")?')
OPTIONAL = ("datasets", "lightning_fabric", "optax", "trl")  # where one is not installed, the rest of a page is skipped
FENCE = re.compile(r"^```(?P<kind>[^\n`]*)\n(?P<body>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Python code of a page, the line it starts on, and what it must print (None: not looked at)."""

    code: str
    line: int
    output: str | None
    title: str | None = None


def blocks_of(text: str, scripts: bool = False) -> list[Block]:
    """The blocks of a page that are run one after the other, or those with a title."""
    fences = list(FENCE.finditer(text))
    blocks = []
    for fence, after in zip(fences, [*fences[1:], None], strict=False):
        kind = PYTHON.fullmatch(fence["kind"].strip())
        if kind is None or (kind["title"] is not None) != scripts:
            continue
        shown = after is not None and after["kind"].strip() in OUTPUTS and not text[fence.end() : after.start()].strip()
        line = text.count("\n", 0, fence.start("body"))
        output = after["body"] if after and shown else None
        blocks.append(Block(code=fence["body"], line=line, output=output, title=kind["title"]))
    return blocks


def run(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        code = compile("\n" * block.line + block.code, str(page), "exec")  # tracebacks show the page's line
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            assert printed.getvalue() == block.output, f"{page.name}, line {block.line + 1}"


def pages_with_code() -> list[Path]:
    return [page for page in PAGES if blocks_of(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs_and_prints_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        run(page)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"the rest of the page needs {error.name}")


def pages_with_scripts() -> list[Path]:
    return [page for page in PAGES if blocks_of(page.read_text(encoding="utf-8"), scripts=True)]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with_scripts(), ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_run_in_two_processes_and_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    """All of a page in one start of two processes, since importing torch takes longer than any of them."""
    blocks = blocks_of(page.read_text(encoding="utf-8"), scripts=True)
    for block in blocks:
        (tmp_path / str(block.title)).write_text(block.code, encoding="utf-8")
    scripts = [block for block in blocks if block.output is not None]
    lacking = {name for name in OPTIONAL if importlib.util.find_spec(name) is None}
    scripts = [block for block in scripts if not any(f"from {name} " in block.code for name in lacking)]
    ports = [str(port) for port in free_ports(len(scripts))]
    arguments = [word for pair in zip(ports, (str(block.title) for block in scripts), strict=True) for word in pair]
    command = [sys.executable, str(ROOT / "tests" / "two_processes.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), *arguments], cwd=tmp_path, env=env, **streams) for rank in (0, 1)]
    try:
        results = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], results[0][1] + results[1][1]
    printed = dict(part.split("\n", 1) for part in results[0][0].split("### ")[1:])
    for block in scripts:  # a library may say something before
        assert printed[str(block.title)].endswith(block.output), f"{block.title}: {printed[str(block.title)]}"


def free_ports(count: int) -> list[int]:
    """Below those that a system hands out by itself: they are used seconds later, and others ask for one meanwhile."""
    found: list[int] = []
    for port in random.sample(range(12_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_python_block_escapes_the_check(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = [*blocks_of(text), *blocks_of(text, scripts=True)]
    assert len(re.findall(r"^\s*(?:```+|~~~+)\s*\{?\.?py", text, re.MULTILINE)) == len(blocks)


def test_a_wrong_output_and_a_raising_block_are_caught(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 2"):
        run(page)
    page.write_text("```python\nvalue = 1\n```\n\nThen:\n\n```python\nassert value == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run(page)
    assert caught.traceback[-1].lineno == 7  # counted from 0


def test_reference_holds_the_public_names_once_each() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    # diagnostics is a module as well, so its entry has to name both
    entries = re.findall(r"^::: selective_pref\.(?:diagnostics\.)?(\w+)$", text, re.MULTILINE)
    assert sorted(entries) == sorted(selective_pref.__all__)
    for module in (selective_pref.pair_losses, selective_pref.divergences, testing):
        listed = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", text, re.MULTILINE)
        assert sorted([*listed, *(set(module.__all__) & set(entries))]) == sorted(module.__all__)


ADAPTERS = ROOT / "adapters" / "selective_pref_adapters"
PACKAGES = (
    "hf_trainer",
    "trl_trainer",
    "deepspeed_loop",
    "reference_store",
    "reference_store.served",
    "pairs",
    "seeing",
    "objectives",
)
MODULES = ("batch", "heads", "references", "models", "model_checks", "monitoring", "sharded")


def public_names(module: str) -> list[str]:
    """`__all__`, else functions and classes without an underscore. Read from the source: no framework is loaded."""
    path = ADAPTERS / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    assert module in MODULES, f"{module} has no __all__"
    definitions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [node.name for node in definitions if not node.name.startswith("_")]


@pytest.mark.parametrize("module", PACKAGES + MODULES)
def test_reference_holds_the_public_names_of_the_adapters_once_each(module: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(rf"^::: selective_pref_adapters\.{re.escape(module)}\.(\w+)$", text, re.MULTILINE)
    assert sorted(entries) == sorted(public_names(module))


MUTATIONS = re.findall(
    r"^\| (?!mistake|---)(.+?) \| `([^`]+)` \| (.+) \|$",
    (ROOT / "docs" / "mutations.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_mutations_name_files_and_tests_that_exist() -> None:
    text = (ROOT / "docs" / "mutations.md").read_text(encoding="utf-8")
    assert len(MUTATIONS) == len(re.findall(r"^\| (?!mistake)", text, re.MULTILINE)) > 200
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    tests = {name for source in sources for name in re.findall(r"^def test_(\w+)", source, re.MULTILINE)}
    for mistake, file, seen_by in MUTATIONS:
        assert any((folder / file).is_file() for folder in (ROOT / "selective_pref", ADAPTERS, ROOT / "docs")), (
            f"{mistake}: {file}"
        )
        names = re.findall(r"`(\w+)`", seen_by)
        assert names, mistake
        assert not set(names) - tests, f"{mistake}: {sorted(set(names) - tests)}"


def train_flags() -> dict[str, str]:
    """Flag → default as the page writes it, read from the source: importing it would import DeepSpeed."""
    tree = ast.parse((ADAPTERS / "options.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    words = {"required": "required", "None": "none", "False": "off", "True": "on"}

    def flags_of(config: ast.ClassDef) -> dict[str, str]:
        flags = {}
        for base in config.bases:
            flags |= flags_of(classes[ast.unparse(base)])
        for field in config.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = field.value
                if isinstance(value, ast.Call):  # field(default=..., metadata=...)
                    value = next(keyword.value for keyword in value.keywords if keyword.arg == "default")
                if isinstance(value, ast.Tuple):  # several may be given
                    value = value.elts[0]
                default = "required" if value is None else ast.unparse(value).strip("'")
                flags["--" + field.target.id.replace("_", "-")] = words.get(default, f"`{default}`")
        return flags

    return flags_of(classes["TrainConfig"])


def test_every_flag_of_train_is_described_with_its_default() -> None:
    page = (ROOT / "docs" / "adapters" / "deepspeed.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(--[a-z-]+)` \| ([^|]+?) \|", page, re.MULTILINE)) == train_flags()
