"""What two processes do with one store of many rows; started by `ranks.run_ranks`."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref_adapters.pairs.large import Making, PairTable, tokenized_rows
from selective_pref_adapters.reference_store import (
    ReferenceStore,
    StoreError,
    fill,
    fill_store,
    local,
    reference_space,
    rows_of_pairs,
)

CUT = Making(max_length=24)


def table(folder: Path, model: str, name: str = "pairs.jsonl") -> PairTable:
    """The pairs of a file as a table."""
    return tokenized_rows(folder / name, AutoTokenizer.from_pretrained(model), CUT, cache=folder / "ids").pairs()[0]


def fill_together(folder: Path, model_folder: str) -> None:
    """Fills a store as if the model were sharded, six rows at a time, then asks both processes for rows it lacks.

    Each process writes how often it called the model, whether it looked into the store, and the error it got.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    rank = dist.get_rank()
    seen: dict[str, Any] = {"calls": 0, "looked": []}

    def counted(name: str, whole: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count()
            return whole(*arguments, **options)

        return call

    def one_more() -> None:
        seen["calls"] += 1

    fill.is_sharded = local.is_sharded = lambda _: True
    fill.WINDOW = local.WINDOW = 6
    local.frozen_per_token_logps = counted("calls", local.frozen_per_token_logps, one_more)
    ReferenceStore._check = counted("looks", ReferenceStore._check, lambda: seen["looked"].append(len(seen["looked"])))
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    space = reference_space(model, AutoTokenizer.from_pretrained(model_folder), label="teacher")
    store = ReferenceStore.create(folder / "store", space)
    pairs = table(folder, model_folder)
    wanted = rows_of_pairs(pairs).different()
    if rank == 0:
        with store.writer() as writer:
            for row in wanted.some(fill._longest_first(wanted)[2::2]):  # of its own share it lacks the first row alone
                writer.add(row, np.zeros(row.values, dtype=np.float32))
    dist.barrier()
    report = fill_store(store, pairs, model, pad_token_id=0, progress=False)
    seen["report"] = [report.rows, report.hits, report.computed]
    store.check(pairs, together=True)
    try:
        store.check(table(folder, model_folder, "others.jsonl"), together=True)
    except StoreError as error:
        seen["error"] = str(error)
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
