"""Losses and selection of pairs: worked values, pools, what is never hidden, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import oracle
import strategies as s
from oracle import Batch, Side
from selective_pref import (
    NonFiniteError,
    Response,
    check_finite,
    dpo_loss,
    excess_loss_scores,
    select,
    selective_dpo_loss,
    sft_loss,
    simpo_loss,
)
from strategies import FLOAT64, LOSSES, Backend, Loss, Settings, numpy_of

ids = {"ids": lambda value: getattr(value, "id", None)}
NAN, INF = math.nan, math.inf
T3, T2 = [[True] * 3], [[True] * 2]

# log-ratios: chosen 1, −2, 0.5; rejected −1, 3
PAIR = Batch(
    Side([[-1.0, -3.0, -0.5]], [[-2.0, -1.0, -1.0]], T3),
    Side([[-2.0, -1.0]], [[-1.0, -4.0]], T2),
)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- worked values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_dpo(backend: Backend) -> None:
    out = dpo_loss(*backend.pair(PAIR), beta=0.1)
    margin = 0.1 * ((1 - 2 + 0.5) - (-1 + 3))
    assert numpy_of(out.losses).tolist() == pytest.approx([-math.log(sigma(margin))], rel=1e-14)
    assert numpy_of(out.chosen_rewards).tolist() == pytest.approx([0.1 * -0.5])
    assert numpy_of(out.rejected_rewards).tolist() == pytest.approx([0.1 * 2.0])
    assert numpy_of(out.chosen_weights).tolist() == [[1, 1, 1]]
    assert float(out.loss) == pytest.approx(-math.log(sigma(margin)))


def test_label_smoothing_mixes_the_loss_of_the_flipped_pair() -> None:
    out = dpo_loss(*s.NUMPY.pair(PAIR), beta=0.1, label_smoothing=0.2)
    margin = 0.1 * (-0.5 - 2.0)
    expected = -0.8 * math.log(sigma(margin)) - 0.2 * math.log(sigma(-margin))
    assert out.losses.tolist() == pytest.approx([expected], rel=1e-14)


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_selective_dpo_keeps_the_chosen_tokens_with_the_lowest_log_ratio_and_the_rejected_with_the_highest(
    backend: Backend,
) -> None:
    out = selective_dpo_loss(*backend.pair(PAIR), beta=0.1, selection_ratio=0.4)  # K = 2 of 3 and 1 of 2
    assert numpy_of(out.chosen_weights).tolist() == [[0, 1, 1]]
    assert numpy_of(out.rejected_weights).tolist() == [[0, 1]]
    margin = 0.1 * ((-2 + 0.5) - 3)
    assert numpy_of(out.losses).tolist() == pytest.approx([math.log(1 + math.exp(-margin))], rel=1e-14)
    assert numpy_of(out.chosen_selected_rewards).tolist() == pytest.approx([0.1 * -1.5])
    assert numpy_of(out.rejected_selected_rewards).tolist() == pytest.approx([0.1 * 3.0])
    assert numpy_of(out.chosen_rewards).tolist() == pytest.approx([0.1 * -0.5])
    assert numpy_of(out.chosen.scores).tolist() == [[-1.0, 2.0, -0.5]]
    assert numpy_of(out.rejected.scores).tolist() == [[-1.0, 3.0]]


def test_simpo_has_gamma_in_units_of_the_reward() -> None:
    out = simpo_loss(*s.NUMPY.pair(PAIR), beta=2.0, gamma=0.5)
    margin = 2.0 * ((-1 - 3 - 0.5) / 3 - (-2 - 1) / 2) - 0.5
    assert out.losses.tolist() == pytest.approx([-math.log(sigma(margin))], rel=1e-14)
    assert out.chosen_rewards.tolist() == pytest.approx([2.0 * -4.5 / 3])
    assert out.rejected_rewards.tolist() == pytest.approx([2.0 * -3 / 2])


def test_sft_is_the_mean_negative_log_likelihood_of_the_chosen_side() -> None:
    out = sft_loss(*s.NUMPY.pair(PAIR))
    assert out.losses.tolist() == pytest.approx([(1 + 3 + 0.5) / 3])
    assert out.rejected_rewards.tolist() == pytest.approx([(-2 - 1) / 2])


def test_selective_supervised_training_is_sft_of_tokens_with_excess_loss() -> None:
    out = sft_loss(*select(*s.NUMPY.pair(PAIR), selection_ratio=0.3, scores=excess_loss_scores))
    assert out.losses.tolist() == [3.0]  # the token that the reference likes best, compared with the policy


@pytest.mark.parametrize("loss", s.named("simpo", "simpo-smoothed", "sft"), **ids)
def test_reference_free_losses_need_no_reference(loss: Loss) -> None:
    with_reference = s.NUMPY.pair(PAIR)
    without = tuple(replace(side, ref_per_token_logps=None) for side in with_reference)
    assert loss(*without, Settings()).losses.tolist() == loss(*with_reference, Settings()).losses.tolist()


def test_the_loss_is_the_mean_over_pairs() -> None:
    side = Side([[-1.0], [-5.0]], [[-2.0], [-2.0]], [[True], [True]])
    out = dpo_loss(*s.NUMPY.pair(Batch(side, Side([[-1.0]] * 2, [[-1.0]] * 2, [[True]] * 2))), beta=1.0)
    assert out.losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))])
    assert float(out.loss) == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2)


@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_large_margins_neither_overflow_nor_lose_their_gradient(margin: float) -> None:
    chosen, rejected = s.torch_leaf(Batch(Side([[margin]], [[0.0]], [[True]]), Side([[0.0]], [[0.0]], [[True]])))
    out = dpo_loss(chosen, rejected, beta=1.0)
    out.loss.backward()
    assert out.losses.tolist() == [max(-margin, 0.0)]
    assert chosen.per_token_logps.grad.tolist() == [[-1.0 if margin < 0 else 0.0]]


def test_gradients_are_beta_sigma_times_the_weight_and_exactly_0_elsewhere() -> None:
    chosen, rejected = s.torch_leaf(PAIR)
    selective_dpo_loss(chosen, rejected, beta=0.1, selection_ratio=0.4).loss.backward()
    pull = 0.1 * sigma(-0.1 * (-1.5 - 3))
    assert chosen.per_token_logps.grad.tolist() == [[0.0, pytest.approx(-pull), pytest.approx(-pull)]]
    assert rejected.per_token_logps.grad.tolist() == [[0.0, pytest.approx(pull)]]


def test_numbers_may_be_numpy_scalars_and_integers() -> None:
    for one in (1, np.float32(1), np.float64(1), np.int64(1)):
        out = selective_dpo_loss(*s.TORCH.pair(PAIR), beta=one, selection_ratio=one)
        assert out.losses.tolist() == dpo_loss(*s.TORCH.pair(PAIR), beta=1.0).losses.tolist()


# --- select ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_pools(backend: Backend) -> None:
    """Scores: chosen (−1, 2, −0.5), rejected (−1, 3); chosen (0, 4, 1), rejected (5, −6)."""
    batch = Batch(
        Side([*PAIR.chosen.policy, [0.0, -4.0, -1.0]], [*PAIR.chosen.ref, [0.0] * 3], T3 * 2),
        Side([*PAIR.rejected.policy, [0.0, -6.0]], [*PAIR.rejected.ref, [-5.0, 0.0]], T2 * 2),
    )
    expected = {
        "response": ([[0, 1, 1], [0, 1, 1]], [[0, 1], [1, 0]]),  # 2 of 3 and 1 of 2
        "pair": ([[0, 1, 0], [0, 1, 0]], [[0, 1], [1, 0]]),  # 2 of 5
        "batch": ([[0, 1, 0], [0, 1, 0]], [[0, 1], [1, 0]]),  # 4 of 10
    }
    for pool, weights in expected.items():
        selected = select(*backend.pair(batch), selection_ratio=0.4, pool=pool)
        assert tuple(numpy_of(side.weights).tolist() for side in selected) == weights
    pair = select(*backend.pair(batch), selection_ratio=0.2, pool="pair")  # 1 of 5
    assert [numpy_of(side.weights).tolist() for side in pair] == [[[0] * 3] * 2, [[0, 1], [1, 0]]]
    whole = select(*backend.pair(batch), selection_ratio=0.1, pool="batch")  # 1 of 10
    assert [numpy_of(side.weights).tolist() for side in whole] == [[[0] * 3] * 2, [[0, 0], [1, 0]]]


def test_pools_count_the_tokens_of_the_pool_only() -> None:
    """Lengths 1 and 3: K is 1 and 2 by response, 2 by pair."""
    batch = Batch(
        Side([[-1.0, NAN, 7.0]], [[0.0, NAN, 7.0]], [[True, False, False]]),
        Side([[0.0, -1.0, -2.0]], [[-9.0, -9.0, -9.0]], T3),
    )
    by_response = select(*s.NUMPY.pair(batch), selection_ratio=0.5)
    assert [side.weights.tolist() for side in by_response] == [[[1, 0, 0]], [[1, 1, 0]]]
    by_pair = select(*s.NUMPY.pair(batch), selection_ratio=0.5, pool="pair")
    assert [side.weights.tolist() for side in by_pair] == [[[0, 0, 0]], [[1, 1, 0]]]


@pytest.mark.parametrize("equal_widths", [True, False])
@pytest.mark.parametrize("pool", ["response", "pair", "batch"])
@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_scores_given_replace_the_alignment_score(backend: Backend, pool: str, equal_widths: bool) -> None:
    batch = (
        PAIR
        if not equal_widths
        else Batch(PAIR.chosen, Side([[-2.0, -1.0, NAN]], [[-1.0, -4.0, NAN]], [[True, True, False]]))
    )
    given = ([[9.0, 8.0, -1.0]], [[2.0, 1.0] + [INF] * equal_widths])
    arrays = tuple(backend.array(scores) for scores in given)
    expected = {
        "response": [[[1, 1, 0]], [[1, 0] + [0] * equal_widths]],
        "pair": [[[1, 1, 0]], [[0, 0] + [0] * equal_widths]],
        "batch": [[[1, 1, 0]], [[0, 0] + [0] * equal_widths]],
    }[pool]
    for scores in (arrays, list(arrays), lambda chosen, rejected: arrays):
        sides = select(*backend.pair(batch), selection_ratio=0.4, scores=scores, pool=pool)
        assert [numpy_of(side.weights).tolist() for side in sides] == expected
        for side, array in zip(sides, arrays, strict=True):
            assert numpy_of(side.scores).tolist() == numpy_of(array).tolist()


@pytest.mark.parametrize("backend", FLOAT64, **ids)
@pytest.mark.parametrize("same_width", [True, False])
def test_a_ratio_for_each_side(backend: Backend, same_width: bool) -> None:
    rejected = Side([[-2.0, -1.0, -3.0]], [[-1.0, -4.0, -3.0]], T3) if same_width else PAIR.rejected
    pair = backend.pair(Batch(PAIR.chosen, rejected))  # scores −1, 2, −0.5; −1, 3 (and 0)
    for ratios in ((0.7, 0.2), [0.7, 0.2]):
        sides = select(*pair, selection_ratio=ratios)
        assert [numpy_of(side.weights).tolist() for side in sides] == [[[1, 1, 1]], [[0, 1] + [0] * same_width]]
        out = selective_dpo_loss(*pair, beta=0.1, selection_ratio=ratios)
        assert numpy_of(out.losses).tolist() == pytest.approx([math.log(1 + math.exp(-0.1 * (-0.5 - 3)))])
    equal, one = (select(*pair, selection_ratio=ratio) for ratio in ((0.4, 0.4), 0.4))
    assert [numpy_of(side.weights).tolist() for side in equal] == [numpy_of(side.weights).tolist() for side in one]


@pytest.mark.parametrize("pool", ["response", "pair", "batch"])
def test_a_threshold_under_every_pool(pool: str) -> None:
    """Scores −1, 2, −0.5 and −1, 3: above 0 stand one token of each side, above 2 only the rejected one."""
    for tau, expected in ((0.0, [[[0, 1, 0]], [[0, 1]]]), (2.0, [[[0, 0, 0]], [[0, 1]]])):
        sides = select(*s.NUMPY.pair(PAIR), selection_ratio=1, min_score=tau, pool=pool)
        assert [side.weights.tolist() for side in sides] == expected
        out = selective_dpo_loss(*s.NUMPY.pair(PAIR), beta=0.1, selection_ratio=1, min_score=tau, pool=pool)
        assert [out.chosen_weights.tolist(), out.rejected_weights.tolist()] == expected


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"selection_ratio": (0.4, 0.1), "pool": "pair"}, ValueError, r"two selection .*'response'; got \(0.4, 0.1\)"),
        ({"selection_ratio": (0.4, 0.1), "pool": "batch"}, ValueError, "two selection ratios need .* one budget"),
        ({"selection_ratio": (0.4,)}, ValueError, r"a pair of numbers \(chosen, rejected\); got \(0.4,\)"),
        ({"selection_ratio": (0.4, 0.3, 0.1)}, ValueError, "a pair of numbers"),
        ({"selection_ratio": (0.4, 10)}, ValueError, r"must be in \(0, 1\].*got 10 \(a percentage"),
        ({"selection_ratio": (0.4, "0.1")}, TypeError, "selection_ratio must be a number"),
        ({"min_score": NAN}, ValueError, "min_score must be a finite number; got nan"),
        ({"min_score": "0"}, TypeError, "min_score must be a number"),
    ],
)
def test_two_ratios_and_thresholds_refused(changes: dict, error: type[Exception], message: str) -> None:
    for call, numbers in ((select, {}), (selective_dpo_loss, {"beta": 0.1})):
        with pytest.raises(error, match=message):
            call(*s.NUMPY.pair(PAIR), **{"selection_ratio": 0.4, **numbers, **changes})


@pytest.mark.parametrize("bad", [-0.5, NAN, INF, -INF])
@pytest.mark.parametrize("loss", [dpo_loss, lambda *pair, beta: simpo_loss(*pair, beta=beta, gamma=0.0)])
def test_a_weight_that_is_negative_or_not_finite_makes_its_pair_nan(loss: Callable, bad: float) -> None:
    batch = Batch(*(Side(*(field * 2 for field in side)) for side in PAIR))
    chosen, rejected = s.TORCH.pair(batch)
    weights = torch.ones(2, 3, dtype=torch.float64)
    weights[1, 2] = bad
    losses = loss(replace(chosen, weights=weights), rejected, beta=0.1).losses
    assert torch.isfinite(losses).tolist() == [True, False]
    with pytest.raises(NonFiniteError, match=r"weights\): rows 1 \(tokens 2\)"):
        check_finite(replace(chosen, weights=weights))
    off = replace(chosen, weights=weights, mask=chosen.mask & (weights == 1))
    check_finite(off)
    assert torch.isfinite(loss(off, rejected, beta=0.1).losses).all()


def test_weights_may_be_above_1() -> None:
    chosen, rejected = s.NUMPY.pair(PAIR)
    out = dpo_loss(replace(chosen, weights=np.array([[4.5, 1.0, 0.0]])), rejected, beta=1.0)
    assert out.losses.tolist() == pytest.approx([math.log(1 + math.exp(-((4.5 - 2) - 2)))])


def test_select_replaces_weights_and_changes_nothing_else() -> None:
    chosen, rejected = s.NUMPY.pair(PAIR)
    weighted = replace(chosen, weights=np.array([[0.0, 0.0, 1.0]]))
    fresh, again = (select(side, rejected, selection_ratio=0.4)[0] for side in (chosen, weighted))
    assert fresh.weights.tolist() == again.weights.tolist()
    assert again.per_token_logps is chosen.per_token_logps
    assert weighted.weights.tolist() == [[0.0, 0.0, 1.0]]


def test_weights_that_responses_carry_are_honoured() -> None:
    chosen, rejected = s.NUMPY.pair(PAIR)
    chosen = replace(chosen, weights=np.array([[0.5, 0.0, 1.0]]))
    out = dpo_loss(chosen, rejected, beta=1.0)
    assert out.losses.tolist() == pytest.approx([math.log(1 + math.exp(-((0.5 * 1 + 0.5) - 2)))])
    assert out.chosen_rewards.tolist() == [1 - 2 + 0.5]
    assert out.chosen_selected_rewards.tolist() == [1.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_are_subtracted_in_float32(dtype: str) -> None:
    """255 and 254.9921875 are one number in bf16 and in fp16: subtracted there, the two tokens would tie."""
    side = Side([[-256.0, -256.0]], [[-1.0, -1.0078125]], T2)
    chosen, rejected = select(*Backend("torch", dtype).pair(Batch(side, side)), selection_ratio=0.5)
    assert chosen.weights.tolist() == [[1.0, 0.0]]
    assert rejected.weights.tolist() == [[0.0, 1.0]]


# --- not finite --------------------------------------------------------------------------------------------------

CLEAN = Batch(
    Side([[-1.0, -3.0, -0.5]] * 3, [[-2.0, -1.0, -1.0]] * 3, T3 * 3),
    Side([[-2.0, -1.0, -3.0]] * 3, [[-1.0, -4.0, -3.0]] * 3, T3 * 3),
)
READ = {  # what a loss reads: (side, field)
    "dpo": [(0, "policy"), (0, "ref"), (1, "policy"), (1, "ref")],
    "simpo": [(0, "policy"), (1, "policy")],
    "sft": [(0, "policy")],
}


def spoiled(side: int, field: str, token: int, bad: float) -> Batch:
    """CLEAN with one bad value in row 1."""
    rows = [list(row) for row in getattr(CLEAN[side], field)]
    rows[1][token] = bad
    sides = list(CLEAN)
    sides[side] = sides[side]._replace(**{field: rows})
    return Batch(*sides)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("backend", "loss"),
    [
        *((backend, loss) for backend in (s.NUMPY, s.TORCH, Backend("torch", "bfloat16")) for loss in LOSSES),
        *((s.JAX, loss) for loss in s.named("selective", "simpo")),
    ],
    **ids,
)
def test_what_is_not_finite_inside_the_mask_makes_its_pair_not_finite(backend: Backend, loss: Loss, bad: float) -> None:
    """Any value, either side, every token, selected or not; other pairs keep their loss unless they share the pool."""
    clean = numpy_of(loss(*backend.pair(CLEAN), Settings()).losses)
    assert np.all(np.isfinite(clean))
    tokens = range(3) if backend is not s.JAX else (1,)
    with np.errstate(invalid="ignore"):
        for side, field in READ[loss.family]:
            for token in tokens:
                losses = numpy_of(loss(*backend.pair(spoiled(side, field, token, bad)), Settings()).losses)
                assert not np.isfinite(losses[1])
                if loss.pool != "batch":
                    assert losses[[0, 2]].tolist() == clean[[0, 2]].tolist()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.family == "dpo"], **ids)
def test_its_gradient_is_not_finite_either(loss: Loss, bad: float) -> None:
    for side, field in READ["dpo"]:
        for token in range(3):
            grads = s.gradients(loss, spoiled(side, field, token, bad), Settings())
            for grad in grads:
                assert not np.any(np.isfinite(grad[1]))
                if loss.pool != "batch":
                    assert np.all(np.isfinite(grad[[0, 2]]))


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_a_policy_of_nothing_but_nan_has_no_finite_loss(loss: Loss) -> None:
    rows = [[NAN] * 3] * 3
    batch = Batch(*(side._replace(policy=rows) for side in CLEAN))
    assert not np.any(np.isfinite(numpy_of(loss(*s.TORCH.pair(batch), Settings()).losses)))


@pytest.mark.parametrize("bad", [INF, -INF])
def test_equal_infinities_do_not_cancel(bad: float) -> None:
    batch = Batch(*(Side([[bad, -1.0]], [[-1.0, -2.0]], T2) for _ in range(2)))
    for loss in s.named("dpo", "simpo", "selective"):
        assert not np.isfinite(loss(*s.TORCH.pair(batch), Settings()).losses.item())


@pytest.mark.parametrize("ties", ["share", "first", "all"])
@pytest.mark.parametrize("pool", ["response", "pair", "batch"])
@pytest.mark.parametrize("token", [0, 1, 2])
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_among_custom_scores_is_not_hidden(side: int, token: int, pool: str, ties: str) -> None:
    chosen, rejected = s.TORCH.pair(CLEAN)
    scores = [torch.arange(9.0).double().reshape(3, 3) for _ in range(2)]
    scores[side][1, token] = NAN
    out = selective_dpo_loss(
        chosen, rejected, beta=1.0, selection_ratio=0.4, scores=tuple(scores), pool=pool, ties=ties
    )
    assert not np.isfinite(out.losses[1].item())
    if pool != "batch":
        assert np.isfinite(numpy_of(out.losses)[[0, 2]]).all()


# --- empty responses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", s.GARBAGE)
@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_an_empty_response_weighs_and_is_worth_nothing(loss: Loss, junk: float) -> None:
    empty = Side([[junk] * 2, [-1.0, -2.0]], [[junk] * 2, [-2.0, -2.0]], [[False] * 2, [True] * 2])
    other = Side([[-1.0], [-2.0]], [[-3.0], [-2.0]], [[True]] * 2)
    for batch, number in ((Batch(empty, other), 0), (Batch(other, empty), 1)):
        out = loss(*s.TORCH.pair(batch), Settings())
        rewards = (out.chosen_rewards, out.rejected_rewards)[number]
        selected = (out.chosen_selected_rewards, out.rejected_selected_rewards)[number]
        assert (rewards[0].item(), selected[0].item()) == (0.0, 0.0)
        assert (out.chosen_weights, out.rejected_weights)[number][0].tolist() == [0.0, 0.0]
        assert torch.isfinite(out.losses).all()
        grad = s.gradients(loss, batch, Settings())[number]
        assert grad[0].tolist() == [0.0, 0.0]
        assert np.all(np.isfinite(s.gradients(loss, batch, Settings())[1 - number]))


def test_two_empty_responses_cost_log_two() -> None:
    nothing = Side([[]], [[]], [[]])
    for loss in (loss for loss in LOSSES if loss.family == "dpo"):
        assert loss(*s.NUMPY.pair(Batch(nothing, nothing)), Settings()).losses.tolist() == pytest.approx([math.log(2)])


# --- what is refused ---------------------------------------------------------------------------------------------

BAD_BETAS = [
    (0, ValueError, "beta must be a finite number above 0; got 0"),
    (-0.1, ValueError, "beta must be a finite number above 0; got -0.1"),
    (INF, ValueError, "beta must be a finite number above 0; got inf"),
    (NAN, ValueError, "beta must be a finite number above 0; got nan"),
    (True, TypeError, "beta must be a number.*got bool True"),
    ("0.1", TypeError, "beta must be a number.*got str '0.1'"),
    (None, TypeError, "beta must be a number.*got NoneType"),
    (Fraction(1, 10), TypeError, "beta must be a number.*got Fraction"),
    (torch.tensor(0.1), TypeError, "beta must be a number.*got Tensor"),
    (np.array(0.1), TypeError, "beta must be a number.*got ndarray"),
    (jnp.asarray(0.1), TypeError, "beta must be a number.*got ArrayImpl"),
]
WITH_BETA = {
    "dpo": dpo_loss,
    "selective": lambda *pair, **numbers: selective_dpo_loss(*pair, selection_ratio=0.4, **numbers),
    "simpo": lambda *pair, **numbers: simpo_loss(*pair, gamma=0.0, **numbers),
}


@pytest.mark.parametrize(("beta", "error", "message"), BAD_BETAS, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("name", WITH_BETA)
def test_betas_refused(name: str, beta: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WITH_BETA[name](*s.NUMPY.pair(PAIR), beta=beta)


@pytest.mark.parametrize(
    ("smoothing", "error", "message"),
    [
        (0.5, ValueError, r"label_smoothing must be in \[0, 0.5\); got 0.5"),
        (-0.01, ValueError, r"label_smoothing must be in \[0, 0.5\); got -0.01"),
        (NAN, ValueError, "got nan"),
        (INF, ValueError, "got inf"),
        (True, TypeError, "label_smoothing must be a number.*got bool"),
        ("0", TypeError, "label_smoothing must be a number.*got str"),
        (torch.tensor(0.1), TypeError, "label_smoothing must be a number.*got Tensor"),
    ],
)
@pytest.mark.parametrize("name", WITH_BETA)
def test_label_smoothings_refused(name: str, smoothing: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WITH_BETA[name](*s.NUMPY.pair(PAIR), beta=0.1, label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("gamma", "error", "message"),
    [
        (-0.1, ValueError, "gamma must be a finite number, at least 0; got -0.1"),
        (INF, ValueError, "got inf"),
        (NAN, ValueError, "got nan"),
        (True, TypeError, "gamma must be a number.*got bool"),
        (torch.tensor(0.1), TypeError, "gamma must be a number.*got Tensor"),
    ],
)
def test_gammas_refused(gamma: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simpo_loss(*s.NUMPY.pair(PAIR), beta=2.0, gamma=gamma)


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("ratio", [0.4, 1])
def test_a_missing_reference_is_an_error_and_never_plain_dpo(missing: int, ratio: float) -> None:
    pair = list(s.NUMPY.pair(PAIR))
    pair[missing] = replace(pair[missing], ref_per_token_logps=None)
    for call in (
        lambda: dpo_loss(*pair, beta=0.1),
        lambda: selective_dpo_loss(*pair, beta=0.1, selection_ratio=ratio),
        lambda: selective_dpo_loss(*pair, beta=0.1, selection_ratio=ratio, scores=(np.zeros((1, 3)), np.zeros((1, 2)))),
        lambda: select(*pair, selection_ratio=ratio),
    ):
        with pytest.raises(ValueError, match=r"ref_per_token_logps is missing.*Pass the reference model's"):
            call()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"selection_ratio": 0}, ValueError, r"selection_ratio must be in \(0, 1\].*got 0"),
        ({"selection_ratio": 40}, ValueError, "got 40"),
        ({"selection_ratio": NAN}, ValueError, "got nan"),
        ({"selection_ratio": True}, TypeError, "got bool"),
        ({"selection_ratio": torch.tensor(0.4)}, TypeError, "got Tensor"),
        ({"pool": "sequence"}, ValueError, "pool must be 'response', 'pair' or 'batch'; got 'sequence'"),
        ({"pool": None}, ValueError, "pool must be .*; got None"),
        ({"ties": "random"}, ValueError, "ties must be 'share', 'first' or 'all'; got 'random'"),
        ({"scores": "random"}, TypeError, r"scores must be None, a function .*\[B T_l\]; got str"),
        ({"scores": np.zeros((1, 3))}, TypeError, "scores must be None, a function .*; got ndarray"),
        ({"scores": lambda chosen, rejected: np.zeros((2, 3))}, TypeError, "scores must be None, .*; got ndarray"),
        ({"scores": (np.zeros((1, 3)),)}, TypeError, "scores must be None, a function .*; got tuple"),
        (
            {"scores": (np.zeros((1, 3)), np.zeros((1, 3)))},
            ValueError,
            r"scores must be .*\(1, 2\); got float64 \(1, 3\)",
        ),
        ({"scores": (np.zeros((1, 3)), np.zeros(2))}, ValueError, r"scores must be .*\(1, 2\); got float64 \(2,\)"),
        (
            {"scores": (np.zeros((1, 3)), np.zeros((1, 2), dtype=int))},
            TypeError,
            "scores must have a real floating dtype",
        ),
        (
            {"scores": (np.zeros((1, 3)), torch.zeros(1, 2))},
            TypeError,
            "scores and per_token_logps must be arrays of one",
        ),
        ({"scores": ([[0.0] * 3], [[0.0] * 2])}, TypeError, "scores must be an array .*; got list"),
        (
            {"scores": lambda chosen, rejected: (np.zeros((2, 3)), np.zeros((1, 2)))},
            ValueError,
            r"got float64 \(2, 3\)",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_selections_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    for call, numbers in ((select, {}), (selective_dpo_loss, {"beta": 0.1})):
        with pytest.raises(error, match=message):
            call(*s.NUMPY.pair(PAIR), **{"selection_ratio": 0.4, **numbers, **changes})


def test_numbers_have_names_and_beta_no_default() -> None:
    pair = s.NUMPY.pair(PAIR)
    for call, numbers in (
        (dpo_loss, {}),
        (selective_dpo_loss, {"selection_ratio": 0.4}),
        (selective_dpo_loss, {"beta": 0.1}),
        (simpo_loss, {"beta": 0.1}),
        (select, {}),
    ):
        with pytest.raises(TypeError, match="required keyword-only argument"):
            call(*pair, **numbers)
        with pytest.raises(TypeError, match="positional argument"):
            call(*pair, 0.1, **numbers)


def test_every_function_is_the_sentence_it_claims_to_be() -> None:
    pair = s.NUMPY.pair(CLEAN)
    options = {"selection_ratio": 0.4, "pool": "pair", "ties": "first"}
    one = selective_dpo_loss(*pair, beta=0.3, label_smoothing=0.1, **options)
    two = dpo_loss(*select(*pair, **options), beta=0.3, label_smoothing=0.1)
    assert one.losses.tolist() == two.losses.tolist()
    by_hand = oracle.losses("dpo", CLEAN, oracle.select(CLEAN, 0.4, "pair", "first"), beta=0.3, label_smoothing=0.1)
    assert one.losses.tolist() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_reference_is_not_hidden_from_a_selective_loss_that_does_not_read_it(broken: float) -> None:
    """SimPO reads no reference, but its selection does: an infinity must not pass for a very high or low score."""
    logps, ref = np.full((2, 4), -1.0), np.full((2, 4), -1.5)
    ref[0, 2] = broken
    mask = np.ones((2, 4), dtype=bool)
    good = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=np.full((2, 4), -1.5))
    bad = Response(per_token_logps=logps, mask=mask, ref_per_token_logps=ref)
    for pair in ((bad, good), (good, bad)):
        with np.errstate(invalid="ignore"):
            losses = simpo_loss(*select(*pair, selection_ratio=0.5), beta=1.0, gamma=0.0).losses
        assert np.isfinite(losses).tolist() == [False, True]
