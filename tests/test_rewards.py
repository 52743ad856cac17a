"""Rewards of responses: sums, means, weights, and what is never hidden."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import strategies as s
from oracle import Side
from selective_pref import Response, mean_logp, summed_log_ratio
from strategies import EVERY_DTYPE, FLOAT64, Backend, numpy_of

ids = {"ids": lambda value: getattr(value, "id", None)}
SIDE = Side(
    [[-1.0, -3.0, 9.0], [-0.5, 0.0, -2.0]], [[-2.0, -0.5, 9.0], [-1.0, -1.5, -4.0]], [[True, True, False], [True] * 3]
)
WEIGHTS = [[1.0, 0.5, 1.0], [0.0, 0.25, 1.0]]


@pytest.mark.parametrize("backend", [*EVERY_DTYPE, s.JAX], **ids)
def test_the_sum_of_weighted_log_ratios(backend: Backend) -> None:
    assert numpy_of(summed_log_ratio(backend.response(SIDE))).tolist() == [1.0 - 2.5, 0.5 + 1.5 + 2.0]
    weighted = summed_log_ratio(backend.response(SIDE, weights=WEIGHTS))
    assert numpy_of(weighted).tolist() == [1.0 * 1.0 + 0.5 * -2.5, 0.25 * 1.5 + 1.0 * 2.0]
    assert str(weighted.dtype).endswith("float64" if backend.dtype == "float64" else "float32")


@pytest.mark.parametrize("backend", [*EVERY_DTYPE, s.JAX], **ids)
def test_the_weighted_mean_of_log_probs(backend: Backend) -> None:
    np.testing.assert_allclose(
        numpy_of(mean_logp(backend.response(SIDE))), [(-1.0 - 3.0) / 2, (-0.5 - 2.0) / 3], rtol=backend.epsilon
    )
    np.testing.assert_allclose(
        numpy_of(mean_logp(backend.response(SIDE, weights=WEIGHTS))),
        [(-1.0 + 0.5 * -3.0) / 1.5, (0.25 * 0.0 + 1.0 * -2.0) / 1.25],
        rtol=backend.epsilon,
    )


def test_a_log_prob_of_exactly_0_counts_as_a_token() -> None:
    side = Side([[0.0, -2.0]], [[-1.0, 0.0]], [[True, True]])
    assert mean_logp(s.NUMPY.response(side)).tolist() == [-1.0]
    assert summed_log_ratio(s.NUMPY.response(side)).tolist() == [1.0 - 2.0]


@pytest.mark.parametrize("reward", [summed_log_ratio, mean_logp])
@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_a_response_without_tokens_or_without_weight_is_worth_0(backend: Backend, reward: object) -> None:
    side = Side([[math.nan, math.inf], [-1.0, -2.0]], [[math.nan, -math.inf], [-1.0, 0.0]], [[False] * 2, [True] * 2])
    assert numpy_of(reward(backend.response(side, weights=[[1.0, 1.0], [0.0, 0.0]]))).tolist() == [0.0, 0.0]


def test_the_gradient_of_a_response_without_tokens_is_0() -> None:
    logps = torch.full((1, 2), math.nan, requires_grad=True)
    mean_logp(Response(per_token_logps=logps, mask=torch.zeros(1, 2, dtype=torch.bool))).sum().backward()
    assert logps.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("reward", [summed_log_ratio, mean_logp])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_inside_the_mask_is_not_hidden_by_a_weight_of_0(
    reward: object, weight: float, bad: float
) -> None:
    side = Side([[bad, -1.0], [-1.0, -1.0]], [[0.0, 0.0]] * 2, [[True, True]] * 2)
    values = numpy_of(reward(s.TORCH.response(side, weights=[[weight, 1.0], [weight, 1.0]])))
    assert np.isfinite(values).tolist() == [False, True]


def test_sums_are_wider_than_bf16() -> None:
    """4096 tokens of 1/4 each: a bf16 sum stops growing at 64."""
    rows = [[-0.25] * 4096]
    side = Side(rows, [[0.0] * 4096], [[True] * 4096])
    response = Backend("torch", "bfloat16").response(side)
    assert summed_log_ratio(response).tolist() == [-1024.0]
    assert mean_logp(response).tolist() == [-0.25]


def test_a_missing_reference_is_an_error_where_it_is_read() -> None:
    response = Response(per_token_logps=np.zeros((1, 2)), mask=np.ones((1, 2), dtype=bool))
    assert mean_logp(response).tolist() == [0.0]
    with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
        summed_log_ratio(response)
