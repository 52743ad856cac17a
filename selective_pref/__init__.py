"""Preference losses that look at the tokens that matter.

    per-token log-probs, mask → scores → token weights → sequence rewards → pairwise losses

Selective-DPO (see docs/maths.md for the paper and its equations) is alignment score + top fraction + DPO. Arrays may
come from torch, NumPy or JAX; importing this package imports none of them.
"""

from selective_pref import divergences as divergences
from selective_pref import pair_losses as pair_losses
from selective_pref.diagnostics import NonFiniteError, check_finite, diagnostics
from selective_pref.divergences import Divergence
from selective_pref.logps import per_token_logps
from selective_pref.losses import (
    Objective,
    PreferenceLoss,
    aot_loss,
    dpo_loss,
    preference_loss,
    selective_dpo_loss,
    sft_loss,
    simpo_loss,
    token_sft_loss,
)
from selective_pref.pair_losses import PairLoss
from selective_pref.pools import Pool, SelectionRatio, select
from selective_pref.response import Response
from selective_pref.rewards import Reward, mean_log_ratio, mean_logp, summed_log_ratio
from selective_pref.scores import ScoreFunction, alignment_scores, excess_loss_scores
from selective_pref.selection import Ties, quantile_weights, ratio_digits, top_fraction_weights
from selective_pref.terms import combine_losses, weigh_pairs
from selective_pref.veto import VetoSides, teacher_veto_loss, veto_weights

__version__: str

__all__ = [
    "Divergence",
    "NonFiniteError",
    "Objective",
    "PairLoss",
    "Pool",
    "PreferenceLoss",
    "Response",
    "Reward",
    "ScoreFunction",
    "SelectionRatio",
    "Ties",
    "VetoSides",
    "alignment_scores",
    "aot_loss",
    "check_finite",
    "combine_losses",
    "diagnostics",
    "dpo_loss",
    "excess_loss_scores",
    "mean_log_ratio",
    "mean_logp",
    "per_token_logps",
    "preference_loss",
    "quantile_weights",
    "ratio_digits",
    "select",
    "selective_dpo_loss",
    "sft_loss",
    "simpo_loss",
    "summed_log_ratio",
    "teacher_veto_loss",
    "token_sft_loss",
    "top_fraction_weights",
    "veto_weights",
    "weigh_pairs",
]


def __getattr__(name: str) -> str:
    """`__version__`, when it is asked for: finding the package's metadata takes longer than importing all of this."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("selective-pref")
    except PackageNotFoundError:  # a source tree on the path, never installed
        return "0+unknown"
