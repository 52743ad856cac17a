"""The flags of `selective-pref replicate`. Imports nothing but the standard library, so that `--help` is quick."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReplicateConfig:
    """What to run, and where the results go."""

    output_dir: str = "runs/replication"
    """Worlds, a file for each run, tables, figures and one page. The same command goes on where it was stopped."""
    quick: bool = False
    """The ten methods that tell most, at the rates that the full form found, after 1x steps alone."""
    tiny: bool = False
    """A few steps of a few methods: shows that everything runs, not what it learns."""
    pairs: str | None = None
    """Real pairs instead of the made-up language: a file, as `selective-pref train` reads it. Needs sft_data."""
    sft_data: str | None = None
    """Supervised rows on which the models for these pairs are trained first."""
    seeds: int | None = None
    """Seeds that are tested: 5, with --quick 4, with --pairs 2, with --tiny 1. Rates are tuned on two others."""
    processes: int = max(1, os.cpu_count() or 1)
    """Runs at once, one thread each."""
    strict: bool = False
    """End with exit status 1 where one of the findings that always came out did not."""

    def __post_init__(self) -> None:
        for name in ("seeds", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.quick and self.tiny:
            raise ValueError("quick and tiny are two forms: give one of them")
        if (self.pairs is None) != (self.sft_data is None):
            raise ValueError("pairs and sft_data go together: models learn from sft_data and are compared on pairs")
        if self.pairs is not None and (self.quick or self.strict):
            raise ValueError("quick and strict belong to the made-up language: leave them away beside pairs")
