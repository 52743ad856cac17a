"""Preference losses that look at the tokens that matter.

    per-token log-probs, mask → scores → token weights → sequence rewards → pairwise losses

Selective-DPO (see docs/maths.md for the paper and its equations) is alignment score + top fraction + DPO. Arrays may
come from torch, NumPy or JAX; importing this package imports none of them.
"""

from selective_pref.diagnostics import NonFiniteError, check_finite, diagnostics
from selective_pref.logps import per_token_logps
from selective_pref.losses import (
    Objective,
    Pool,
    PreferenceLoss,
    dpo_loss,
    select,
    selective_dpo_loss,
    sft_loss,
    simpo_loss,
)
from selective_pref.response import Response
from selective_pref.rewards import mean_logp, summed_log_ratio
from selective_pref.scores import ScoreFunction, alignment_scores, excess_loss_scores
from selective_pref.selection import Ties, quantile_weights, top_fraction_weights

__version__ = "0.1.0"

__all__ = [
    "NonFiniteError",
    "Objective",
    "Pool",
    "PreferenceLoss",
    "Response",
    "ScoreFunction",
    "Ties",
    "alignment_scores",
    "check_finite",
    "diagnostics",
    "dpo_loss",
    "excess_loss_scores",
    "mean_logp",
    "per_token_logps",
    "quantile_weights",
    "select",
    "selective_dpo_loss",
    "sft_loss",
    "simpo_loss",
    "summed_log_ratio",
    "top_fraction_weights",
]
