"""Scores: the sign of Eq. 6 on both sides, and what they never carry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

import oracle
import strategies as s
from oracle import Batch, Side
from selective_pref import Response, alignment_scores, excess_loss_scores
from strategies import EVERY_DTYPE, Backend, batches, numpy_of

ids = {"ids": lambda value: getattr(value, "id", None)}
PAIR = Batch(
    Side([[-1.0, -3.0, 5.0]], [[-2.0, -0.5, 7.0]], [[True, True, False]]),
    Side([[-1.0, -4.0]], [[-3.0, -0.5]], [[True, True]]),
)


@pytest.mark.parametrize("backend", [*EVERY_DTYPE, s.JAX], **ids)
def test_alignment_scores_are_eq_6(backend: Backend) -> None:
    chosen, rejected = alignment_scores(*backend.pair(PAIR))
    assert numpy_of(chosen).tolist() == [[-2.0 - -1.0, -0.5 - -3.0, 0.0]]  # reference − policy
    assert numpy_of(rejected).tolist() == [[-1.0 - -3.0, -4.0 - -0.5]]  # policy − reference
    assert str(chosen.dtype).endswith("float64" if backend.dtype == "float64" else "float32")


def test_excess_loss_scores_are_reference_minus_policy_on_both_sides() -> None:
    chosen, rejected = excess_loss_scores(*s.NUMPY.pair(PAIR))
    assert chosen.tolist() == [[-2.0 - -1.0, -0.5 - -3.0, 0.0]]
    assert rejected.tolist() == [[-3.0 - -1.0, -0.5 - -4.0]]


@pytest.mark.parametrize("score", ["alignment_scores", "excess_loss_scores"])
@pytest.mark.parametrize("backend", s.FLOAT64, **ids)
@given(batch=batches(values=s.REAL))
def test_scores_agree_with_the_oracle(backend: Backend, score: str, batch: Batch) -> None:
    ours = {"alignment_scores": alignment_scores, "excess_loss_scores": excess_loss_scores}[score]
    for actual, expected in zip(ours(*backend.pair(batch)), getattr(oracle, score)(batch), strict=True):
        np.testing.assert_array_equal(numpy_of(actual), np.reshape(expected, actual.shape))


@pytest.mark.parametrize("score", [alignment_scores, excess_loss_scores])
def test_scores_are_detached(score: object) -> None:
    assert not any(scores.requires_grad for scores in score(*s.torch_leaf(PAIR)))


@pytest.mark.parametrize("score", [alignment_scores, excess_loss_scores])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_reference_is_an_error(score: object, missing: int) -> None:
    pair = list(s.NUMPY.pair(PAIR))
    pair[missing] = Response(per_token_logps=pair[missing].per_token_logps, mask=pair[missing].mask)
    with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
        score(*pair)


@pytest.mark.parametrize("score", [alignment_scores, excess_loss_scores])
def test_scores_of_sides_that_do_not_fit_together_are_refused(score: object) -> None:
    with pytest.raises(TypeError, match="arrays of one library"):
        score(s.NUMPY.response(PAIR.chosen), s.TORCH.response(PAIR.rejected))
    with pytest.raises(TypeError, match="rejected must be a Response; got Tensor"):
        score(s.TORCH.response(PAIR.chosen), torch.zeros(1, 2))
