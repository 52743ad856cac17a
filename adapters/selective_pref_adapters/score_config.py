"""Everything `selective-pref score` depends on, as one dataclass. Imports no framework: `--help` is quick.

A field's name is the flag, its docstring the help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selective_pref_adapters.train_config import Truncation


@dataclass(kw_only=True)
class ScoreConfig:
    """Whose log-probs, of which pairs, into which store; or what to do with the store instead."""

    store: str
    """Folder of the store; made where it is absent. It may hold any number of references."""
    ref_model: str | None = None
    """Reference: a folder or hub id of a causal language model; with --url, the name it is served under."""
    pairs: str | None = None
    """Preference rows: a .jsonl, .json, .parquet or .csv file, a folder, or a hub id (NAME:SPLIT)."""
    tokenizer: str | None = None
    """The policy's model or tokenizer: pairs are tokenised by it. Default: the reference's own."""
    max_length: int | None = None
    """Tokens of prompt + completion, the same as in training. Default: what the reference can read, at most 4096."""
    truncation_mode: Truncation = "keep_start"
    """keep_start cuts the end of what is too long, keep_end the start; the same as in training."""
    columns: str | None = None
    """Which columns hold what, where the rows' schema is not recognised: prompt=question,chosen=good,rejected=bad."""
    skip_malformed_rows: bool = False
    """Leave out rows that are no preference pair, or refused by the chat template (counted), instead of stopping."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the reference's weights; log-probs are stored in float32."""
    attention: str | None = None
    """Attention implementation, as transformers names them (eager, sdpa, …). Default: its choice."""
    batch_tokens: int = 16384
    """Token positions of one batch on a GPU; a CPU takes row after row."""
    flush_seconds: float = 30.0
    """What is scored is written at least this often: what a kill costs at most."""
    url: str | None = None
    """A server that speaks OpenAI's completions protocol, up to and with /v1: it is asked instead of a local model."""
    protocol: Literal["completions", "prompt_logprobs"] = "completions"
    """How the server is asked: echoed prompts with log-probs, or vLLM's prompt_logprobs."""
    revision: str | None = None
    """Of what is served: change it whenever weights, adapters or dtype there change. Needed with --url."""
    concurrency: int = 4
    """Requests under way at once."""
    rows_per_request: int = 8
    """Rows in one request."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    attempts: int = 5
    """How often a row is asked for before it is given up."""
    api_key_variable: str | None = None
    """Environment variable that holds the server's API key."""
    stat: bool = False
    """Only show what the store holds; with --pairs and --tokenizer or --ref-model, also how many rows it lacks."""
    verify: bool = False
    """Only score a random sample of the stored rows again, and compare."""
    verify_rows: int = 64
    """Rows of that sample."""
    verify_seed: int = 0
    """Which ones are drawn."""
    verify_tolerance: float | None = None
    """Largest difference in nats that passes. Default: 1e-3 for float32 on this machine, 0.5 for anything else."""
    prune: bool = False
    """Only tidy up: damage, copies and leftovers go, small files become large; with --pairs, other rows go, too."""
    space: str | None = None
    """Which reference --stat and --prune mean, by name or label. Default: all."""
