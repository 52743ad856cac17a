"""The flags of `selective-pref generate`. Imports nothing but the standard library, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

BenchmarkName: TypeAlias = Literal["arena-hard-v0.1", "arena-hard-v2.0", "mt-bench"]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Whose answers, to which questions, and where they go."""

    benchmark: BenchmarkName
    """Says what the questions look like, the answer file, and the defaults of temperature and max_new_tokens."""
    model: str
    """A folder or hub id of a causal language model; with --base-url, the name it is served under."""
    questions: str
    """The benchmark's question.jsonl, or some lines of it."""
    out: str
    """The answer file, *.jsonl; it is there once every question is answered."""
    model_id: str | None = None
    """What the model is called in the answer file. Default: the name of the file, as the benchmarks read it."""
    chat_template: str | None = None
    """A file with a chat template (Jinja), for a tokenizer that has none, or instead of its own."""
    max_new_tokens: int | None = None
    """Tokens of one answer. Default: 4096 for Arena-Hard, 1024 for each turn of MT-Bench."""
    temperature: float | None = None
    """0 takes the likeliest token. Default: 0; for MT-Bench 0.7, 0.1 or 0, by category."""
    seed: int = 0
    """Of what is sampled: the same seed gives the same answers on the same machine, in whatever batches."""
    token_len: Literal["tiktoken", "none"] = "tiktoken"
    """Length of Arena-Hard answers in tokens of gpt-4o, for style control; none leaves it to be filled in later."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights. Default: bfloat16 on a GPU, float32 else."""
    batch_size: int = 8
    """Questions answered at once by a local model."""
    base_url: str | None = None
    """A server that speaks OpenAI's chat protocol, up to and with /v1: it is asked instead of a local model."""
    api_key_variable: str | None = None
    """Name of the environment variable that holds the server's API key (never the key itself)."""
    concurrency: int = 4
    """Questions that a server is asked at once."""
    timeout: float = 600.0
    """Seconds to wait for one answer of a server."""
    attempts: int = 20
    """How often a server is asked for an answer, after pauses of 1 to 30 s, before it is given up."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if self.temperature is not None and not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature must be in [0, 10]; got {self.temperature}")
        if not self.out.endswith(".jsonl"):
            raise ValueError(f"out must end in .jsonl: the benchmarks read no other files; got {self.out}")
        if self.base_url is not None and (self.chat_template is not None or self.dtype is not None):
            raise ValueError("chat_template and dtype are the server's own where --base-url is given: leave them out")
