"""Methods × rates × seeds on real pairs, each a run of the training job, and what is measured on held-out pairs.

In: a folder that `start` made. Out: a file for each run; one that is there is not run again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head
from selective_pref_adapters.models import load_model, load_tokenizer
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import collate
from selective_pref_adapters.replication.real.start import cleared, store_of, tokenized

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
BETA, RATIO = 0.01, 0.4
"""The paper's."""


@dataclass(frozen=True, kw_only=True)
class RealMethod:
    """A row: its name, the reference that it reads, and further options of the training job."""

    title: str
    reference: str | None
    options: dict[str, Any]


METHODS = {
    "sft": RealMethod(title="SFT on the chosen side", reference=None, options={"objective": "sft"}),
    "dpo": RealMethod(title="DPO", reference="student", options={"objective": "dpo", "beta": BETA}),
    "distilled_dpo": RealMethod(title="distilled DPO", reference="teacher", options={"objective": "dpo", "beta": BETA}),
    "simpo": RealMethod(title="SimPO", reference=None, options={"objective": "simpo", "beta": 2.0, "gamma": 1.0}),
    **{
        f"selective_{name}": RealMethod(
            title=f"Selective-DPO, {words}", reference=name, options={"beta": BETA, "selection_ratio": RATIO}
        )
        for name, words in (("weak", "weak reference"), ("teacher", "strong reference"), ("student", "own start"))
    },
}


@dataclass(frozen=True, kw_only=True)
class RealCell:
    """One run."""

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return f"{self.method}.rate-{self.rate:g}.seed-{self.seed}"


def cells_of(rates: Sequence[float], seeds: int) -> list[RealCell]:
    """Every method at every rate on every seed."""
    return [
        RealCell(method=method, rate=rate, seed=seed) for seed in range(seeds) for method in METHODS for rate in rates
    ]


def path_of(folder: Path, name: str) -> Path:
    """Where the results of a run, or the measurements of a model, are."""
    return folder / "runs" / f"{name}.json"


def run_cell(folder: Path, cell: RealCell) -> None:
    """Trains and measures one run; a loss that is not finite marks it as diverged. Its model is not kept."""
    scale = json.loads((folder / "made_from.json").read_text(encoding="utf-8"))
    method, output = METHODS[cell.method], cleared(folder / "models" / cell.name)
    try:
        train(
            TrainConfig(
                model=str(folder / "student"),
                pairs=str(folder / "train.jsonl"),
                output_dir=str(output),
                eval_fraction=0.0,
                max_length=scale["max_length"],
                batch_size=scale["batch"],
                max_steps=scale["steps"],
                learning_rate=cell.rate,
                lr_schedule="constant",
                seed=cell.seed,
                **({} if method.reference is None else store_of(folder, method.reference)),
                **method.options,
            )
        )
        found: dict[str, Any] = {"diverged": False, **measure(folder, output)}
    except FloatingPointError:
        found = {"diverged": True}
    write_whole(path_of(folder, cell.name), json.dumps(found) + "\n")
    shutil.rmtree(output, ignore_errors=True)


@torch.no_grad()
def measure(folder: Path, model: Path) -> dict[str, float]:
    """What a model makes of the held-out pairs.

    Returns:
        accuracy: share of pairs whose chosen response has the higher log-ratio to the start, which is DPO's implicit
        reward (0 of the start itself); likelier: share whose chosen response has the higher log-prob; chosen, rejected:
        log-prob of a token, mean over all tokens, nats; margin: mean difference of the log-ratios of a pair, nats.
    """
    tokenizer, policy = load_tokenizer(str(folder / "tokenizer")), load_model(str(model), dtype="float32").eval()
    start = load_model(str(folder / "student"), dtype="float32").eval()
    for one in (policy, start):
        install_fused_head(one)
    pairs = tokenized(folder, "held_out")
    sums: list[torch.Tensor] = []
    tokens = torch.zeros(2)
    for at in range(0, len(pairs), 16):
        batch = collate(pairs[at : at + 16], tokenizer.pad_token_id)
        logps, before = (frozen_per_token_logps(one, batch).sum(-1) for one in (policy, start))
        sums.append(torch.stack([*logps.chunk(2), *before.chunk(2)]))
        tokens += torch.stack([side.sum() for side in batch["completion_mask"].chunk(2)])
    chosen, rejected, chosen_before, rejected_before = torch.cat(sums, dim=1)
    margins = (chosen - chosen_before) - (rejected - rejected_before)
    return {
        "accuracy": float((margins > 0).float().mean()),
        "likelier": float((chosen > rejected).float().mean()),
        "chosen": float(chosen.sum() / tokens[0]),
        "rejected": float(rejected.sum() / tokens[1]),
        "margin": float(margins.mean()),
    }
