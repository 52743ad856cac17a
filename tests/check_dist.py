"""Builds the sdist and the wheel, and tries both from other folders: `make dist-check`.

    python tests/check_dist.py dist

The wheel is built from the sdist, installed into an empty environment beside NumPy alone, and computes there. The sdist
is unpacked, and its tests of the core run there with this Python, which has torch and JAX.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ON_NUMPY = """
import importlib.util, sys
from importlib.metadata import version
import numpy as np
import selective_pref
from selective_pref import Response, diagnostics, selective_dpo_loss

mask = np.ones((1, 5), dtype=bool)
ref = np.full((1, 5), -1.0)
chosen = Response(per_token_logps=np.array([[-0.5, -3.0, -1.0, -2.0, -1.5]]), mask=mask, ref_per_token_logps=ref)
rejected = Response(per_token_logps=np.array([[-2.0, -0.5, -1.0, -0.2, -3.0]]), mask=mask, ref_per_token_logps=ref)
out = selective_dpo_loss(chosen, rejected, beta=0.1, selection_ratio=0.4)
kept = -2.0 - 1.0, 0.5 + 0.8  # log-ratios of the two tokens of each side
assert np.isclose(out.loss, np.logaddexp(0.0, -0.1 * (kept[0] - kept[1]))), out.loss
assert diagnostics(out)["selection/fraction"] == 0.4
assert "site-packages" in selective_pref.__file__, selective_pref.__file__
assert selective_pref.__version__ == version("selective-pref")
assert not importlib.util.find_spec("torch") and not importlib.util.find_spec("jax")
print("the wheel of", selective_pref.__version__, "computes on NumPy", np.__version__)
"""


def run(*command: object, cwd: Path) -> None:
    """Runs a command in a folder, without the paths of this checkout. Raises CalledProcessError where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    print("+", *map(str, command), flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


def build(into: Path) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the sdist."""
    run(sys.executable, "-m", "build", "--outdir", into, ROOT, cwd=into)
    (sdist,) = into.glob("*.tar.gz")
    (wheel,) = into.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=into)
    return sdist, wheel


def try_wheel(wheel: Path, folder: Path) -> None:
    """Installs the wheel beside NumPy and nothing else, and computes."""
    venv.create(folder / "empty", with_pip=True)
    scripts = folder / "empty" / ("Scripts" if os.name == "nt" else "bin")
    pip = (scripts / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, wheel, "numpy", cwd=folder)
    run(scripts / "python", "-c", ON_NUMPY, cwd=folder)
    run(scripts / "selective-pref", "--version", cwd=folder)


def try_sdist(sdist: Path, folder: Path) -> None:
    """Unpacks the sdist and runs its tests of the core there."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("selective_pref-*")
    tests = sorted(path.relative_to(unpacked) for path in (unpacked / "tests").glob("test_*.py"))
    assert tests
    assert not {"README.md", "LICENSE", "Makefile", "constraints.txt"} - {p.name for p in unpacked.iterdir()}
    run(sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests, cwd=unpacked)


def main() -> None:
    """Writes into the folder that is named, which must be empty or absent."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/check_dist.py FOLDER")
    into = Path(sys.argv[1]).resolve()
    into.mkdir(parents=True, exist_ok=True)
    if any(into.iterdir()):
        sys.exit(f"{into} is not empty: what lies there might be uploaded beside the new files. Remove it first")
    sdist, wheel = build(into)
    with tempfile.TemporaryDirectory() as folder:
        try_wheel(wheel, Path(folder))
        try_sdist(sdist, Path(folder))
    print(f"{sdist.name} and {wheel.name} are fine")


if __name__ == "__main__":
    main()
