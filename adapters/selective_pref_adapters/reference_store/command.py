"""`selective-pref score`: reference log-probs of a file of pairs into a store, or counts, checks, tidies up a store.

In: a `ScoreConfig`. Out: rows in a store, and a few lines that say what was done. Under torchrun each process loads the
reference and computes its share of the rows.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from selective_pref_adapters.launching.processes import meeting
from selective_pref_adapters.model_checks import check_padding
from selective_pref_adapters.models import load_config, load_model, load_tokenizer, pad_token_id, usable_length
from selective_pref_adapters.options import ScoreConfig
from selective_pref_adapters.pairs import TokenizedPair, check_same_tokenizer, parse_columns
from selective_pref_adapters.pairs.large import Making, PairTable, malformed_note, tokenized_rows
from selective_pref_adapters.reference_store.fill import Comparison, FillReport, compare_rows, fill_rows
from selective_pref_adapters.reference_store.identity import reference_space
from selective_pref_adapters.reference_store.local import local_logps
from selective_pref_adapters.reference_store.prune import prune
from selective_pref_adapters.reference_store.rows import LogpSource, rows_of_pairs
from selective_pref_adapters.reference_store.shards import StoreError, writing
from selective_pref_adapters.reference_store.spaces import empty_spaces, note_filling, read_spaces, remove_empty_spaces
from selective_pref_adapters.reference_store.store import ReferenceStore
from selective_pref_adapters.weight_files import check_whole_models


def score(config: ScoreConfig) -> FillReport | Comparison | None:
    """Does what the configuration says, and prints what came of it.

    Returns:
        What filling took, or how a verified sample compares; None for --stat and --prune.

    Raises:
        ValueError: options that make no sense, rows, models or stores that do not work, a sample that differs.
        OSError: a store that cannot be written to, a server that does not answer.
        NonFiniteError: the reference gave NaN or an infinity.
    """
    check_config(config)
    console = Console(stderr=True)
    disable_progress_bar()
    if config.stat:
        show_stat(config, Console())
        return None
    if config.prune:
        prune_spaces(config, Console())
        return None
    rank = process_rank()
    store, source, tokenizer, model = served_reference(config) if config.url else local_reference(config)
    policy_tokenizer = tokenizer if config.tokenizer is None else load_tokenizer(config.tokenizer)
    check_same_tokenizer(policy_tokenizer, tokenizer)
    pairs, notes = load_pairs(config, policy_tokenizer, model, progress=rank == 0)
    if rank == 0:
        for note in notes:
            console.print(f"[yellow]note:[/yellow] {note}", soft_wrap=True)
    if config.verify:
        return verify(config, store, pairs, source)
    rows = rows_of_pairs(pairs)
    if config.url is not None:
        from selective_pref_adapters.reference_store.served.fill import compared_first

        source = compared_first(store, rows, source, tell=partial(tqdm.write, file=sys.stderr))  # above the bar
    report = fill_rows(store, rows, source, flush_seconds=config.flush_seconds)
    if rank == 0:
        if report.computed:
            with writing(store.folder):
                note_filling(store.folder, length_in_force(config, model), config.truncation_mode)
        print_report(Console(), config, store, len(pairs), report)
    return report


def check_config(config: ScoreConfig) -> None:
    """Raises ValueError at the first option that makes no sense, alone or beside another."""
    modes = [name for name in ("stat", "verify", "prune") if getattr(config, name)]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]} are two different things to do: give one")
    if config.stat or config.prune:
        if config.pairs is not None and config.tokenizer is None and (config.ref_model is None or config.url):
            raise ValueError(
                "rows are found by their token ids: give --tokenizer (or a local --ref-model) with --pairs"
            )
    else:
        for name in ("ref_model", "pairs"):
            if getattr(config, name) is None:
                raise ValueError(f"give --{name.replace('_', '-')} (or --stat or --prune alone)")
        if config.url is not None and config.revision is None:
            raise ValueError(
                "which weights a server has cannot be read over HTTP: give --revision, any name that you change "
                "whenever they change"
            )
        if config.url is not None and config.tokenizer is None and not Path(str(config.ref_model)).is_dir():
            raise ValueError("give --tokenizer: the folder or hub id of the served model's tokenizer")
    if config.verify and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--verify runs on one process: start it without torchrun")
    for name in ("batch_tokens", "verify_rows", "rows_per_request", "concurrency", "attempts"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(config, name)}")


MEETING_MINUTES = 30.0
"""How long processes may take to find one another."""

# --- references ------------------------------------------------------------------------------------------------------

Reference = tuple[ReferenceStore, LogpSource, Any, torch.nn.Module | None]
"""(its space of the store, how it is asked, its tokenizer, the model where it is on this process)."""


def local_reference(config: ScoreConfig) -> Reference:
    """The model of `ref_model` on this process's device."""
    name = str(config.ref_model)
    tokenizer = load_tokenizer(name)
    check_whole_models({"reference": name}, getattr(torch, config.dtype))
    model = load_model(name, dtype=config.dtype, attention=config.attention).to(_device()).eval().requires_grad_(False)
    check_padding(tokenizer, {"reference": model})
    label = Path(name).name if Path(name).exists() else name
    store = ReferenceStore.create(config.store, reference_space(model, tokenizer, label=label))
    source = partial(local_logps, model=model, pad_token_id=pad_token_id(tokenizer), batch_tokens=config.batch_tokens)
    return store, source, tokenizer, model


def served_reference(config: ScoreConfig) -> Reference:
    """The model that `url` serves under the name `ref_model`."""
    from selective_pref_adapters.reference_store.served import Server, served_logps, served_space  # an HTTP client

    headers = {} if config.api_key_variable is None else {"Authorization": f"Bearer {api_key(config.api_key_variable)}"}
    server = Server(
        url=str(config.url),
        model=str(config.ref_model),
        protocol=config.protocol,
        concurrency=config.concurrency,
        rows_per_request=config.rows_per_request,
        timeout=config.timeout,
        attempts=config.attempts,
        headers=headers,
    )
    tokenizer = load_tokenizer(config.tokenizer or str(config.ref_model))
    space = served_space(server.model, str(config.revision), tokenizer)
    store = ReferenceStore.create(config.store, space)
    return store, partial(served_logps, server=server, tokenizer=tokenizer), tokenizer, None


def api_key(variable: str) -> str:
    """The key that an environment variable holds. No error shows it, even if it was given in place of the name."""
    from selective_pref_adapters.reference_store.served.server import sendable

    named = variable if re.fullmatch(r"[A-Z][A-Z0-9_]*", variable) else "that --api-key-variable names"
    if variable not in os.environ:
        raise ValueError(f"the environment variable {named} is not set. The flag takes its name, not the key")
    key = sendable(os.environ[variable], f"the key in the environment variable {named}")
    if len(key.split()) > 1:
        raise ValueError(f"the key in the environment variable {named} holds a blank, which no key has")
    return key


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def process_rank() -> int:
    """This process's rank; under torchrun, of a process group for sums of counts alone.

    The group stays until the process ends, so that a second call in this process finds it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        with meeting(MEETING_MINUTES, RuntimeError):
            dist.init_process_group("gloo", timeout=timedelta(days=30))  # a share may take hours longer than another
    return dist.get_rank() if dist.is_initialized() else 0


# --- pairs -----------------------------------------------------------------------------------------------------------


def load_pairs(
    config: ScoreConfig, tokenizer: Any, model: Any, *, progress: bool = True
) -> tuple[PairTable, list[str]]:
    """(the pairs as token ids, what a reader should know about them)."""
    making = Making(
        max_length=length_in_force(config, model),
        truncation_mode=config.truncation_mode,
        columns=parse_columns(config.columns),
    )
    rows = tokenized_rows(
        str(config.pairs),
        tokenizer,
        making,
        cache=config.data_cache,
        workers=config.data_workers,
        skip_malformed=config.skip_malformed_rows,
        progress=progress,
    )
    # Whatever a training run leaves out, its rows are found.
    pairs, report = rows.pairs(keep_unteachable=True, skip_malformed=config.skip_malformed_rows)
    return pairs, [*rows.notes, *report.lines(), *malformed_note([(rows, None)])]


def length_in_force(config: ScoreConfig, model: Any) -> int:
    """How many tokens of a row are kept: as configured, else what reference and policy can read, as in training.

    The policy is known by `config.tokenizer`, where that names a model.
    """
    policy = None if config.tokenizer is None else load_config(config.tokenizer)
    models = {"reference": model, "policy": policy}
    return usable_length(config.max_length, {name: model for name, model in models.items() if model is not None})


def _pairs_without_reference(config: ScoreConfig) -> tuple[PairTable | None, str]:
    """(the pairs where no model is loaded, None where none are named; how they were cut)."""
    if config.pairs is None:
        return None, ""
    local = config.max_length is None and config.ref_model is not None and Path(config.ref_model).is_dir()
    model = load_config(str(config.ref_model)) if local else None
    cut = f"max_length {length_in_force(config, model)} ({config.truncation_mode})"
    return load_pairs(config, load_tokenizer(config.tokenizer or str(config.ref_model)), model)[0], cut


# --- what is printed -------------------------------------------------------------------------------------------------


def print_report(console: Console, config: ScoreConfig, store: ReferenceStore, pairs: int, report: FillReport) -> None:
    """What filling took."""
    speed = f", {report.tokens / report.seconds:,.0f} tokens a second" if report.computed else ""
    console.print(
        f"{pairs} pairs, {report.rows} different rows: {report.hits} were stored, {report.computed} computed in "
        f"{report.seconds:.1f} s with {report.forward_passes} calls of the reference{speed}",
        soft_wrap=True,
    )
    console.print(f"store: {config.store}, space {store.space.name} ({store.space.label})", soft_wrap=True)


def verify(
    config: ScoreConfig, store: ReferenceStore, pairs: Sequence[TokenizedPair], source: LogpSource
) -> Comparison:
    """Computes a sample again. Raises ValueError where it differs by more than it may."""
    tolerance = config.verify_tolerance
    if tolerance is None:
        tolerance = 1e-3 if config.dtype == "float32" and config.url is None else 0.5
    seen = compare_rows(store, rows_of_pairs(pairs), source, sample=config.verify_rows, seed=config.verify_seed)
    summary = (
        f"{seen.rows} stored rows computed again: {seen.identical} equal bit by bit, largest difference "
        f"{seen.max_difference:.3g} nats, mean {seen.mean_difference:.3g}"
    )
    if seen.max_difference > tolerance:
        raise StoreError(
            f"{summary}, most at {seen.worst}: more than {tolerance:g}. These rows were not given by this reference: "
            f"remove {store.folder} and run `selective-pref score` again"
        )
    if config.url is not None and config.verify_tolerance is None:
        from selective_pref_adapters.reference_store.served.fill import check_drift

        check_drift(seen, store.space.label)
    Console().print(summary, soft_wrap=True)
    return seen


def show_stat(config: ScoreConfig, console: Console) -> None:
    """A table of the references of a store; with pairs, how many rows each lacks."""
    pairs, cut = _pairs_without_reference(config)
    notes: list[str] = []
    names, unusable = _names_of_spaces(config)
    table = Table(title=config.store)
    columns = ["space", "reference", "rows", "log-probs", "MB", "shards", "damaged"]
    for column in columns + (["lacks"] if pairs is not None else []):
        table.add_column(column, justify="left" if column in ("space", "reference") else "right", overflow="fold")
    for name in names:
        with ReferenceStore.open(config.store, name) as store:
            stat = store.stat()
            cells = [name[:8], store.space.label, f"{stat.rows}", f"{stat.values}", f"{stat.bytes / 1e6:.1f}"]
            cells += [f"{stat.shards}", f"{len(stat.damaged)}"]
            if pairs is not None:
                rows = rows_of_pairs(pairs).different()
                lacking = len(rows) - int(store.held(rows).sum())
                cells.append(f"{lacking} of {len(rows)}")
                if lacking:
                    notes.append(f"{store.space.label}: {store.lengths(rows.tokens)}")
            table.add_row(*cells)
    console.print(table)
    if notes:
        console.print(
            f"These pairs were cut at {cut}. Rows are found only where that is what the store was filled with: give "
            "the same --max-length and --truncation-mode to `score` and to training",
            soft_wrap=True,
        )
    for note in notes:
        console.print(note, soft_wrap=True)
    if empty := empty_spaces(Path(config.store)):
        console.print(
            f"{len(empty)} without rows, left out: {', '.join(f.name[:8] for f in empty)}. --prune removes them",
            soft_wrap=True,
        )
    for name, reason in unusable.items():
        console.print(f"{name}: {reason}", soft_wrap=True)


def prune_spaces(config: ScoreConfig, console: Console) -> None:
    """Tidies up one space or all, and removes what then has no rows."""
    pairs, _ = _pairs_without_reference(config)
    names, unusable = _names_of_spaces(config)
    for name in names:
        with ReferenceStore.open(config.store, name) as store:
            before, after = prune(store, None if pairs is None else rows_of_pairs(pairs))
            console.print(
                f"{name[:8]} ({store.space.label}): {after.rows} rows kept, {before.rows - after.rows} removed; "
                f"{before.bytes / 1e6:.1f} MB in {before.shards} shards before, {after.bytes / 1e6:.1f} MB in "
                f"{after.shards} now",
                soft_wrap=True,
            )
    for name, reason in unusable.items():
        console.print(f"{name}: left alone. {reason}", soft_wrap=True)
    with writing(Path(config.store)):
        removed = remove_empty_spaces(Path(config.store), None if config.space is None else names)
    for name in removed:
        console.print(f"{name[:8]}: removed, it held no rows", soft_wrap=True)


def _names_of_spaces(config: ScoreConfig) -> tuple[list[str], dict[str, str]]:
    """(names of the spaces that are meant, folder → reason of those that cannot be used)."""
    if config.space is not None:
        with ReferenceStore.open(config.store, config.space) as store:
            return [store.space.name], {}
    found, unusable = read_spaces(Path(config.store))
    return [space.name for space in found], unusable
