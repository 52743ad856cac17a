"""The pair losses as the library computes them, and a fixed set of batches that laws are tried on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

import pair_oracle as po
from oracle import Batch, Side
from selective_pref import (
    PreferenceLoss,
    Response,
    aot_loss,
    divergences,
    mean_log_ratio,
    pair_losses,
    preference_loss,
    sft_loss,
    summed_log_ratio,
    token_sft_loss,
)

Call = Callable[[Response, Response, float], PreferenceLoss]


def _loss(pair_loss: Callable, reward: Callable = summed_log_ratio, **numbers: float) -> Call:
    bound = partial(pair_loss, **numbers)
    return lambda chosen, rejected, beta: preference_loss(chosen, rejected, pair_loss=bound, beta=beta, reward=reward)


def _diverging(divergence: Callable) -> Call:
    return _loss(pair_losses.sigmoid, partial(summed_log_ratio, divergence=divergence))


CALLS: dict[str, Call] = {
    "sigmoid": _loss(pair_losses.sigmoid),
    "sigmoid_smoothed": _loss(pair_losses.sigmoid, label_smoothing=po.SMOOTHING),
    "sigmoid_norm": _loss(pair_losses.sigmoid, mean_log_ratio),
    "hinge": _loss(pair_losses.hinge),
    "ipo": _loss(pair_losses.ipo, mean_log_ratio),
    "robust": _loss(pair_losses.robust, label_smoothing=po.SMOOTHING),
    "exo_pair": _loss(pair_losses.exo_pair, label_smoothing=po.EXO_SMOOTHING),
    "nca_pair": _loss(pair_losses.nca_pair),
    "bco_pair": _loss(pair_losses.bco_pair, delta=po.DELTA),
    "sppo_hard": _loss(pair_losses.sppo_hard),
    "aot": lambda chosen, rejected, beta: aot_loss(chosen, rejected, beta=beta),
    "aot_unpaired": _loss(pair_losses.aot_unpaired),
    "apo_zero": _loss(pair_losses.apo_zero),
    "apo_down": _loss(pair_losses.apo_down),
    "discopop": _loss(pair_losses.discopop, tau=po.TAU),
    "sft": lambda chosen, rejected, beta: sft_loss(chosen, rejected),
    "token_sft": lambda chosen, rejected, beta: token_sft_loss(chosen, rejected),
    "forward_kl": _diverging(divergences.forward_kl),
    "js_divergence": _diverging(divergences.js_divergence),
    "alpha_divergence": _diverging(partial(divergences.alpha_divergence, alpha=po.ALPHA)),
}
ACROSS_PAIRS = ("aot", "aot_unpaired", "token_sft")  # an entry of the losses depends on the other pairs
WITH_REFERENCE = [name for name in CALLS if name not in ("sft", "token_sft")]


def batch_of(
    rng: np.random.Generator, pairs: int = 48, widths: tuple[int, int] = (5, 6), lead: int = 0, scale: int = 24
) -> Batch:
    """Ragged pairs with log-probs in eighths, so that sums are exact and ties common; NaN off the mask.

    `lead` eighths are what each chosen token is ahead of its reference, and each rejected one behind.
    """
    sides = []
    for width, sign in zip(widths, (1, -1), strict=True):
        mask = rng.random((pairs, width)) < 0.8
        mask[:, 0] = True
        policy, ref = (-rng.integers(0, scale, (pairs, width)) / 8 for _ in range(2))
        fields = (np.where(mask, field, np.nan) for field in (policy + sign * lead / 8, ref))
        sides.append(Side(*(field.tolist() for field in fields), mask.tolist()))
    return Batch(*sides)


def corpus() -> list[Batch]:
    """The same batches in every run: of all kinds, near the reference, won, lost; and two of two short pairs."""
    rng = np.random.default_rng(0)
    large = [batch_of(rng, lead=lead, scale=scale) for lead, scale in ((0, 24), (0, 2), (24, 24), (-24, 24))]
    rng = np.random.default_rng(0)
    short = [batch_of(rng, pairs=2, widths=(3, 2)) for _ in range(56)]
    return [*large, short[6], short[55]]  # these two break what losses across pairs break; most do not


def with_policy(batch: Batch, chosen: np.ndarray, rejected: np.ndarray) -> Batch:
    return Batch(
        batch.chosen._replace(policy=chosen.tolist()),
        batch.rejected._replace(policy=rejected.tolist()),
    )


def policies(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    return np.array(batch.chosen.policy), np.array(batch.rejected.policy)
