"""Checkpoint folders: complete under their name, or not under that name at all.

In: a folder of checkpoints and a step number. Out: `step-00000012/`, which gets its marker and its name last.

    begin → (anyone writes into the folder) → publish → newest_complete

Files are written into a folder whose name starts with a dot. `publish` waits until they are on the disk, adds a marker
that lists every file with its size, renames the folder, and only then removes older checkpoints. A kill at any moment
leaves either a complete checkpoint or a folder that is not read as one. Of several processes only the first calls
these functions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from selective_pref_adapters.files import sync

MARKER = "COMPLETE.json"
_NAME = "step-{:08d}"


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; files of an attempt that failed are removed from it."""
    aside = _aside(folder, step)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    return aside


def abandon(folder: Path, step: int) -> None:
    """Removes the unfinished checkpoint of `step`, if there is one."""
    shutil.rmtree(_aside(folder, step), ignore_errors=True)


def publish(folder: Path, step: int, keep: int) -> Path:
    """Turns the folder of `begin` into the checkpoint of `step`, then removes all but the newest `keep` complete ones.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: something could not be written; earlier checkpoints are as they were.
    """
    aside, final = _aside(folder, step), folder / _NAME.format(step)
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    marker = {"step": step, "files": {str(path.relative_to(aside)): path.stat().st_size for path in files}}
    (aside / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    sync(aside / MARKER)
    sync(aside)
    if final.exists():  # damaged, or the run was resumed from an older one and has come to this step again
        _remove(final)
    aside.rename(final)
    sync(folder)
    for old in complete(folder)[:-keep]:
        _remove(old)
    return final


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return [path for path in sorted(folder.glob("step-*")) if is_complete(path)]


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return max(complete(folder), default=None)


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file that it lists has the size it lists."""
    try:
        files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return False
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == files[name] for name in files)


def incomplete(folder: Path) -> list[Path]:
    """The folders of checkpoints that are not complete: half written, half removed, or damaged."""
    return [path for path in sorted(folder.glob("*step-*")) if not is_complete(path) or path.name.startswith(".")]


def sweep(folder: Path) -> None:
    """Removes what killed runs left: folders that were not published, and folders whose marker is already removed."""
    for path in incomplete(folder):
        if path.name.startswith(".") or not (path / MARKER).exists():
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The step of a complete checkpoint."""
    return int(json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["step"])


def _aside(folder: Path, step: int) -> Path:
    return folder / f".{_NAME.format(step)}"


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink(missing_ok=True)  # first, so that a kill between the two leaves no marker
    shutil.rmtree(checkpoint)
