"""The teacher's veto: values against a loop over tokens, and the laws that it keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import torch
from hypothesis import given

import strategies as s
from oracle import Batch, Rows, Side
from selective_pref import Response, teacher_veto_loss, veto_weights
from strategies import FLOAT64, NUMPY, TORCH, Backend, batches, numpy_of

over = pytest.mark.parametrize
THRESHOLDS, FLOORS = st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.sampled_from([0.0, 2.0, 5.0])


def signs(side: Side, start: Rows, threshold: float, floor: float) -> Rows:
    """+1 for a token to raise, −1 for one to lower, 0 for one to leave: token by token."""

    def sign(policy: float, teacher: float, before: float) -> float:
        if teacher - before > -threshold:
            return 1.0
        return -1.0 if policy > teacher - floor else 0.0

    return [
        [sign(p, t, b) if here else 0.0 for p, t, b, here in zip(*row, strict=True)]
        for row in zip(side.policy, side.ref, start, side.mask, strict=True)
    ]


@st.composite
def started(draw: st.DrawFn) -> tuple[Batch, tuple[Rows, Rows]]:
    """Pairs, and the log-probs of the start, which are those of another draw."""
    batch = draw(batches())
    near = st.integers(-24, 24).map(lambda n: n / 8)
    starts = [
        [
            [t + draw(near) if here else math.nan for t, here in zip(*row, strict=True)]
            for row in zip(*some, strict=True)
        ]
        for some in ((side.ref, side.mask) for side in batch)
    ]
    return batch, (starts[0], starts[1])


def shaped(rows: Rows, like: Any) -> np.ndarray:
    return np.reshape(np.array(rows, dtype=float), like.shape)


def starts_in(backend: Backend, pair: tuple[Response, Response], starts: tuple[Rows, Rows]) -> Any:
    return tuple(backend.array(shaped(rows, side.per_token_logps)) for rows, side in zip(starts, pair, strict=True))


@over("backend", FLOAT64, ids=lambda backend: backend.id)
@given(drawn=started(), threshold=THRESHOLDS, floor=FLOORS, sides=st.sampled_from(["both", "labelled"]))
def test_values(backend: Backend, drawn: Any, threshold: float, floor: float, sides: Any) -> None:
    batch, starts = drawn
    pair = backend.pair(batch)
    out = teacher_veto_loss(
        *pair, start_per_token_logps=starts_in(backend, pair, starts), threshold=threshold, floor=floor, sides=sides
    )
    expected = [0.0] * len(batch.chosen.mask)
    for side, before, allowed, weights in zip(
        batch, starts, (1.0, -1.0), (out.chosen_weights, out.rejected_weights), strict=True
    ):
        moved = signs(side, before, threshold, floor)
        if sides == "labelled":
            moved = [[sign if sign == allowed else 0.0 for sign in row] for row in moved]
        np.testing.assert_array_equal(numpy_of(weights), np.abs(shaped(moved, weights)))
        for number, (row, logps) in enumerate(zip(moved, side.policy, strict=True)):
            expected[number] -= math.fsum(sign * logp for sign, logp in zip(row, logps, strict=True) if sign)
    np.testing.assert_allclose(numpy_of(out.losses), expected, rtol=1e-12, atol=1e-12)


@given(drawn=started(), threshold=THRESHOLDS, floor=FLOORS)
def test_a_token_s_gradient_is_its_sign_and_nothing_else(drawn: Any, threshold: float, floor: float) -> None:
    batch, starts = drawn
    chosen, rejected = s.torch_leaf(batch)
    before = [array.requires_grad_() for array in starts_in(TORCH, (chosen, rejected), starts)]
    options: Any = {"start_per_token_logps": before, "threshold": threshold, "floor": floor}
    teacher_veto_loss(chosen, rejected, **options).losses.sum().backward()
    for side, response, rows in zip(batch, (chosen, rejected), starts, strict=True):
        grad = response.per_token_logps.grad
        np.testing.assert_array_equal(numpy_of(grad), -shaped(signs(side, rows, threshold, floor), grad))
    assert [array.grad for array in before] == [None, None]


@given(drawn=started())
def test_both_sides_are_read_alike_whatever_the_label(drawn: Any) -> None:
    batch, starts = drawn
    pair = NUMPY.pair(batch)
    one, other = starts_in(NUMPY, pair, starts)
    right = teacher_veto_loss(*pair, start_per_token_logps=(one, other))
    swapped = teacher_veto_loss(*pair[::-1], start_per_token_logps=(other, one))
    np.testing.assert_allclose(right.losses, swapped.losses, rtol=0, atol=1e-12)


@given(drawn=started())
def test_no_token_is_raised_and_lowered_and_no_weight_is_negative(drawn: Any) -> None:
    batch, starts = drawn
    pair = NUMPY.pair(batch)
    for side, start in zip(pair, starts_in(NUMPY, pair, starts), strict=True):
        raised, lowered = veto_weights(side, start)
        assert (raised >= 0).all()
        assert (lowered >= 0).all()
        assert not (raised * lowered).any()
        assert not (raised + lowered)[~side.mask].any()


def one_token(policy: float, teacher: float) -> Response:
    def array(value: float) -> np.ndarray:
        return np.array([[value]])

    return Response(per_token_logps=array(policy), mask=np.array([[True]]), ref_per_token_logps=array(teacher))


@over(
    ("policy", "teacher", "start", "raised", "lowered"),
    [
        (-1.0, -2.0, -1.5, 1.0, 0.0),
        (-1.0, -2.0, -1.0, 0.0, 1.0),
        (-3.9, -2.0, -1.0, 0.0, 1.0),
        (-4.0, -2.0, -1.0, 0.0, 0.0),
        (-9.0, -0.5, -3.0, 1.0, 0.0),
    ],
    ids=["liked a little less", "vetoed at the threshold", "vetoed, above the floor", "at the floor", "liked more"],
)
def test_thresholds(policy: float, teacher: float, start: float, raised: float, lowered: float) -> None:
    up, down = veto_weights(one_token(policy, teacher), np.array([[start]]), threshold=1.0, floor=2.0)
    assert (up.item(), down.item()) == (raised, lowered)


def test_weights_of_the_responses_are_honoured() -> None:
    side = replace(one_token(-1.0, -1.0), weights=np.array([[0.25]]))
    out = teacher_veto_loss(side, side, start_per_token_logps=(np.array([[-1.0]]),) * 2)
    assert out.losses.tolist() == [2 * 0.25 * 1.0]


@over("broken", [math.nan, -math.inf])
@over("which", ["policy", "teacher", "start"])
def test_what_is_not_finite_is_not_hidden(which: str, broken: float) -> None:
    values = {"policy": -1.0, "teacher": -1.0, "start": -1.0, which: broken}
    side = one_token(values["policy"], values["teacher"])
    out = teacher_veto_loss(side, one_token(-1.0, -1.0), start_per_token_logps=(np.array([[values["start"]]]),) * 2)
    assert math.isnan(out.loss)


def test_compiled_in_torch_and_jax() -> None:
    batch = Batch(
        Side([[-1.0, -2.0]], [[-4.0, -1.0]], [[True, True]]), Side([[-1.0, -2.0]], [[-1.5, -9.0]], [[True, False]])
    )
    pair = TORCH.pair(batch)
    starts = (torch.tensor([[-1.0, -1.0]], dtype=torch.float64),) * 2

    def loss(chosen: Response, rejected: Response) -> Any:
        return teacher_veto_loss(chosen, rejected, start_per_token_logps=starts).losses

    eager = loss(*pair)
    assert torch.equal(torch.compile(loss, fullgraph=True, backend="eager")(*pair), eager)
    own = Backend("jax").pair(batch)
    given_starts = (own[0].per_token_logps * 0 - 1,) * 2
    compiled = jax.jit(lambda *sides: teacher_veto_loss(*sides, start_per_token_logps=given_starts).losses)
    np.testing.assert_allclose(numpy_of(compiled(*own)), numpy_of(eager), rtol=1e-15)


@over(
    ("options", "error", "message"),
    [
        ({"threshold": -1.0}, ValueError, "threshold must be a finite number of nats, at least 0; got -1.0"),
        ({"floor": math.inf}, ValueError, "floor must be a finite number of nats, at least 0; got inf"),
        ({"floor": None}, TypeError, "floor must be a number"),
        ({"sides": "chosen"}, ValueError, "sides must be 'both' or 'labelled'; got 'chosen'"),
        ({"start_per_token_logps": np.zeros((1, 1))}, TypeError, "must be a pair of arrays"),
        ({"start_per_token_logps": (np.zeros((1, 2)),) * 2}, ValueError, "start_per_token_logps must be"),
        ({"start_per_token_logps": (np.zeros((1, 1), dtype=int),) * 2}, TypeError, "start_per_token_logps must have"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    side = one_token(-1.0, -1.0)
    with pytest.raises(error, match=message):
        teacher_veto_loss(side, side, **{"start_per_token_logps": (np.zeros((1, 1)),) * 2, **options})
    bare = replace(side, ref_per_token_logps=None)
    with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
        teacher_veto_loss(bare, bare, start_per_token_logps=(np.zeros((1, 1)),) * 2)
