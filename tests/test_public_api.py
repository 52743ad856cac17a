"""The public surface: names, docstrings, who imports whom, what an import costs, and examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

import selective_pref

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "selective_pref").glob("*.py"))
FRAMEWORKS = ("torch", "numpy", "jax", "transformers", "trl", "deepspeed", "datasets", "accelerate", "peft")
WITH_TORCH = {"_tiles", "fused", "fused_kl"}
WITH_NUMPY = {"_subject", "_laws", "testing"}
MAY_IMPORT = {"array_api_compat", "selective_pref", *sys.stdlib_module_names}

PUBLIC = {name: getattr(selective_pref, name) for name in selective_pref.__all__}
PUBLIC |= {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (selective_pref.pair_losses, selective_pref.divergences)
    for name in module.__all__
}
CALLABLE = {
    name: value
    for name, value in PUBLIC.items()
    if inspect.isroutine(value) or (inspect.isclass(value) and not isinstance(value, types.GenericAlias))  # Python 3.10
}


def test_all_is_what_can_be_imported() -> None:
    names = {
        name
        for name, value in vars(selective_pref).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert names == set(selective_pref.__all__)
    assert list(selective_pref.__all__) == sorted(selective_pref.__all__)
    scope: dict[str, object] = {}
    exec("from selective_pref import *", scope)
    assert names <= set(scope)


def test_the_contract_is_there() -> None:
    assert {
        "Response",
        "PreferenceLoss",
        "selective_dpo_loss",
        "dpo_loss",
        "simpo_loss",
        "select",
        "alignment_scores",
        "quantile_weights",
        "diagnostics",
        "check_finite",
        "per_token_logps",
        "preference_loss",
        "ratio_digits",
        "weigh_pairs",
        "combine_losses",
    } <= set(PUBLIC)


def test_the_version_is_that_of_the_installed_package() -> None:
    try:
        installed = importlib.metadata.version("selective-pref")
    except importlib.metadata.PackageNotFoundError:
        installed = "0+unknown"
    assert selective_pref.__version__ == installed
    assert Version(installed).release >= (0,)
    with pytest.raises(AttributeError, match="has no attribute 'verson'"):
        _ = selective_pref.verson


@pytest.mark.parametrize("name", CALLABLE)
def test_public_things_say_what_they_take_return_and_raise(name: str) -> None:
    value = CALLABLE[name]
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    assert len(text.splitlines()[0]) > 20
    if inspect.isclass(value):
        if not issubclass(value, Exception):
            assert "Attributes:" in text
            for field in inspect.signature(value).parameters:
                assert field in text
        return
    known = ("chosen", "rejected", "responses", "out", "chosen_rewards", "rejected_rewards", "log_ratios", "beta")
    parameters = [p for p in inspect.signature(value).parameters if p not in known]
    for parameter in parameters:
        assert parameter in text or "Args, Returns, Raises: as" in text, f"{name} does not explain {parameter}"
    if parameters:
        assert "Args" in text
        assert "Returns" in text
        assert "Raises" in text or name == "mean_logp"  # which refuses nothing


@pytest.mark.parametrize("name", [name for name in CALLABLE if not inspect.isclass(CALLABLE[name])])
def test_public_functions_have_annotations(name: str) -> None:
    signature = inspect.signature(CALLABLE[name])
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_modules_open_with_what_they_are(path: Path) -> None:
    assert len(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") > 40


def imported(path: Path, module_level: bool) -> set[str]:
    """Dotted names that a file imports: at module level (class bodies and conditions included), or inside functions."""
    found: set[str] = set()

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if inside != module_level:
                if isinstance(child, ast.Import):
                    found.update(alias.name for alias in child.names)
                elif isinstance(child, ast.ImportFrom):
                    assert child.level == 0, f"{path.name}: imports are absolute"
                    found.add(child.module or "")
            walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(ast.parse(path.read_text(encoding="utf-8")), inside=False)
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_imports_the_standard_library_and_array_api_compat(path: Path) -> None:
    allowed = MAY_IMPORT | ({"torch"} if path.stem in WITH_TORCH else {"numpy"} if path.stem in WITH_NUMPY else set())
    outside = {name for name in imported(path, module_level=True) if name.split(".")[0] not in allowed}
    assert not outside
    later = {name for name in imported(path, module_level=False) if name.split(".")[0] not in allowed}
    assert later <= ({"jax"} if path.stem in ("_arrays", "_subject") else set())


@pytest.mark.parametrize("path", [p for p in CORE if p.stem not in WITH_TORCH | WITH_NUMPY], ids=lambda path: path.stem)
def test_modules_that_need_a_library_are_imported_by_name(path: Path) -> None:
    names = imported(path, module_level=True) | imported(path, module_level=False)
    assert not {f"selective_pref.{stem}" for stem in WITH_TORCH | WITH_NUMPY} & names
    assert not any(name.startswith("selective_pref_adapters") for name in names)


def test_imports_of_the_core_point_one_way() -> None:
    """The arrows of the data flow: no module imports a later one."""
    order = ["_arrays", "response", "scores", "selection", "pools", "divergences", "rewards", "pair_losses", "losses"]
    order += ["terms", "veto", "diagnostics", "logps", "_tiles", "fused", "fused_kl", "_subject", "_laws", "testing"]
    for path in CORE:
        if path.stem == "__init__":
            continue
        for name in imported(path, module_level=True):
            if name.startswith("selective_pref."):
                assert order.index(name.split(".")[1]) < order.index(path.stem), f"{path.stem} imports {name}"


ADAPTERS = ROOT / "adapters" / "selective_pref_adapters"
TRAINERS = {"deepspeed_loop", "hf_trainer", "trl_trainer"}
FLOORS = [
    {"cli"},
    {"replication", "planning"},
    TRAINERS,
    {"seeing"},
    {"references", "generation"},
    {"reference_store"},
    {"heads", "objectives", "monitoring"},
    {"model_inputs", "shared_prefix"},
    {"batch"},
    {"pairs"},
    {"model_checks", "weight_files"},
    {"models", "fsdp"},
    {"options", "files", "recipes", "sharded", "launching"},
]
"""The rooms of the adapters, from the top down: a room imports rooms of lower floors only, or of its own folder."""


def picture_of_the_rooms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS)))
def test_a_room_imports_rooms_below_it(room: str) -> None:
    depth = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    imports = picture_of_the_rooms().imports()
    assert not {other for other in imports[room] - {"selective_pref"} if depth[other] <= depth[room]}


def test_the_rooms_are_those_of_the_picture() -> None:
    drawing = picture_of_the_rooms()
    assert drawing.imports().keys() == set().union(*FLOORS)
    floors = drawing.floors(drawing.imports())  # raises where imports run in a circle
    shown = drawing.PICTURE.read_text(encoding="utf-8")
    assert all(f">{room}</text>" in shown for room in floors), "draw it again: python docs/draw_architecture.py"


def test_imports_in_a_circle_are_named() -> None:
    with pytest.raises(ValueError, match="in a circle: a → b → a"):
        picture_of_the_rooms().floors({"a": {"b"}, "b": {"a"}})


def test_no_folder_of_the_adapters_is_crowded() -> None:
    for folder in {path.parent for path in ADAPTERS.rglob("*.py")}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 12, f"{folder.name}: {modules}"


@pytest.mark.parametrize("package", ["selective_pref", "selective_pref_adapters"])
def test_an_import_loads_no_framework(package: str, tmp_path: Path) -> None:
    slow = (*FRAMEWORKS, "importlib.metadata")
    program = f"import sys, {package}; print(*[m for m in {slow!r} if m in sys.modules])"
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "adapters"))
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout.split(), run.stderr) == (0, [], "")


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(selective_pref.__path__)])
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"selective_pref.{name}")
    assert doctest.testmod(module).failed == 0


def test_the_modules_of_the_main_path_have_an_example() -> None:
    for name in ("response", "selection", "pools", "pair_losses", "losses", "terms"):
        module = importlib.import_module(f"selective_pref.{name}")
        assert doctest.DocTestFinder().find(module)[0].examples or module.__doc__.count(">>>") > 0
        assert doctest.testmod(module).attempted > 0
