"""Files that are there whole or not at all, also after a power cut. In: a path and its content. Out: the file.

Imports nothing but the standard library.
"""

from __future__ import annotations

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
