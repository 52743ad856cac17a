"""What `SelectiveDPOTrainer` is given, checked before the first step: arguments, data sets, models.

In: the trainer's arguments, and what TRL has made of them. Out: nothing, or an error that says what to change.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from selective_pref import Objective
from selective_pref_adapters.model_checks import check_padding, check_policy, check_reloadable
from selective_pref_adapters.models import (
    check_same_tokenizer,
    check_token_ids,
    model_config,
    own_vocabulary,
)
from selective_pref_adapters.objectives import check_objective, selects
from selective_pref_adapters.options import PAIR_LOSS, SelectionOptions
from selective_pref_adapters.trl_trainer.config import SelectiveDPOConfig, changed, check_options
from selective_pref_adapters.trl_trainer.stored import check_stored_dataset
from selective_pref_adapters.weight_files import Checkpoint, check_fits, check_room, check_whole, in_parts, is_quantised

logger = logging.getLogger(__name__)


def check_named_models(args: SelectiveDPOConfig, policy: Any, ref_model: Any, *, twice: bool) -> None:
    """Raises ValueError where a model given by its name lacks a weight; under ZeRO-3 also where it has no room.

    Args:
        args: the trainer's.
        policy: a model, its folder or its hub id.
        ref_model: likewise, or None.
        twice: whether the policy's weights are loaded a second time, as its own reference.
    """
    options = args.model_init_kwargs or {}
    if options.keys() & _OTHER_FILES:
        return
    in_parts_only = is_deepspeed_zero3_enabled() and options.get("quantization_config") is None
    dtype = options.get("dtype", torch.float32)
    if isinstance(dtype, str):  # "auto" takes that of the files
        dtype = getattr(torch, dtype, None)
    models: dict[str, Checkpoint] = {}
    loaded_whole: dict[str, Checkpoint | None] = {}
    for what, name in (("policy", policy), ("reference", ref_model)):
        if not isinstance(name, str):
            continue
        found_by = {"trust_remote_code": options.get("trust_remote_code", args.trust_remote_code)}
        if name == policy and options.get("revision") is not None:
            found_by["revision"] = options["revision"]
        kind, cut = _class_of(model_config(name, **found_by)), in_parts_only and not is_quantised(name, **found_by)
        if kind is None:  # code of its own, of which nothing is known but the files
            if cut:
                models[what] = Checkpoint.open(name, **found_by)
        elif cut:
            models[what] = in_parts(name, kind, **found_by)
        else:
            loaded_whole[what] = check_whole(name, kind, **found_by)
    if options.get("quantization_config") is None:  # else smaller than its files
        check_fits(loaded_whole, dtype)
    if not models:
        return
    if twice and ref_model is None:
        models["reference"] = models["policy"]
    settings = getattr(args, "hf_deepspeed_config", None)  # none without DeepSpeed
    offloaded = settings is not None and settings.get_value("zero_optimization.offload_param.device") in ("cpu", "nvme")
    check_room(models, dtype, offloaded=offloaded)


def _class_of(config: Any) -> Any:
    """The class by which TRL loads a model; None for one whose code is not in transformers."""
    return getattr(transformers, (config.architectures or [""])[0], None)


_OTHER_FILES = {"subfolder", "variant", "gguf_file", "state_dict", "use_safetensors"}
"""Options of `from_pretrained` by which it reads other files than those that are looked at."""


def check_arguments(args: Any, objective: Objective | None, datasets: list[Any]) -> None:
    """Raises at what cannot work, before anything is loaded."""
    if not isinstance(args, SelectiveDPOConfig):
        raise TypeError(f"args must be a SelectiveDPOConfig, DPOConfig with a selection; got {type(args).__name__}")
    check_options(args)  # again: options may have been set since
    if objective is not None and (unread := changed(args, _OF_THE_LOSS)):
        raise ValueError(f"{next(iter(unread))} is not read beside objective=: bind it there, or leave objective out")
    for dataset in datasets:
        columns = getattr(dataset, "column_names", None) or []
        if args.reference_store is not None and ("image" in columns or "images" in columns):
            raise ValueError(
                "a data set with images cannot have stored reference log-probs, which are addressed by token ids "
                "alone: leave reference_store out"
            )
        if dataset is not None and (args.reference_store is not None or args.precompute_ref_log_probs):
            check_stored_dataset(dataset)


_OF_THE_LOSS = [option.name for option in dataclasses.fields(SelectionOptions)]
_OF_THE_LOSS += ["selection_warmup_steps", "scores", *PAIR_LOSS]


def check_built(trainer: Any, reference: Any, ref_tokenizer: Any) -> None:
    """Raises at models that cannot be trained, saved or compared; before they compute log-probs of a row.

    Args:
        trainer: a `DPOTrainer` whose models are there.
        reference: the reference model, or None.
        ref_tokenizer: its tokenizer, or None.
    """
    model, tokenizer = trainer.model, trainer._tokenizer  # of a processor, where there are images
    if ref_tokenizer is not None:
        check_same_tokenizer(tokenizer, ref_tokenizer)
    check_padding(tokenizer, {"policy": model, **({} if reference is None else {"reference": reference})})
    if reference is not None:
        check_token_ids(
            max(own_vocabulary(tokenizer).values()), {"reference": reference}, where="the policy's tokenizer: "
        )
    for note in check_policy(model, tokenizer, auxiliary_loss=True):
        logger.warning("%s", note)
    if trainer.args.load_best_model_at_end:
        check_reloadable(trainer, "load_best_model_at_end")


def check_left(name: str, given: Any, left: Any, max_length: int) -> None:
    """Says how many rows TRL has left out of a data set, since their prompt alone fills `max_length`.

    Raises:
        ValueError: no row is left, or none was given.
    """
    if not isinstance(given, Dataset):
        return  # a stream has no length
    if not len(left):
        reason = f"every one of its {len(given)} prompts alone fills max_length {max_length}" if len(given) else "empty"
        remedy = ": give a larger max_length, or truncation_mode='keep_end'" if len(given) else ""
        raise ValueError(f"nothing is left of the {name} data set: {reason}{remedy}")
    if len(left) < len(given):
        logger.warning(
            "%s: %d of %d rows are left out, since their prompt alone fills max_length %d",
            *(name, len(given) - len(left), len(given), max_length),
        )


def check_ids(model: Any, datasets: list[Any]) -> None:
    """Raises ValueError where a tokenised data set holds an id that the policy's embedding does not."""
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            continue
        columns = [name for name in dataset.column_names if name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        highest = [pc.max(pc.list_flatten(chunk)).as_py() for n in columns for chunk in dataset.data.column(n).chunks]
        check_token_ids(max((i for i in highest if i is not None), default=0), {"policy": model})


def selects_by_alignment(args: SelectiveDPOConfig, objective: Objective | None) -> bool:
    """Whether the loss selects tokens by the alignment score; a custom objective selects where it returns scores."""
    if objective is None:
        return selects(args.ratio(), args.min_score) and args.scores == "alignment"
    return check_objective(objective).chosen.scores is not None
