"""The teacher's veto: every token is raised, unless the teacher finds it clearly less likely than the start did.

**Experimental.** Not from the paper: a loss of this project, which did better than selection by a share in a study in
miniature. Its numbers may change.

In: the two responses of a pair with the teacher's log-probs as reference, and those of the policy's own start. Out: a
`PreferenceLoss`. It is the same four arrows; only, two kinds of weight come out of the third, and both are at least 0:

    T − S, once per token ─▶ weights to raise, weights to lower ─▶ two weighted sums of log π_θ ─▶ lowered − raised

    >>> import numpy as np
    >>> mask = np.ones((1, 3), dtype=bool)
    >>> policy, teacher, start = np.array([[[-2.0, -1.0, -6.0]], [[-1.0, -4.0, -3.0]], [[-2.0, -1.0, -1.0]]])
    >>> side = Response(per_token_logps=policy, mask=mask, ref_per_token_logps=teacher)
    >>> raised, lowered = veto_weights(side, start)  # the last token is vetoed, and is low enough already
    >>> raised, lowered
    (array([[1., 0., 0.]]), array([[0., 1., 0.]]))
    >>> teacher_veto_loss(side, side, start_per_token_logps=(start, start)).losses  # 2 · (2 − 1)
    array([2.])
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, TypeAlias

from selective_pref import _arrays
from selective_pref._arrays import Array
from selective_pref.losses import PreferenceLoss, make_report
from selective_pref.response import Response, check_like, check_pair, masked, required_reference
from selective_pref.rewards import summed_log_ratio

VetoSides: TypeAlias = Literal["both", "labelled"]
"""Both responses are raised and lowered, or the chosen one is raised only and the rejected one lowered only."""


def veto_weights(
    response: Response, start_per_token_logps: Array, *, threshold: float = 1.0, floor: float = 2.0
) -> tuple[Array, Array]:
    """Which tokens of a response to raise and which to lower.

    With T the teacher's log-prob of a token, S the start's, π the policy's now: it is raised where T − S > −τ. It is
    vetoed where T − S ≤ −τ, and then lowered as long as log π > T − m.

    Args:
        response: [B T], with the teacher's log-probs as `ref_per_token_logps`. Its weights are honoured.
        start_per_token_logps: log-probs of the same tokens under the policy as it was before training, real floating
            [B T]; constants.
        threshold: τ in nats, a finite number at least 0.
        floor: m in nats, a finite number at least 0: how far below the teacher a vetoed token is pushed. (2; 5 did
            better where teacher and student write alike.)

    Returns:
        (to raise, to lower): each at least float32 [B T], detached, at least 0, 0 off the mask. No token has both. NaN
        in both where a log-prob inside the mask is not finite.

    Raises:
        TypeError, ValueError: a missing reference, start log-probs of another shape, library or device; numbers out of
            range.
    """
    _check_nats("threshold", threshold)
    _check_nats("floor", floor)
    teacher = masked(_arrays.detach(required_reference(response)), response.mask)
    start = _start(response, start_per_token_logps)
    policy = _arrays.detach(masked(response.per_token_logps, response.mask))
    xp = _arrays.namespace(policy)
    finite = xp.isfinite(policy) & xp.isfinite(teacher) & xp.isfinite(start)
    weights = xp.where(finite, response.token_weights, xp.nan)
    vetoed, enough = teacher - start <= -threshold, policy <= teacher - floor
    return xp.where(vetoed & finite, 0.0, weights), xp.where((enough | ~vetoed) & finite, 0.0, weights)


def teacher_veto_loss(
    chosen: Response,
    rejected: Response,
    *,
    start_per_token_logps: tuple[Array, Array],
    threshold: float = 1.0,
    floor: float = 2.0,
    sides: VetoSides = "both",
) -> PreferenceLoss:
    """Raises what the teacher does not veto and lowers what it vetoes: −Σ_raise log π + Σ_lower log π. Experimental.

    With `sides="both"` the label of a pair is not read: both responses are texts to learn from, token by token. There
    is no β, and the gradient of a token is 1, −1 or 0 (over B), whatever the margin is: a rate for supervised training
    fits. Known to fail with few pairs, which it memorises, and with a teacher of another style, whose veto then means
    "not my style": be warned when it vetoes more than about a tenth of the tokens (`diagnostics` does not say; the mean
    of ``out.chosen.scores <= -threshold`` over the mask does).

    Args:
        chosen, rejected: the pair, [B T_w] and [B T_l], with the teacher's log-probs as reference. Weights they carry
            are honoured.
        start_per_token_logps: (chosen [B T_w], rejected [B T_l]): see `veto_weights`.
        threshold, floor: as in `veto_weights`.
        sides: "both", or "labelled": chosen tokens are raised only, and rejected ones lowered only.

    Returns:
        A `PreferenceLoss`. Its responses carry as `weights` what the loss reads of each token, raised or lowered, and
        as `scores` T − S in nats. Rewards are log-ratios to the teacher, without β.

    Raises:
        TypeError, ValueError: as `veto_weights`; responses that do not fit together; an unknown `sides`.
    """
    check_pair(chosen, rejected)
    if sides not in ("both", "labelled"):
        raise ValueError(f"sides must be 'both' or 'labelled'; got {sides!r}")
    if not isinstance(start_per_token_logps, (tuple, list)) or len(start_per_token_logps) != 2:
        raise TypeError(
            "start_per_token_logps must be a pair of arrays [B T_w] and [B T_l]: log-probs of the policy before "
            f"training; got {type(start_per_token_logps).__name__}"
        )
    options = {"threshold": threshold, "floor": floor}
    moves, chosen = _moves(chosen, start_per_token_logps[0], options, raises=True, lowers=sides == "both")
    other, rejected = _moves(rejected, start_per_token_logps[1], options, raises=sides == "both", lowers=True)
    return make_report(moves + other, chosen, rejected, summed_log_ratio, 1.0)


def _moves(
    side: Response, start: Array, options: dict[str, float], *, raises: bool, lowers: bool
) -> tuple[Array, Response]:
    """Σ lowered · log π − Σ raised · log π of one side [B], and the side as the loss reads it."""
    raised, lowered = veto_weights(side, start, **options)
    raised, lowered = raised * float(raises), lowered * float(lowers)
    losses = _arrays.last_axis_sum((lowered - raised) * masked(side.per_token_logps, side.mask))
    gained = masked(_arrays.detach(required_reference(side)), side.mask) - _start(side, start)
    return losses, replace(side, weights=raised + lowered, scores=gained)


def _start(response: Response, start_per_token_logps: Array) -> Array:
    """The start's log-probs of the tokens that count, 0 elsewhere."""
    _arrays.check_floating("start_per_token_logps", start_per_token_logps)
    check_like("start_per_token_logps", start_per_token_logps, response.per_token_logps)
    return masked(_arrays.detach(start_per_token_logps), response.mask)


def _check_nats(name: str, number: float) -> None:
    _arrays.check_number(name, number)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of nats, at least 0; got {number!r}")
