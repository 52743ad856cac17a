"""The training step written out by hand for one process, without DeepSpeed: what every set-up must agree with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref import selective_dpo_loss
from selective_pref_adapters.batch import responses
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.pairs import TokenizedPair, collate, read_rows, split_by_prompt, tokenize_pairs

LEARNING_RATE = 1e-2


def training_pairs(policy: Path, pairs_file: Path) -> list[TokenizedPair]:
    """What a run trains on with eval_fraction 0.2 and seed 0."""
    rows, _ = split_by_prompt(read_rows(pairs_file), 0.2, 0)
    return tokenize_pairs(rows, AutoTokenizer.from_pretrained(policy), max_length=64)[0]


def plain_torch_run(
    policy: Path, reference: Path, steps: Sequence[Sequence[Sequence[TokenizedPair]]], leave_out: bool = False
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights, and the loss of each step; a step is a list of batches, whose mean losses are averaged.

    With `leave_out`, batches whose loss is not finite have no gradient and no part in the step's loss.
    """
    model = AutoModelForCausalLM.from_pretrained(policy)
    ref_model = AutoModelForCausalLM.from_pretrained(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for number, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - number / len(steps))
        seen = []
        for pairs in batches:
            batch = collate(pairs, 0)
            with torch.no_grad():
                ref_logps = model_per_token_logps(ref_model, batch)
            sides = responses(batch, model_per_token_logps(model, batch), ref_logps)
            loss = selective_dpo_loss(*sides, beta=0.01, selection_ratio=0.4).loss
            if leave_out and not torch.isfinite(loss):
                continue
            (loss / len(batches)).backward()
            seen.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(seen) / len(seen) if seen else math.nan)
    return model.state_dict(), losses
