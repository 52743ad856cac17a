"""Checks of a `Trainer` before its first step: what would train wrongly, or fail later, is an error here.

In: the trainer with its loss, collator, arguments and data sets. Out: nothing, or an error that says what to change.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer

from selective_pref_adapters.batch import REF_LOGPS, SCORING_REF_LOGPS
from selective_pref_adapters.hf_trainer.collator import PreferenceCollator
from selective_pref_adapters.hf_trainer.loss import NO_REFERENCE, NO_REJECTED, SelectivePreferenceLoss
from selective_pref_adapters.model_checks import check_policy, check_reloadable
from selective_pref_adapters.model_inputs import check_stored_inputs, further_inputs, inputs_of
from selective_pref_adapters.models import check_token_ids, context_length, has_dropout
from selective_pref_adapters.objectives import CHOSEN_ONLY, Schedule, as_names
from selective_pref_adapters.objectives.named_losses import check_pair_weights, weights_line
from selective_pref_adapters.pairs.large import PairTable
from selective_pref_adapters.references import AdapterOffReference

logger = logging.getLogger(__name__)


_DROPOUT = (
    "the policy has dropout, so in training its log-probs differ from the reference's by noise, too, and the selection "
    "picks tokens by it: call selective_pref_adapters.models.switch_off_dropout(model) before the Trainer is made"
)


def check_trainer(trainer: Trainer) -> None:
    """Raises TypeError or ValueError at the first argument that would train wrongly, or not at all."""
    args, loss, collator = trainer.args, trainer.compute_loss_func, trainer.data_collator
    if not isinstance(loss, SelectivePreferenceLoss):
        raise TypeError(f"SelectionCallback needs compute_loss_func=SelectivePreferenceLoss(...); got {loss!r:.80}")
    if not isinstance(collator, PreferenceCollator):
        raise TypeError(
            "the loss needs completion masks and reference log-probs, which other collators do not make: pass "
            f"data_collator=PreferenceCollator(tokenizer); got {type(collator).__name__}"
        )
    workers = args.accelerator_config
    for wrong, message in (
        (args.remove_unused_columns, "remove_unused_columns=True takes the pairs' columns away: set it to False"),
        (
            args.label_smoothing_factor != 0,
            "label_smoothing_factor smooths token labels and is not read beside compute_loss_func: leave it at 0 and "
            "set SelectivePreferenceLoss(label_smoothing=...)",
        ),
        (
            args.n_gpu > 1,
            f"DataParallel over {args.n_gpu} GPUs would tear pairs apart: start one process per GPU (torchrun "
            "--nproc_per_node), or show one GPU (CUDA_VISIBLE_DEVICES=0)",
        ),
        (
            workers.split_batches or workers.dispatch_batches,
            "split_batches and dispatch_batches tear pairs apart (a batch is chosen rows, then rejected rows): set "
            "both to False in accelerator_config",
        ),
        (
            args.world_size > 1 and workers.dispatch_batches is None and _streams(trainer),
            "an IterableDataset on several processes is dispatched, which tears pairs apart: set "
            "accelerator_config={'dispatch_batches': False}",
        ),
        (
            collator.chosen_only and isinstance(loss.objective, str) and loss.objective not in CHOSEN_ONLY,
            NO_REJECTED.format(objective=loss.objective),
        ),
        (args.use_liger_kernel, "use_liger_kernel replaces the forward that the fused head stands in: set it to False"),
        (
            trainer.compute_metrics is not None,
            "compute_metrics gets two rows per pair, of which the Trainer cuts the wrong ones off: leave it out; the "
            "selection's metrics are logged at every evaluation",
        ),
        (
            list(trainer.label_names) != ["labels"],
            f"the Trainer looks for labels named {list(trainer.label_names)}, so evaluations would have no loss: set "
            "label_names=['labels']",
        ),
    ):
        if wrong:
            raise ValueError(message)
    check_references(trainer)
    notes = check_policy(trainer.model, trainer.processing_class)
    for note in [_DROPOUT] * (loss.reads_reference and has_dropout(trainer.model)) + notes:
        logger.warning("%s", note)
    if args.load_best_model_at_end:
        check_reloadable(trainer, "load_best_model_at_end")


def check_references(trainer: Trainer) -> None:
    """Raises ValueError unless there is exactly one reference where the objective reads one."""
    loss, stores = trainer.compute_loss_func, trainer.data_collator.stores
    for key, prefix in ((REF_LOGPS, ""), (SCORING_REF_LOGPS, "scoring_")):
        given = [option for option in (f"{prefix}reference_store",) if option in stores]
        given += [f"{prefix}ref_model"] if key in loss.references else []
        if len(given) > 1:
            raise ValueError(f"both {given[0]} and {given[1]} are given: leave one of them out")
        if given and not loss.reads_reference:
            raise ValueError(f"objective {loss.objective!r} reads no reference: leave {given[0]} out")
        if given and key == SCORING_REF_LOGPS and loss.objective == "dpo":
            raise ValueError(f"objective 'dpo' selects no tokens: leave {given[0]} out")
        if not given and key == REF_LOGPS and loss.reads_reference:
            raise ValueError(NO_REFERENCE.format(objective=loss.objective))
    for reference in loss.references.values():
        switched = isinstance(reference, AdapterOffReference)
        if reference.model is trainer.model and not switched:
            raise ValueError(
                "the reference is the policy itself and would move with it: load a second copy (a PEFT model may be "
                "its own reference, with its adapter switched off, if the adapter is trainable: is_trainable=True)"
            )
        if isinstance(reference, AdapterOffReference):
            reference.check()  # again: parameters may have been unfrozen since
        if switched and reference.model is not trainer.model:
            raise ValueError("the reference is another PEFT model, which could be trained: requires_grad_(False) it")


def check_schedules(loss: SelectivePreferenceLoss, schedules: Mapping[str, Schedule]) -> None:
    """Raises ValueError where the objective does not read a scheduled number, or refuses one of its values."""
    for name, schedule in schedules.items():
        if name not in loss.schedulable:
            raise ValueError(f"objective {loss.objective!r} does not read {name}: leave its schedule out")
        for value in (schedule.start, schedule.end):
            loss.check(**{name: value})


def check_rows(
    name: str, dataset: Any, collator: PreferenceCollator, loss: SelectivePreferenceLoss, models: Mapping[str, Any]
) -> None:
    """Raises where a row is no pair, is longer or has other ids than a model can read, or is not in a store.

    Raises also where rows have weights that their losses cannot be multiplied by.
    """
    pairs = dataset if isinstance(dataset, PairTable) else collator.pairs(dataset, name)
    if not len(pairs):
        raise ValueError(f"{name} is empty")
    if isinstance(pairs, PairTable):  # which knows it of all its pairs, and holds none in memory
        weights, longest, highest = pairs.weights, int(pairs.lengths.max()), pairs.highest_id
    else:
        weights = [pair.weight for pair in pairs]
        longest = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
        highest = max(max(*pair.chosen_ids, *pair.rejected_ids) for pair in pairs)
    check_pair_weights(weights, as_names(loss.options["loss_type"]), name)
    for line in weights_line(weights):
        logger.info("%s: %s", name, line)
    for who, model in models.items():
        context = context_length(model)
        if context is not None and longest > context:
            raise ValueError(
                f"{name} holds {longest} tokens in one row, more than the {who} can read ({context}): cut rows when "
                "they are tokenised (max_length)"
            )
    check_token_ids(highest, models, where=f"{name}: ")
    for store in collator.stores.values():
        store.check(pairs, together=True)
    check_inputs(collator, [dataset[n] for n in range(min(len(dataset), 4))], models)


def check_inputs(collator: PreferenceCollator, rows: list[Any], models: Mapping[str, Any]) -> None:
    """Raises ValueError where a subclass's batch would be read in another way by the policy than by its reference.

    The `Trainer` gives the policy what the batch holds; a reference is given positions, too, where the batch has none.
    """
    policy, *references = models.values()
    batch = collator(rows)
    given = inputs_of(policy, batch)
    if "position_ids" not in batch and "position_ids" in given and not bool((batch["attention_mask"][:, 0] != 0).all()):
        raise ValueError(
            "the collator pads on the left, and the policy would count the padding as positions: put position_ids into "
            "the batch and into batch['labels'] (0 at the first token that is attended to), or pad on the right"
        )
    if collator.stores:
        check_stored_inputs(policy, batch)
    lacking = [name for name in further_inputs(policy, batch) if name not in batch["labels"]]
    if references and lacking:
        raise ValueError(
            f"the collator gives the model {', '.join(lacking)}, and the reference does not see it: put it into "
            "batch['labels'], too, from where the reference is asked"
        )


def models_of(trainer: Trainer) -> dict[str, Any]:
    """The policy and its references, named for error messages."""
    references = trainer.compute_loss_func.references.values()
    return {"policy": trainer.model, **{f"reference {n}": r.model for n, r in enumerate(references, start=1)}}


def datasets_of(trainer: Trainer) -> list[tuple[str, Any]]:
    """(name, data set) of those whose rows can be counted."""
    evaluation = trainer.eval_dataset
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    named = [("train_dataset", trainer.train_dataset)]
    named += [(f"eval_dataset {name}".strip(), dataset) for name, dataset in several.items()]
    return [(name, dataset) for name, dataset in named if hasattr(dataset, "__len__")]


def _streams(trainer: Trainer) -> bool:
    sets = [trainer.train_dataset, trainer.eval_dataset]
    sets += trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else []
    return any(isinstance(dataset, torch.utils.data.IterableDataset) for dataset in sets)
