"""The options of `SelectiveDPOTrainer`, and which of `DPOConfig`'s mean something when tokens are selected.

In: what a script, a YAML file or flags say. Out: a checked `SelectiveDPOConfig`. No option is silently ignored: every
field of the installed `DPOConfig` is either read, or an error that says what to do instead once it is set.

Importing this module checks the installed version of TRL.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import trl
from packaging.version import Version
from transformers import TrainingArguments
from trl import DPOConfig

from selective_pref import Objective, Response, ScoreFunction, SelectionRatio, alignment_scores, excess_loss_scores
from selective_pref_adapters.objectives import Schedule, check_objective, pair_loss, selective_objective
from selective_pref_adapters.objectives.named_losses import check_pairs_can_be_weighted, unread_numbers
from selective_pref_adapters.options import PAIR_LOSS, SelectionOptions, SharePrefix
from selective_pref_adapters.pairs import parse_columns

logger = logging.getLogger(__name__)

OLDEST_TRL, FIRST_UNTRIED_TRL = "1.14", "1.17"
"""The supported range: from the first, below the second."""


def check_trl_version(version: str) -> None:
    """Raises ImportError for a version of TRL outside the supported range."""
    if not Version(OLDEST_TRL) <= Version(version) < Version(FIRST_UNTRIED_TRL):
        raise ImportError(
            f"selective_pref_adapters.trl_trainer supports trl >={OLDEST_TRL},<{FIRST_UNTRIED_TRL}; installed is "
            f"{version}: pip install 'trl>={OLDEST_TRL},<{FIRST_UNTRIED_TRL}'"
        )


check_trl_version(trl.__version__)


def random_scores(chosen: Response, rejected: Response) -> tuple[torch.Tensor, torch.Tensor]:
    """A control: which tokens are kept is left to chance."""
    return torch.rand_like(chosen.log_ratios), torch.rand_like(rejected.log_ratios)


SCORES: dict[str, ScoreFunction] = {
    "alignment": alignment_scores,
    "excess_loss": excess_loss_scores,
    "random": random_scores,
}
"""The names that `scores` may have besides ``"module:function"``."""


@dataclass
class SelectiveDPOConfig(SelectionOptions, DPOConfig):
    """`DPOConfig` with the options of a selection: those of `SelectionOptions`, and the following.

    Every loss that `loss_type` names reads the selected tokens, "sft" too; `sft_weight` adds a supervised term over
    every chosen token.

    Attributes:
        selection_ratio: as in `SelectionOptions`; on a command line one number or two.
        max_length: tokens of prompt + completion; None for what policy and reference can read, at most the paper's
            4096 (the trainer then writes the number here). More than they can read is an error.
        selection_warmup_steps: optimiser steps over which the ratio falls from 1 (DPO) to `selection_ratio`.
            Evaluation always uses `selection_ratio`.
        scores: what tokens are selected by: "alignment" (Eq. 6), "excess_loss", "random", or "module:function" for a
            function (chosen, rejected) → scores of both. In code the function itself may be given.
        reference_store: folder of stored reference log-probs, read instead of running a reference. With a `ref_model`
            or `precompute_ref_log_probs`, what it lacks is computed before training.
        reference_space: which reference of that folder (its name or label), where it holds several.
        scoring_reference_store: folder of stored log-probs of a second reference: from it scores are made (Eq. 6),
            while the first anchors the reward; for the objective "teacher_veto", those of the policy's own start.
        scoring_reference_space: which reference of that folder.
        non_finite: "raise" stops on all processes before a loss that is not finite reaches the weights; "ignore" goes
            on with it, as `DPOTrainer` does.
        fused_head: compute log-probs without materialising the logits, wherever the model allows it.
        picture_pairs: at each evaluation, keep the selection of so many pairs, the first of the evaluation set, as
            `selection/step-….svg` and `.json` in the output folder, and as an image in every tracker.
        share_prefix: `auto` computes a pair's prompt once, and no padding, wherever `fused_head` and the model allow
            it; `off` does not.
        columns: which columns hold what, where the schema of the rows is not recognised by them.
        skip_malformed_rows: leave out rows that are no preference pair, and count them, instead of stopping.
        stock_tokenization: let TRL split and tokenise the rows, as `DPOTrainer` does, instead of this library's reader.
    """

    selection_ratio: list[float] = field(  # a list, so that a command line may give one number or two
        default_factory=lambda: [0.4],
        metadata=SelectionOptions.__dataclass_fields__["selection_ratio"].metadata,
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of prompt + completion. Default: what all models can read, at most 4096."},
    )
    selection_warmup_steps: int = field(
        default=0, metadata={"help": "Optimiser steps over which the ratio falls from 1 to selection_ratio."}
    )
    scores: str = field(
        default="alignment",
        metadata={"help": "What tokens are selected by: alignment, excess_loss, random, or 'module:function'."},
    )
    reference_store: str | None = field(
        default=None, metadata={"help": "Folder of stored reference log-probs, read instead of running a reference."}
    )
    reference_space: str | None = field(
        default=None, metadata={"help": "Which reference of that folder, where it holds several."}
    )
    scoring_reference_store: str | None = field(
        default=None, metadata={"help": "Folder of stored log-probs of a second reference, from which scores are made."}
    )
    scoring_reference_space: str | None = field(
        default=None, metadata={"help": "Which reference of scoring_reference_store, where it holds several."}
    )
    non_finite: Literal["raise", "ignore"] = field(
        default="raise",
        metadata={"help": "At a loss that is NaN or infinite: stop on all processes, or go on as DPOTrainer does."},
    )
    fused_head: bool = field(default=True, metadata={"help": "Compute log-probs without materialising the logits."})
    picture_pairs: int = field(
        default=0, metadata={"help": "At each evaluation, keep the selection of so many pairs as a picture."}
    )
    share_prefix: SharePrefix = field(
        default="auto", metadata={"help": "Compute a pair's prompt once, and no padding (auto), or not (off)."}
    )
    columns: str | None = field(
        default=None, metadata={"help": "Which columns hold what: prompt=question,chosen=good,rejected=bad."}
    )
    skip_malformed_rows: bool = field(
        default=False, metadata={"help": "Leave out rows that are no preference pair (counted), instead of stopping."}
    )
    stock_tokenization: bool = field(
        default=False,
        metadata={"help": "Let TRL split and tokenise rows, where it differs from this library's reader."},
    )

    def __post_init__(self) -> None:
        if callable(self.scores):
            self.scores = _name_of(self.scores)  # so that the configuration can be written down and sent around
        for name in ("reference_store", "scoring_reference_store"):
            if getattr(self, name) is not None:
                setattr(self, name, str(getattr(self, name)))
        self.selection_ratio = one_or_two(self.selection_ratio)
        super().__post_init__()
        check_options(self)

    def ratio(self, step: int | None = None) -> SelectionRatio:
        """The share of tokens to keep, or one for each side, at an optimiser step or after the warm-up."""
        ratio: Any = self.selection_ratio
        if step is None or self.selection_warmup_steps == 0:
            return ratio

        def warm_up(end: float) -> float:
            return Schedule(start=1.0, end=end, steps=self.selection_warmup_steps)(step)

        return (warm_up(ratio[0]), warm_up(ratio[1])) if isinstance(ratio, tuple) else warm_up(ratio)

    def objective(self, step: int | None = None) -> Objective:
        """The loss as a callable (chosen, rejected) → PreferenceLoss; at an optimiser step, during the warm-up."""
        ratio, scores = self.ratio(step), score_function(self.scores)
        return selective_objective(self, pair_loss(self), selection_ratio=ratio, scores=scores)


def one_or_two(ratio: Any) -> Any:
    """A list of one ratio as a number, one of two as a tuple; anything else as it is."""
    if isinstance(ratio, (list, tuple)):
        return ratio[0] if len(ratio) == 1 else tuple(ratio)
    return ratio


def score_function(name: str) -> ScoreFunction:
    """The score function that a configuration names: one of `SCORES`, or "module:function".

    Raises:
        ValueError: there is no such function.
    """
    if name in SCORES:
        return SCORES[name]
    module, _, function = name.partition(":")
    wanted = f"scores must be one of {sorted(SCORES)}, or 'module:function'; got {name!r}"
    if not function:
        raise ValueError(wanted)
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{wanted}: {error}") from error
    return found


def _name_of(function: Callable[..., Any]) -> str:
    known = {id(known): name for name, known in SCORES.items()}
    if id(function) in known:
        return known[id(function)]
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    if "<" in name or name.startswith(":") or name.endswith(":"):
        raise ValueError(
            f"scores must be a function that can be imported by name; got {function!r}. Define it at the top of a "
            "module, or give the trainer objective=functools.partial(selective_dpo_loss, ..., scores=...)"
        )
    return name


# --- DPOConfig's own options -----------------------------------------------------------------------------------------

_READ = {
    "model_init_kwargs",
    "trust_remote_code",
    "disable_dropout",
    "dataset_num_proc",
    "pad_token",
    "max_length",
    "truncation_mode",
    "pad_to_multiple_of",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "label_smoothing",
    "beta",
    "activation_offloading",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "router_aux_loss_coef",
    "use_weighting",
    *PAIR_LOSS,
    "padding_free",  # TRL 1.16 warns that it is not implemented, and pads
}
"""Options of `DPOConfig` that mean under selection what they mean to the stock trainer."""


def check_options(args: SelectiveDPOConfig) -> None:
    """Raises ValueError at the first option that has no meaning under selection, alone or beside another."""
    general = {f.name for f in dataclasses.fields(TrainingArguments)} - {"label_smoothing_factor"}
    for name, default in changed(args, {f.name for f in dataclasses.fields(DPOConfig)} - general - _READ).items():
        smooths = name == "label_smoothing_factor"
        instead = "it smooths labels of tokens, not of pairs: set label_smoothing" if smooths else "leave it out"
        value = getattr(args, name)
        raise ValueError(f"{name}={value!r} (default {default!r}) has no meaning under selection: {instead}")
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end'; got {args.truncation_mode!r}")
    if args.non_finite not in ("raise", "ignore"):
        raise ValueError(f"non_finite must be 'raise' or 'ignore'; got {args.non_finite!r}")
    for name in ("selection_warmup_steps", "picture_pairs"):
        if getattr(args, name) < 0:
            raise ValueError(f"{name} must be at least 0; got {getattr(args, name)}")
    if args.sync_ref_model and (args.reference_store is not None or args.precompute_ref_log_probs):
        raise ValueError(
            "sync_ref_model changes the reference during training, so its stored log-probs would be wrong: leave "
            "reference_store and precompute_ref_log_probs out, or sync_ref_model"
        )
    parse_columns(args.columns)
    if args.stock_tokenization and (args.columns is not None or args.skip_malformed_rows):
        raise ValueError(
            "columns and skip_malformed_rows are read by this library's reader, which stock_tokenization switches off: "
            "leave them out, or it"
        )
    for prefix in ("", "scoring_"):
        if getattr(args, f"{prefix}reference_space") is not None and getattr(args, f"{prefix}reference_store") is None:
            raise ValueError(f"{prefix}reference_space names a reference of a store: give {prefix}reference_store, too")
    if args.use_weighting:
        check_pairs_can_be_weighted(args.loss_type)
    check_objective(args.objective())  # β, ratio, pool, ties, the numbers of the losses
    for name in changed(args, set(unread_numbers(args.loss_type, args.f_divergence_type)) - {"beta"}):
        logger.warning("%s=%r is not read by loss_type %s", name, getattr(args, name), ", ".join(args.loss_type))


def changed(args: SelectiveDPOConfig, names: Collection[str]) -> dict[str, Any]:
    """Name → default of those of these options that do not have their default."""
    defaults = {
        option.name: option.default if option.default is not dataclasses.MISSING else option.default_factory()  # type: ignore[misc]
        for option in dataclasses.fields(args)
        if option.name in names
    }
    defaults |= {name: one_or_two(defaults[name]) for name in ("selection_ratio",) if name in defaults}
    return {name: default for name, default in defaults.items() if getattr(args, name) != default}
