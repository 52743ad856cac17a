"""Dense log-probs: the one shift, the statistics in float32, and what is not read."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import oracle
import strategies as s
from selective_pref import per_token_logps
from strategies import FLOAT64, Backend, numpy_of

ids = {"ids": lambda value: getattr(value, "id", None)}
NAN, INF = math.nan, math.inf


def integers(backend: Backend, rows: list[list[int]]) -> object:
    if backend.library == "torch":
        return torch.tensor(rows)
    return backend.xp.asarray(np.array(rows))


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_entry_t_is_the_token_after_logits_t(backend: Backend) -> None:
    logits = backend.array([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [9.0, 9.0]]])
    logps, mask = per_token_logps(logits, integers(backend, [[0, 1, 0]]))
    np.testing.assert_allclose(numpy_of(logps), [[math.log(3 / 4), math.log(4 / 5)]], rtol=1e-14)
    assert numpy_of(mask).tolist() == [[True, True]]


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
@pytest.mark.parametrize("ignored", [-100, -1, 7])
def test_ignored_labels_are_off_the_mask_and_their_logits_unread(backend: Backend, ignored: int) -> None:
    logits = np.zeros((1, 4, 2))
    logits[0, 0], logits[0, 2] = NAN, INF
    labels = integers(backend, [[ignored, ignored, 1, ignored]])
    logps, mask = per_token_logps(backend.array(logits), labels, ignore_index=ignored)
    assert numpy_of(mask).tolist() == [[False, True, False]]
    np.testing.assert_allclose(numpy_of(logps), [[0.0, math.log(1 / 2), 0.0]])


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
@pytest.mark.parametrize("strange", [-1, 5, 6, 100])
def test_an_id_that_is_no_token_has_no_log_prob(backend: Backend, strange: int) -> None:
    """A tokenizer larger than the model, or another library's padding: nothing is read in its place."""
    logps, mask = per_token_logps(backend.array(np.zeros((1, 4, 5))), integers(backend, [[0, 4, strange, -100]]))
    assert numpy_of(mask).tolist() == [[True, True, False]]
    np.testing.assert_allclose(numpy_of(logps), [[-math.log(5), NAN, 0.0]])


@pytest.mark.parametrize("backend", FLOAT64, **ids)
@settings(max_examples=15)
@given(data=st.data())
def test_agrees_with_the_oracle(backend: Backend, data: st.DataObject) -> None:
    vocabulary, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    cell = st.floats(-50, 50)
    logits = [data.draw(st.lists(cell, min_size=vocabulary, max_size=vocabulary)) for _ in range(length)]
    labels = data.draw(st.lists(st.sampled_from([-100, *range(vocabulary)]), min_size=length, max_size=length))
    logps, mask = per_token_logps(backend.array([logits]), integers(backend, [labels]))
    assert tuple(logps.shape) == (1, length - 1)
    for t in range(length - 1):
        expected = oracle.log_softmax(logits[t])[labels[t + 1]] if labels[t + 1] >= 0 else 0.0
        assert float(logps[0, t]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert bool(mask[0, t]) == (labels[t + 1] != -100)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_low_precision_logits_have_float32_statistics(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 9, 512, generator=generator)).to(getattr(torch, dtype))
    labels = torch.randint(512, (2, 9), generator=generator)
    logps, _ = per_token_logps(logits, labels)
    assert logps.dtype == torch.float32
    truth = torch.log_softmax(logits.double(), -1)[:, :-1].gather(-1, labels[:, 1:, None])[..., 0]
    assert torch.allclose(logps.double(), truth, atol=1e-5)


def test_large_logits_do_not_overflow_and_impossible_tokens_are_minus_infinity() -> None:
    logits = torch.tensor([[[1e4, 0.0, -INF], [1e4, 0.0, -INF], [1e4, 0.0, -INF], [0.0, 0.0, 0.0]]])
    logps, _ = per_token_logps(logits, torch.tensor([[0, 0, 1, 2]]))
    assert logps.tolist() == [[0.0, -1e4, -INF]]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_logits_that_are_not_finite_are_not_hidden(bad: float) -> None:
    logits = torch.zeros(1, 3, 2)
    logits[0, 0, 1] = bad
    logps, _ = per_token_logps(logits, torch.tensor([[0, 0, 0]]))
    assert torch.isfinite(logps).tolist() == [[False, True]]


def test_gradients_are_softmax_minus_one_hot_and_0_where_ignored() -> None:
    logits = torch.tensor([[[0.0, 1.0], [NAN, INF], [2.0, 0.0], [NAN, NAN]]], dtype=torch.float64, requires_grad=True)
    logps, _ = per_token_logps(logits, torch.tensor([[0, 1, -100, 0]]))
    logps.sum().backward()
    first, third = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))
    assert logits.grad[0].tolist() == [
        [pytest.approx(first - 1), pytest.approx(1 - first)],
        [0.0, 0.0],
        [pytest.approx(1 - (1 - third)), pytest.approx(-third)],
        [0.0, 0.0],
    ]


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([[0, 2, -100, 1], [1, 1, 0, -100]])
    assert torch.autograd.gradcheck(lambda x: per_token_logps(x, labels)[0], [logits])


def test_one_position_has_no_next_token() -> None:
    logps, mask = per_token_logps(np.zeros((2, 1, 3)), np.zeros((2, 1), dtype=int))
    assert (logps.shape, mask.shape) == ((2, 0), (2, 0))


LOGITS, LABELS = np.zeros((2, 4, 3)), np.zeros((2, 4), dtype=int)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (LOGITS.astype(int), LABELS, TypeError, r"logits must have a real floating dtype; got int64 \(2, 4, 3\)"),
        (LOGITS.tolist(), LABELS, TypeError, "logits must be an array .*; got list"),
        (LOGITS, LABELS.tolist(), TypeError, "labels must be an array .*; got list"),
        (LOGITS, LABELS.astype(float), TypeError, r"labels must be integer token ids; got float64 \(2, 4\)"),
        (LOGITS, LABELS.astype(bool), TypeError, "labels must be integer token ids; got bool"),
        (LOGITS[:, :-1], LABELS, ValueError, r"both unshifted; got float64 \(2, 3, 3\) and int64 \(2, 4\)"),
        (LOGITS, LABELS[:, 1:], ValueError, r"both unshifted; got float64 \(2, 4, 3\) and int64 \(2, 3\)"),
        (LOGITS[0], LABELS[0], ValueError, r"got float64 \(4, 3\) and int64 \(4,\)"),
        (LOGITS[:, :0], LABELS[:, :0], ValueError, r"got float64 \(2, 0, 3\) and int64 \(2, 0\)"),
        (
            torch.zeros(2, 4, 3),
            LABELS,
            TypeError,
            "logits and labels must be arrays of one library; got torch.Tensor and",
        ),
        (LOGITS, jnp.asarray(LABELS), TypeError, "arrays of one library; got numpy.ndarray and jax"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=int, device="meta"), ValueError, "one device; got cpu and meta"),
    ],
)
def test_arrays_refused(logits: object, labels: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        per_token_logps(logits, labels)
