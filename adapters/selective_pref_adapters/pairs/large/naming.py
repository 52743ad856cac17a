"""What decides the ids of a source's rows, as one digest: the name under which they are kept.

In: a source, a tokenizer, how rows are read and cut. Out: a name that changes with anything that could change an id.

Files are known by what they hold, not by their time or size: xxh3 with 128 bits, as `datasets` uses it, reads 4 GB a
second and more, so that a disk is the slower part. A file that has changed by a byte has another name.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selective_pref_adapters.options import Truncation
from selective_pref_adapters.pairs.files import files_of, hub_dataset, is_saved_dataset, located
from selective_pref_adapters.pairs.rendering import Tokenizer
from selective_pref_adapters.pairs.schemas import Columns


@dataclass(frozen=True, kw_only=True)
class Making:
    """How ids are made of rows, beside the tokenizer.

    Attributes:
        max_length, truncation_mode: as in `tokenize_pairs`.
        columns, chosen_only: as in `read_rows`.
    """

    max_length: int
    truncation_mode: Truncation = "keep_start"
    columns: Columns | None = None
    chosen_only: bool = False


def name_of(source: str | Path, tokenizer: Tokenizer, making: Making) -> tuple[str, dict[str, Any]]:
    """(the name, what it is the digest of)."""
    identity = {
        "source": content_of(source),
        "tokenizer": tokenizer_digest(tokenizer),
        "making": asdict(making),
        "reader": code_digest(),
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
        **_today(tokenizer),
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), identity


def content_of(source: str | Path) -> str:
    """The digest of the files that are read, with the names by which their rows are called; of the hub: its own.

    Raises:
        FileNotFoundError, ValueError: nothing that can be read is there; as `raw_rows`.
    """
    path, split = located(source)
    if not path.exists():
        return f"hub {hub_dataset(str(source))._fingerprint}"
    if path.is_file():
        return _digest_of_files([path], path.parent)
    if is_saved_dataset(path):
        within = path / (split or "train") if (path / "dataset_dict.json").is_file() else path
        return _digest_of_files(sorted(file for file in within.rglob("*") if file.is_file()), path.parent)
    return _digest_of_files(files_of(path, split, []), path)


def _digest_of_files(files: Iterable[Path], beside: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.relative_to(beside)}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb", buffering=0) as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """Of the reader's own code: ids that another version of it made are not taken."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# --- tokenizers ------------------------------------------------------------------------------------------------------

_OF_NO_MEANING = {
    "_tokenizer",  # taken as its own serialisation
    "_in_target_context_manager",
    "deprecation_warnings",
    "files_loaded",
    "init_inputs",
    "model_input_names",
    "name_or_path",
    "padding_side",
    "truncation_side",
    "verbose",
}
"""Attributes of a tokenizer that change no id: rows are neither padded nor cut by it."""
_FILES = {"name_or_path", "local_files_only", "is_local", "_commit_hash"}


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of all that decides a tokenizer's ids: its serialised backend, chat template, special tokens, settings, code."""
    state = {name: value for name, value in vars(tokenizer).items() if name not in _OF_NO_MEANING}
    options = {name: value for name, value in (state.pop("init_kwargs", None) or {}).items() if name not in _FILES}
    state["init_kwargs"] = {name: value for name, value in options.items() if not name.endswith("_file")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        whole = json.loads(backend.to_str())
        state["_backend"] = {name: part for name, part in whole.items() if name not in ("truncation", "padding")}
    kind = type(tokenizer)
    state["_class"] = f"{kind.__module__}.{kind.__qualname__}"
    digest = hashlib.blake2b(json.dumps(state, sort_keys=True, default=_as_text).encode(), digest_size=16)
    if not kind.__module__.startswith("transformers.") and (file := inspect.getsourcefile(kind)):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _as_text(value: Any) -> str:
    """What stands for a value that JSON does not know."""
    from datasets.fingerprint import Hasher
    from tokenizers import AddedToken

    if isinstance(value, AddedToken | type | os.PathLike):
        return repr(value)
    if hasattr(value, "serialized_model_proto"):
        return hashlib.blake2b(value.serialized_model_proto(), digest_size=16).hexdigest()
    return Hasher.hash(value)


def _today(tokenizer: Tokenizer) -> dict[str, str]:
    """The date, where a chat template writes it into the prompt."""
    template = getattr(tokenizer, "chat_template", None)
    return {"date": str(datetime.date.today())} if "strftime_now" in json.dumps(template, default=str) else {}
