"""Models and tokenizers: loaded once, asked what they can read, and checked before they are trained.

In: the folder or hub id of a causal language model, or a loaded one. Out: the model and its tokenizer, or an error that
says what is wrong with the folder; its context length, its vocabulary, whether it has anything to train and can be
saved afterwards, whether its weights are sharded, whether two models have equal weights. Every adapter and command asks
here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from selective_pref_adapters.options import PAPER_MAX_LENGTH

# --- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        ValueError: there is none; says whether the folder is absent or incomplete.
    """
    return _load("tokenizer", name, AutoTokenizer.from_pretrained, ("config.json", "tokenizer_config.json"))


def load_model(name: str, *, dtype: str, attention: str | None = None) -> nn.Module:
    """A causal LM from a folder or hub id, with every dropout rate 0: policy and reference must differ by weights only.

    Args:
        name: the folder or hub id.
        dtype: of the weights, as torch names it: "float32", "bfloat16" or "float16".
        attention: attention implementation, as transformers names them ("eager", "sdpa", …); None for its choice.

    Raises:
        ValueError: there is no such model; says whether the folder is absent or incomplete.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    model = _load("model", name, partial(AutoModelForCausalLM.from_pretrained, **options), ("config.json",))
    for module in model.modules():
        rates = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for rate in rates:
            if isinstance(getattr(module, rate), float):
                setattr(module, rate, 0.0)
    return model


def _load(kind: str, name: str, loader: Callable[[str], Any], needed: tuple[str, ...]) -> Any:
    folder = Path(name)
    if folder.exists() and not any((folder / file).is_file() for file in needed):
        raise ValueError(
            f"{name} is no model folder: expected a config.json, a tokenizer and safetensors weights in it"
        )
    try:
        return loader(name)
    except (OSError, ValueError, ImportError) as error:
        where = "the folder is incomplete" if folder.exists() else "there is no such folder, nor a hub model at hand"
        raise ValueError(f"cannot load the {kind} of {name!r} ({where}): {error}") from error


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


# --- before training -------------------------------------------------------------------------------------------------


def check_trainable(model: nn.Module) -> None:
    """Raises ValueError where no parameter of the policy takes a gradient: a run would leave every weight as it is."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = (
            "load the adapter with PeftModel.from_pretrained(..., is_trainable=True)"
            if hasattr(model, "peft_config")
            else "call requires_grad_(True) on what is to be trained, or put an adapter on the model"
        )
        raise ValueError(f"the policy has no trainable parameter: {remedy}")


def auxiliary_loss_coefficient(model: Any) -> float:
    """The weight of the load-balancing loss that a mixture of experts asks for; 0 where it asks for none.

    transformers adds this loss to its own where the configuration says `output_router_logits: true`, with the weight
    `router_aux_loss_coef`. Per-token log-probs do not contain it.
    """
    config = text_config(model)
    if not getattr(config, "output_router_logits", False):
        return 0.0
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next((float(value) for name in names if (value := getattr(config, name, None)) is not None), 0.0)


def check_no_auxiliary_loss(model: Any) -> None:
    """Raises ValueError where a mixture of experts asks for a load-balancing loss: preference losses do not add it."""
    coefficient = auxiliary_loss_coefficient(model)
    if coefficient:
        raise ValueError(
            f"the policy is a mixture of experts whose configuration asks for a load-balancing loss (output_router_"
            f"logits true, coefficient {coefficient:g}), which is not added to the preference loss here. Set "
            "output_router_logits to false (or the coefficient to 0) in its config.json to train without it"
        )


_READ_BY_SAMPLING = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Options of a generation configuration that greedy decoding does not read, and the values that change nothing."""


def check_savable(model: Any, tokenizer: Any = None) -> list[str]:
    """Finds out before a run whether `save_pretrained` is going to refuse the trained model after it.

    All of it but the weights is saved into a temporary folder. Beforehand, a generation configuration that decodes
    greedily loses the options that sampling alone reads: generated text stays the same, but transformers may refuse to
    save them (a `generation_config.json` with `do_sample: false` and a `temperature`).

    Args:
        model: the policy. Of a PEFT model the adapters are saved, so only its generation configuration is looked at.
        tokenizer: what is going to be saved beside it, or None.

    Returns:
        What was changed, one sentence for each change.

    Raises:
        ValueError: something will be refused; the message holds what transformers says.
    """
    notes = _drop_unread_sampling_options(model)
    adapted = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    with tempfile.TemporaryDirectory() as folder, _no_progress_bars():
        try:
            if not adapted and hasattr(model, "save_pretrained"):
                model.save_pretrained(folder, state_dict={})
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the trained model could not be saved at the end, so change this first: {reason}"
            ) from error
    return notes


def _drop_unread_sampling_options(model: Any) -> list[str]:
    generation = getattr(model, "generation_config", None)
    if generation is None or generation.do_sample:
        return []
    dropped = [n for n, neutral in _READ_BY_SAMPLING.items() if getattr(generation, n, None) not in (None, neutral)]
    for name in dropped:
        setattr(generation, name, None)
    if not dropped:
        return []
    return [
        f"the generation configuration says do_sample: false, beside which {', '.join(dropped)} are not read and might "
        "not be saved: the trained model's generation_config.json is written without them"
    ]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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


# --- weights ---------------------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has cut the weights, so that this process holds parts only."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def same_weights(policy: nn.Module, reference: nn.Module | None) -> bool:
    """Whether the reference is, weight for weight, the policy; of sharded weights, this process's part."""
    if reference is None:
        return False
    ours, theirs = _weights(policy), _weights(reference)
    return ours.keys() == theirs.keys() and all(_equal(ours[name], theirs[name]) for name in ours)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name; of one that ZeRO-3 has sharded, this process's part."""
    return {name: getattr(parameter, "ds_tensor", parameter).detach() for name, parameter in model.named_parameters()}


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs.to(ours.device))


# --- what stays when adapters are off, and what a checkpoint gives back -----------------------------------------------


def trained_outside_adapters(model: Any) -> list[str]:
    """The trainable parameters of a PEFT model that stay as they are when its adapters are switched off.

    Those of an adapter carry its name (`lora_A.default.weight`); others are the base model's own, such as the biases
    that ``LoraConfig(bias="all")`` trains.
    """
    adapters = [f".{name}." for name in model.peft_config]
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(adapter in f".{name}." for adapter in adapters)
    ]


def check_reloadable(trainer: Any, what: str) -> None:
    """Raises ValueError where transformers' `Trainer` would not load all weights of a checkpoint back.

    `save_pretrained` gives the weights of experts other names than the model has. `from_pretrained` reads them again;
    `Trainer`, which loads a checkpoint name by name, leaves such weights as they are. DeepSpeed and FSDP have
    checkpoints of their own.

    Args:
        trainer: a `Trainer` with its model.
        what: the option that needs the checkpoint, for the message.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not is_saved_under_other_names(trainer.model):
        return
    raise ValueError(
        f"{what}: transformers saves some weights of {type(trainer.model).__name__} (its experts) under other names "
        "than it loads them by, so a checkpoint would not be loaded back completely. Load the checkpoint with "
        "from_pretrained instead, train under DeepSpeed, or train adapters"
    )


def is_saved_under_other_names(model: Any) -> bool:
    """Whether `save_pretrained` gives the weights other names than the model has, as it does for experts."""
    if not isinstance(model, PreTrainedModel):
        return False
    names = {name: torch.empty(tensor.shape, device="meta") for name, tensor in model.state_dict().items()}
    return set(revert_weight_conversion(model, names)) != set(names)
