"""One side of a pair: what it accepts, what it derives, and its three layouts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import oracle
import strategies as s
from oracle import Batch
from selective_pref import Response, select
from strategies import FLOAT64, LOSSES, TORCH, Backend, Loss, Settings, batches, numpy_of

ids = {"ids": lambda value: getattr(value, "id", None)}
NAN, INF = math.nan, math.inf

LOGPS = np.array([[-1.0, -2.0, -4.0], [-0.5, 0.0, -1.0]])
REF = np.array([[-1.5, -0.5, -1.0], [-0.5, -2.0, 0.0]])
MASK = np.array([[True, True, False], [False, True, True]])


def response(**changes: object) -> Response:
    return Response(**{"per_token_logps": LOGPS, "mask": MASK, "ref_per_token_logps": REF, **changes})


# --- what it derives ---------------------------------------------------------------------------------------------


def test_log_ratios_are_policy_minus_reference_and_0_off_the_mask() -> None:
    assert response().log_ratios.tolist() == [[-1.0 + 1.5, -2.0 + 0.5, 0], [0, 0.0 + 2.0, -1.0 - 0.0]]


def test_token_weights_default_to_the_mask() -> None:
    assert response().token_weights.tolist() == [[1, 1, 0], [0, 1, 1]]
    assert response().token_weights.dtype == np.float64


@pytest.mark.parametrize("junk", s.GARBAGE)
def test_what_stands_off_the_mask_is_not_read(junk: float) -> None:
    dirty = response(
        per_token_logps=np.where(MASK, LOGPS, junk),
        ref_per_token_logps=np.where(MASK, REF, junk),
        weights=np.where(MASK, 0.5, junk),
    )
    assert np.array_equal(dirty.log_ratios, response().log_ratios)
    assert dirty.token_weights.tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5]]


@pytest.mark.parametrize("backend", s.EVERY_DTYPE, **ids)
def test_derived_values_are_at_least_float32(backend: Backend) -> None:
    side = oracle.Side([[-1.0]], [[-2.0]], [[True]])
    made = backend.response(side, weights=[[0.5]])
    wide = "float64" if backend.dtype == "float64" else "float32"
    for array in (made.log_ratios, made.token_weights, backend.response(side).token_weights):
        assert str(array.dtype).endswith(wide)


def test_a_low_precision_policy_meets_a_float32_reference_without_rounding_it() -> None:
    ref = torch.tensor([[-1.0000001]], dtype=torch.float32)
    mixed = Response(
        per_token_logps=torch.tensor([[-1.0]], dtype=torch.bfloat16),
        mask=torch.tensor([[True]]),
        ref_per_token_logps=ref,
    )
    assert mixed.log_ratios.tolist() == (-1.0 - ref).tolist()


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        response().mask = MASK


def test_fields_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        Response(LOGPS, MASK)


# --- what it refuses ---------------------------------------------------------------------------------------------

T = torch.tensor(LOGPS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"per_token_logps": LOGPS[0]}, ValueError, r"per_token_logps must be \[B T\]; got float64 (3,)"),
        ({"per_token_logps": LOGPS[None]}, ValueError, r"per_token_logps must be \[B T\]; got float64 (1, 2, 3)"),
        ({"per_token_logps": LOGPS[:0]}, ValueError, "empty batch.* at least one row; got float64 (0, 3)"),
        (
            {"per_token_logps": LOGPS.astype(int)},
            TypeError,
            "per_token_logps must have a real floating dtype; got int64",
        ),
        ({"per_token_logps": LOGPS.astype(complex)}, TypeError, "real floating dtype; got complex128"),
        ({"per_token_logps": LOGPS.tolist()}, TypeError, "per_token_logps must be an array .*; got list"),
        ({"per_token_logps": None}, TypeError, "per_token_logps must be an array .*; got NoneType"),
        (
            {"mask": MASK.astype(np.float32)},
            TypeError,
            r"mask must be bool \[B T\] like per_token_logps (2, 3); got float32 (2, 3)",
        ),
        ({"mask": MASK.astype(np.int64)}, TypeError, "mask must be bool .* got int64 (2, 3): compare it first"),
        ({"mask": MASK[0]}, ValueError, r"mask must be \[B T\] like per_token_logps (2, 3); got bool (3,)"),
        ({"mask": MASK[:, :2]}, ValueError, "mask must be .* (2, 3); got bool (2, 2)"),
        ({"mask": MASK.tolist()}, TypeError, "mask must be an array .*; got list"),
        (
            {"mask": torch.tensor(MASK)},
            TypeError,
            "mask and per_token_logps must be arrays of one library; got torch.Tensor and numpy.ndarray",
        ),
        ({"ref_per_token_logps": REF[:, :2]}, ValueError, "ref_per_token_logps must be .* (2, 3); got float64 (2, 2)"),
        ({"ref_per_token_logps": REF.sum(-1)}, ValueError, "ref_per_token_logps must be .* (2, 3); got float64 (2,)"),
        (
            {"ref_per_token_logps": REF.astype(int)},
            TypeError,
            "ref_per_token_logps must have a real floating dtype; got int64",
        ),
        ({"ref_per_token_logps": REF.tolist()}, TypeError, "ref_per_token_logps must be an array .*; got list"),
        (
            {"ref_per_token_logps": torch.tensor(REF)},
            TypeError,
            "ref_per_token_logps and per_token_logps must be arrays of one library",
        ),
        ({"ref_per_token_logps": jnp.asarray(REF)}, TypeError, "arrays of one library; got jax"),
        ({"weights": MASK}, TypeError, "weights must have a real floating dtype; got bool (2, 3)"),
        ({"weights": LOGPS[:1]}, ValueError, "weights must be .* (2, 3); got float64 (1, 3)"),
        ({"scores": LOGPS[:, :1]}, ValueError, "scores must be .* (2, 3); got float64 (2, 1)"),
        ({"scores": MASK.astype(int)}, TypeError, "scores must have a real floating dtype; got int64"),
    ],
)
def test_fields_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        response(**changes)


@pytest.mark.parametrize("field", ["mask", "ref_per_token_logps", "weights"])
def test_devices_refused(field: str) -> None:
    fields = {"mask": torch.tensor(MASK), "ref_per_token_logps": T, "weights": T.abs()}
    fields[field] = fields[field].to("meta")
    with pytest.raises(ValueError, match=f"{field} and per_token_logps must be on one device; got meta and cpu"):
        Response(per_token_logps=T, **fields)


# --- other layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
@pytest.mark.parametrize("with_reference", [True, False])
def test_stacked_rows_are_chosen_first(backend: Backend, with_reference: bool) -> None:
    ref = backend.array(REF) if with_reference else None
    chosen, rejected = Response.from_stacked(
        per_token_logps=backend.array(LOGPS), mask=backend.array(MASK), ref_per_token_logps=ref
    )
    assert numpy_of(chosen.per_token_logps).tolist() == LOGPS[:1].tolist()
    assert numpy_of(rejected.per_token_logps).tolist() == LOGPS[1:].tolist()
    assert numpy_of(rejected.mask).tolist() == MASK[1:].tolist()
    if with_reference:
        assert numpy_of(chosen.ref_per_token_logps).tolist() == REF[:1].tolist()
        assert numpy_of(rejected.ref_per_token_logps).tolist() == REF[1:].tolist()
    else:
        assert chosen.ref_per_token_logps is None
        assert rejected.ref_per_token_logps is None


@pytest.mark.parametrize("rows", [1, 3])
def test_an_odd_number_of_stacked_rows_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"\[2B T\], chosen rows first; got float64 \({rows}, 4\)"):
        Response.from_stacked(per_token_logps=np.zeros((rows, 4)), mask=np.ones((rows, 4), dtype=bool))


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_packed_sequences_stand_end_to_end_chosen_first(backend: Backend) -> None:
    flat = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]
    mask = [True, True, False, True, True, True, False]
    chosen, rejected = Response.from_packed(
        per_token_logps=backend.array(flat),
        ref_per_token_logps=backend.array([x / 2 for x in flat]),
        mask=backend.array(mask),
        lengths=[2, 1, 0, 4],
    )
    assert numpy_of(chosen.mask).tolist() == [[True, True], [False, False]]
    assert numpy_of(rejected.mask).tolist() == [[False] * 4, [True, True, True, False]]
    assert numpy_of(chosen.log_ratios).tolist() == [[-0.5, -1.0], [0, 0]]
    assert numpy_of(rejected.log_ratios).tolist() == [[0] * 4, [-2.0, -2.5, -3.0, 0]]


@pytest.mark.parametrize("lengths", [[0, 3], [3, 0], [0, 2, 1, 0], [0, 0, 1, 2], [1, 2, 0, 0]])
@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_packed_sequences_may_be_empty_and_the_mask_defaults_to_every_token(
    backend: Backend, lengths: list[int]
) -> None:
    sides = Response.from_packed(per_token_logps=backend.array([-1.0, -2.0, -3.0]), lengths=lengths)
    half = len(lengths) // 2
    for side, expected in zip(sides, (lengths[:half], lengths[half:]), strict=True):
        assert tuple(side.mask.shape) == (half, max(expected))
        assert numpy_of(side.mask).sum(-1).tolist() == expected
        assert side.ref_per_token_logps is None
    values = [x for side in sides for x in numpy_of(side.per_token_logps)[numpy_of(side.mask)].tolist()]
    assert values == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_a_packed_batch_may_hold_no_token_at_all(backend: Backend) -> None:
    nothing = backend.array(np.zeros(0))
    sides = Response.from_packed(per_token_logps=nothing, ref_per_token_logps=nothing, lengths=[0, 0])
    assert [tuple(side.per_token_logps.shape) for side in sides] == [(1, 0), (1, 0)]
    assert numpy_of(s.BY_NAME["selective"](*sides, Settings()).losses).tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": [2, 4]}, ValueError, "lengths must be at least 0 and add up to N = 7; got [2, 4]"),
        ({"lengths": [4, 4]}, ValueError, "add up to N = 7; got [4, 4]"),
        ({"lengths": [-1, 8]}, ValueError, "at least 0 and add up to N = 7; got [-1, 8]"),
        ({"lengths": [3, 3, 1]}, ValueError, "lengths must name 2B sequences, chosen first; got 3"),
        ({"lengths": []}, ValueError, "lengths must name 2B sequences, chosen first; got 0"),
        ({"lengths": [3.0, 4.0]}, TypeError, "lengths must be Python integers .*; got float"),
        (
            {"lengths": torch.tensor([3, 4])},
            TypeError,
            "lengths must be Python integers (call .tolist() once); got Tensor",
        ),
        ({"lengths": np.array([3, 4])}, TypeError, "lengths must be Python integers .*; got int64"),
        ({"per_token_logps": np.zeros((1, 7))}, ValueError, "packed per_token_logps must be [N]; got float64 (1, 7)"),
        (
            {"per_token_logps": np.zeros(7, dtype=int)},
            TypeError,
            "per_token_logps must have a real floating dtype; got int64 (7,)",
        ),
        ({"per_token_logps": [0.0] * 7}, TypeError, "per_token_logps must be an array .*; got list"),
        ({"mask": np.ones(7)}, TypeError, "mask must be bool [N] like per_token_logps (7,); got float64 (7,)"),
        ({"mask": np.ones(6, dtype=bool)}, ValueError, "mask must be [N] like per_token_logps (7,); got bool (6,)"),
        (
            {"ref_per_token_logps": np.zeros(6)},
            ValueError,
            "ref_per_token_logps must be [N] like per_token_logps (7,); got float64 (6,)",
        ),
        (
            {"ref_per_token_logps": np.zeros(7, dtype=int)},
            TypeError,
            "ref_per_token_logps must have a real floating dtype",
        ),
        ({"ref_per_token_logps": torch.zeros(7)}, TypeError, "must be arrays of one library"),
    ],
)
def test_packed_arrays_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(error, match=pattern):
        Response.from_packed(**{"per_token_logps": np.zeros(7), "lengths": [3, 4], **changes})


@pytest.mark.parametrize("loss", LOSSES, **ids)
@settings(max_examples=10)
@given(batch=batches(), drawn=st.data())
def test_stacked_and_packed_agree_with_side_by_side_gradients_included(
    loss: Loss, batch: Batch, drawn: st.DataObject
) -> None:
    numbers = drawn.draw(s.SETTINGS)
    rows, width = len(batch.chosen.mask), max(len(side.mask[0]) for side in batch)
    expected = loss(*TORCH.pair(batch), numbers)
    grads = s.gradients(loss, batch, numbers)

    def stack(index: int, fill: object) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for side in batch for row in side[index]])

    policy = stack(0, NAN).double().reshape(2 * rows, width).requires_grad_()
    out = loss(
        *Response.from_stacked(
            per_token_logps=policy,
            mask=stack(2, False).bool().reshape(2 * rows, width),
            ref_per_token_logps=stack(1, INF).double().reshape(2 * rows, width),
        ),
        numbers,
    )
    np.testing.assert_allclose(numpy_of(out.losses), numpy_of(expected.losses), rtol=1e-12)
    out.losses.sum().backward()
    for number, side in enumerate(batch):
        mine = numpy_of(policy.grad)[number * rows : (number + 1) * rows, : len(side.mask[0])]
        np.testing.assert_allclose(mine, grads[number], rtol=1e-12, atol=1e-15)

    flat = [[x for side in batch for row in side[index] for x in row] for index in range(3)]
    packed = torch.tensor(flat[0], dtype=torch.float64, requires_grad=True)
    out = loss(
        *Response.from_packed(
            per_token_logps=packed,
            ref_per_token_logps=torch.tensor(flat[1], dtype=torch.float64),
            mask=torch.tensor(flat[2], dtype=torch.bool),
            lengths=[len(row) for side in batch for row in side.mask],
        ),
        numbers,
    )
    np.testing.assert_allclose(numpy_of(out.losses), numpy_of(expected.losses), rtol=1e-12)
    if packed.numel():
        out.losses.sum().backward()
        mine = numpy_of(torch.zeros_like(packed) if packed.grad is None else packed.grad)
        np.testing.assert_allclose(mine, np.concatenate([g.ravel() for g in grads]), rtol=1e-12, atol=1e-15)


# --- pairs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "error", "message"),
    [
        (response(), LOGPS, TypeError, "rejected must be a Response; got ndarray"),
        (None, response(), TypeError, "chosen must be a Response; got NoneType"),
        (
            response(),
            Response(per_token_logps=LOGPS[:1], mask=MASK[:1]),
            ValueError,
            r"same number of pairs B; got per_token_logps float64 \(2, 3\) and float64 \(1, 3\)",
        ),
        (
            response(),
            Response(per_token_logps=T, mask=torch.tensor(MASK)),
            TypeError,
            "chosen and rejected must be arrays of one library; got numpy.ndarray and torch.Tensor",
        ),
        (
            Response(per_token_logps=T, mask=torch.tensor(MASK)),
            Response(per_token_logps=T.to("meta"), mask=torch.tensor(MASK, device="meta")),
            ValueError,
            "chosen and rejected must be on one device; got cpu and meta",
        ),
    ],
)
@pytest.mark.parametrize(
    "call",
    [*LOSSES, lambda chosen, rejected, numbers: select(chosen, rejected, selection_ratio=numbers.ratio)],
    ids=[*(loss.id for loss in LOSSES), "select"],
)
def test_sides_that_do_not_fit_together_are_refused(
    call: Callable[..., object], chosen: Response, rejected: Response, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(chosen, rejected, Settings())
