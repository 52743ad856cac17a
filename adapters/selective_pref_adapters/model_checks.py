"""Models checked before they are trained.

Whatever would fail late, or train nothing, is an error before the first step.

In: a loaded model, its tokenizer, or the `Trainer` that holds it. Out: nothing, a note, or an error that says what to
change. Every door asks here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from selective_pref_adapters.models import keep_trainable_in_4_bits, pad_token_id, text_config, vocabulary_size


def check_policy(policy: Any, tokenizer: Any, *, auxiliary_loss: bool = False) -> list[str]:
    """What is checked of a policy before it is trained, by every trainer; returns what a reader should know.

    Args:
        policy: the model.
        tokenizer: what is going to be saved beside it, or None.
        auxiliary_loss: whether the trainer adds the load-balancing loss of a mixture of experts.

    Raises:
        ValueError: nothing of it would learn, it asks for a loss that is not added, or it could not be saved.
    """
    keep_trainable_in_4_bits(policy)
    check_trainable(policy)
    if not auxiliary_loss:
        check_no_auxiliary_loss(policy)
    return check_savable(policy, tokenizer)


def check_padding(tokenizer: Any, models: Mapping[str, Any]) -> None:
    """Raises ValueError where what fills up shorter rows is a token id that a model does not have.

    So it is where a padding token was added to a tokenizer, and the model's embedding was not made longer.
    """
    padding = pad_token_id(tokenizer)
    for name, model in models.items():
        size = vocabulary_size(model)
        if size is not None and padding >= size:
            raise ValueError(
                f"the tokenizer's padding token has the id {padding}, outside the {name}'s vocabulary of {size}: use a "
                'token that the model has (tokenizer.pad_token = tokenizer.eos_token, or "pad_token" in '
                "tokenizer_config.json), or make its embedding longer (model.resize_token_embeddings)"
            )


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


def trained_outside_adapters(model: Any) -> list[str]:
    """The trainable parameters of a PEFT model that stay as they are when its adapters are switched off.

    Those of an adapter carry its name (`lora_A.default.weight`); others are the base model's own, such as the biases
    that ``LoraConfig(bias="all")`` trains.
    """
    adapters = [f".{name}." for name in model.peft_config]
    # Within these modules PEFT keeps what it adds. Elsewhere a name means nothing: an adapter may be called "model".
    owners = [f"{name}." for name, module in model.named_modules() if getattr(module, "adapter_layer_names", ())]
    owners.append("prompt_encoder.")

    def is_adapters(name: str) -> bool:
        inside = [name.removeprefix(owner) for owner in owners if name.startswith(owner)]
        return any(adapter in f".{rest}." for rest in inside for adapter in adapters)

    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and not is_adapters(name)]


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
