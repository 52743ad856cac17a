"""Rows → token ids: the training and evaluation pairs of a run, and what a reader should know about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from selective_pref_adapters.deepspeed_loop.sampling import FILLER
from selective_pref_adapters.models import check_token_ids
from selective_pref_adapters.objectives import CHOSEN_ONLY
from selective_pref_adapters.objectives.named_losses import check_pair_weights, weights_line
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import (
    PreferenceRow,
    RowError,
    TokenizedPair,
    parse_columns,
    read_rows,
    split_by_prompt,
    tokenize_pairs,
)
from selective_pref_adapters.reference_store import ReferenceStore


def load_pairs(
    config: TrainConfig, tokenizer: Any, max_length: int, progress: bool = True
) -> tuple[list[TokenizedPair], list[TokenizedPair], list[str]]:
    """(training pairs, evaluation pairs, what a reader should know about them and about this machine)."""
    notes: list[str] = []
    if config.dtype == "bfloat16" and not torch.cuda.is_available():
        capabilities = torch.cpu.get_capabilities()
        if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")):
            notes.append("this CPU has no instructions for bfloat16: it is emulated, and slower than float32")
    malformed: list[str] | None = [] if config.skip_malformed_rows else None
    columns = parse_columns(config.columns)
    how: dict[str, Any] = {"columns": columns, "notes": notes, "chosen_only": config.objective in CHOSEN_ONLY}
    rows = read_rows(config.pairs, malformed, **how)
    if config.eval_pairs is None:
        rows, eval_rows = split_by_prompt(rows, config.eval_fraction, config.seed)
    else:
        eval_rows = read_rows(config.eval_pairs, malformed, **how)
        seen = {row.prompt_key for row in rows}
        if common := sum(row.prompt_key in seen for row in eval_rows):
            notes.append(f"{common} of {len(eval_rows)} evaluation rows have a prompt that is trained on")

    def tokenized(which: str, some: list[PreferenceRow]) -> list[TokenizedPair]:
        try:
            pairs, report = tokenize_pairs(
                some,
                tokenizer,
                max_length=max_length,
                truncation_mode=config.truncation_mode,
                malformed=malformed,
                progress=progress,
            )
        except RowError:
            raise
        except ValueError as error:
            raise ValueError(f"{which} pairs: {error}") from error
        notes.extend(f"{which}: {line}" for line in report.lines())
        weights = [pair.weight for pair in pairs]
        check_pair_weights(weights, config.loss_type, f"{which} pairs")
        notes.extend(f"{which}: {line}" for line in weights_line(weights))
        return pairs

    train_pairs, eval_pairs = tokenized("training", rows), tokenized("evaluation", eval_rows) if eval_rows else []
    if malformed:
        notes.append(f"{len(malformed)} malformed rows left out, the first: {malformed[0]}")
    return train_pairs, eval_pairs, notes


def check_pairs(pairs: Sequence[TokenizedPair], models: Mapping[str, Any], stores: Iterable[ReferenceStore]) -> None:
    """Raises ValueError where a token id has no row in a model's embedding, or a pair is not in a store."""
    check_token_ids(max(max(pair.chosen_ids + pair.rejected_ids) for pair in pairs), models)
    for store in stores:
        store.check([pair for pair in pairs if pair is not FILLER])
