"""Pair losses, divergences, and losses put together: worked values, what is loud, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import pair_oracle as po
import strategies as s
from pair_strategies import CALLS
from selective_pref import (
    Response,
    aot_loss,
    combine_losses,
    diagnostics,
    divergences,
    dpo_loss,
    mean_log_ratio,
    mean_logp,
    pair_losses,
    preference_loss,
    select,
    sft_loss,
    simpo_loss,
    summed_log_ratio,
    token_sft_loss,
    weigh_pairs,
)
from strategies import FLOAT64, Backend, numpy_of
from test_backends import random_batch

over = pytest.mark.parametrize
ids = {"ids": lambda value: getattr(value, "id", None)}
LOSSES = {
    "sigmoid": pair_losses.sigmoid,
    "hinge": pair_losses.hinge,
    "ipo": pair_losses.ipo,
    "robust": partial(pair_losses.robust, label_smoothing=0.1),
    "exo_pair": partial(pair_losses.exo_pair, label_smoothing=1e-3),
    "nca_pair": pair_losses.nca_pair,
    "bco_pair": partial(pair_losses.bco_pair, delta=0.3),
    "sppo_hard": pair_losses.sppo_hard,
    "aot_unpaired": pair_losses.aot_unpaired,
    "apo_zero": pair_losses.apo_zero,
    "apo_down": pair_losses.apo_down,
    "discopop": pair_losses.discopop,
}
W, R = np.array([3.0, -1.0]), np.array([1.0, 1.0])  # margins at β = ½: 1 and −1


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logsigma(x: float) -> float:
    return math.log(sigma(x))


# --- worked values -----------------------------------------------------------------------------------------------

WORKED = {
    "sigmoid": [-logsigma(1), -logsigma(-1)],
    "hinge": [0.0, 2.0],
    "ipo": [(2 - 1) ** 2, (-2 - 1) ** 2],
    "robust": [-(0.9 * logsigma(x) - 0.1 * logsigma(-x)) / 0.8 for x in (1, -1)],
    "exo_pair": [
        sigma(x) * (logsigma(x) - math.log(0.999)) + sigma(-x) * (logsigma(-x) - math.log(0.001)) for x in (1, -1)
    ],
    "nca_pair": [-logsigma(x) - logsigma(-x) / 2 - logsigma(-0.5) / 2 for x in (1.5, -0.5)],
    "bco_pair": [-logsigma(1.5 - 0.3) - logsigma(-(0.5 - 0.3)), -logsigma(-0.5 - 0.3) - logsigma(-(0.5 - 0.3))],
    "sppo_hard": [(3 - 1) ** 2 + (1 + 1) ** 2, (-1 - 1) ** 2 + (1 + 1) ** 2],
    "aot_unpaired": [-logsigma(0.5 * (-1 - 1)), -logsigma(0.5 * (3 - 1))],  # lowest against lowest
    "apo_zero": [1 - sigma(1.5) + sigma(0.5), 1 - sigma(-0.5) + sigma(0.5)],
    "apo_down": [sigma(1.5) + 1 - sigma(1), sigma(-0.5) + 1 - sigma(-1)],
    "discopop": [-logsigma(x) * (1 - sigma(x / 0.05)) + math.exp(-x) * sigma(x / 0.05) for x in (1, -1)],
}


@over("backend", [*FLOAT64, Backend("torch", "float32"), Backend("torch", "bfloat16")], **ids)
@over("name", LOSSES)
def test_worked_values(name: str, backend: Backend) -> None:
    losses = LOSSES[name](backend.array(W), backend.array(R), beta=0.5)
    assert numpy_of(losses).tolist() == pytest.approx(WORKED[name], rel=64 * backend.epsilon)
    assert str(losses.dtype).endswith("float64" if backend.dtype == "float64" else "float32")


@over("backend", FLOAT64, **ids)
@over(
    ("divergence", "expected"),
    [
        (divergences.reverse_kl, [2.0, -1.0]),
        (divergences.forward_kl, [1 - math.exp(-2), 1 - math.e]),
        (divergences.js_divergence, [math.log(2 * sigma(2)), math.log(2 * sigma(-1))]),
        (partial(divergences.alpha_divergence, alpha=0.5), [-2 * (math.exp(-1) - 1), -2 * (math.exp(0.5) - 1)]),
        (partial(divergences.alpha_divergence, alpha=0), [1 - math.exp(-2), 1 - math.e]),
        (partial(divergences.alpha_divergence, alpha=1), [2.0, -1.0]),
        (partial(divergences.alpha_divergence, alpha=1 + 1e-9), [2.0 + 2e-9, -1.0 + 0.5e-9]),
    ],
)
def test_divergences(divergence: object, expected: list[float], backend: Backend) -> None:
    actual = numpy_of(divergence(backend.array([2.0, -1.0])))
    assert actual.tolist() == pytest.approx(expected, rel=1e-14)


def test_the_mean_log_ratio_is_over_the_weight() -> None:
    logps, mask = np.array([[-1.0, -3.0, 9.0], [0.0, 0.0, 0.0]]), np.array([[True, True, False], [False] * 3])
    response = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=np.array([[-2.0, -1.0, 9.0], [9.0] * 3]))
    assert mean_log_ratio(response).tolist() == [(1 - 2) / 2, 0.0]
    weighted = replace(response, weights=np.array([[3.0, 0.5, 1.0], [1.0] * 3]))
    assert mean_log_ratio(weighted).tolist() == [(3 - 1) / 3.5, 0.0]
    assert mean_log_ratio(weighted, divergence=divergences.forward_kl).tolist() == [-math.expm1(-2.0) / 3.5, 0.0]


PAIR = random_batch(3, 5, 4)


def test_every_named_loss_is_the_sentence_it_claims_to_be() -> None:
    chosen, rejected = s.NUMPY.pair(PAIR)
    smoothed = partial(pair_losses.sigmoid, label_smoothing=0.2)
    target = partial(pair_losses.sigmoid, gamma=0.3)
    for one, two in (
        (dpo_loss(chosen, rejected, beta=0.3), {"pair_loss": pair_losses.sigmoid}),
        (dpo_loss(chosen, rejected, beta=0.3, label_smoothing=0.2), {"pair_loss": smoothed}),
        (simpo_loss(chosen, rejected, beta=0.3, gamma=0.3), {"pair_loss": target, "reward": mean_logp}),
    ):
        other = preference_loss(chosen, rejected, beta=0.3, **two)
        assert one.losses.tolist() == other.losses.tolist()
        assert one.chosen_rewards.tolist() == other.chosen_rewards.tolist()


def test_paired_aot_sorts_policy_and_reference_margins() -> None:
    mask = np.ones((2, 1), dtype=bool)
    chosen = Response(
        per_token_logps=np.array([[-1.0], [-5.0]]), mask=mask, ref_per_token_logps=np.array([[-4.0], [0]])
    )
    rejected = Response(per_token_logps=np.array([[-2.0], [-2.0]]), mask=mask, ref_per_token_logps=np.zeros((2, 1)))
    out = aot_loss(chosen, rejected, beta=0.5)  # policy margins 1, −3; reference margins −4, 0
    assert out.losses.tolist() == pytest.approx([-logsigma(0.5 * (-3 + 4)), -logsigma(0.5 * (1 - 0))])
    assert out.chosen_rewards.tolist() == [0.5 * 3, 0.5 * -5]
    smoothed = aot_loss(chosen, rejected, beta=0.5, label_smoothing=0.25).losses
    assert smoothed.tolist() == pytest.approx([-0.75 * logsigma(0.5) - 0.25 * logsigma(-0.5)] * 2)


def test_supervised_training_by_tokens_counts_every_token_of_the_call_alike() -> None:
    mask = np.array([[True, True, True], [True, False, False]])
    chosen = Response(per_token_logps=np.array([[-1.0, -2.0, -3.0], [-6.0, 9.0, 9.0]]), mask=mask)
    assert float(token_sft_loss(chosen, chosen).loss) == (1 + 2 + 3 + 6) / 4
    assert float(sft_loss(chosen, chosen).loss) == (2 + 6) / 2
    weighted = replace(chosen, weights=np.array([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]))
    assert float(token_sft_loss(weighted, weighted).loss) == pytest.approx((2 + 1.5 + 6) / 2.5)
    nothing = replace(chosen, mask=~mask & mask)
    assert token_sft_loss(nothing, nothing).losses.tolist() == [0.0, 0.0]


# --- far away ----------------------------------------------------------------------------------------------------


@over("margin", [-3000.0, 3000.0])
@over("name", [name for name in LOSSES if name not in ("ipo", "sppo_hard")])
def test_large_margins_neither_overflow_nor_become_nan(name: str, margin: float) -> None:
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (margin, -margin))
    losses = LOSSES[name](chosen, rejected, beta=0.5)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()
    if name == "discopop":
        assert losses.tolist() == [max(-margin, 0.0)]


@over("bad", [math.nan, math.inf, -math.inf])
@over("side", [0, 1])
@over("name", LOSSES)
def test_a_reward_that_is_not_finite_makes_its_loss_and_gradient_nan(name: str, side: int, bad: float) -> None:
    rewards = [torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.5, -1.0, 0.0])]
    rewards[side][1] = bad
    leaves = [r.requires_grad_() for r in rewards]
    losses = LOSSES[name](*leaves, beta=0.5)
    losses.sum().backward()
    broken = 2 if name == "aot_unpaired" else 1
    assert losses.isnan().tolist() == [i == broken for i in range(3)]
    assert leaves[side].grad[1].isnan()


@over("divergence", [divergences.forward_kl, divergences.js_divergence, divergences.reverse_kl])
def test_a_divergence_does_not_make_an_infinite_log_ratio_finite(divergence: object) -> None:
    with np.errstate(invalid="ignore"):
        assert np.isnan(divergence(np.array([np.inf, -np.inf]))).all()


def test_an_exponential_that_overflows_is_loud() -> None:
    side = Response(
        per_token_logps=torch.full((1, 1), -200.0),
        mask=torch.ones(1, 1, dtype=torch.bool),
        ref_per_token_logps=torch.zeros(1, 1),
    )
    for name in ("forward_kl", "alpha_divergence"):  # e^200 and e^100 in float32
        losses = CALLS[name](side, replace(side, per_token_logps=torch.zeros(1, 1)), 0.1).losses
        assert not torch.isfinite(losses).any()


# --- terms and weights of pairs ----------------------------------------------------------------------------------


def test_rpo_is_a_preference_loss_and_a_supervised_term_of_every_token() -> None:
    chosen, rejected = s.torch_leaf(PAIR)
    selected = select(chosen, rejected, selection_ratio=0.4)
    out = combine_losses((1.0, dpo_loss(*selected, beta=0.1)), (0.5, sft_loss(chosen, rejected)))
    expected = dpo_loss(*selected, beta=0.1).losses + 0.5 * sft_loss(chosen, rejected).losses
    assert out.losses.tolist() == expected.tolist()
    assert out.chosen_weights.tolist() == selected[0].token_weights.tolist()
    out.loss.backward()
    assert (chosen.per_token_logps.grad[chosen.mask] != 0).all()
    single = combine_losses((1.0, dpo_loss(*selected, beta=0.1)))
    assert single.losses.tolist() == dpo_loss(*selected, beta=0.1).losses.tolist()


@over("backend", [*FLOAT64, Backend("torch", "float32")], **ids)
def test_the_loss_is_the_weighted_mean_over_pairs(backend: Backend) -> None:
    out = dpo_loss(*backend.pair(PAIR), beta=0.5)
    one, _, three = numpy_of(out.losses).tolist()
    weights = backend.array([2.0, 0.0, 0.5])
    weighted = weigh_pairs(out, weights)
    assert float(weighted.loss) == pytest.approx((2 * one + 0.5 * three) / 2.5, rel=8 * backend.epsilon)
    assert numpy_of(diagnostics(weighted)["loss"]) == numpy_of(weighted.loss)
    assert float(diagnostics(weighted)["pair_weight"]) == pytest.approx(2.5 / 3)
    assert "pair_weight" not in diagnostics(out)
    for total in (3, 3.0, backend.array(3.0)):
        assert float(weigh_pairs(out, weights, total=total).loss) == pytest.approx(
            (2 * one + 0.5 * three) / 3, rel=1e-6
        )


def test_weights_that_are_all_0_give_loss_and_gradient_0() -> None:
    chosen, rejected = s.torch_leaf(PAIR)
    out = weigh_pairs(dpo_loss(chosen, rejected, beta=0.5), torch.zeros(3, dtype=torch.float64))
    out.loss.backward()
    assert out.losses.tolist() == [0.0] * 3
    assert float(diagnostics(out)["pair_weight"]) == 0.0
    assert not chosen.per_token_logps.grad.any()
    none = torch.zeros((), dtype=torch.float64)
    assert weigh_pairs(out, torch.zeros(3, dtype=torch.float64), total=none).losses.tolist() == [0.0] * 3


@over("bad", [-1.0, math.nan, math.inf])
def test_weights_of_pairs_that_are_negative_or_not_finite_are_loud(bad: float) -> None:
    out = weigh_pairs(dpo_loss(*s.TORCH.pair(PAIR), beta=0.5), torch.tensor([1.0, bad, 1.0]), total=3)
    assert torch.isfinite(out.losses).tolist() == [True, False, True]
    assert not torch.isfinite(weigh_pairs(out, torch.tensor([1.0, bad, 1.0])).loss)


def test_a_broken_pair_is_not_hidden_by_weight_0() -> None:
    out = replace(dpo_loss(*s.TORCH.pair(PAIR), beta=0.5), losses=torch.tensor([1.0, math.nan, 1.0]))
    assert math.isnan(weigh_pairs(out, torch.tensor([1.0, 0.0, 1.0])).loss.item())


def test_no_gradient_reaches_weights_and_shift() -> None:
    weights, delta = torch.ones(3, requires_grad=True), torch.zeros((), requires_grad=True)
    bound = partial(pair_losses.bco_pair, delta=delta)
    out = weigh_pairs(preference_loss(*s.torch_leaf(PAIR), pair_loss=bound, beta=0.5), weights)
    out.loss.backward()
    assert weights.grad is None
    assert delta.grad is None


# --- what is refused ---------------------------------------------------------------------------------------------


@over(
    ("chosen", "rejected", "error", "message"),
    [
        ([1.0], R, TypeError, "chosen_rewards must be an array"),
        (W, R[:1], ValueError, r"must both be \[B\]; got float64 \(2,\) and float64 \(1,\)"),
        (W[None], R[None], ValueError, r"must both be \[B\]; got float64 \(1, 2\)"),
        (W.astype(int), R, TypeError, "chosen_rewards must have a real floating dtype; got int64"),
        (W, torch.tensor(R), TypeError, "must be arrays of one library"),
    ],
)
@over("name", LOSSES)
def test_rewards_refused(name: str, chosen: object, rejected: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LOSSES[name](chosen, rejected, beta=0.5)


@over("beta", [0, -1.0, math.inf, math.nan, True, "0.1", None])
@over("name", LOSSES)
def test_betas_refused(name: str, beta: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"beta must be"):
        LOSSES[name](W, R, beta=beta)


@over(
    ("call", "error", "message"),
    [
        (
            lambda: pair_losses.robust(W, R, beta=1, label_smoothing=0.5),
            ValueError,
            r"label_smoothing must be in \[0, 0.5",
        ),
        (lambda: pair_losses.exo_pair(W, R, beta=1, label_smoothing=0), ValueError, "exo_pair must be above 0.*1e-3"),
        (lambda: pair_losses.sigmoid(W, R, beta=1, gamma=-1), ValueError, "gamma must be a finite number, at least 0"),
        (lambda: pair_losses.discopop(W, R, beta=1, tau=0), ValueError, "tau must be a finite number above 0"),
        (lambda: pair_losses.discopop(W, R, beta=1, tau=2), ValueError, r"tau must be in \(0, 1\]; got 2"),
        (
            lambda: pair_losses.bco_pair(W, R, beta=1, delta=math.inf),
            ValueError,
            "delta must be a finite number; got inf",
        ),
        (lambda: pair_losses.bco_pair(W, R, beta=1, delta=W), ValueError, r"delta must be a number or .* without axes"),
        (lambda: pair_losses.bco_pair(W, R, beta=1, delta="0"), TypeError, "delta must be a number"),
        (lambda: divergences.alpha_divergence(W, alpha=math.nan), ValueError, "alpha must be a finite number; got nan"),
        (lambda: divergences.forward_kl([1.0]), TypeError, "log_ratios must be an array"),
    ],
)
def test_numbers_refused(call: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_what_preference_loss_refuses() -> None:
    chosen, rejected = s.NUMPY.pair(PAIR)
    options = {"pair_loss": pair_losses.hinge, "beta": 0.5}
    alone = replace(rejected, ref_per_token_logps=None)
    for reward in (summed_log_ratio, mean_log_ratio):
        with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
            preference_loss(chosen, alone, reward=reward, **options)
    with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
        aot_loss(chosen, alone, beta=0.5)
    with pytest.raises(ValueError, match="beta must be a finite number above 0"):
        preference_loss(chosen, rejected, pair_loss=pair_losses.hinge, beta=0)
    with pytest.raises(ValueError, match=r"one loss per pair, \[B\] = \(3,\); got float64 \(\)"):
        preference_loss(chosen, rejected, pair_loss=lambda w, r, *, beta: np.mean(w - r), beta=0.5)
    named = "hinge"
    with pytest.raises(TypeError, match=r"pair_loss must be a function, as .*sigmoid is one; got 'hinge'"):
        preference_loss(chosen, rejected, pair_loss=named, beta=0.5)
    with pytest.raises(TypeError, match=r"reward must be a function, as .*mean_logp is one; got 'hinge'"):
        preference_loss(chosen, rejected, pair_loss=pair_losses.hinge, beta=0.5, reward=named)
    with pytest.raises(TypeError, match="rejected must be a Response"):
        preference_loss(chosen, None, **options)


def test_what_terms_and_weights_refuse() -> None:
    out = dpo_loss(*s.NUMPY.pair(PAIR), beta=0.5)
    short = dpo_loss(*s.NUMPY.pair(random_batch(2, 5, 4)), beta=0.5)
    for call, error, message in (
        (lambda: combine_losses(), ValueError, "at least one term"),
        (
            lambda: combine_losses(out),
            TypeError,
            r"a term must be a tuple \(weight, PreferenceLoss\); got PreferenceLoss",
        ),
        (
            lambda: combine_losses((-1.0, out)),
            ValueError,
            "weight of a term must be a finite number, at least 0; got -1.0",
        ),
        (lambda: combine_losses((math.nan, out)), ValueError, "weight of a term must be a finite number.*got nan"),
        (
            lambda: combine_losses((1.0, out), (1.0, short)),
            ValueError,
            r"losses must be \[B\] = \(3,\); got float64 \(2,\)",
        ),
        (lambda: weigh_pairs(out, np.ones(2)), ValueError, r"pair_weights must be \[B\] = \(3,\); got float64 \(2,\)"),
        (lambda: weigh_pairs(out, np.ones(3, dtype=int)), TypeError, "pair_weights must have a real floating dtype"),
        (lambda: weigh_pairs(out, [1.0] * 3), TypeError, "pair_weights must be an array"),
        (lambda: weigh_pairs(out, torch.ones(3)), TypeError, "must be arrays of one library"),
        (lambda: weigh_pairs(out, np.ones(3), total=0), ValueError, "total must be a finite number above 0; got 0"),
        (
            lambda: weigh_pairs(out, np.ones(3), total=np.ones(2)),
            ValueError,
            "total must be a number or an array without",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_oracle_speaks_of_every_loss() -> None:
    assert set(CALLS) == {*po.OF_ONE_PAIR, "aot", "aot_unpaired", "sft", "token_sft"}
