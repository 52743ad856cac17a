"""What `SelectiveDPOTrainer` is given, checked before the first step: arguments, data sets, models.

In: the trainer's arguments, and what TRL has made of them. Out: nothing, or an error that says what to change.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from transformers import ProcessorMixin

from selective_pref import Objective
from selective_pref_adapters.models import (
    check_reloadable,
    check_same_tokenizer,
    check_savable,
    check_token_ids,
    check_trainable,
    own_vocabulary,
)
from selective_pref_adapters.objectives import check_objective
from selective_pref_adapters.options import SelectionOptions
from selective_pref_adapters.trl_trainer.config import SelectiveDPOConfig, check_options, default_of
from selective_pref_adapters.trl_trainer.stored import check_stored_dataset

logger = logging.getLogger(__name__)


def check_arguments(args: Any, objective: Objective | None, processing_class: Any, datasets: list[Any]) -> None:
    """Raises at what cannot work, before anything is loaded."""
    if not isinstance(args, SelectiveDPOConfig):
        raise TypeError(f"args must be a SelectiveDPOConfig, DPOConfig with a selection; got {type(args).__name__}")
    check_options(args)  # again: options may have been set since
    if objective is not None:
        for name in _OF_THE_LOSS:
            option = next(f for f in dataclasses.fields(args) if f.name == name)
            if getattr(args, name) != default_of(option):
                raise ValueError(f"{name} is not read beside objective=: bind it there, or leave objective out")
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(_NO_VISION)
    for dataset in datasets:
        columns = getattr(dataset, "column_names", None) or []
        if "image" in columns or "images" in columns:
            raise ValueError(_NO_VISION)
        if dataset is not None and (args.reference_store is not None or args.precompute_ref_log_probs):
            check_stored_dataset("given", dataset)


_OF_THE_LOSS = [option.name for option in dataclasses.fields(SelectionOptions)] + ["selection_warmup_steps", "scores"]


_NO_VISION = (
    "images are not supported: this trainer scores tokens of text. Use a text-only model, tokenizer and data set, or "
    "TRL's DPOTrainer"
)


def check_built(trainer: Any, reference: Any, ref_tokenizer: Any) -> None:
    """Raises at models that cannot be trained, saved or compared; before any row is scored.

    Args:
        trainer: a `DPOTrainer` whose models are there.
        reference: the reference model, or None.
        ref_tokenizer: its tokenizer, or None.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    if hasattr(model.config, "vision_config") or isinstance(tokenizer, ProcessorMixin):
        raise ValueError(_NO_VISION)
    if ref_tokenizer is not None:
        check_same_tokenizer(tokenizer, ref_tokenizer)
    if reference is not None:
        check_token_ids(
            max(own_vocabulary(tokenizer).values()), {"reference": reference}, where="the policy's tokenizer: "
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "this mixture of experts would add its load-balancing loss, which no objective here reads: set "
            "router_aux_loss_coef=0.0"
        )
    check_trainable(model)
    for note in check_savable(model, tokenizer):
        logger.warning("%s", note)
    if trainer.args.load_best_model_at_end:
        check_reloadable(trainer, "load_best_model_at_end")


def selects_by_alignment(args: SelectiveDPOConfig, objective: Objective | None) -> bool:
    """Whether the loss keeps some tokens by the alignment score; for a custom objective, whether it scores tokens."""
    if objective is None:
        return args.selection_ratio < 1 and args.scores == "alignment"
    return check_objective(objective).chosen.scores is not None
