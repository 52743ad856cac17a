"""The options of `selective-pref inspect` and `selective-pref report`. Imports no framework: `--help` is quick.

A field's name is the flag, its docstring the help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from selective_pref import Pool, Ties
from selective_pref_adapters.options import Truncation

SUFFIXES = (".html", ".svg", ".json", ".txt")
"""Kinds of file that `inspect` writes."""


@dataclass(kw_only=True)
class InspectConfig:
    """Which pairs, read by which policy beside which reference, into which picture."""

    model: str
    """Policy: a folder or hub id of a causal language model."""
    pairs: str
    """Preference rows: a .jsonl, .json, .parquet or .csv file, a folder, or a hub id (NAME:SPLIT)."""
    columns: str | None = None
    """Which columns hold what, where the rows' schema is not recognised: prompt=question,chosen=good,rejected=bad."""
    skip_malformed_rows: bool = False
    """Leave out rows that are no preference pair, or refused by the chat template (counted), instead of stopping."""
    ref_model: str | None = None
    """Reference: a folder or hub id of a model with the same tokenizer."""
    store: str | None = None
    """Instead of ref_model: a folder of stored log-probs (`selective-pref score`)."""
    space: str | None = None
    """Which reference of the store, where it holds several."""
    rows: str = "1-20"
    """Which rows to show, counted from 1 in the order of the file: 7, or 1,5-9, or 100-."""
    out: str | None = None
    """File to write: .html (a page), .svg, .json or .txt. Default: the terminal."""
    title: str = "What the loss read"
    """Heading of the page."""
    beta: float = 0.01
    """Strength of the pull towards the reference, for rewards and losses."""
    selection_ratio: float | str = 0.4
    """Share of each pool's tokens to keep, in (0, 1], or one for each side, as 0.4,0.1 (chosen, rejected)."""
    min_score: float | None = None
    """Of those tokens keep only the ones with a score above it, in nats; with selection_ratio 1 it decides alone."""
    selection_pool: Pool = "response"
    """Which tokens compete: those of one response, or of one pair (batch: of eight pairs)."""
    selection_ties: Ties = "share"
    """What happens to tokens that stand exactly on the threshold."""
    max_length: int | None = None
    """Tokens of prompt + completion, as in training. Default: what the models can read, at most 4096."""
    truncation_mode: Truncation = "keep_start"
    """keep_start cuts the end of what is too long, keep_end the start."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of both models' weights."""
    attention: str | None = None
    """Attention implementation, as transformers names them (eager, sdpa, …). Default: its choice."""
    statistics: int = 0
    """Figures over so many rows from the first one on: scores, kept share by position, class and token, overlap."""
    figures: str | None = None
    """Folder for those figures as files (.svg and .png) and their numbers (statistics.json)."""
    other_models: tuple[str, ...] = ()
    """Policies to compare the selection with, checkpoints of a run for instance. Needs statistics."""
    other_ref_models: tuple[str, ...] = ()
    """References to compare the selection with, a weaker one for instance. Needs statistics."""
    other_dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ()
    """Precisions of both models to compare the selection with. Needs statistics and ref_model."""


@dataclass(kw_only=True)
class ReportConfig:
    """Whose runs, into which page."""

    runs: Positional[tuple[str, ...]]
    """Folders of runs: of `selective-pref train`, of the Hugging Face Trainer, of TRL."""
    out: str = "report.html"
    """The page to write."""
    figures: str | None = None
    """Folder for its figures as files (.svg and .png)."""
    title: str = "How the runs went"
    """Heading of the page."""
