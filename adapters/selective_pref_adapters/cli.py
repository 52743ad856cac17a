"""`selective-pref`: the command line. In: flags and a YAML file. Out: a run, or one line that says what is wrong.

A YAML file is read as flags that come first: same names, same types, same errors, and flags given by hand win.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from selective_pref_adapters.launching.launcher import check_address, join_launcher
from selective_pref_adapters.recipes import bare_word, config_file, recipe_names

C = TypeVar("C")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 1 after an error, 2 for wrong flags, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and re.fullmatch(r"--local[-_]rank=\d+", arguments[0]):  # deepspeed's, which is in LOCAL_RANK, too
        del arguments[0]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "--version":
        from selective_pref import __version__

        print(f"selective-pref {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"selective-pref: no command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run, _ = COMMANDS[command]
        return run(rest) or 0
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("SELECTIVE_PREF_TRACEBACK"):
            raise
        lacking = isinstance(error, ModuleNotFoundError)
        print(f"selective-pref {command}: {error}{_extra_of(command, error) if lacking else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = {
            "score": "computed rows are stored",
            "inspect": "nothing was written",
            "report": "nothing was written",
            "plan": "nothing was written",
            "replicate": "runs that have ended are kept, and the same command goes on",
            "generate": "answers are kept, and the same command goes on",
            "demo": "runs that have ended are kept, and the same command goes on",
        }
        said = left.get(command, "no model was saved, logs stay where they are")
        print(f"selective-pref {command}: interrupted; {said}", file=sys.stderr)
        return 130


def program() -> NoReturn:
    """`main`, as a program of its own."""
    status = main()
    if "torch.distributed" not in sys.modules:
        sys.exit(status)
    from selective_pref_adapters.launching.processes import end_program

    end_program(status)


def _extra_of(command: str, error: ModuleNotFoundError) -> str:
    """Which extra brings a package that is absent; nothing for one that is none of ours."""
    needed = {requirement.partition(";")[0].strip().lower() for requirement in _requirements()}
    names = {re.split(r"[^\w.-]", requirement)[0].replace("-", "_") for requirement in needed}
    package = str(error.name).partition(".")[0].lower()
    if needed and {"yaml": "pyyaml"}.get(package, package) not in names:
        return ""
    extras = {"dpo": "trl", "inspect": "seeing", "report": "seeing", "demo": "replicate", "plan": "score"}
    extras |= {name: name for name in ("score", "replicate", "generate")}
    own = package if package in ("deepspeed", "peft", "trl") else None  # each an extra of its own
    return f": pip install 'selective-pref[{own or extras.get(command, 'deepspeed')}]'"


def _requirements() -> list[str]:
    """What this package and its extras need, as its metadata say; none where it was not installed."""
    from importlib import metadata

    try:
        return metadata.requires("selective-pref") or []
    except metadata.PackageNotFoundError:
        return []


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: selective-pref COMMAND [--help] [flags]", "", *lines])


# --- the commands ----------------------------------------------------------------------------------------------------
# The docstring of each is its help. What is slow to import is imported after the flags are understood.


def _train(arguments: list[str]) -> None:
    """Train a policy on preference pairs and save it.

    `--config FILE.yaml` reads flags from a file (the names below with underscores), `--config paper` and `--config
    smoke` from a recipe that is shipped; flags on the command line win. On several processes:
    torchrun --nproc_per_node 2 -m selective_pref_adapters.cli train ...
    """
    from selective_pref_adapters.options import TrainConfig

    config = _options(TrainConfig, arguments, "train")
    join_launcher()
    check_address()

    from selective_pref_adapters.deepspeed_loop import leave_processes, train

    train(config)
    leave_processes()


def _dpo(arguments: list[str]) -> None:
    join_launcher()
    check_address()
    _name_accelerator()

    from selective_pref_adapters.launching.processes import leave_processes
    from selective_pref_adapters.trl_trainer.command import main as dpo

    dpo(arguments)
    leave_processes()


def _score(arguments: list[str]) -> None:
    """Compute a reference's log-probs of pairs, once, into a store that training reads.

    Only what the store lacks is computed, so the same command goes on after a kill. --stat, --verify and --prune
    count, check and tidy up a store instead. `--config FILE.yaml` reads flags from a file; flags on the command line
    win.
    """
    from selective_pref_adapters.options import ScoreConfig

    config = _options(ScoreConfig, arguments, "score")

    from selective_pref_adapters.launching.processes import leave_processes
    from selective_pref_adapters.reference_store.command import score

    score(config)
    leave_processes()


def _inspect(arguments: list[str]) -> None:
    """Show what the loss reads of preference pairs: the score and weight of every token, both sides.

    Without --out in the terminal; with --out page.html as one page that needs nothing else. `--config FILE.yaml` reads
    flags from a file; flags on the command line win.
    """
    from selective_pref_adapters.seeing.options import InspectConfig

    config = _options(InspectConfig, arguments, "inspect")

    from selective_pref_adapters.seeing.inspect_command import inspect

    inspect(config)


def _report(arguments: list[str]) -> None:
    """Show how runs went: their curves over each other, what differs in their configuration, what to conclude."""
    from selective_pref_adapters.seeing.options import ReportConfig

    config = _options(ReportConfig, arguments, "report")

    from selective_pref_adapters.seeing.report import report

    report(config)


def _rows(arguments: list[str]) -> int:
    """Show how rows are read: schema, prompt and completion tokens with the boundary, what is cut and left out.

    The exit status is 1 where nothing can be trained on. `--config FILE.yaml` reads flags from a file; flags on the
    command line win.
    """
    from selective_pref_adapters.options import RowsConfig

    config = _options(RowsConfig, arguments, "rows")

    from selective_pref_adapters.pairs.command import show_rows

    return show_rows(config)


def _replicate(arguments: list[str]) -> int:
    """Run the paper's tables in miniature, with controls: about two hours on two cores, with --quick four minutes.

    Every method has the same grid of learning rates, tuned on seeds that are not tested. What is there already is not
    run again: the same command goes on after a kill. `--config FILE.yaml` reads flags from a file; flags on the command
    line win.
    """
    return _replication(arguments, "replicate")


def _generate(arguments: list[str]) -> None:
    """Answer the questions of Arena-Hard or MT-Bench, in the file that the benchmark's own code judges.

    By a model on this machine, or (--base-url) by a server that speaks OpenAI's chat protocol. Answers are kept as they
    come: the same command goes on after a kill. `--config FILE.yaml` reads flags from a file; flags on the command line
    win.
    """
    from selective_pref_adapters.generation.options import GenerateConfig

    config = _options(GenerateConfig, arguments, "generate")

    from selective_pref_adapters.generation.command import generate

    generate(config)


def _plan(arguments: list[str]) -> int:
    """Compute what a run takes on each device, each host and on disk, from the models' configurations alone.

    For a reference that runs beside the policy, whose log-probs are stored, or that a server runs. No weights are read.
    The exit status is 1 where --device-memory is given and nothing fits. `--config FILE.yaml` reads flags from a file;
    flags on the command line win.
    """
    from selective_pref_adapters.planning.options import PlanConfig

    config = _options(PlanConfig, arguments, "plan")

    from selective_pref_adapters.planning.command import plan

    return plan(config)


def _demo(arguments: list[str]) -> int:
    """See what Selective-DPO does, in a small language in which it is known which tokens decide.

    The quick form of `selective-pref replicate`, under five minutes on two cores, without a network: ten methods and
    controls on four seeds.
    """
    return _replication(["--quick", "--output-dir", "runs/demo", *arguments], "demo")


def _replication(arguments: list[str], command: str) -> int:
    from selective_pref_adapters.replication.options import ReplicateConfig

    config = _options(ReplicateConfig, arguments, command)
    _name_accelerator()

    from selective_pref_adapters.replication.command import replicate

    return replicate(config)


def _name_accelerator() -> None:
    """Tells DeepSpeed where there are only CPUs; it prints a warning where it has to guess."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "train": (_train, "train a policy on preference pairs (SFT, DPO, SimPO, Selective-DPO)"),
    "dpo": (
        _dpo,
        "the same with TRL's DPOTrainer: LoRA, several processes, ZeRO, checkpoints (`trl dpo` with a selection)",
    ),
    "score": (_score, "log-probs of a reference into a store, once for all runs that read them"),
    "inspect": (_inspect, "pairs as the loss reads them: a page, a picture or text, and statistics over a data set"),
    "report": (_report, "one page of one run or several: curves, what differs, what it means"),
    "rows": (_rows, "how each row of a file is read and tokenised, and what is left out, before anything is trained"),
    "plan": (_plan, "what a run takes in GPU and host memory and on disk, from the models' configurations alone"),
    "replicate": (_replicate, "the paper's tables in miniature, with controls, seeds and intervals"),
    "demo": (_demo, "the same in four minutes: what Selective-DPO does, and what it does not"),
    "generate": (_generate, "answers to Arena-Hard and MT-Bench, in the files that their own code judges"),
}
"""Name → (its arguments → the exit status, None for 0; what it is for)."""


# --- flags and files -------------------------------------------------------------------------------------------------


def _options(config: type[C], arguments: list[str], command: str) -> C:
    """The flags, and those of a file behind `--config`, as the dataclass whose fields they are."""
    import tyro

    flags = _with_config_file(arguments, config, command)
    run, _ = COMMANDS[command]
    try:
        return tyro.cli(config, args=flags, prog=f"selective-pref {command}", description=inspect.getdoc(run))
    except ValueError as error:  # of the dataclass itself; newer versions of tyro end the program with it
        print(f"selective-pref {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _with_config_file(arguments: list[str], config: type, command: str) -> list[str]:
    """`--config FILE` replaced by the flags that the file holds, put first.

    Args:
        arguments: as they were typed.
        config: the dataclass whose fields are the flags.
        command: whose recipes may be named, too.
    """
    flags: list[str] = []
    rest = iter(arguments)
    from_file: list[str] = []
    for argument in rest:
        if argument == "--config" or argument.startswith("--config="):
            path = argument.partition("=")[2] or next(rest, "")
            from_file += _flags_of_file(path, config, command)
        else:
            flags.append(argument)
    return from_file + flags


def _flags_of_file(path: str, config: type, command: str) -> list[str]:
    import yaml

    known = {field.name: field.default for field in fields(config)}
    kinds = get_type_hints(config)

    if not path:
        names = recipe_names(command)
        recipes = f", or of a recipe: {', '.join(names)}" if names else ""
        raise ValueError(f"--config needs the name of a YAML file{recipes}")
    try:
        options = yaml.safe_load(config_file(path, command).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold 'name: value' lines; got {type(options).__name__}")
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            meant = f": did you mean {near[0]!r}?" if near else f". Options are {', '.join(known)}"
            raise ValueError(f"{path}: there is no option {name!r}{meant}")
        switch = bool in (kinds[name], *get_args(kinds[name]))
        if isinstance(value := options[name], bool) and not switch:
            choices = [choice for kind in (kinds[name], *get_args(kinds[name])) for choice in get_args(kind)]
            choices = [choice for choice in choices if isinstance(choice, str | int)]
            options[name] = bare_word(f"{path}: {name}", value, choices=choices, default=known[name])
        if kinds[name] is bool and not isinstance(value, bool):
            raise ValueError(f"{path}: {name}: expected true or false, got {value!r}")
    return [flag for name, value in options.items() for flag in _flag(str(name), value)]


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


if __name__ == "__main__":
    program()
