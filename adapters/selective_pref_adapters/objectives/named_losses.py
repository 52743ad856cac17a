"""TRL's names of pair losses and divergences → one objective: the only place where a loss is found by its name.

In: names and numbers as `DPOConfig` of TRL has them (`loss_type`, `loss_weights`, `f_divergence_type`, …). Out: a
callable (chosen, rejected) → PreferenceLoss that honours token weights, so that `select` makes it selective.

    names → [pair loss of a reward]  → Σ weight · loss
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch

from selective_pref import (
    Divergence,
    PreferenceLoss,
    Response,
    aot_loss,
    combine_losses,
    divergences,
    mean_log_ratio,
    pair_losses,
    preference_loss,
    summed_log_ratio,
    token_sft_loss,
)
from selective_pref_adapters.options import DivergenceName, LossName

_PAIR_LOSSES = {
    "sigmoid": pair_losses.sigmoid,
    "hinge": pair_losses.hinge,
    "ipo": pair_losses.ipo,
    "exo_pair": pair_losses.exo_pair,
    "nca_pair": pair_losses.nca_pair,
    "robust": pair_losses.robust,
    "bco_pair": pair_losses.bco_pair,
    "sppo_hard": pair_losses.sppo_hard,
    "aot_unpaired": pair_losses.aot_unpaired,
    "apo_zero": pair_losses.apo_zero,
    "apo_down": pair_losses.apo_down,
    "discopop": pair_losses.discopop,
    "sigmoid_norm": pair_losses.sigmoid,
}
_OF_MEANS = ("ipo", "sigmoid_norm")
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")
_OF_RANKS = ("aot", "aot_unpaired")
_OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


@dataclass(frozen=True, kw_only=True)
class NamedLoss:
    """Σ weight · loss of the losses that TRL's `loss_type` names: an `Objective`.

    Whatever the loss, the reported rewards are β · log-ratio of the responses (of IPO, too, whose loss reads means),
    as in TRL's logs.

    Attributes:
        loss_type: names, each one of `LossName`.
        loss_weights: a weight for each, at least 0; None for 1 each.
        beta: above 0.
        label_smoothing: ε, read by sigmoid, sigmoid_norm, robust, exo_pair, aot and aot_unpaired.
        f_divergence_type: one of `DivergenceName`; another than "reverse_kl" only for losses of the difference of two
            rewards, in which log Z cancels.
        f_alpha_divergence_coef: α of "alpha_divergence".
        discopop_tau: τ of discopop.
        ld_alpha: LD-DPO's α in [0, 1] (Liu et al. 2024): the tokens of the longer response beyond the length of the
            shorter one count for α. The supervised term reads every token. None for 1.

    Raises:
        ValueError: a name that there is not; weights of another number, or all 0; a divergence with a loss that has
            none; α of LD-DPO out of range. Numbers of the losses are checked when it is called.
    """

    loss_type: Sequence[str]
    loss_weights: Sequence[float] | None = None
    beta: float
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None

    def __post_init__(self) -> None:
        names = self.loss_type
        if isinstance(names, str) or not names:
            raise ValueError(f"loss_type must be a list of at least one name; got {names!r}")
        for name in names:
            check_name("loss_type", name, get_args(LossName))
        check_name("f_divergence_type", self.f_divergence_type, get_args(DivergenceName))
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ValueError(
                f"loss_weights must have one weight for each loss_type; got {len(self.loss_weights)} for {len(names)}"
            )
        if self.loss_weights is not None and not any(self.loss_weights):
            raise ValueError("every one of loss_weights is 0, so nothing would be learnt: give one above 0")
        if self.f_divergence_type != "reverse_kl" and (wrong := [n for n in names if n not in _OF_DIFFERENCES]):
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type!r} is for losses of the difference of two rewards, in "
                f"which log Z cancels ({', '.join(_OF_DIFFERENCES)}); not for {', '.join(wrong)}"
            )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], or None; got {self.ld_alpha!r}")

    def __call__(self, chosen: Response, rejected: Response) -> PreferenceLoss:
        """The weighted sum of the losses of a batch of pairs."""
        weighted = (
            (chosen, rejected) if self.ld_alpha in (None, 1) else beyond_shared_length(chosen, rejected, self.ld_alpha)
        )
        losses = [self._one(name, *((chosen, rejected) if name == "sft" else weighted)) for name in self.loss_type]
        weights = self.loss_weights or [1.0] * len(losses)
        out = losses[0] if list(weights) == [1.0] else combine_losses(*zip(map(float, weights), losses, strict=True))
        return self._with_log_ratios(out, chosen, rejected)

    def _one(self, name: str, chosen: Response, rejected: Response) -> PreferenceLoss:
        numbers: dict[str, float] = {"label_smoothing": self.label_smoothing} if name in _SMOOTHED else {}
        if name == "sft":
            return token_sft_loss(chosen, rejected)
        if name == "aot":
            return aot_loss(chosen, rejected, beta=self.beta, **numbers)
        if name == "discopop":
            numbers["tau"] = self.discopop_tau
        reward = partial(mean_log_ratio if name in _OF_MEANS else summed_log_ratio, divergence=self._divergence())
        pair_loss = partial(_PAIR_LOSSES[name], **numbers)
        return preference_loss(chosen, rejected, pair_loss=pair_loss, beta=self.beta, reward=reward)

    def _divergence(self) -> Divergence | None:
        named: dict[str, Divergence | None] = {
            "reverse_kl": None,
            "forward_kl": divergences.forward_kl,
            "js_divergence": divergences.js_divergence,
            "alpha_divergence": partial(divergences.alpha_divergence, alpha=self.f_alpha_divergence_coef),
        }
        return named[self.f_divergence_type]

    def _with_log_ratios(self, out: PreferenceLoss, chosen: Response, rejected: Response) -> PreferenceLoss:
        """`out`, reporting β · log-ratios; as it is where it does already, or where there is no reference."""
        name, plain = self.loss_type[0], self.f_divergence_type == "reverse_kl"
        if chosen.ref_per_token_logps is None or (plain and name != "sft" and name not in _OF_MEANS):
            return out
        with torch.no_grad():
            reports = preference_loss(out.chosen, out.rejected, pair_loss=pair_losses.sigmoid, beta=self.beta)
        names = ("chosen_rewards", "rejected_rewards", "chosen_selected_rewards", "rejected_selected_rewards")
        return replace(out, **{name: getattr(reports, name) for name in names})


def beyond_shared_length(chosen: Response, rejected: Response, alpha: float) -> tuple[Response, Response]:
    """LD-DPO's token weights: those that the responses carry, times α behind the length of the shorter one.

    Args:
        chosen, rejected: the pair, torch tensors [B T] each.
        alpha: in [0, 1].
    """
    lengths = torch.minimum(chosen.mask.sum(-1), rejected.mask.sum(-1)).unsqueeze(-1)

    def weighted(side: Response) -> Response:
        behind = side.mask.cumsum(-1) > lengths
        return replace(side, weights=torch.where(behind, alpha * side.token_weights, side.token_weights))

    return weighted(chosen), weighted(rejected)


def unread_numbers(names: Sequence[str], f_divergence_type: str) -> list[str]:
    """Which numbers none of these losses reads."""
    read = {
        "label_smoothing": any(name in _SMOOTHED for name in names),
        "discopop_tau": "discopop" in names,
        "f_alpha_divergence_coef": f_divergence_type == "alpha_divergence",
        "beta": any(name != "sft" for name in names),
    }
    return [name for name, is_read in read.items() if not is_read]


def check_pairs_can_be_weighted(names: Sequence[str]) -> None:
    """Raises ValueError for losses of ranks, whose values do not belong to single pairs."""
    if wrong := [name for name in names if name in _OF_RANKS]:
        raise ValueError(
            f"pairs cannot be weighted (use_weighting, a column 'weight') under {', '.join(wrong)}: it sorts the "
            "batch, so that its losses belong to ranks and not to pairs"
        )


def check_pair_weights(weights: Sequence[float | None], names: Sequence[str], which: str) -> None:
    """Raises ValueError where rows' weights cannot be what their losses are multiplied by.

    Args:
        weights: of every row, each at least 0; None for a row that has none.
        names: of the losses.
        which: what the rows are called in error messages.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return
    check_pairs_can_be_weighted(names)
    if len(given) < len(weights):
        lacking = list(weights).index(None)
        raise ValueError(
            f"{which}: {len(given)} of {len(weights)} rows have a weight, the others (the first is number "
            f"{lacking + 1}) have none: give every row one, 1 where nothing is to change, or none at all"
        )
    if not any(given):
        raise ValueError(
            f"{which}: every weight is 0, so no row would be learnt from: leave the column 'weight' out, or scale it"
        )


def weights_line(weights: Sequence[float | None]) -> list[str]:
    """One sentence about rows' weights; none where no row has one."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return []
    mean = sum(given) / len(given)
    return [f"losses are multiplied by the rows' weights, from {min(given):g} to {max(given):g}, mean {mean:.4g}"]


def check_name(option: str, name: Any, known: Iterable[str]) -> None:
    """Raises ValueError for a name that there is not, with the nearest one."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        meant = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{option} must be one of {', '.join(known)}; got {name!r}{meant}")
