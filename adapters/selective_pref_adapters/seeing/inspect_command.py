"""`selective-pref inspect`: pairs of a file, as a policy and a reference read them, into a picture.

In: an `InspectConfig`. Out: a page, an SVG, JSON or text; with statistics, figures over many more rows than
one reads. Everything that can be checked is checked before a model is loaded, and files are there whole or not at all.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from selective_pref import selective_dpo_loss
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head
from selective_pref_adapters.model_checks import check_padding
from selective_pref_adapters.models import check_token_ids, load_model, load_tokenizer, pad_token_id, usable_length
from selective_pref_adapters.objectives import check_objective, loss_of_batch
from selective_pref_adapters.pairs import (
    PreferenceRow,
    TokenizedPair,
    check_same_tokenizer,
    collate,
    parse_columns,
    read_rows,
    tokenize_pairs,
)
from selective_pref_adapters.reference_store.store import ReferenceStore
from selective_pref_adapters.seeing.options import SUFFIXES, InspectConfig
from selective_pref_adapters.seeing.page import page_of_pairs
from selective_pref_adapters.seeing.pictures import pairs_json, svg_of_pairs
from selective_pref_adapters.seeing.shown import ShownPair, shown_pairs
from selective_pref_adapters.seeing.terminal import print_pairs

BATCH = 8
"""Pairs of one batch."""

Logps: TypeAlias = list[Tensor]
"""Per-token log-probs [2B T] of each batch."""


def inspect(config: InspectConfig) -> list[ShownPair]:
    """Does what the configuration says, and returns the pairs that are shown.

    Raises:
        ValueError: options that make no sense, rows that are not there, models or a store that do not fit.
        MissingRowsError: the store lacks rows.
        OSError: a file cannot be read or written.
    """
    check_config(config)
    disable_progress_bar()
    notes = Console(stderr=True)
    about: list[str] = []
    malformed: list[str] | None = [] if config.skip_malformed_rows else None
    rows = read_rows(config.pairs, malformed, columns=parse_columns(config.columns), notes=about)
    for line in about:
        notes.print(f"[yellow]note:[/yellow] {line}", soft_wrap=True)
    wanted = row_numbers(config.rows, len(rows))
    counted = range(1, min(config.statistics, len(rows)) + 1)
    numbers = sorted({*wanted, *counted})
    tokenizer = load_tokenizer(config.model)
    policy = _ready(config, config.model)
    reference = _reference(config, tokenizer)
    models = {"policy": policy} if config.ref_model is None else {"policy": policy, "reference": reference}
    check_padding(tokenizer, models)
    pairs = _tokenized([rows[n - 1] for n in numbers], tokenizer, config, models, malformed, notes)
    check_token_ids(max(max(ids) for pair in pairs for _, ids, _ in pair.sides()), models)
    if isinstance(reference, ReferenceStore):
        reference.check(pairs)
    batches = _batches(pairs, tokenizer)
    logps = _logps(policy, batches), _logps(reference, batches)
    numbered = dict(
        zip(_numbers_of(pairs, rows, numbers), _shown(config, batches, pairs, tokenizer, *logps), strict=True)
    )
    visible = [pair for number, pair in numbered.items() if number in set(wanted)]
    figures: Sequence[Any] = ()
    tables: Sequence[Any] = ()
    if counted:
        from selective_pref_adapters.seeing.figures import data_figures, write_figures  # needs a plotting library
        from selective_pref_adapters.seeing.statistics import data_tables, statistics_of

        def of_statistics(shown: Sequence[ShownPair]) -> list[ShownPair]:
            return [pair for number, pair in zip(numbered, shown, strict=True) if number in counted]

        others = _others(config, batches, pairs, tokenizer, *logps)
        found = statistics_of(
            of_statistics(list(numbered.values())), {name: of_statistics(theirs) for name, theirs in others.items()}
        )
        figures, tables = data_figures(found), data_tables(found)
        if config.figures is not None:
            write_figures(Path(config.figures), figures)
            write_whole(
                Path(config.figures) / "statistics.json", json.dumps(dataclasses.asdict(found), indent=1) + "\n"
            )
            notes.print(f"figures: {config.figures}", soft_wrap=True)
    if not visible:
        raise ValueError(f"--rows {config.rows}: nothing of them is left to show; the reasons are above")
    _write(config, visible, figures, tables)
    return visible


def check_config(config: InspectConfig) -> None:
    """Raises ValueError at the first option that makes no sense, alone or beside another."""
    if (config.ref_model is None) == (config.store is None):
        raise ValueError("give --ref-model (a model) or --store (its stored log-probs), one of the two")
    if config.space is not None and config.store is None:
        raise ValueError("--space names a reference of a store: give --store, too")
    if config.out is not None and Path(config.out).suffix not in SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(SUFFIXES)}; got {config.out!r}")
    if config.statistics < 0:
        raise ValueError(f"--statistics must be a number of rows, at least 0; got {config.statistics}")
    for name in ("figures", "other_models", "other_ref_models", "other_dtypes"):
        if getattr(config, name) and not config.statistics:
            raise ValueError(f"--{name.replace('_', '-')} is for statistics: give --statistics, a number of rows")
    if config.other_dtypes and config.ref_model is None:
        raise ValueError("--other-dtypes needs --ref-model: stored log-probs have one precision")
    check_objective(_objective(config))


def row_numbers(text: str, count: int) -> list[int]:
    """Row numbers that a text like "1,5-9" or "100-" names, in order, each once.

    Args:
        text: numbers and ranges, counted from 1, both ends included. A range may reach beyond the last row.
        count: how many rows there are.

    Raises:
        ValueError: the text is no list of rows, or names one that is not there.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d*)\s*)?", part)
        if match is None:
            raise ValueError(f"--rows must be numbers and ranges, as 1,5-9 or 100-; got {text!r}")
        first = int(match[1])
        last = first if match[2] is None else int(match[3] or count)
        if first < 1 or first > count or (match[3] and last < first):
            raise ValueError(f"--rows {part.strip()}: there are rows 1 to {count}")
        found.update(range(first, min(last, count) + 1))
    return sorted(found)


def ratio_of(text: float | str) -> float | tuple[float, float]:
    """0.4 or "0.4" → 0.4; "0.4,0.1" → (0.4, 0.1), for chosen and rejected.

    Raises:
        ValueError: the text is neither. Whether the numbers are ratios is checked by the loss.
    """
    try:
        numbers = [float(part) for part in str(text).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--selection-ratio must be one share, as 0.4, or one for each side, as 0.4,0.1; got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _rule(config: InspectConfig) -> str:
    """The selection in words."""
    ratio = ratio_of(config.selection_ratio)
    share = f"{ratio[0]:g} of chosen and {ratio[1]:g} of rejected" if isinstance(ratio, tuple) else f"{ratio:g}"
    return f"Share {share}" + ("" if config.min_score is None else f", scores above {config.min_score:g} nats")


def _ready(config: InspectConfig, name: str, dtype: str | None = None) -> Any:
    """A model that is asked for log-probs only."""
    model = load_model(name, dtype=dtype or config.dtype, attention=config.attention)
    model.to(_device()).eval().requires_grad_(False)
    install_fused_head(model, at_first_call=True)
    return model


def _reference(config: InspectConfig, tokenizer: Any) -> Any:
    if config.store is not None:
        store = ReferenceStore.open(config.store, config.space)
        store.check_tokenizer(tokenizer)
        return store
    check_same_tokenizer(tokenizer, load_tokenizer(str(config.ref_model)))
    return _ready(config, str(config.ref_model))


def _numbers_of(pairs: Sequence[TokenizedPair], rows: Sequence[PreferenceRow], numbers: Sequence[int]) -> list[int]:
    """The row number of each pair: pairs have the order of their rows, of which some may have been left out."""
    left = iter(numbers)
    return [next(number for number in left if rows[number - 1].place == pair.place) for pair in pairs]


def _tokenized(
    rows: Sequence[PreferenceRow],
    tokenizer: Any,
    config: InspectConfig,
    models: Mapping[str, Any],
    malformed: list[str] | None,
    notes: Console,
) -> list[TokenizedPair]:
    pairs, report = tokenize_pairs(
        rows,
        tokenizer,
        max_length=usable_length(config.max_length, models),
        truncation_mode=config.truncation_mode,
        keep_unteachable=True,
        malformed=malformed,
        progress=True,
    )
    kept = {pair.place for pair in pairs}
    lines = report.lines()
    if malformed:
        lines.append(f"{len(malformed)} malformed rows left out, the first: {malformed[0]}")
    for line in lines:
        notes.print(f"[yellow]note:[/yellow] {line}", soft_wrap=True)
    if len(kept) < len(rows):
        gone = [row.place for row in rows if row.place not in kept]
        notes.print(f"left out: {', '.join(gone[:10])}{' …' if len(gone) > 10 else ''}", soft_wrap=True)
    return pairs


def _batches(pairs: Sequence[TokenizedPair], tokenizer: Any) -> list[dict[str, Tensor]]:
    return [
        {
            name: tensor.to(_device())
            for name, tensor in collate(pairs[at : at + BATCH], pad_token_id(tokenizer)).items()
        }
        for at in range(0, len(pairs), BATCH)
    ]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _logps(source: Any, batches: Sequence[dict[str, Tensor]]) -> Logps:
    """What a model, or a store, says of each batch."""
    if isinstance(source, ReferenceStore):
        return [source.lookup(batch) for batch in batches]
    return [frozen_per_token_logps(source, batch).float() for batch in batches]


def _objective(config: InspectConfig) -> Any:
    return partial(
        selective_dpo_loss,
        beta=config.beta,
        selection_ratio=ratio_of(config.selection_ratio),
        min_score=config.min_score,
        pool=config.selection_pool,
        ties=config.selection_ties,
    )


def _shown(
    config: InspectConfig,
    batches: Sequence[dict[str, Tensor]],
    pairs: Sequence[TokenizedPair],
    tokenizer: Any,
    policy: Logps,
    reference: Logps,
) -> list[ShownPair]:
    objective, shown = _objective(config), []
    for number, batch in enumerate(batches):
        out = loss_of_batch(objective, batch, policy[number], reference[number])
        places = [pair.place for pair in pairs[number * BATCH : (number + 1) * BATCH]]
        shown += shown_pairs(out, batch["input_ids"], tokenizer, places=places)
    return shown


def _others(
    config: InspectConfig,
    batches: Sequence[dict[str, Tensor]],
    pairs: Sequence[TokenizedPair],
    tokenizer: Any,
    ours: Logps,
    theirs: Logps,
) -> dict[str, list[ShownPair]]:
    """The same pairs under other policies, references and precisions, by name."""

    def selections() -> Iterator[tuple[str, Logps, Logps]]:
        for name in config.other_models:
            check_same_tokenizer(tokenizer, load_tokenizer(name))
            yield f"policy {name}", _logps(_ready(config, name), batches), theirs
        for name in config.other_ref_models:
            check_same_tokenizer(tokenizer, load_tokenizer(name))
            yield f"reference {name}", ours, _logps(_ready(config, name), batches)
        for dtype in config.other_dtypes:
            policy, reference = (_ready(config, name, dtype) for name in (config.model, str(config.ref_model)))
            yield f"in {dtype}", _logps(policy, batches), _logps(reference, batches)

    return {
        name: _shown(config, batches, pairs, tokenizer, policy, reference) for name, policy, reference in selections()
    }


def _write(config: InspectConfig, pairs: Sequence[ShownPair], figures: Any, tables: Any) -> None:
    if config.out is None:
        print_pairs(Console(highlight=False), pairs)
        return
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        reference = config.ref_model or f"{config.store}{f' ({config.space})' if config.space else ''}"
        lead = f"{config.pairs}, read by {config.model} beside {reference}. {_rule(config)}, β {config.beta:g}."
        page_of_pairs(pairs, title=config.title, lead=lead, figures=figures, tables=tables).write(path)
    elif path.suffix == ".svg":
        write_whole(path, svg_of_pairs(pairs, title=config.title))
    elif path.suffix == ".json":
        write_whole(path, pairs_json(pairs, model=config.model, reference=config.ref_model or config.store))
    else:
        text = io.StringIO()
        print_pairs(Console(file=text, width=100, highlight=False), pairs)
        write_whole(path, text.getvalue())
    Console(stderr=True).print(f"{len(pairs)} pairs: {path}", soft_wrap=True)
