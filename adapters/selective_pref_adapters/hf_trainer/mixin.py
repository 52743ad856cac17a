"""For those who subclass `Trainer`: a mixin that passes the same loss, collator and callback on to it."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from selective_pref_adapters.hf_trainer.callback import SelectionCallback
from selective_pref_adapters.hf_trainer.collator import PreferenceCollator
from selective_pref_adapters.hf_trainer.loss import SelectivePreferenceLoss
from selective_pref_adapters.reference_store.store import ReferenceStore


class SelectivePreferenceMixin:
    """Put in front of a `Trainer` class, it fills in what preference training needs.

    ``class MyTrainer(SelectivePreferenceMixin, SomeTrainer)`` then overrides whatever it likes. `compute_loss` may be
    overridden to add a term: ``super().compute_loss(...)`` is divided as the Trainer's other losses are, and `inputs`
    holds `labels`. An overridden `log` gets the selection's metrics, too.

    Args:
        preference_loss: the loss, with `ref_model` unless there is a store; default: Selective-DPO as in the paper.
        selection_callback: schedules, patience, pictures; default: none of them, but metrics and warnings.
        reference_store: stored reference log-probs, for the collator that is made where none is given.
        data_collator: a `PreferenceCollator`; default: one of `processing_class`, the tokenizer.
        callbacks, processing_class and all others: as `Trainer` takes them.

    Raises:
        TypeError, ValueError: see `SelectionCallback.attach`.
    """

    def __init__(
        self,
        *args: Any,
        preference_loss: SelectivePreferenceLoss | None = None,
        selection_callback: SelectionCallback | None = None,
        reference_store: ReferenceStore | None = None,
        data_collator: Any = None,
        callbacks: list[Any] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is None:
            if processing_class is None:
                raise ValueError("give data_collator=PreferenceCollator(tokenizer), or processing_class=tokenizer")
            data_collator = PreferenceCollator(processing_class, reference_store=reference_store)
        elif reference_store is not None:
            raise ValueError("give the store to the collator: PreferenceCollator(tokenizer, reference_store=...)")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("the loss is called preference_loss here: leave compute_loss_func out")
        own = [callback for callback in callbacks or [] if isinstance(callback, SelectionCallback)]
        extra = [] if own and selection_callback is None else [selection_callback or SelectionCallback()]
        kwargs["compute_loss_func"] = preference_loss or SelectivePreferenceLoss()
        super().__init__(
            *args,
            data_collator=data_collator,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), *extra],
            **kwargs,
        )


class SelectivePreferenceTrainer(SelectivePreferenceMixin, Trainer):
    """A `Trainer` for preference pairs; arguments as in `SelectivePreferenceMixin`."""
