"""How much each token needs the update: the second arrow.

In: the two responses of a pair. Out: one score per token for each side, [B T_w] and [B T_l], detached; higher
means "select me". Off the mask a score is 0 and is never read.

Other methods are other responses in the same two functions. SePO's score is `alignment_scores` of an oracle and
its base; a contrast of two models is `alignment_scores` with one of them as policy and the other as reference;
a random control is an array of random numbers passed to `select(..., scores=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.response import Response, check_pair

ScoreFunction: TypeAlias = Callable[[Response, Response], tuple[Array, Array]]
"""(chosen, rejected) → their scores, [B T_w] and [B T_l]."""


def alignment_scores(chosen: Response, rejected: Response) -> tuple[Array, Array]:
    """Selective-DPO's alignment score of every token, Eq. 6.

    s(y_i) = (−1)^[y_i ∈ y_l] · [log π_ref(y_i | x, y_<i) − log π_θ(y_i | x, y_<i)]: high where the reference
    wants a token of the chosen response more than the policy does, or one of the rejected response less.

    Args:
        chosen: y_w, with reference log-probs.
        rejected: y_l, with reference log-probs.

    Returns:
        Scores of chosen [B T_w] and rejected [B T_l] in nats, at least float32, detached, 0 off the mask; NaN where a
        log-prob inside the mask is not finite.

    Raises:
        ValueError: a reference is missing, or the responses do not fit together.
    """
    check_pair(chosen, rejected)
    return -_finite_log_ratios(chosen), _finite_log_ratios(rejected)


def excess_loss_scores(chosen: Response, rejected: Response) -> tuple[Array, Array]:
    """Rho-1's excess loss of every token (Lin et al. 2024, §2.2): log π_ref − log π_θ on both sides.

    It equals the alignment score on the chosen side and its negative on the rejected side; it serves selective
    supervised training and is the natural control for the sign in Eq. 6.

    Args, Returns, Raises: as `alignment_scores`.
    """
    check_pair(chosen, rejected)
    return -_finite_log_ratios(chosen), -_finite_log_ratios(rejected)


def _finite_log_ratios(response: Response) -> Array:
    """Detached log-ratios, with NaN for an infinity: a broken log-prob must not pass for a very high or low score."""
    log_ratios = _arrays.detach(response.log_ratios)
    return log_ratios + 0.0 * log_ratios
