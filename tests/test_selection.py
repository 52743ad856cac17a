"""Top fractions and the quantile rule: worked values, exact counts, and what is refused."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given

import oracle
import strategies as s
from selective_pref import quantile_weights, ratio_digits, top_fraction_weights
from strategies import EVERY_DTYPE, FLOAT64, RATIOS, Backend, numpy_of

ids = {"ids": lambda value: getattr(value, "id", None)}
NAN, INF = math.nan, math.inf


def weights(scores: list[float], ratio: object, rule: object = top_fraction_weights, **options: str) -> list[float]:
    """Weights of one row without masked tokens."""
    return rule(np.array([scores]), np.ones((1, len(scores)), dtype=bool), ratio, **options)[0].tolist()


# --- worked values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*EVERY_DTYPE, s.JAX], **ids)
def test_the_top_two_of_five(backend: Backend) -> None:
    scores = backend.array([[0.5, -1.0, 2.0, 1.0, -3.0], [-2.0, -8.0, -1.0, -4.0, 0.0]])
    mask = backend.array([[True] * 5, [True, False, True, True, True]])
    actual = top_fraction_weights(scores, mask, 0.4)  # K = 2 of 5, and ceil(1.6) = 2 of 4
    np.testing.assert_array_equal(numpy_of(actual), [[0, 0, 1, 1, 0], [0, 0, 1, 0, 1]])
    assert str(actual.dtype).endswith("float64" if backend.dtype == "float64" else "float32")


@pytest.mark.parametrize(
    ("ties", "expected"),
    [
        ("share", [1.0, (3 - 1) / 3, 0.0, (3 - 1) / 3, (3 - 1) / 3]),
        ("first", [1.0, 1.0, 0.0, 1.0, 0.0]),
        ("all", [1.0, 1.0, 0.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_ties_at_the_threshold(backend: Backend, ties: str, expected: list[float]) -> None:
    scores, mask = backend.array([[7.0, 2.0, 1.0, 2.0, 2.0]]), backend.array([[True] * 5])
    assert numpy_of(top_fraction_weights(scores, mask, 0.6, ties=ties)).tolist() == [expected]


def test_all_scores_equal_share_the_budget_equally() -> None:
    assert weights([0.0] * 5, 0.4) == [2 / 5] * 5
    assert weights([0.0] * 5, 0.4, ties="first") == [1, 1, 0, 0, 0]
    assert weights([0.0] * 5, 0.4, ties="all") == [1] * 5


def test_minus_zero_ties_with_zero() -> None:
    assert weights([0.0, -0.0], 0.5) == [0.5, 0.5]


def test_infinite_scores_sort_last_and_first() -> None:
    assert weights([-INF, 0.0, INF, 1.0], 0.5) == [0, 0, 1, 1]
    assert weights([-INF, -INF, -INF, 5.0], 0.5) == [1 / 3, 1 / 3, 1 / 3, 1.0]
    mask = np.array([[True, False, True, False, True]])
    scores = np.array([[INF, INF, INF, -INF, -INF]])
    assert top_fraction_weights(scores, mask, 0.4).tolist() == [[1.0, 0, 1.0, 0, 0]]
    assert top_fraction_weights(scores, mask, 0.1).tolist() == [[0.5, 0, 0.5, 0, 0]]


@pytest.mark.parametrize("junk", s.GARBAGE)
@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_what_stands_off_the_mask_is_not_read(backend: Backend, junk: float) -> None:
    scores = backend.array([[junk, -3.0, junk, -1.0, -2.0]])
    mask = backend.array([[False, True, False, True, True]])
    assert numpy_of(top_fraction_weights(scores, mask, 0.34)).tolist() == [[0, 0, 0, 1, 1]]
    assert numpy_of(quantile_weights(scores, mask, 0.5)).tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("rule", [top_fraction_weights, quantile_weights])
@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_rows_without_tokens_weigh_nothing(backend: Backend, rule: object) -> None:
    scores, mask = backend.array([[NAN, 1.0], [1.0, 2.0]]), backend.array([[False, False], [True, True]])
    assert numpy_of(rule(scores, mask, 0.5)).tolist() == [[0, 0], [0, 1]]
    empty = rule(backend.array(np.zeros((2, 0))), backend.array(np.zeros((2, 0), dtype=bool)), 0.5)
    assert tuple(empty.shape) == (2, 0)


@pytest.mark.parametrize("ties", ["share", "first", "all"])
@pytest.mark.parametrize("scores", [[NAN, 1.0, 2.0], [1.0, NAN, 2.0], [NAN, NAN, NAN], [2.0, INF, NAN]])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 1])
@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_a_nan_score_has_a_nan_weight_and_other_rows_do_not(
    backend: Backend, ties: str, scores: list[float], ratio: float
) -> None:
    rows, mask = backend.array([scores, [3.0, 1.0, 2.0]]), backend.array([[True] * 3] * 2)
    actual = numpy_of(top_fraction_weights(rows, mask, ratio, ties=ties))
    assert np.all(np.isnan(actual[0]) | ~np.isnan(scores))
    assert actual[1].tolist() == weights([3.0, 1.0, 2.0], ratio, ties=ties)
    kept = numpy_of(quantile_weights(rows, mask, ratio))
    assert np.all(np.isnan(kept[0]) | ~np.isnan(scores))
    assert kept[1].tolist() == weights([3.0, 1.0, 2.0], ratio, quantile_weights)


# --- how many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "tokens", "keep"),
    [
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.07, 101, 8),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.1, 10, 1),
        (0.1, 11, 2),
        (0.3, 10, 3),
        (0.30000000000000004, 10, 4),
        (0.4, 5, 2),
        (0.4, 1, 1),
        (1e-05, 100_000, 1),
        (1e-05, 100_001, 2),
        (1e-300, 7, 1),
        (5e-324, 7, 1),
        (1 / 3, 3, 1),
        (1 / 3, 300, 100),
        (2 / 3, 3, 2),
        (0.6666666666666667, 3, 3),
        (0.9999999999999999, 1000, 1000),
        (1, 9, 9),
        (1.0, 9, 9),
        (np.float32(0.4), 5, 2),
        (np.float32(0.07), 100, 7),
        (np.float16(0.1), 10, 1),
        (np.float64(0.07), 100, 7),
        (Decimal("0.4"), 5, 2),
        (Decimal("0.070"), 100, 7),
        (Decimal("4E-1"), 10, 4),
        (Decimal("1E-7"), 10, 1),
        (Decimal("1.00"), 10, 10),
        (np.int64(1), 4, 4),
    ],
)
def test_k_is_the_exact_ceiling(ratio: object, tokens: int, keep: int) -> None:
    scores = [float(i) for i in range(tokens)]
    assert weights(scores, ratio) == [0.0] * (tokens - keep) + [1.0] * keep


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX, Backend("torch", "float32")], **ids)
@given(
    ratio=st.one_of(
        RATIOS,
        st.decimals("0.000001", "1", places=6),
        st.integers(1, 10**5).map(lambda n: float(f"{n}e-5")),
        st.integers(1, 2**24).map(lambda n: np.float32(n) / np.float32(2**24)),
    )
)
def test_k_agrees_with_decimal_arithmetic_for_every_length(backend: Backend, ratio: object) -> None:
    """One row per length 0 … 96, all scores equal: the weights of a row add up to its K."""
    lengths = np.arange(97)
    mask = np.arange(96)[None, :] < lengths[:, None]
    actual = numpy_of(top_fraction_weights(backend.array(np.zeros((97, 96))), backend.array(mask), ratio, ties="first"))
    assert actual.sum(-1).tolist() == [oracle.keep_count(ratio, int(n)) for n in lengths]


def test_k_is_exact_in_long_rows_with_32_bit_counts() -> None:
    with s.with_x64(False):
        scores, mask = jnp.arange(200_000.0)[None, :], jnp.ones((1, 200_000), dtype=bool)
        for ratio in (0.07, 0.123456789, 1 / 3):
            assert int(top_fraction_weights(scores, mask, ratio).sum()) == oracle.keep_count(ratio, 200_000)


def test_a_pool_too_long_for_32_bit_counts_is_refused() -> None:
    with s.with_x64(False):
        shapes = (
            jax.ShapeDtypeStruct((1, 2_200_000), jnp.float32),
            jax.ShapeDtypeStruct((1, 2_200_000), jnp.bool_),
        )
        with pytest.raises(ValueError, match="a pool of 2200000 tokens is too large for int32"):
            jax.eval_shape(lambda scores, mask: top_fraction_weights(scores, mask, 0.4), *shapes)


@given(
    scores=st.lists(st.one_of(s.WHOLE, s.REAL), min_size=1, max_size=12), ratio=RATIOS, seed=st.integers(0, 2**12 - 1)
)
def test_weights_agree_with_the_oracle_under_masks(scores: list[float], ratio: float, seed: int) -> None:
    mask = [bool(seed >> i & 1) for i in range(len(scores))]
    kept = [x for x, here in zip(scores, mask, strict=True) if here]
    for rule, truth in (
        *((lambda a, m, r, t=t: top_fraction_weights(a, m, r, ties=t), t) for t in ("share", "first", "all")),
        (quantile_weights, None),
    ):
        expected = oracle.top_weights(kept, ratio, truth) if truth else oracle.quantile_rule(kept, ratio)
        actual = rule(np.array([scores]), np.array([mask]), ratio)[0]
        np.testing.assert_allclose(actual[mask], expected, rtol=1e-15)
        assert not np.any(actual[~np.array(mask)])


@pytest.mark.parametrize("ties", ["share", "first", "all"])
@pytest.mark.parametrize("backend", [*FLOAT64, Backend("torch", "float32")], **ids)
@given(ratio=RATIOS, seed=st.integers(0, 2**32 - 1))
def test_a_ratio_given_as_its_digits_selects_the_same_bits(
    backend: Backend, ties: str, ratio: float, seed: int
) -> None:
    if len(np.format_float_positional(ratio)) > 26:  # 0., and 24 decimals
        return
    rng = np.random.default_rng(seed)
    scores, mask = backend.array(rng.integers(0, 4, (9, 11)) / 2), backend.array(rng.random((9, 11)) < 0.7)
    digits = ratio_digits(ratio, like=scores)
    for one, two in (
        (top_fraction_weights(scores, mask, digits, ties=ties), top_fraction_weights(scores, mask, ratio, ties=ties)),
        (quantile_weights(scores, mask, digits), quantile_weights(scores, mask, ratio)),
    ):
        np.testing.assert_array_equal(numpy_of(one), numpy_of(two))


@pytest.mark.parametrize("backend", FLOAT64, **ids)
def test_a_nan_score_is_not_hidden_where_the_ratio_is_an_array(backend: Backend) -> None:
    rows, mask = backend.array([[NAN, 1.0, 2.0], [3.0, 1.0, 2.0], [-INF, NAN, 0.0]]), backend.array([[True] * 3] * 3)
    for ratio in (0.3, 0.5, 1):
        digits = ratio_digits(ratio, like=rows)
        for tau in (None, 5.0):
            actual = numpy_of(top_fraction_weights(rows, mask, digits, min_score=tau))
            assert np.isnan(actual[[0, 2], [0, 1]]).all()
            assert np.isfinite(actual[1]).all()


def test_digits_refused() -> None:
    for ratio, error, message in (
        (0, ValueError, r"selection_ratio must be in \(0, 1\]"),
        (1e-300, ValueError, "at most 24 decimals here; got 1e-300: round it"),
        (np.array([0.4]), TypeError, r"selection_ratio must be a number; got float64 \(1,\)"),
    ):
        with pytest.raises(error, match=message):
            ratio_digits(ratio, like=SCORES)
    for ratio in (np.array([0.4]), np.array([0, 400]), np.zeros(9)):
        with pytest.raises(TypeError, match=r"or the integer array \[9\] that ratio_digits returns; got"):
            top_fraction_weights(SCORES, MASK, ratio)
    with pytest.raises(TypeError, match="selection_ratio and scores must be arrays of one library"):
        top_fraction_weights(SCORES, MASK, ratio_digits(0.4, like=torch.zeros(1)))


# --- a threshold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EVERY_DTYPE, **ids)
def test_only_scores_above_the_threshold_keep_their_weight(backend: Backend) -> None:
    scores = backend.array([[2.0, 0.5, 0.5, -1.0, 9.0], [0.0, 0.0, -0.5, 0.0, 9.0]])
    mask = backend.array([[True] * 4 + [False]] * 2)
    for ratio, tau, expected in (
        (1, 0.0, [[1, 1, 1, 0, 0], [0] * 5]),
        (1, 0.5, [[1, 0, 0, 0, 0], [0] * 5]),
        (1, -0.5, [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]),
        (0.5, 0.0, [[1, 0.5, 0.5, 0, 0], [0] * 5]),
        (0.25, 0.0, [[1, 0, 0, 0, 0], [0] * 5]),
        (0.5, 2, [[0] * 5, [0] * 5]),
    ):
        actual = top_fraction_weights(scores, mask, ratio, min_score=tau)
        assert numpy_of(actual).tolist() == expected
        assert str(actual.dtype).endswith("float64" if backend.dtype == "float64" else "float32")


@pytest.mark.parametrize("ties", ["share", "first", "all"])
@given(batch=s.batches(), ratio=RATIOS, tau=st.integers(-24, 24).map(lambda n: n / 8))
def test_a_threshold_takes_away_what_is_not_above_it_and_nothing_else(
    batch: s.Batch, ratio: float, tau: float, ties: str
) -> None:
    response = s.NUMPY.response(batch.chosen)
    scores, mask = response.per_token_logps, response.mask
    plain = top_fraction_weights(scores, mask, ratio, ties=ties)
    actual = top_fraction_weights(scores, mask, ratio, ties=ties, min_score=tau)
    above = mask & (np.where(mask, scores, 0.0) > tau)
    np.testing.assert_array_equal(actual, np.where(above, plain, 0.0))


@pytest.mark.parametrize(
    ("tau", "error"),
    [(NAN, ValueError), (INF, ValueError), ("0", TypeError), (True, TypeError), (np.zeros(1), TypeError)],
)
def test_thresholds_refused(tau: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="min_score must be a"):
        top_fraction_weights(SCORES, MASK, 0.4, min_score=tau)


# --- the authors' rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "keep"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3), (8, 3), (11, 5), (13, 5), (26, 11)]
)
def test_the_released_rule_keeps_one_of_three_two_of_four_five_of_eleven(tokens: int, keep: int) -> None:
    scores = [float(i) for i in range(tokens)]
    assert weights(scores, 0.4, quantile_weights) == [0.0] * (tokens - keep) + [1.0] * keep
    assert keep == math.floor(Fraction(4, 10) * (tokens - 1)) + 1


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.35, 0.4, 0.5, 0.75])
def test_the_released_rule_is_torchs_quantile_where_that_is_exact(ratio: float) -> None:
    """In float64, at every length whose rank is no whole number (there rounding decides on the authors' side)."""
    for length in range(1, 60):
        if ((1 - Fraction(str(ratio))) * (length - 1)).denominator == 1:
            continue
        scores = torch.randperm(length, generator=torch.Generator().manual_seed(length)).double()[None, :]
        expected = (scores >= torch.quantile(scores, 1 - ratio)).double()
        assert torch.equal(quantile_weights(scores, torch.ones(1, length, dtype=torch.bool), ratio), expected)


def test_the_released_rule_keeps_all_ties() -> None:
    assert weights([0.0] * 4, 0.4, quantile_weights) == [1] * 4
    assert weights([1.0, 1.0, 0.0, 5.0], 0.4, quantile_weights) == [1, 1, 0, 1]


# --- what is refused ---------------------------------------------------------------------------------------------

SCORES, MASK = np.zeros((2, 3)), np.ones((2, 3), dtype=bool)


@pytest.mark.parametrize("rule", [top_fraction_weights, quantile_weights])
@pytest.mark.parametrize(
    ("ratio", "error", "message"),
    [
        (0, ValueError, r"selection_ratio must be in \(0, 1\].*got 0"),
        (0.0, ValueError, "got 0.0"),
        (-0.4, ValueError, "got -0.4"),
        (1.0000000000000002, ValueError, "got 1.0000000000000002"),
        (40, ValueError, r"got 40 \(a percentage\? 40 % is 0.4\)"),
        (NAN, ValueError, "got nan"),
        (INF, ValueError, "got inf"),
        (-INF, ValueError, "got -inf"),
        (np.float32("nan"), ValueError, "nan"),
        (Decimal("NaN"), ValueError, "NaN"),
        (Decimal("0"), ValueError, "got Decimal"),
        (Decimal("1.1"), ValueError, "got Decimal"),
        (True, TypeError, "selection_ratio must be a number.*got bool True"),
        (np.True_, TypeError, "got bool"),
        ("0.4", TypeError, "got str '0.4'"),
        (None, TypeError, "got NoneType"),
        (0.4j, TypeError, "got complex"),
        (Fraction(2, 5), TypeError, r"got Fraction Fraction\(2, 5\)"),
        (torch.tensor(0.4), TypeError, "got Tensor"),
        (np.array(0.4), TypeError, "got ndarray"),
        (jnp.asarray(0.4), TypeError, "got ArrayImpl"),
    ],
    ids=repr,
)
def test_ratios_refused(rule: object, ratio: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rule(SCORES, MASK, ratio)


@pytest.mark.parametrize("rule", [top_fraction_weights, quantile_weights])
@pytest.mark.parametrize(
    ("scores", "mask", "error", "message"),
    [
        (
            SCORES,
            MASK.astype(float),
            TypeError,
            r"mask must be bool \[B T\] like scores \(2, 3\); got float64 \(2, 3\)",
        ),
        (SCORES, MASK.astype(np.int64), TypeError, "mask must be bool.*got int64"),
        (SCORES, MASK[:, :2], ValueError, r"both be \[B T\]; got float64 \(2, 3\) and bool \(2, 2\)"),
        (SCORES[0], MASK[0], ValueError, r"both be \[B T\]; got float64 \(3,\) and bool \(3,\)"),
        (SCORES[None], MASK[None], ValueError, r"got float64 \(1, 2, 3\)"),
        (SCORES.astype(int), MASK, TypeError, r"scores must have a real floating dtype; got int64 \(2, 3\)"),
        (SCORES.astype(complex), MASK, TypeError, "real floating dtype; got complex128"),
        (MASK, MASK, TypeError, "real floating dtype; got bool"),
        (SCORES.tolist(), MASK, TypeError, "scores must be an array of a library.*got list"),
        (SCORES, MASK.tolist(), TypeError, "mask must be an array of a library.*got list"),
        (torch.zeros(2, 3), MASK, TypeError, "mask and scores must be arrays of one library; got numpy.ndarray"),
        (SCORES, jnp.asarray(MASK), TypeError, "must be arrays of one library; got jax.* and numpy.ndarray"),
        (
            torch.zeros(2, 3),
            torch.ones(2, 3, dtype=torch.bool, device="meta"),
            ValueError,
            "must be on one device; got meta and cpu",
        ),
    ],
)
def test_arrays_refused(rule: object, scores: object, mask: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rule(scores, mask, 0.4)


@pytest.mark.parametrize("ties", ["random", "", None, "Share"])
def test_ties_refused(ties: object) -> None:
    with pytest.raises(ValueError, match=f"ties must be 'share', 'first' or 'all'; got {ties!r}"):
        top_fraction_weights(SCORES, MASK, 0.4, ties=ties)
