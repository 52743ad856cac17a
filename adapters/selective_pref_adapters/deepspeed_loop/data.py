"""Rows → token ids: the training and evaluation pairs of a run, and what a reader should know about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from selective_pref_adapters.models import check_token_ids, own_vocabulary
from selective_pref_adapters.objectives import CHOSEN_ONLY
from selective_pref_adapters.objectives.named_losses import check_pair_weights, weights_line
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import RowError, parse_columns
from selective_pref_adapters.pairs.large import (
    Making,
    PairStream,
    PairTable,
    TokenizedRows,
    joined,
    malformed_note,
    no_pairs,
    stream_of,
    streamed_pairs,
    tokenized_rows,
)
from selective_pref_adapters.reference_store import ReferenceStore

Part: TypeAlias = tuple[TokenizedRows, np.ndarray]
"""Rows, and the numbers of those that are meant."""


def load_pairs(
    config: TrainConfig, tokenizer: Any, max_length: int, progress: bool = True
) -> tuple[PairTable | PairStream, PairTable, list[str]]:
    """(training pairs, evaluation pairs, what a reader should know about them and about this machine).

    The ids come from the cache, where `config.data_cache` has them, or are made as they are needed: see `pairs.large`.
    """
    notes = _emulation_note(config)
    making = Making(
        max_length=max_length,
        truncation_mode=config.truncation_mode,
        columns=parse_columns(config.columns),
        chosen_only=config.objective in CHOSEN_ONLY,
    )

    def read(source: str) -> TokenizedRows:
        rows = tokenized_rows(
            source,
            tokenizer,
            making,
            cache=config.data_cache,
            workers=config.data_workers,
            skip_malformed=config.skip_malformed_rows,
            progress=progress,
        )
        notes.extend(rows.notes)
        return rows

    parts: dict[str, Part] = {}
    if not config.streaming:
        rows = read(config.pairs)
        training, evaluation = rows.split(0 if config.eval_pairs else config.eval_fraction, config.seed)
        parts = {"training": (rows, training), "evaluation": (rows, evaluation)}
    if config.eval_pairs is not None:
        others = read(config.eval_pairs)
        if "training" in parts:
            common = int(np.isin(others.prompt_hashes, parts["training"][0].prompt_hashes).sum())
            notes += [f"{common} of {len(others)} evaluation rows have a prompt that is trained on"] if common else []
        parts["evaluation"] = (others, np.arange(len(others)))
    tables = {which: _table(which, part, config, notes) for which, part in parts.items() if len(part[1])}
    notes += malformed_note(list(parts.values()))
    trained = _stream(config, tokenizer, making) if config.streaming else tables["training"]
    return trained, tables.get("evaluation", no_pairs()), notes


def _emulation_note(config: TrainConfig) -> list[str]:
    if config.dtype != "bfloat16" or torch.cuda.is_available():
        return []
    if not hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.10
        return []
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"):
        return []
    return ["this CPU has no instructions for bfloat16: it is emulated, and slower than float32"]


def _table(which: str, part: Part, config: TrainConfig, notes: list[str]) -> PairTable:
    rows, some = part
    try:
        pairs, report = rows.pairs(some, skip_malformed=config.skip_malformed_rows)
    except RowError:
        raise
    except ValueError as error:
        raise ValueError(f"{which} pairs: {error}") from error
    notes.extend(f"{which}: {line}" for line in report.lines())
    weights = pairs.weights
    check_pair_weights(weights, config.loss_type, f"{which} pairs")
    notes.extend(f"{which}: {line}" for line in weights_line(weights))
    return pairs


def _stream(config: TrainConfig, tokenizer: Any, making: Making) -> PairStream:
    """This process's rows, as they come."""
    from datasets.distributed import split_dataset_by_node

    several = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    def make() -> Any:
        rows = split_dataset_by_node(stream_of(config.pairs), rank, world)
        return streamed_pairs(rows, tokenizer, making, name=config.pairs, skip_malformed=config.skip_malformed_rows)

    return PairStream(make, config.pairs)


def check_pairs(
    tables: Sequence[PairTable | PairStream],
    tokenizer: Any,
    models: Mapping[str, Any],
    stores: Iterable[ReferenceStore],
) -> None:
    """Raises ValueError where a token id has no row in a model's embedding, or a pair is not in a store.

    Of a stream, whose rows are not known yet, the ids of the whole vocabulary are looked at, and no store.
    """
    known = [table for table in tables if isinstance(table, PairTable)]
    streams = len(known) < len(tables)
    highest = [max(own_vocabulary(tokenizer).values())] if streams else []
    check_token_ids(max(highest + [table.highest_id for table in known]), models)
    for store in stores:
        store.check(joined(known), together=True)
