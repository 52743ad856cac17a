"""Whose log-probs are stored: the identity of a reference, and the files in its folder that say it.

In: a reference's identity (names and values that decide the numbers it gives) and its tokenizer's vocabulary. Out: a
`Space`, and its folder's `manifest.json` and `vocabulary.json.gz`. The folder's name is the digest of the identity, the
identity names the digest of the vocabulary: both are compared when they are read. A space is made with its first row; a
folder without rows, as an interrupted run may leave it, counts as none.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from selective_pref_adapters.files import write_whole
from selective_pref_adapters.reference_store.shards import (
    FORMAT,
    SUFFIX,
    DamagedStoreError,
    StoreError,
    is_abandoned,
    writing,
)

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json.gz"
FILLINGS = "fillings.json"
FILL = " Fill it: selective-pref score --ref-model MODEL --pairs PAIRS --store STORE"
_AGAIN = "`selective-pref score` with the same reference writes it again and keeps what is stored"


@dataclass(frozen=True, kw_only=True)
class Space:
    """The identity of a reference: whatever decides the numbers that it gives. Two equal spaces share their rows.

    Attributes:
        identity: names and values that decide, as JSON holds them; see `identity.reference_space`.
        vocabulary: token → id of the reference's tokenizer; None for a space that was read from disk (the store
            reads it where it is needed).
        label: what people call the reference; decides nothing.
    """

    identity: dict[str, Any]
    vocabulary: dict[str, int] | None = field(default=None, repr=False)
    label: str = "reference"

    @cached_property
    def name(self) -> str:
        """The folder's name."""
        return _space_name(self.identity, FORMAT)

    def __post_init__(self) -> None:
        if self.vocabulary is not None and self.identity.get("vocabulary") != vocabulary_digest(self.vocabulary):
            raise StoreError(f"the vocabulary of {self.label!r} is not the one that its identity names")


def _space_name(identity: Mapping[str, Any], version: int) -> str:
    """The digest of an identity and of the format it is stored in: 32 hexadecimal digits."""
    return digest_of_json([version, identity])


def vocabulary_digest(vocabulary: dict[str, int]) -> str:
    """The digest of every token and its id: 32 hexadecimal digits."""
    return digest_of_json(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))


def digest_of_json(value: Any) -> str:
    """The digest of anything that JSON holds, whatever the order of its names: 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def read_spaces(path: Path) -> tuple[list[Space], dict[str, str]]:
    """(the spaces of a store in order of their labels, folder → reason of those that cannot be used).

    Folders without a shard are left out: `empty_spaces` finds them.

    Raises:
        StoreError: `path` is no folder.
    """
    if not path.is_dir():
        raise StoreError(f"no reference store at {path}: expected a folder.{FILL}")
    found: list[Space] = []
    unusable: dict[str, str] = {}
    for folder in sorted(path.iterdir()):
        if not holds_rows(folder):
            continue
        try:
            found.append(read_manifest(folder))
        except StoreError as error:
            unusable[folder.name] = str(error)
    return sorted(found, key=lambda space: (space.label, space.name)), unusable


def holds_rows(folder: Path) -> bool:
    """Whether a folder has a shard in it."""
    return folder.is_dir() and any(folder.glob(f"*{SUFFIX}"))


def empty_spaces(path: Path) -> list[Path]:
    """The folders of a store that name a reference and hold no row of it, nor any file of another kind."""
    return [folder for folder in sorted(path.iterdir()) if _is_empty(folder)]


def remove_empty_spaces(path: Path, only: Collection[str] | None = None) -> list[str]:
    """Removes those, or those of them that `only` names; returns their names.

    Raises:
        OSError: one cannot be removed.
    """
    removed: list[str] = []
    for folder in empty_spaces(path):
        if only is None or folder.name in only:
            for file in folder.iterdir():
                file.unlink(missing_ok=True)
            folder.rmdir()
            removed.append(folder.name)
    return removed


def _is_empty(folder: Path) -> bool:
    if not re.fullmatch(r"[0-9a-f]{32}", folder.name) or not folder.is_dir():
        return False
    return all(file.name in (FILLINGS, VOCABULARY, MANIFEST) or is_abandoned(file) for file in folder.iterdir())


def write_identity(folder: Path, space: Space) -> None:
    """Makes a space's folder and its two files, unless they are there and whole.

    The manifest is written last, so that where it exists the vocabulary is whole.

    Raises:
        StoreWriteError: they cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            read_vocabulary(folder, read_manifest(folder))
        except DamagedStoreError:
            if space.vocabulary is None:
                raise
            tokens = json.dumps(space.vocabulary, sort_keys=True).encode("ascii")
            write_whole(folder / VOCABULARY, gzip.compress(tokens, mtime=0))
            manifest = {"format": FORMAT, "label": space.label, "identity": space.identity}
            write_whole(folder / MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode("ascii"))


def note_filling(folder: Path, max_length: int, truncation_mode: str) -> None:
    """Notes how the rows of a space were cut when it was filled, so that an error about a lacking row can say it.

    Raises:
        OSError: it cannot be written.
    """
    filling = {"max_length": max_length, "truncation_mode": truncation_mode}
    noted = read_fillings(folder)
    if filling not in noted:
        write_whole(folder / FILLINGS, json.dumps([*noted, filling]) + "\n")


def read_fillings(folder: Path) -> list[dict[str, Any]]:
    """What was noted; empty where nothing was, or where it cannot be read: no row depends on it."""
    try:
        noted = json.loads((folder / FILLINGS).read_bytes())
        return [{"max_length": int(n["max_length"]), "truncation_mode": str(n["truncation_mode"])} for n in noted]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def read_manifest(folder: Path) -> Space:
    """The space that a folder holds.

    Raises:
        DamagedStoreError: its manifest is gone or damaged.
        StoreError: it is whole and of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, identity, label = manifest["format"], dict(manifest["identity"]), str(manifest["label"])
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{folder} has no {MANIFEST}: {_AGAIN}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedStoreError(f"{folder / MANIFEST} is damaged: {_AGAIN}") from error
    if _space_name(identity, version) != folder.name:
        raise DamagedStoreError(f"{folder / MANIFEST} does not have the digest that names its folder: {_AGAIN}")
    if version != FORMAT:
        raise StoreError(
            f"{folder} is of format {version}; this version of selective-pref reads {FORMAT}: use the version that "
            "wrote it, or run `selective-pref score` into this store, which keeps both apart"
        )
    return Space(identity=identity, label=label)


def read_vocabulary(folder: Path, space: Space) -> dict[str, int]:
    """Token → id of the reference's tokenizer.

    Raises:
        DamagedStoreError: the file is gone or damaged.
    """
    try:
        vocabulary = json.loads(gzip.decompress((folder / VOCABULARY).read_bytes()))
        intact = vocabulary_digest(vocabulary) == space.identity.get("vocabulary")
    except (OSError, EOFError, zlib.error, ValueError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{folder / VOCABULARY} is gone or damaged: {_AGAIN}") from error
    if not intact:
        raise DamagedStoreError(f"{folder / VOCABULARY} does not have the digest that {MANIFEST} names: {_AGAIN}")
    return vocabulary
