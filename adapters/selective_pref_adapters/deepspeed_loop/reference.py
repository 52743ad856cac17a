"""The references that a configuration names: models beside the policy, stores of log-probs, or stores filled by models.

In: a `TrainConfig` and the policy's tokenizer. Out: what gives the log-probs of a batch. A model that fills a store is
sharded like any other under ZeRO-3, computes what the store lacks before the first step, and is gone by then.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from selective_pref_adapters.deepspeed_loop.engine import load, start_frozen_engine
from selective_pref_adapters.models import load_tokenizer, pad_token_id
from selective_pref_adapters.monitoring import SELF_REFERENCE
from selective_pref_adapters.objectives import selects
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import check_same_tokenizer
from selective_pref_adapters.pairs.large import PairTable, joined
from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space
from selective_pref_adapters.references import Reference, RunningReference, StoredReference, is_initial_policy


@dataclass(kw_only=True)
class Opened:
    """One reference of a run."""

    reference: Reference | None = None
    """What gives the log-probs of a batch; None where the run has no such reference."""
    model: nn.Module | None = None
    """The model that runs beside the policy, or fills `store`."""
    store: ReferenceStore | None = None
    """The store that is read."""


def open_references(config: TrainConfig, tokenizer: Any) -> dict[str, Opened]:
    """ "reference" and "scoring reference", as the configuration names them. Tokenizers must agree.

    Raises:
        ValueError: a model or a store that is not there, or does not fit the policy.
    """
    return {
        "reference": _open(config, tokenizer, config.ref_model, config.reference_store, config.reference_space),
        "scoring reference": _open(
            config, tokenizer, config.scoring_ref_model, config.scoring_reference_store, config.scoring_reference_space
        ),
    }


def _open(config: TrainConfig, tokenizer: Any, name: str | None, store: str | None, space: str | None) -> Opened:
    """A model is put into a DeepSpeed engine when it is first asked: by then the policy has been put into its own."""
    if name is None:
        if store is None:
            return Opened()
        opened = ReferenceStore.open(store, space)
        opened.check_tokenizer(tokenizer)
        return Opened(reference=StoredReference(opened), store=opened)
    own = load_tokenizer(name)
    check_same_tokenizer(tokenizer, own)
    model = load(config, name)
    if store is not None:
        model.eval().requires_grad_(False)
        filled = ReferenceStore.create(store, reference_space(model, own, label=name))
        return Opened(reference=StoredReference(filled), model=model, store=filled)
    running = RunningReference(
        model,
        fused_head=config.fused_head,
        share_prefix=config.share_prefix,
        start=partial(start_frozen_engine, config),
    )
    return Opened(reference=running, model=model)


def own_start_note(config: TrainConfig, opened: Mapping[str, Opened], policy: nn.Module) -> list[str]:
    """A sentence where selection by alignment is to learn from the policy's own start, as fresh adapters do by default.

    Args:
        config: of the run.
        opened: its references.
        policy: before adapters were put on it; they add nothing yet.
    """
    if config.objective != "selective_dpo" or not selects(config.selection_ratio, config.min_score):
        return []
    scoring = opened["scoring reference"].reference or opened["reference"].reference
    own = config.reference_is_start if scoring is None else is_initial_policy(scoring, policy)
    return [SELF_REFERENCE] if own else []


def fill_stores(
    config: TrainConfig,
    tokenizer: Any,
    opened: Mapping[str, Opened],
    tables: Sequence[PairTable],
    *,
    max_length: int,
    progress: bool,
) -> None:
    """Has the models that were opened with a store compute the rows that it lacks, and lets go of them."""
    for one in opened.values():
        if one.model is None or one.store is None:
            continue
        fill_store(
            one.store,
            joined(tables),
            one.model,
            pad_token_id=pad_token_id(tokenizer),
            progress=progress,
            engine=partial(start_frozen_engine, config, one.model, torch.device("cpu")),
            cut=(max_length, config.truncation_mode),
        )
        one.model = None
        gc.collect()
