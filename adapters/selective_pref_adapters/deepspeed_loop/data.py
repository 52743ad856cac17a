"""Rows → token ids: the training and evaluation pairs of a run, and what a reader should know about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from selective_pref_adapters.models import check_token_ids
from selective_pref_adapters.objectives import CHOSEN_ONLY
from selective_pref_adapters.objectives.named_losses import check_pair_weights, weights_line
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import RowError, parse_columns
from selective_pref_adapters.pairs.large import Making, PairTable, TokenizedRows, tokenized_rows
from selective_pref_adapters.reference_store import ReferenceStore


def load_pairs(
    config: TrainConfig, tokenizer: Any, max_length: int, progress: bool = True
) -> tuple[PairTable, PairTable, list[str]]:
    """(training pairs, evaluation pairs, what a reader should know about them and about this machine).

    The ids come from the cache, where `config.data_cache` has them: see `pairs.large`.
    """
    notes: list[str] = []
    if config.dtype == "bfloat16" and not torch.cuda.is_available():
        capabilities = torch.cpu.get_capabilities()
        if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")):
            notes.append("this CPU has no instructions for bfloat16: it is emulated, and slower than float32")
    making = Making(
        max_length=max_length,
        truncation_mode=config.truncation_mode,
        columns=parse_columns(config.columns),
        chosen_only=config.objective in CHOSEN_ONLY,
    )
    read = partial(
        tokenized_rows,
        tokenizer=tokenizer,
        making=making,
        cache=config.data_cache,
        workers=config.data_workers,
        skip_malformed=config.skip_malformed_rows,
        progress=progress,
    )
    rows = read(config.pairs)
    notes += rows.notes
    if config.eval_pairs is None:
        others, (training, evaluation) = rows, rows.split(config.eval_fraction, config.seed)
    else:
        others = read(config.eval_pairs)
        notes += others.notes
        training, evaluation = np.arange(len(rows)), np.arange(len(others))
        if common := int(np.isin(others.prompt_hashes, rows.prompt_hashes).sum()):
            notes.append(f"{common} of {len(others)} evaluation rows have a prompt that is trained on")

    def pairs_of(which: str, source: TokenizedRows, some: np.ndarray) -> PairTable:
        try:
            pairs, report = source.pairs(some, skip_malformed=config.skip_malformed_rows)
        except RowError:
            raise
        except ValueError as error:
            raise ValueError(f"{which} pairs: {error}") from error
        notes.extend(f"{which}: {line}" for line in report.lines())
        weights = pairs.weights
        check_pair_weights(weights, config.loss_type, f"{which} pairs")
        notes.extend(f"{which}: {line}" for line in weights_line(weights))
        return pairs

    train_pairs = pairs_of("training", rows, training)
    eval_pairs = pairs_of("evaluation", others, evaluation) if len(evaluation) else train_pairs[:0]
    sources = [rows] if others is rows else [rows, others]
    malformed = [source.first_unread for source in sources if source.unread]
    malformed += [*rows.refused(training), *others.refused(evaluation)]
    if malformed:
        count = len(malformed) + sum(max(source.unread - 1, 0) for source in sources)
        notes.append(f"{count} malformed rows left out, the first: {malformed[0]}")
    return train_pairs, eval_pairs, notes


def check_pairs(tables: Sequence[PairTable], models: Mapping[str, Any], stores: Iterable[ReferenceStore]) -> None:
    """Raises ValueError where a token id has no row in a model's embedding, or a pair is not in a store."""
    check_token_ids(max(table.highest_id for table in tables), models)
    for store in stores:
        store.check(chain.from_iterable(tables))
