"""The recipes that come with this package: a folder of YAML files for each command that reads them.

In: what a user wrote after `--config`. Out: the file that is meant, on the disk or here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def recipe_names(command: str) -> list[str]:
    """The names of a command's recipes, without their suffix; none for a command that has no folder here."""
    return sorted(path.stem for path in (Path(__file__).parent / command).glob("*.yaml"))


def config_file(name: str, command: str) -> Path:
    """The file of that name, else the command's recipe of that name, with or without ".yaml".

    Raises:
        FileNotFoundError: there is neither.
    """
    shipped = Path(__file__).parent / command / f"{name.removesuffix('.yaml')}.yaml"
    found = next((path for path in (Path(name), shipped) if path.is_file()), None)
    if found is None:
        names = ", ".join(recipe_names(command))
        recipes = f", nor one of the recipes that come with it ({names})" if names else ""
        raise FileNotFoundError(f"--config {name}: no such file{recipes}")
    return found


def bare_word(name: str, value: bool, *, choices: Sequence[Any], default: Any) -> Any:
    """What a bare `no` or `off`, which YAML reads as false, means to an option that is not a switch.

    Args:
        name: what the error begins with: file and option.
        value: as YAML has read it.
        choices: of the option; empty where it takes any value.
        default: of the option.

    Returns:
        "no" or "none" where that is one of the choices, or the default; None where the option may be left out.

    Raises:
        ValueError: neither; or `yes` or `on`, which YAML reads as true.
    """
    word = next((word for word in ("no", "none") if word in choices or word == default), None)
    if value is False and (word is not None or default is None):
        return word
    expected = f"one of {', '.join(map(str, choices))}" if choices else "a value"
    raise ValueError(
        f"{name}: expected {expected}, got {str(value).lower()} (as YAML reads yes, no, on and off without quotes). "
        "Write the value, in quotes if it is such a word, or leave the line out"
    )
