"""The recipes that come with this package: a folder of YAML files for each command that reads them.

In: what a user wrote after `--config`. Out: the file that is meant, on the disk or here.
"""

from __future__ import annotations

from pathlib import Path


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
