"""A checkpoint of safetensors files, of which names, shapes and types are read first, and values when they are needed.

In: the folder or hub id of a causal LM. Out: its class and configuration, and tensors that are read from their files
when they are copied; or an error, before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as integration
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from selective_pref_adapters.files import files_of_index, unreadable
from selective_pref_adapters.models import model_config, whole_model


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The safetensors files of a model, of which only names, shapes and dtypes were read."""

    name: str
    config: Any
    files: Mapping[str, str]
    """Name of each tensor → its file."""
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Name of each tensor → its shape and dtype."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of transformers' `from_pretrained`, with which it was found: `revision`, `trust_remote_code`."""

    @classmethod
    def open(cls, name: str, **options: Any) -> Checkpoint:
        """The checkpoint of a folder or hub id.

        Args:
            name: the folder or hub id.
            options: `revision` and `trust_remote_code`, as `from_pretrained` takes them.

        Raises:
            ValueError: it holds no safetensors, or a file is missing or damaged.
        """
        config = model_config(name, **options)
        paths = safetensors_files(name, revision=options.get("revision"))
        if not paths:
            raise ValueError(
                f"{name} cannot be loaded in parts: expected {SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and the "
                "files that it names. Other formats are read whole into the memory of a process. Convert it once: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), tokenizer beside it"
            )
        files: dict[str, str] = {}
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (it is no mapping)
                        part = file.get_slice(key)
                        files[key] = path
                        if (dtype := _DTYPES.get(part.get_dtype())) is None:
                            raise ValueError(
                                f"{path}: {key} is of the type {part.get_dtype()}, and config.json does not say that "
                                "weights are quantised (quantization_config)"
                            )
                        shapes[key] = tuple(part.get_shape()), dtype
            except (SafetensorError, OSError, RuntimeError) as error:
                raise ValueError(unreadable(path, error)) from error
        return cls(name=name, config=config, files=files, shapes=shapes, options=options)

    def check(self, kind: Any = None) -> tuple[Any, Any]:
        """(the class of the model, its configuration), once every weight of it was found in the files; none is read.

        Args:
            kind: a class of transformers with `from_pretrained`; None for the causal language model of the
                configuration.

        Raises:
            ValueError: a weight is absent from the files, or has another shape there than by the configuration.
        """
        if kind is None:
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(self.config, **self._trusted()))
        with apart_from_training():
            try:
                options = {"config": self.config, "device_map": "meta", **self._trusted()}
                model = whole_model(kind, None, shown=self.name, state_dict=self.tensors(values=False), **options)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        for name, weight in model.named_parameters():
            _, dtype = self.shapes.get(name, ((), weight.dtype))
            if weight.is_floating_point() and not dtype.is_floating_point:
                raise ValueError(
                    f"{self.name}: {name} is of the type {dtype}, and config.json does not say that weights are "
                    "quantised (quantization_config)"
                )
        return type(model), model.config

    def untied(self, kind: Any) -> str:
        """A sentence where two weights that the configuration ties have different values in the files; else "".

        Args:
            kind: the class of the model.
        """
        with torch.device("meta"):
            model = kind(self.config)
        for pair in getattr(model, "all_tied_weights_keys", {}).items():
            names = [self._in_files(key, model.base_model_prefix) for key in pair]
            if None not in names and not self._equal(*map(str, names)):
                return (
                    f"{self.name}: its files hold {names[0]} and {names[1]} with different values, and config.json "
                    "ties the two: ZeRO-3 would drop one of them. Set tie_word_embeddings to false in config.json, if "
                    "both are meant"
                )
        return ""

    def _in_files(self, weight: str, prefix: str) -> str | None:
        """How the files name a weight: as the model does, without its prefix, or with another; None for not at all."""
        end = "." + ".".join(weight.split(".")[-2:])  # as ".lm_head.weight", behind whatever transformers renames
        ends = [name for name in self.files if f".{name}".endswith(end)]
        known = [name for name in (weight, weight.removeprefix(f"{prefix}.")) if name in self.files]
        return known[0] if known else ends[0] if len(ends) == 1 else None

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors of the files are equal; some rows of both are in memory at a time."""
        if self.shapes[one] != self.shapes[other]:
            return False
        with (
            safe_open(self.files[one], framework="pt") as first,
            safe_open(self.files[other], framework="pt") as second,
        ):
            ours, theirs = first.get_slice(one), second.get_slice(other)
            rows = range(0, self.shapes[one][0][0], _ROWS)
            return all(torch.equal(ours[at : at + _ROWS], theirs[at : at + _ROWS]) for at in rows)

    def _trusted(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name == "trust_remote_code"}

    def size(self, dtype: torch.dtype | None) -> int:
        """Bytes of all weights in a dtype; None for the one that each has in its file."""
        return sum(math.prod(shape) * (dtype or own).itemsize for shape, own in self.shapes.values())

    def tensors(self, *, values: bool) -> dict[str, Tensor]:
        """Every tensor by name: one that is read when it is copied; without `values` its shape alone."""
        return {
            key: Unread(self.files[key], key, shape, dtype)
            if values
            else torch.empty(shape, dtype=dtype, device="meta")
            for key, (shape, dtype) in self.shapes.items()
        }


_ROWS = 4096
"""Of two tensors that are compared at once."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""How safetensors names the types of weights that are not quantised."""


class Unread(Tensor):
    """A tensor in a safetensors file, which is opened for each operation on it and closed again.

    A file that stayed open would count all its pages that were ever read as this process's memory.
    """

    file: str
    key: str

    @staticmethod
    def __new__(cls, file: str, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """Takes no memory."""
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")  # pyright: ignore
        self.file, self.key = file, key
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation on what is in the file."""

        def read(value: Any) -> Any:
            if not isinstance(value, Unread):
                return value
            with safe_open(value.file, framework="pt") as file:
                return file.get_tensor(value.key)

        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))


def safetensors_files(name: str, *, revision: str | None = None) -> list[str]:
    """The safetensors files of a checkpoint; none where it has another format.

    Raises:
        ValueError: the index is damaged, or names a file that is missing.
    """

    def found(file: str) -> str | None:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)

    if (path := Path(name) / SAFE_WEIGHTS_NAME).is_dir() or (path.is_symlink() and not path.exists()):
        raise ValueError(
            f"{path} is {'a folder' if path.is_dir() else 'a link to nothing'}: expected a file of weights"
        )
    if (whole := found(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    index = found(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    names = files_of_index(index)
    paths = {file: found(file) for file in names}
    if missing := [file for file, path in paths.items() if path is None]:
        raise ValueError(f"{name}: {SAFE_WEIGHTS_INDEX_NAME} names files that are not there: {', '.join(missing)}")
    return [path for path in paths.values() if path is not None]


@contextmanager
def apart_from_training() -> Iterator[None]:
    """Inside, transformers makes models as if there were no ZeRO-3."""
    zero_3 = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = zero_3
