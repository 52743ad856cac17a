"""TRL's own tests of its DPO trainer, run with our two names in place of its own.

In: a checkout of TRL (https://github.com/huggingface/trl). Out: a table of TRL's tests: passed, refused (an error of
ours that says why), failed or skipped, for the stock trainer and for ours at ratio 1 and 0.4. Nothing of TRL is kept
here, and no network is used: `stand_ins.py` makes the models and data sets.

    python tests/trl_suite/run.py TRL_CHECKOUT [--work FOLDER] [--only stock ratio-1 ratio-0.4] [-k EXPRESSION]

TRL's tests of its main branch may be newer, or older, than the installed TRL; what the stock trainer does not pass
says nothing about ours. Takes ten minutes a trainer on one core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STOCK = "from trl import DPOConfig, DPOTrainer\n"
OURS = """from functools import partial
from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer as DPOTrainer
DPOConfig = partial(SelectiveDPOConfig, selection_ratio={ratio}, beta=0.1)
"""
MISSING_CHECKS = """import trl.import_utils as _there
for _name in ("is_harbor_available", "is_joblib_available", "is_mergekit_available", "is_openreward_available"):
    if not hasattr(_there, _name):  # of a package that the installed TRL does not know
        setattr(_there, _name, lambda: False)
"""
TRAINERS = {"stock": STOCK, "ratio-1": OURS.format(ratio=1.0), "ratio-0.4": OURS.format(ratio=0.4)}


def main() -> int:
    """Runs the tests with each trainer. Returns 1 where one passes with the stock trainer and not with ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--work", type=Path, help="folder to keep the stand-ins in; default: a temporary one")
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("-k", default="", help="which tests, as pytest's -k")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        if not (work / "hub" / "complete").exists():
            run(
                [
                    sys.executable,
                    str(Path(__file__).with_name("stand_ins.py")),
                    str(options.checkout),
                    str(work / "hub"),
                ]
            )
        found = {name: outcomes(options.checkout.resolve(), work, name, options.k) for name in options.only}
    return report(found)


def outcomes(checkout: Path, work: Path, trainer: str, expression: str) -> dict[str, tuple[str, str]]:
    """Test → (outcome, message), of TRL's tests run in a process of their own."""
    tests = work / trainer / "tests"
    tests.mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "conftest.py", "testing_utils.py", "test_dpo_trainer.py"):
        text = (checkout / "tests" / name).read_text(encoding="utf-8")
        if name == "testing_utils.py":
            text = MISSING_CHECKS + text
        (tests / name).write_text(text.replace(STOCK, TRAINERS[trainer]), encoding="utf-8")
    assert trainer == "stock" or TRAINERS[trainer] in (tests / "test_dpo_trainer.py").read_text(encoding="utf-8")
    (tests.parent / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    results = tests.parent / "results.xml"
    command = [sys.executable, "-m", "pytest", str(tests / "test_dpo_trainer.py"), "-v", "--tb=short", "-k", expression]
    command += ["-c", str(tests.parent / "pytest.ini"), "--rootdir", str(tests.parent), f"--junitxml={results}"]
    run([*command, "-p", "no:cacheprovider"], cwd=work / "hub", may_fail=True)
    return {case.get("name", ""): outcome(case) for case in ET.parse(results).getroot().iter("testcase")}


def run(command: list[str], *, cwd: Path | None = None, may_fail: bool = False) -> None:
    """Runs a command without a network for models and data sets, with this repository's packages."""
    paths = [str(REPOSITORY), str(REPOSITORY / "adapters"), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run(command, cwd=cwd, env=environment, check=not may_fail)


def outcome(case: ET.Element) -> tuple[str, str]:
    """What became of a test, and the first line of its error."""
    if (skipped := case.find("skipped")) is not None:
        return "skipped", skipped.get("message", "")
    failure = case.find("failure") if case.find("failure") is not None else case.find("error")
    if failure is None:
        return "passed", ""
    frames = [line for line in (failure.text or "").splitlines() if ".py:" in line and not line.startswith(("E ", " "))]
    message = failure.get("message", "").splitlines()[0] if failure.get("message") else ""
    ours = bool(frames) and "selective_pref" in frames[-1] and "AssertionError" not in message
    return ("refused" if ours else "failed"), message


def report(found: dict[str, dict[str, tuple[str, str]]]) -> int:
    """Prints counts, and each test that does not pass everywhere. Returns 1 where ours is worse than stock."""
    kinds = ("passed", "refused", "failed", "skipped")
    print(f"\n{'':10}" + "".join(f"{kind:>9}" for kind in kinds))
    for trainer, tests in found.items():
        print(f"{trainer:10}" + "".join(f"{sum(o == kind for o, _ in tests.values()):9}" for kind in kinds))
    worse = 0
    for test in next(iter(found.values())):
        seen = {trainer: tests.get(test, ("absent", "")) for trainer, tests in found.items()}
        if all(o in ("passed", "skipped") for o, _ in seen.values()):
            continue
        worse += seen.get("stock", ("passed", ""))[0] == "passed"
        print(f"\n{test}")
        for trainer, (o, message) in seen.items():
            print(f"    {trainer:10} {o} {message[:300]}")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
