"""The laws of the library, each over every loss for which it holds.

Supervised and SimPO losses with the alignment score select by one number and are worth another, so the laws of convex
and monotone losses speak of their unselected forms; so does "all" under ties, which keeps more than K tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import oracle
import strategies as s
from oracle import Batch
from selective_pref import PreferenceLoss, Response, dpo_loss, select, selective_dpo_loss, top_fraction_weights
from strategies import (
    BETAS,
    EVERY_DTYPE,
    FLOAT64,
    LOSSES,
    NUMPY,
    RATIOS,
    SETTINGS,
    TORCH,
    Backend,
    Loss,
    Settings,
    batches,
    except_for,
    moved,
    named,
    numpy_of,
)

over = pytest.mark.parametrize
ids = {"ids": lambda value: getattr(value, "id", None)}
few = settings(max_examples=8)

SELECTIVE = [loss for loss in LOSSES if loss.selective]
WITH_REFERENCE = [loss for loss in LOSSES if loss.family == "dpo"]
SIDE_BY_SIDE = except_for("selective-batch")  # one pair does not see another
MONOTONE = named("dpo", "simpo", "sft", "selective", "selective-pair", "selective-first")
CONVEX = [*MONOTONE, *named("dpo-smoothed", "simpo-smoothed")]
SWAPPED = named("dpo", "simpo", "selective", "selective-pair", "selective-first")


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(numpy_of(actual), numpy_of(expected), rtol=tolerance, atol=tolerance)


def same(actual: object, expected: object) -> None:
    np.testing.assert_array_equal(numpy_of(actual), numpy_of(expected))


def weights_of(out: PreferenceLoss) -> list[np.ndarray]:
    return [numpy_of(out.chosen_weights), numpy_of(out.rejected_weights)]


# --- agreement ---------------------------------------------------------------------------------------------------


@over("backend", FLOAT64, **ids)
@over("loss", LOSSES, **ids)
@few
@given(data=st.data(), numbers=SETTINGS)
def test_agrees_with_the_oracle(loss: Loss, backend: Backend, data: st.DataObject, numbers: Settings) -> None:
    batch = data.draw(batches(values=data.draw(st.sampled_from([s.WHOLE, s.REAL]))))
    out = loss(*backend.pair(batch), numbers)
    weights = loss.weights(batch, numbers)
    close(out.losses, oracle.losses(loss.family, batch, weights, **loss.numbers(numbers)))
    close(
        out.loss, math.fsum(oracle.losses(loss.family, batch, weights, **loss.numbers(numbers))) / out.losses.shape[0]
    )
    for actual, expected in zip(weights_of(out), weights, strict=True):
        close(actual, np.reshape(expected, actual.shape))
    reward = oracle.summed_log_ratio if loss.family == "dpo" else oracle.mean_logp
    beta = loss.steepness(numbers)
    for side, sums, selected, whole, kept in (
        (batch.chosen, oracle.full(batch)[0], weights[0], out.chosen_rewards, out.chosen_selected_rewards),
        (batch.rejected, oracle.full(batch)[1], weights[1], out.rejected_rewards, out.rejected_selected_rewards),
    ):
        close(whole, [beta * r for r in reward(side, sums)])
        close(kept, [beta * r for r in reward(side, selected)])


@over("loss", LOSSES, **ids)
@given(data=st.data(), numbers=SETTINGS)
def test_the_gradient_is_the_closed_form_and_exactly_zero_where_the_weight_is(
    loss: Loss, data: st.DataObject, numbers: Settings
) -> None:
    batch = data.draw(batches(values=data.draw(st.sampled_from([s.WHOLE, s.REAL]))))
    weights = loss.weights(batch, numbers)
    expected = oracle.gradients(loss.family, batch, weights, **loss.numbers(numbers))
    for grad, by_hand, weight in zip(s.gradients(loss, batch, numbers), expected, weights, strict=True):
        close(grad, np.reshape(by_hand, grad.shape))
        assert not np.any(grad[np.reshape(weight, grad.shape) == 0])


@over("dtype", [torch.bfloat16, torch.float16], ids=str)
@over("loss", LOSSES, **ids)
@few
@given(data=st.data(), numbers=st.builds(Settings, beta=st.sampled_from([0.1, 0.5]), ratio=RATIOS))
def test_low_precision_error_is_within_the_naive_one(
    loss: Loss, dtype: torch.dtype, data: st.DataObject, numbers: Settings
) -> None:
    batch = data.draw(batches(values=s.REAL, max_width=12))
    rounded = Batch(*(side._replace(policy=_round(side.policy, dtype), ref=_round(side.ref, dtype)) for side in batch))
    out = loss(*Backend("torch", str(dtype).removeprefix("torch.")).pair(rounded), numbers)
    assert out.losses.dtype == torch.float32
    weights = [numpy_of(w).tolist() for w in weights_of(out)]
    truth = oracle.losses(loss.family, rounded, weights, **loss.numbers(numbers))
    naive = _naive_losses(loss, rounded, weights, numbers, dtype)
    error = np.abs(numpy_of(out.losses) - truth)
    assert np.all(error <= np.abs(naive - truth) + 1e-5 * (1 + np.abs(truth)))
    for actual, expected in zip(weights, loss.weights(rounded, numbers), strict=True):
        np.testing.assert_allclose(actual, np.reshape(expected, np.shape(actual)), atol=1e-6)


def _round(rows: oracle.Rows, dtype: torch.dtype) -> oracle.Rows:
    return torch.tensor(rows, dtype=torch.float64).to(dtype).double().tolist()


def _naive_losses(
    loss: Loss, batch: Batch, weights: list[oracle.Rows], numbers: Settings, dtype: torch.dtype
) -> np.ndarray:
    """Everything in the low precision, as most code in the field has it."""
    rewards = []
    for side, rows in zip(batch, weights, strict=True):
        mask = torch.tensor(side.mask, dtype=torch.bool)
        weight = torch.tensor(rows, dtype=dtype)
        policy = torch.where(mask, torch.tensor(side.policy, dtype=dtype), 0)
        ref = torch.where(mask, torch.tensor(side.ref, dtype=dtype), 0)
        if loss.family == "dpo":
            rewards.append((weight * (policy - ref)).sum(-1))
        else:
            rewards.append((weight * policy).sum(-1) / weight.sum(-1).clamp(min=1e-6))
    if loss.family == "sft":
        return numpy_of(-rewards[0])
    gamma = numbers.gamma if loss.family == "simpo" else 0.0
    margins = numbers.beta * (rewards[0] - rewards[1]) - gamma
    smoothing = numbers.label_smoothing if loss.smoothed else 0.0
    log_sigmoid = torch.nn.functional.logsigmoid
    return numpy_of(-(1 - smoothing) * log_sigmoid(margins) - smoothing * log_sigmoid(-margins))


# --- ratio 1 and step 0 ------------------------------------------------------------------------------------------


@over("backend", EVERY_DTYPE, **ids)
@over("loss", SELECTIVE, **ids)
@few
@given(batch=batches(values=s.REAL.map(lambda x: round(x, 2))), beta=BETAS)
def test_ratio_one_is_the_plain_loss_bit_by_bit(loss: Loss, backend: Backend, batch: Batch, beta: float) -> None:
    chosen, rejected = backend.pair(batch)
    for one in (1, 1.0):
        numbers = Settings(beta=beta, ratio=one)
        out, plain = loss(chosen, rejected, numbers), loss.plain()(chosen, rejected, numbers)
        same(out.losses, plain.losses)
        same(out.chosen_weights, numpy_of(chosen.mask).astype(float))
        same(out.rejected_weights, numpy_of(rejected.mask).astype(float))
        same(out.chosen_rewards, out.chosen_selected_rewards)


@over("loss", SELECTIVE, **ids)
@few
@given(batch=batches(values=s.REAL), beta=BETAS)
def test_ratio_one_has_the_plain_gradient_bit_by_bit(loss: Loss, batch: Batch, beta: float) -> None:
    numbers = Settings(beta=beta, ratio=1)
    for actual, expected in zip(
        s.gradients(loss, batch, numbers), s.gradients(loss.plain(), batch, numbers), strict=True
    ):
        same(actual, expected)


@over("backend", EVERY_DTYPE, **ids)
@over("loss", WITH_REFERENCE, **ids)
@few
@given(batch=batches(self_referenced=True), numbers=SETTINGS)
def test_policy_equal_to_reference_costs_log_two(loss: Loss, backend: Backend, batch: Batch, numbers: Settings) -> None:
    close(loss(*backend.pair(batch), numbers).losses, [math.log(2)] * len(batch.chosen.mask), 2 * backend.epsilon)


@given(batch=batches(self_referenced=True), numbers=SETTINGS)
def test_the_first_self_referenced_step_is_dpo_scaled_token_by_token(batch: Batch, numbers: Settings) -> None:
    selected = s.gradients(s.BY_NAME["selective"], batch, numbers)
    plain = s.gradients(s.BY_NAME["dpo"], batch, numbers)
    for grad, whole, side in zip(selected, plain, batch, strict=True):
        counts = [sum(row) for row in side.mask]
        scale = [oracle.keep_count(numbers.ratio, n) / n if n else 0.0 for n in counts]
        close(grad, whole * np.reshape(scale, (-1, 1)))


# --- what does not matter ----------------------------------------------------------------------------------------


@over("loss", LOSSES, **ids)
@given(batch=batches(), data=st.data(), numbers=SETTINGS)
def test_padding_and_masked_content_are_inert(loss: Loss, batch: Batch, data: st.DataObject, numbers: Settings) -> None:
    padded, kept = [], []
    for side in batch:
        left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        junk = [data.draw(st.sampled_from(s.GARBAGE)) for _ in range(3)]

        def fill(rows: oracle.Rows, mask: list[list[bool]], around: tuple = (left, right), junk: list = junk) -> list:
            return [
                [junk[0]] * around[0]
                + [x if here else junk[2] for x, here in zip(*row, strict=True)]
                + [junk[1]] * around[1]
                for row in zip(rows, mask, strict=True)
            ]

        mask = [[False] * left + row + [False] * right for row in side.mask]
        padded.append(oracle.Side(fill(side.policy, side.mask), fill(side.ref, side.mask), mask))
        kept.append(slice(left, left + len(side.mask[0])))
    before, after = (loss(*TORCH.pair(b), numbers) for b in (batch, Batch(*padded)))
    close(after.losses, before.losses)
    for number, (grad, expected) in enumerate(
        zip(s.gradients(loss, Batch(*padded), numbers), s.gradients(loss, batch, numbers), strict=True)
    ):
        here = np.array(padded[number].mask, dtype=bool)
        assert not np.any(grad[~here])
        close(grad[:, kept[number]], expected)
        assert not np.any(weights_of(after)[number][~here])
        same(weights_of(after)[number][:, kept[number]], weights_of(before)[number])


@over("backend", [NUMPY, TORCH], **ids)
@over("loss", LOSSES, **ids)
@given(batch=batches(), data=st.data(), numbers=SETTINGS)
def test_permuting_tokens_permutes_weights_and_keeps_the_value(
    loss: Loss, backend: Backend, batch: Batch, data: st.DataObject, numbers: Settings
) -> None:
    orders = []

    def shuffled(columns: list[int]) -> list[int]:
        orders.append(data.draw(st.permutations(columns)))
        return orders[-1]

    permuted = Batch(*(s.rebuilt(side, shuffled) for side in batch))
    before, after = loss(*backend.pair(batch), numbers), loss(*backend.pair(permuted), numbers)
    close(after.losses, before.losses)
    if loss.ties == "first":  # the one rule that looks at positions: only the value is promised
        return
    rows = len(batch.chosen.mask)
    for number, (weights, expected) in enumerate(zip(weights_of(after), weights_of(before), strict=True)):
        for row in range(rows):
            same(weights[row], expected[row][orders[number * rows + row]])


@over("backend", [NUMPY, TORCH, Backend("torch", "float32")], **ids)
@over("loss", SIDE_BY_SIDE, **ids)
@given(batch=batches(), data=st.data(), numbers=SETTINGS)
def test_permuting_or_splitting_the_batch_does_nothing_to_a_pair(
    loss: Loss, backend: Backend, batch: Batch, data: st.DataObject, numbers: Settings
) -> None:
    rows = len(batch.chosen.mask)
    order = data.draw(st.permutations(range(rows)))
    cut = data.draw(st.integers(1, rows))
    whole = loss(*backend.pair(batch), numbers)
    for part in filter(None, (order, order[:cut], order[cut:])):
        some = Batch(*(oracle.Side(*([field[i] for i in part] for field in side)) for side in batch))
        out = loss(*backend.pair(some), numbers)
        close(out.losses, numpy_of(whole.losses)[part], 4 * backend.epsilon)
        for weights, expected in zip(weights_of(out), weights_of(whole), strict=True):
            same(weights, expected[part])


@over("backend", [NUMPY, TORCH, Backend("torch", "float32")], **ids)
@over("loss", WITH_REFERENCE, **ids)
@given(batch=batches(), data=st.data(), numbers=SETTINGS)
def test_adding_the_same_to_policy_and_reference_changes_nothing(
    loss: Loss, backend: Backend, batch: Batch, data: st.DataObject, numbers: Settings
) -> None:
    shifted = []
    for side in batch:
        steps = [[data.draw(st.integers(-20, 20)) / 4 for _ in row] for row in side.mask]
        policy, ref = (
            [[x + c for x, c in zip(*row, strict=True)] for row in zip(rows, steps, strict=True)]
            for rows in (side.policy, side.ref)
        )
        shifted.append(side._replace(policy=policy, ref=ref))
    before, after = (loss(*backend.pair(b), numbers) for b in (batch, Batch(*shifted)))
    same(after.losses, before.losses)
    for actual, expected in zip(weights_of(after), weights_of(before), strict=True):
        same(actual, expected)


@over("loss", SELECTIVE, **ids)
@given(batch=batches(), numbers=SETTINGS, other=BETAS)
def test_the_selection_does_not_depend_on_beta(loss: Loss, batch: Batch, numbers: Settings, other: float) -> None:
    outs = [loss(*NUMPY.pair(batch), replace(numbers, beta=beta)) for beta in (numbers.beta, other)]
    for actual, expected in zip(weights_of(outs[0]), weights_of(outs[1]), strict=True):
        same(actual, expected)


@given(batch=batches(values=s.WHOLE), numbers=SETTINGS)
def test_any_tie_break_has_the_value_of_sharing(batch: Batch, numbers: Settings) -> None:
    for shared, first in (("selective", Loss("", "dpo", True, ties="first")), ("selective-pair", None)):
        first = first or Loss("", "dpo", True, pool="pair", ties="first")
        close(
            s.BY_NAME[shared](*NUMPY.pair(batch), numbers).losses,
            first(*NUMPY.pair(batch), numbers).losses,
        )


@over("backend", [NUMPY, TORCH, s.STRICT], **ids)
@over("loss", LOSSES, **ids)
@few
@given(batch=batches(values=s.REAL), numbers=SETTINGS)
def test_repeated_runs_are_equal_and_inputs_unmodified(
    loss: Loss, backend: Backend, batch: Batch, numbers: Settings
) -> None:
    pair = backend.pair(batch)
    fields = [a for r in pair for a in (r.per_token_logps, r.mask, r.ref_per_token_logps)]
    before = [numpy_of(a).copy() for a in fields]
    versions = [getattr(a, "_version", None) for a in fields]
    if backend is NUMPY:
        for array in fields:
            array.flags.writeable = False
    outs = [loss(*pair, numbers) for _ in range(2)]
    same(outs[0].losses, outs[1].losses)
    for actual, expected in zip(weights_of(outs[0]), weights_of(outs[1]), strict=True):
        same(actual, expected)
    assert [getattr(a, "_version", None) for a in fields] == versions
    for array, expected in zip(fields, before, strict=True):
        same(array, expected)


# --- the shape of the loss ---------------------------------------------------------------------------------------


@over("loss", MONOTONE, **ids)
@given(batch=batches(), data=st.data(), numbers=SETTINGS)
def test_raising_a_chosen_log_prob_never_raises_the_loss_nor_a_rejected_one_lowers_it(
    loss: Loss, batch: Batch, data: st.DataObject, numbers: Settings
) -> None:
    now = numpy_of(loss(*NUMPY.pair(batch), numbers).losses)
    better = data.draw(moved(batch, sides=(0,), direction=1))
    worse = data.draw(moved(batch, sides=(1,), direction=1))
    assert np.all(numpy_of(loss(*NUMPY.pair(better), numbers).losses) <= now + 1e-12)
    assert np.all(numpy_of(loss(*NUMPY.pair(worse), numbers).losses) >= now - 1e-12)


@over("loss", CONVEX, **ids)
@given(batch=batches(), data=st.data(), numbers=SETTINGS, share=st.sampled_from([0.25, 0.5, 0.75]))
def test_the_loss_is_convex_and_lipschitz_in_the_policy(
    loss: Loss, batch: Batch, data: st.DataObject, numbers: Settings, share: float
) -> None:
    other = data.draw(moved(batch))

    def between(one: oracle.Rows, two: oracle.Rows) -> oracle.Rows:
        return [[(1 - share) * x + share * y for x, y in zip(*row, strict=True)] for row in zip(one, two, strict=True)]

    middle = Batch(*(a._replace(policy=between(a.policy, b.policy)) for a, b in zip(batch, other, strict=True)))
    here, there, inside = (numpy_of(loss(*NUMPY.pair(b), numbers).losses) for b in (batch, other, middle))
    assert np.all(inside <= (1 - share) * here + share * there + 1e-9)
    moves = [
        sum(
            abs(p - q)
            for one, two in zip(batch, other, strict=True)
            for p, q, inside_mask in zip(one.policy[row], two.policy[row], one.mask[row], strict=True)
            if inside_mask
        )
        for row in range(len(batch.chosen.mask))
    ]
    assert np.all(np.abs(here - there) <= loss.steepness(numbers) * np.array(moves) + 1e-9)


@over("loss", SWAPPED, **ids)
@given(batch=batches(), numbers=SETTINGS)
def test_both_sides_cannot_win_after_a_swap(loss: Loss, batch: Batch, numbers: Settings) -> None:
    def total(numbers: Settings) -> np.ndarray:
        pairs = (batch, Batch(batch.rejected, batch.chosen))
        return sum(np.exp(-numpy_of(loss(*NUMPY.pair(pair), numbers).losses)) for pair in pairs)

    assert np.all(total(numbers) <= 1 + 1e-12)
    close(total(replace(numbers, ratio=1, gamma=0.0)), [1.0] * len(batch.chosen.mask))


def test_the_wrong_direction_of_selection_breaks_these_laws() -> None:
    """Keeping the tokens that are best already: no reward is convex, and both sides win after a swap."""

    def loss(chosen_policy: list[float], rejected_policy: list[float]) -> float:
        chosen, rejected = (
            NUMPY.response(oracle.Side([row], [[-1.0, -1.0]], [[True, True]]))
            for row in (chosen_policy, rejected_policy)
        )
        wrong = tuple(-scores for scores in (-chosen.log_ratios, rejected.log_ratios))
        return float(selective_dpo_loss(chosen, rejected, beta=1.0, selection_ratio=0.5, scores=wrong).loss)

    even, left, right = [-1.0, -1.0], [-2.0, 0.0], [0.0, -2.0]
    assert math.exp(-loss(left, right)) + math.exp(-loss(right, left)) > 1.5
    assert loss(even, even) > (loss(left, even) + loss(right, even)) / 2 + 0.3


# --- weights -----------------------------------------------------------------------------------------------------


@over("backend", EVERY_DTYPE, **ids)
@over("ties", ["share", "first", "all"])
@given(batch=batches(), ratio=RATIOS, other=RATIOS)
def test_weights_add_up_to_k_stay_within_0_and_1_and_grow_with_the_ratio(
    backend: Backend, ties: str, batch: Batch, ratio: float, other: float
) -> None:
    response = backend.response(batch.chosen)
    mask = np.array(batch.chosen.mask, dtype=bool)
    small, large = (
        numpy_of(top_fraction_weights(response.per_token_logps, response.mask, r, ties=ties))
        for r in sorted((ratio, other))
    )
    keep = np.array([oracle.keep_count(min(ratio, other), int(n)) for n in mask.sum(-1)])
    assert np.all((small >= 0) & (small <= 1))
    assert not np.any(small[~mask])
    assert np.all(small <= large)
    if ties == "all":
        assert np.all(small.sum(-1) >= keep)
    else:
        close(small.sum(-1), keep, 4 * backend.epsilon)
    if ties != "share":
        assert set(np.unique(small)) <= {0.0, 1.0}


@over("pool", ["response", "pair", "batch"])
@given(batch=batches(), ratio=RATIOS)
def test_weights_of_a_pool_add_up_to_its_k(pool: str, batch: Batch, ratio: float) -> None:
    chosen, rejected = select(*NUMPY.pair(batch), selection_ratio=ratio, pool=pool)
    kept = [r.token_weights.sum(-1) for r in (chosen, rejected)]
    count = [r.mask.sum(-1) for r in (chosen, rejected)]
    if pool != "response":
        kept, count = [kept[0] + kept[1]], [count[0] + count[1]]
    if pool == "batch":
        kept, count = [kept[0].sum(keepdims=True)], [count[0].sum(keepdims=True)]
    for sums, tokens in zip(kept, count, strict=True):
        close(sums, [oracle.keep_count(ratio, int(n)) for n in tokens])


# --- gradients that must not exist -------------------------------------------------------------------------------


@over("loss", LOSSES, **ids)
@few
@given(batch=batches(values=s.REAL), numbers=SETTINGS)
def test_no_gradient_reaches_the_reference_and_reports_are_detached(
    loss: Loss, batch: Batch, numbers: Settings
) -> None:
    chosen, rejected = (
        replace(r, ref_per_token_logps=r.ref_per_token_logps.requires_grad_()) for r in s.torch_leaf(batch)
    )
    out = loss(chosen, rejected, numbers)
    out.losses.sum().backward()
    assert chosen.per_token_logps.grad is not None
    assert chosen.ref_per_token_logps.grad is None
    assert rejected.ref_per_token_logps.grad is None
    for report in (
        out.chosen_rewards,
        out.rejected_rewards,
        out.chosen_selected_rewards,
        out.rejected_selected_rewards,
        *(
            getattr(side, name)
            for side in (out.chosen, out.rejected)
            for name in _FIELDS
            if getattr(side, name) is not None
        ),
    ):
        assert not report.requires_grad


_FIELDS = ("per_token_logps", "mask", "ref_per_token_logps", "weights", "scores", "token_weights")


@over("pool", ["response", "pair", "batch"])
@given(batch=batches(values=s.REAL), numbers=SETTINGS)
def test_no_gradient_reaches_scores_and_weights(pool: str, batch: Batch, numbers: Settings) -> None:
    chosen, rejected = s.torch_leaf(batch)
    scores = tuple(torch.zeros(r.mask.shape, dtype=torch.float64, requires_grad=True) for r in (chosen, rejected))
    selected = select(chosen, rejected, selection_ratio=numbers.ratio, scores=tuple(x * 1 for x in scores), pool=pool)
    for response in selected:
        assert not response.scores.requires_grad
        assert not response.weights.requires_grad
    dpo_loss(*selected, beta=numbers.beta).losses.sum().backward()
    assert scores[0].grad is None
    assert scores[1].grad is None
    weights = tuple(torch.full(r.mask.shape, 0.5, dtype=torch.float64, requires_grad=True) for r in selected)
    weighted = [replace(r, weights=w) for r, w in zip(selected, weights, strict=True)]
    dpo_loss(*weighted, beta=numbers.beta).losses.sum().backward()
    assert weights[0].grad is None
    assert weights[1].grad is None


@over("loss", except_for("selective-simpo", "selective-sft"), **ids)
@few
@given(batch=batches(values=s.REAL, max_pairs=2, max_width=4), numbers=st.builds(Settings, ratio=RATIOS))
def test_gradcheck(loss: Loss, batch: Batch, numbers: Settings) -> None:
    """Numerical derivatives; REAL scores do not tie, so a small step leaves the selection where it is."""
    chosen, rejected = s.torch_leaf(batch)

    def losses(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        pair = (replace(chosen, per_token_logps=one), replace(rejected, per_token_logps=two))
        return loss(*(_filled(r) for r in pair), numbers).losses

    def _filled(response: Response) -> Response:
        logps = torch.where(response.mask, response.per_token_logps, torch.nan)
        return replace(response, per_token_logps=logps)

    inputs = [torch.where(r.mask, r.per_token_logps, 0.0).detach().requires_grad_() for r in (chosen, rejected)]
    scores = torch.cat([(r.per_token_logps - r.ref_per_token_logps)[r.mask] for r in (chosen, rejected)])
    signed = torch.cat([scores, -scores]).sort().values
    if loss.selective and len(signed) > 1 and float(signed.diff().detach().min()) < 1e-3:
        return
    if inputs[0].numel() and inputs[1].numel():
        assert torch.autograd.gradcheck(losses, inputs, eps=1e-5, atol=1e-6)
