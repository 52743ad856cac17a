"""The flags of `selective-pref replicate`. Imports nothing but the standard library, so that `--help` is quick."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReplicateConfig:
    """What to run, and where the results go."""

    output_dir: str = "runs/replication"
    """Worlds, a file for each run, tables, figures and one page. The same command goes on where it was stopped."""
    seeds: int = 5
    """Seeds that are tested; rates are tuned on two others."""
    processes: int = max(1, os.cpu_count() or 1)
    """Runs at once, one thread each."""
    tiny: bool = False
    """A few steps of a few methods: shows that everything runs, not what it learns."""

    def __post_init__(self) -> None:
        for name in ("seeds", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
