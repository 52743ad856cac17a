"""A collated batch → (chosen, rejected) Responses. The one place where foreign names become ours.

In: a batch in the trainers' layout (`input_ids`, `attention_mask`, `completion_mask`, each [2B T+1], chosen rows first)
and the per-token log-probs [2B T] that models gave to it. Out: the core's first arrow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from selective_pref import Response
from selective_pref_adapters.pairs import IGNORE_INDEX

Batch = Mapping[str, torch.Tensor]

REF_LOGPS = "ref_per_token_logps_bits"
"""The batch's key of stored reference log-probs; see `to_bits`."""
SCORING_REF_LOGPS = "scoring_ref_per_token_logps_bits"
"""Likewise of the reference from which scores are made, where another one anchors the reward."""

PAIR_WEIGHTS = "pair_weights_bits"
"""Weights of the batch's pairs [B], from the rows' column "weight"; see `to_bits`."""


def to_bits(logps: torch.Tensor) -> torch.Tensor:
    """Log-probs, or other floats, as the int32 bits of their float32 values.

    Trainers cast every float of a batch to the model's dtype (bf16 under DeepSpeed, say) and leave integers alone.
    """
    return logps.to(torch.float32).view(torch.int32)


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    """The float32 log-probs that `to_bits` packed."""
    return bits.view(torch.float32)


def labels_of(batch: Batch) -> torch.Tensor:
    """The token ids where a completion token stands, -100 elsewhere: int64 [2B T+1], not shifted."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)


def responses(
    batch: Batch,
    per_token_logps: torch.Tensor,
    ref_per_token_logps: torch.Tensor | None = None,
    *,
    chosen_only: bool = False,
) -> tuple[Response, Response]:
    """(chosen, rejected) of a batch.

    Args:
        batch: with `completion_mask` [2B T+1], chosen rows first.
        per_token_logps: the policy's, [2B T]: entry t belongs to the token at t + 1.
        ref_per_token_logps: the reference's, [2B T], or None for losses without one.
        chosen_only: the batch has no rejected rows: all arrays are [B T], and the rejected responses have no tokens,
            [B 0].
    """
    mask = batch["completion_mask"][:, 1:] != 0
    if not chosen_only:
        return Response.from_stacked(
            per_token_logps=per_token_logps, mask=mask, ref_per_token_logps=ref_per_token_logps
        )

    def first(tokens: int | None) -> Response:
        ref = None if ref_per_token_logps is None else ref_per_token_logps[:, :tokens]
        return Response(per_token_logps=per_token_logps[:, :tokens], mask=mask[:, :tokens], ref_per_token_logps=ref)

    return first(None), first(0)
