"""Files that are there whole or not at all, also after a power cut; and what to say of those that cannot be read.

In: a path, and its content or an error. Out: the file, or a sentence.
Imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8) aside, flushes it, and gives it its name last; what stood there before is replaced.

    Raises:
        OSError: it cannot be written. Nothing of it is left, and what stood there before is as it was.
    """
    aside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there: where its disk can be asked about."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def files_of_index(path: str | Path) -> list[str]:
    """The names of the weights files that an index (`*.index.json`) lists, sorted.

    Raises:
        ValueError: it is damaged; names it.
    """
    try:
        names = set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map does not name a file for each weight")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is damaged: expected {{"weight_map": {{name of a weight: its file, ...}}}}; {error!r}'
        ) from error
    return sorted(names)


def unreadable(path: str | Path, error: Exception) -> str:
    """What to say of a weights file that cannot be read."""
    path = Path(path)
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        return f"{path} holds a pointer of Git LFS and no weights: fetch them with git lfs pull"
    if isinstance(error, RuntimeError):  # torch maps a file as a whole
        return (
            f"{path} is too large for this machine to map ({str(error).splitlines()[0]}): save the model in several "
            'files, save_pretrained(..., max_shard_size="5GB")'
        )
    return f"{path} cannot be read: {error}"
