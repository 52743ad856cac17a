"""A checkpoint of safetensors files, of which names, shapes and types are read first, and values when they are needed.

In: the folder or hub id of a causal LM. Out: its class and configuration, and tensors that are read from their files
when they are copied; or an error, before anything is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from selective_pref_adapters.models import model_config


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The safetensors files of a model, of which only names, shapes and dtypes were read."""

    name: str
    config: Any
    files: Mapping[str, str]
    """Name of each tensor → its file."""
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """The checkpoint of a folder or hub id.

        Raises:
            ValueError: it holds no safetensors, a file is missing or damaged, or its weights are quantised.
        """
        config = model_config(name)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"the weights of {name} are quantised, and ZeRO-3 cannot cut those: use zero_stage 2 or below, or a "
                "checkpoint that is not quantised"
            )
        paths = _safetensors(name)
        files: dict[str, str] = {}
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (it is no mapping)
                        part = file.get_slice(key)
                        files[key] = path
                        shapes[key] = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
            except (SafetensorError, OSError, KeyError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
        return cls(name=name, config=config, files=files, shapes=shapes)

    def shell(self) -> tuple[Any, Any]:
        """(the class of the model, its configuration), once its shapes have been compared with those in the files.

        Raises:
            ValueError: a weight in the files has another shape than the configuration gives it.
        """
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(self.config)
        prefix = f"{shell.base_model_prefix}."
        for key, expected in shell.state_dict().items():
            found = self.shapes.get(key, self.shapes.get(key.removeprefix(prefix)))
            if found is not None and found[0] != tuple(expected.shape):
                raise ValueError(
                    f"{self.name}: {key} has the shape {found[0]} in the files and {tuple(expected.shape)} by "
                    "config.json: the two do not belong together"
                )
        return type(shell), shell.config

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


def _safetensors(name: str) -> list[str]:
    """The safetensors files of a checkpoint.

    Raises:
        ValueError: there are none, or one that the index names is missing.
    """

    def found(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)

    if (whole := found(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    index = found(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise ValueError(
            f"{name} cannot be loaded in parts: expected {SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and the "
            "files that it names. Other formats are read whole into the memory of a process. Convert it once: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), tokenizer beside it"
        )
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    paths = {file: found(file) for file in names}
    if missing := [file for file, path in paths.items() if path is None]:
        raise ValueError(f"{name}: {SAFE_WEIGHTS_INDEX_NAME} names files that are not there: {', '.join(missing)}")
    return [path for path in paths.values() if path is not None]
