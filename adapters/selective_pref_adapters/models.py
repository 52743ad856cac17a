"""Models and tokenizers: loaded once, and asked what they can read.

In: the folder or hub id of a causal language model, or a loaded one. Out: the model and its tokenizer, or an error that
says what is wrong with the folder; its context length and its vocabulary. Every adapter and command asks here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as logging_of_transformers

from selective_pref_adapters.files import files_of_index, unreadable
from selective_pref_adapters.options import PAPER_MAX_LENGTH

logger = logging.getLogger(__name__)

# --- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        ValueError: there is none; says whether the folder is absent or incomplete.
    """
    return _load("tokenizer", name, AutoTokenizer.from_pretrained, ("config.json", "tokenizer_config.json"))


def load_model(
    name: str, *, dtype: str, attention: str | None = None, loader: Callable[..., nn.Module] | None = None
) -> nn.Module:
    """A causal LM from a folder or hub id, with every dropout rate 0: policy and reference must differ by weights only.

    Args:
        name: the folder or hub id.
        dtype: of the weights, as torch names it: "float32", "bfloat16" or "float16".
        attention: attention implementation, as transformers names them ("eager", "sdpa", …); None for its choice.
        loader: what makes the model, given its name and options; None for transformers' `from_pretrained`.

    Raises:
        ValueError: there is no such model (says whether the folder is absent or incomplete), a file is damaged, or the
            files lack a weight of the model or hold it in another shape (names the weight).
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    loader = partial(whole_model, AutoModelForCausalLM) if loader is None else loader
    model = _load("model", name, partial(loader, **options), ("config.json",))
    switch_off_dropout(model)
    return model


def whole_model(kind: Any, name: str | None, *, shown: str | None = None, **options: Any) -> nn.Module:
    """`kind.from_pretrained(name, **options)`, where the files hold every weight of the model.

    transformers draws at random what they lack, and trains on. Weights that are tied to others may be absent. What the
    files hold besides is left out, with a warning.

    Args:
        kind: a class of transformers with `from_pretrained`.
        name: the folder or hub id; None where weights are among the options.
        shown: its name in a warning, if it is not `name`.
        options: of `from_pretrained`.

    Raises:
        ValueError: a weight is absent from the files, or has another shape there.
    """
    try:
        with _quiet():
            model, found = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except RuntimeError as error:
        if "conversion" not in str(error):
            raise
        raise ValueError(
            f"a weight of {kind.__name__} cannot be put together from its parts in the files, as where one of several "
            "experts is absent: take a checkpoint that was saved whole"
        ) from error
    for key, there, asked in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{key} has the shape {tuple(there)} in the files and {tuple(asked)} by config.json: the two do not belong "
            "together"
        )
    weights = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    if absent := sorted(weights & set(found["missing_keys"])):
        raise ValueError(
            f"its files lack {_some(absent)}, of {len(weights)} weights of {type(model).__name__}: what is absent "
            "would be random. Take a checkpoint that was saved whole, as the model that config.json describes"
        )
    if not _is_first_process():
        return model
    shown = name if shown is None else shown
    if unused := sorted(found["unexpected_keys"]):
        logger.warning(
            "%s: its files also hold %s, which the %s that config.json describes does not have: left out",
            *(shown, _some(unused), type(model).__name__),
        )
    if _untied(model):
        logger.warning(
            "%s: its files hold an output layer that differs from the embedding, to which config.json ties it: both "
            "are kept. Set tie_word_embeddings to false in config.json",
            shown,
        )
    return model


def _untied(model: Any) -> bool:
    """Whether a model with weights has an output layer of its own although its configuration ties it."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in layers or any(layer.weight.is_meta for layer in layers):
        return False
    return bool(getattr(text_config(model), "tie_word_embeddings", False)) and layers[0].weight is not layers[1].weight


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _is_first_process() -> bool:
    """Whether this process is the one to say what is the same for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers shows no bar and says nothing of what it loads: what matters is said by us."""
    verbosity, bars = logging_of_transformers.get_verbosity(), logging_of_transformers.is_progress_bar_enabled()
    logging_of_transformers.set_verbosity_error()
    logging_of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        logging_of_transformers.set_verbosity(verbosity)
        if bars:
            logging_of_transformers.enable_progress_bar()


def model_config(name: str, **options: Any) -> Any:
    """The configuration of a model folder or hub id. Raises ValueError as `load_model` does.

    Args:
        name: the folder or hub id.
        options: of transformers' `from_pretrained`, as `revision`.
    """
    return _load("model", name, partial(AutoConfig.from_pretrained, **options), ("config.json",))


def load_config(name: str) -> Any:
    """The configuration of a model folder or hub id; None where there is none, as beside a tokenizer alone."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return None


def switch_off_dropout(model: nn.Module) -> None:
    """Sets every dropout rate of a model and its adapters to 0: in training it then gives the same log-probs as else.

    Besides `nn.Dropout` modules there are rates that a module keeps as a number, and passes to a function (OPT, Llama).
    """
    for module, name in _dropout_rates(model):
        setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """Whether some dropout rate of a model is above 0."""
    return any(getattr(module, name) > 0 for module, name in _dropout_rates(model))


def _dropout_rates(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a model keeps its dropout rates: (module, name of the attribute)."""
    found = [
        (module, name)
        for module in model.modules()
        for name in (["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name])
    ]
    return [(module, name) for module, name in found if isinstance(getattr(module, name), float)]


def _load(kind: str, name: str, loader: Callable[[str], Any], needed: tuple[str, ...]) -> Any:
    folder = Path(name)
    if folder.exists() and not any((folder / file).is_file() for file in needed):
        adapter = (folder / "adapter_config.json").is_file()
        found = (
            "It holds an adapter (PEFT) alone: merge it into its model (merge_and_unload) first. " if adapter else ""
        )
        raise ValueError(
            f"{name} is no model folder: {found}expected a config.json, a tokenizer and safetensors weights in it"
        )
    try:
        return loader(name)
    except Exception as error:  # a damaged file gives whatever error its reader has
        incomplete = "the folder is incomplete, or a file in it is damaged"
        where = incomplete if folder.exists() else "there is no such folder, nor a hub model at hand"
        said = error if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {error}"
        said = _damage(folder) or " ".join(str(said).split())
        raise ValueError(f"cannot load the {kind} of {name!r} ({where}): {said}") from error


def _damage(folder: Path) -> str:
    """Which weights file of a folder cannot be read, and why; "" where none is found."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError, RuntimeError) as error:
            return unreadable(path, error)
    for path in sorted(folder.glob("*.index.json")):
        try:
            files_of_index(path)
        except ValueError as error:
            return str(error)
    return ""


# --- what a model can read -------------------------------------------------------------------------------------------


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text; models of text and images nest it."""
    config = getattr(model, "config", model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: Any) -> int | None:
    """How many tokens a model (or a configuration) can read, where its configuration says so."""
    return getattr(text_config(model), "max_position_embeddings", None)


def vocabulary_size(model: Any) -> int | None:
    """How many token ids a model (or a configuration) knows, where its configuration says so."""
    return getattr(text_config(model), "vocab_size", None)


def usable_length(max_length: int | None, models: Mapping[str, Any]) -> int:
    """`max_length`, checked against (or by default taken from) what all models can read, at most the paper's 4096.

    Args:
        max_length: tokens of prompt + completion, or None.
        models: name → model or configuration; names are for the error message.

    Raises:
        ValueError: a model cannot read so many tokens.
    """
    contexts = {name: length for name, model in models.items() if (length := context_length(model)) is not None}
    for name, context in contexts.items():
        if max_length is not None and max_length > context:
            raise ValueError(
                f"max_length {max_length} is longer than the {name} can read ({context} tokens): give {context} or less"
            )
    return max_length if max_length is not None else min([PAPER_MAX_LENGTH, *contexts.values()])


def check_token_ids(highest: int, models: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError where token id `highest` has no row in a model's embedding.

    Args:
        highest: the highest token id that is going to be read.
        models: name → model or configuration; names are for the error message.
        where: what holds the id, to put in front, as ``"train_dataset holds "``.
    """
    for name, model in models.items():
        size = vocabulary_size(model)
        if size is not None and highest >= size:
            raise ValueError(
                f"{where}token id {highest} is outside the {name}'s vocabulary of {size}: tokenizer and model do not "
                "belong together"
            )


def pad_token_id(tokenizer: Any) -> int:
    """What fills the ends of shorter rows: the padding token, else the EOS token, else 0. Masks hide it."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


# --- what two tokenizers mean -----------------------------------------------------------------------------------------


def own_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Token → id of a tokenizer, without a pad token that it was given behind all others.

    No row that a model reads holds it (masks hide it), so tokenizers are the same with it and without.
    """
    vocabulary = dict(tokenizer.get_vocab())
    pad = getattr(tokenizer, "pad_token", None)
    others = [getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "unk_token")]
    if pad in vocabulary and pad not in others and vocabulary[pad] == max(vocabulary.values()):
        del vocabulary[pad]
    return vocabulary


def check_same_tokenizer(policy: Any, reference: Any) -> None:
    """Raises unless both tokenizers give every token string the same id; names the first that differs.

    Vocabularies are compared token by token, not by size: a padded or larger vocabulary of the reference is fine,
    and so is a padding token that the policy's tokenizer was given behind all others.

    Raises:
        ValueError: an id of the policy's vocabulary means something else to the reference.
    """
    difference = differing_token(own_vocabulary(policy), reference.get_vocab())
    if difference is not None:
        raise ValueError(
            f"policy and reference tokenize differently: {difference}. Per-token log-probs of different tokens cannot "
            "be compared: choose a reference that shares the policy's tokenizer"
        )


def differing_token(policy: dict[str, int], reference: dict[str, int]) -> str | None:
    """The first token, in order of the policy's ids, that has another id in the reference's vocabulary; None if none.

    Args:
        policy, reference: token → id. What only the reference has does not matter.
    """
    by_id = {token_id: token for token, token_id in reference.items()}
    for token, token_id in sorted(policy.items(), key=lambda item: item[1]):
        if reference.get(token) != token_id:
            other = by_id.get(token_id)
            said = "no token" if other is None else repr(other)
            return f"id {token_id} is {token!r} for the policy and {said} for the reference"
    return None


# --- weights and modes -----------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without dropout; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def running_model(trainer: Any) -> Any:
    """The policy of a `Trainer` as it is called without a gradient: inside the engine where one shards its weights."""
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return trainer.model_wrapped if sharded else trainer.model


def keep_trainable_in_4_bits(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for inference on a CPU, from where no gradient comes back.

    It packs them at the first call in evaluation mode, as when the policy with its adapters off is the reference, or
    at an evaluation. On a GPU nothing is packed.

    Raises:
        ValueError: they are packed already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):  # what bitsandbytes packs by
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"the policy's 4-bit weights ({name} for one) are packed for inference, from where no gradient comes "
                "back: they were used in evaluation mode on this CPU. Load the model again and train it before that"
            )
