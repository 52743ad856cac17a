"""What is reported: full and selected rewards, the selection, and rows that are empty or broken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import strategies as s
from oracle import Batch, Side
from selective_pref import (
    NonFiniteError,
    Response,
    check_finite,
    diagnostics,
    dpo_loss,
    select,
    selective_dpo_loss,
    sft_loss,
    simpo_loss,
)
from strategies import FLOAT64, LOSSES, Backend, Loss, Settings, batches, numpy_of

ids = {"ids": lambda value: getattr(value, "id", None)}
NAN, INF = math.nan, math.inf

# log-ratios: chosen (3, −1) and (2, 2); rejected (−2, 1) and none
BATCH = Batch(
    Side([[-1.0, -2.0], [-1.0, -1.0]], [[-4.0, -1.0], [-3.0, -3.0]], [[True, True]] * 2),
    Side([[-3.0, -1.0], [NAN, INF]], [[-1.0, -2.0], [NAN, NAN]], [[True, True], [False, False]]),
)


def metrics_of(out: object) -> dict[str, float]:
    return {name: float(value) for name, value in diagnostics(out).items()}


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX, Backend("torch", "bfloat16")], **ids)
def test_worked_values(backend: Backend) -> None:
    metrics = metrics_of(selective_dpo_loss(*backend.pair(BATCH), beta=0.5, selection_ratio=0.5))
    losses = [math.log1p(math.exp(-0.5 * (-1 - 1))), math.log1p(math.exp(-0.5 * (2 - 0)))]
    assert metrics == pytest.approx(
        {
            "loss": sum(losses) / 2,
            "rewards/chosen": 0.5 * (2 + 4) / 2,
            "rewards/rejected": 0.5 * (-1 + 0) / 2,
            "rewards/margins": 0.5 * ((2 - -1) + (4 - 0)) / 2,
            "rewards/accuracies": 1.0,
            "selection/rewards/chosen": 0.5 * (-1 + 2) / 2,
            "selection/rewards/rejected": 0.5 * (1 + 0) / 2,
            "selection/rewards/margins": 0.5 * (-2 + 2) / 2,
            "selection/rewards/accuracies": 0.5,
            "logps/chosen": (-3 - 2) / 2,
            "logps/rejected": (-4 + 0) / 2,
            "selection/fraction": (1 / 2 + 1 / 2 + 1 / 2 + 0) / 4,
            "selection/empty_rows": 1 / 4,
            "selection/nonfinite_rows": 0.0,
            "selection/threshold": (1 - 2 + 1 + 0) / 4,
            "selection/tied_fraction": (0 + 2 / 2 + 0 + 0) / 4,
        },
        rel=1e-6,
    )


def test_the_threshold_is_the_lowest_selected_score() -> None:
    """At ratio 1 that is the lowest of all: −3 of (−3, 1), −2 twice of (−2, −2), −2 of (−2, 1), none."""
    metrics = metrics_of(selective_dpo_loss(*s.NUMPY.pair(BATCH), beta=0.5, selection_ratio=1))
    assert metrics["selection/threshold"] == (-3 - 2 - 2 + 0) / 4
    assert metrics["selection/tied_fraction"] == (0 + 2 / 2 + 0 + 0) / 4


def test_full_accuracy_may_be_1_where_the_selected_one_is_0() -> None:
    batch = Batch(
        Side([[-1.0, -2.0]], [[-4.0, -1.0]], [[True] * 2]), Side([[-3.0, -1.0]], [[-1.0, -2.0]], [[True] * 2])
    )
    metrics = metrics_of(selective_dpo_loss(*s.NUMPY.pair(batch), beta=0.01, selection_ratio=0.5))
    assert (metrics["rewards/accuracies"], metrics["selection/rewards/accuracies"]) == (1.0, 0.0)
    assert metrics["rewards/margins"] > 0 > metrics["selection/rewards/margins"]


def test_without_selection_everything_is_kept_and_there_is_no_threshold() -> None:
    metrics = metrics_of(dpo_loss(*s.NUMPY.pair(BATCH), beta=0.5))
    assert metrics["selection/fraction"] == 3 / 4  # the empty response keeps nothing
    assert "selection/threshold" not in metrics
    assert "selection/tied_fraction" not in metrics
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert metrics[f"rewards/{name}"] == metrics[f"selection/rewards/{name}"]


def test_a_reference_free_loss_has_diagnostics_too() -> None:
    pair = [Response(per_token_logps=r.per_token_logps, mask=r.mask) for r in s.NUMPY.pair(BATCH)]
    metrics = metrics_of(simpo_loss(*pair, beta=2.0, gamma=0.5))
    assert metrics["rewards/chosen"] == 2.0 * (-1.5 - 1.0) / 2
    assert metrics["selection/nonfinite_rows"] == 0.0


@pytest.mark.parametrize(("field", "side"), [("policy", 0), ("policy", 1), ("ref", 0), ("ref", 1)])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_that_are_not_finite_are_counted(field: str, side: int, bad: float) -> None:
    sides = list(BATCH)
    rows = [list(row) for row in getattr(sides[side], field)]
    rows[0][1] = bad
    sides[side] = sides[side]._replace(**{field: rows})
    metrics = metrics_of(selective_dpo_loss(*s.TORCH.pair(Batch(*sides)), beta=0.5, selection_ratio=0.5))
    assert metrics["selection/nonfinite_rows"] == 1 / 4
    assert not math.isfinite(metrics["loss"])


@pytest.mark.parametrize("loss", LOSSES, **ids)
@settings(max_examples=8)
@given(batch=batches(values=s.REAL), numbers=s.SETTINGS)
def test_every_metric_is_a_detached_scalar_and_a_mean_of_its_pairs(loss: Loss, batch: Batch, numbers: Settings) -> None:
    out = loss(*s.torch_leaf(batch), numbers)
    whole = diagnostics(out)
    for value in whole.values():
        assert value.ndim == 0
        assert not value.requires_grad
        assert math.isfinite(value.item())
    rows = len(batch.chosen.mask)
    if loss.pool == "batch":
        return
    alone = [
        diagnostics(loss(*s.TORCH.pair(Batch(*(Side(*([f[i]] for f in side)) for side in batch))), numbers))
        for i in range(rows)
    ]
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(m[name].item() for m in alone) / rows, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("pool", ["response", "pair", "batch"])
def test_a_batch_without_any_token_has_diagnostics(pool: str) -> None:
    nothing = Side([[], []], [[], []], [[], []])
    out = selective_dpo_loss(*s.NUMPY.pair(Batch(nothing, nothing)), beta=0.5, selection_ratio=0.5, pool=pool)
    metrics = metrics_of(out)
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert (metrics["selection/empty_rows"], metrics["selection/fraction"]) == (1.0, 0.0)


# --- check_finite ------------------------------------------------------------------------------------------------


def response(backend: Backend, policy: list, ref: list | None = None, mask: list | None = None) -> Response:
    side = Side(policy, ref or np.zeros_like(policy).tolist(), mask or np.ones_like(policy, dtype=bool).tolist())
    made = backend.response(side)
    return made if ref is not None else Response(per_token_logps=made.per_token_logps, mask=made.mask)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_rows_and_tokens_are_named(backend: Backend, bad: float) -> None:
    chosen = response(backend, [[0.0, -1.0, 0.0], [bad, 0.0, bad], [0.0, bad, 0.0]])
    rejected = response(backend, [[0.0, 0.0]], ref=[[0.0, bad]])
    with pytest.raises(NonFiniteError) as raised:
        check_finite(chosen, rejected)
    message = str(raised.value)
    assert "response 0 (per_token_logps): rows 1 (tokens 0, 2), 2 (tokens 1)" in message
    assert "response 1 (ref_per_token_logps): rows 0 (tokens 1)" in message
    assert "response 1 (per_token_logps)" not in message


def test_long_lists_are_cut() -> None:
    with pytest.raises(NonFiniteError, match=r"rows 0 \(tokens 0, 1, 2, 3, 4 and 3 more\), 1 .* 4 .* and 2 more"):
        check_finite(response(s.TORCH, [[NAN] * 8] * 7))


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_finite_responses_and_garbage_off_the_mask_pass(backend: Backend) -> None:
    sides = backend.pair(BATCH)
    check_finite(*sides)
    check_finite(*select(*sides, selection_ratio=0.5))
    check_finite(response(backend, [[0.0, NAN]], mask=[[True, False]]))
    check_finite(response(backend, [[]]))


def test_the_error_is_an_arithmetic_one() -> None:
    with pytest.raises(FloatingPointError, match="non-finite values inside the mask"):
        check_finite(response(s.TORCH, [[NAN]]))


def test_what_check_finite_reports_is_what_spoils_the_loss() -> None:
    sides = s.TORCH.pair(BATCH)
    out = selective_dpo_loss(*sides, beta=1.0, selection_ratio=0.5)
    assert torch.isfinite(out.losses).all()
    policy = sides[0].per_token_logps.clone()
    policy[1, 0] = NAN
    broken = Response(per_token_logps=policy, mask=sides[0].mask, ref_per_token_logps=sides[0].ref_per_token_logps)
    with pytest.raises(NonFiniteError, match=r"response 0 \(per_token_logps\): rows 1 \(tokens 0\)"):
        check_finite(broken, sides[1])
    losses = selective_dpo_loss(broken, sides[1], beta=1.0, selection_ratio=0.5).losses
    assert np.isfinite(numpy_of(losses)).tolist() == [True, False]


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX], **ids)
def test_without_a_rejected_side_only_what_the_chosen_one_says_is_reported(backend: Backend) -> None:
    chosen, rejected = backend.pair(BATCH)
    nothing = Response(per_token_logps=rejected.per_token_logps[:, :0], mask=rejected.mask[:, :0])
    out = sft_loss(chosen, nothing)
    metrics = {name: float(value) for name, value in diagnostics(out, chosen_only=True).items()}
    assert metrics == pytest.approx(
        {
            "loss": (1.5 + 1) / 2,
            "rewards/chosen": (-1.5 - 1) / 2,
            "selection/rewards/chosen": (-1.5 - 1) / 2,
            "logps/chosen": (-3 - 2) / 2,
            "selection/fraction": 1.0,
            "selection/empty_rows": 0.0,
            "selection/nonfinite_rows": 0.0,
        }
    )
