"""Names to objectives, schedules, and the one call that turns a batch's log-probs into losses."""

from __future__ import annotations

import math

import pytest
import torch

from selective_pref import alignment_scores, diagnostics, select, selective_dpo_loss
from selective_pref_adapters.batch import from_bits, responses, to_bits
from selective_pref_adapters.objectives import (
    Schedule,
    check_objective,
    loss_of_batch,
    make_objective,
    without_rounding,
)


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[:, :2] = 0
    return {"completion_mask": mask}, *(-torch.rand(4, 6) for _ in range(3))


@pytest.mark.parametrize("name", ["selective_dpo", "dpo", "simpo", "sft"])
def test_every_name_makes_an_objective(name: str) -> None:
    objective = make_objective(name, beta=0.1, selection_ratio=0.4)
    check_objective(objective)
    rows, logps, ref, _ = batch()
    assert loss_of_batch(objective, rows, logps, ref).losses.shape == (2,)


def test_selective_dpo_is_the_core_s() -> None:
    rows, logps, ref, _ = batch()
    ours = loss_of_batch(make_objective("selective_dpo", beta=0.1, selection_ratio=0.4), rows, logps, ref)
    core = selective_dpo_loss(*responses(rows, logps, ref), beta=0.1, selection_ratio=0.4)
    assert torch.equal(ours.losses, core.losses)


def test_a_scoring_reference_chooses_and_the_other_anchors() -> None:
    rows, logps, ref, scoring = batch()
    out = loss_of_batch(make_objective("selective_dpo", beta=0.1, selection_ratio=0.4), rows, logps, ref, scoring)
    expected = select(*responses(rows, logps, scoring), selection_ratio=0.4)
    assert torch.equal(out.chosen_weights, expected[0].token_weights)
    assert torch.equal(out.rejected.scores, alignment_scores(*responses(rows, logps, scoring))[1])
    assert torch.equal(out.chosen.ref_per_token_logps, ref[:2])
    assert not torch.equal(out.chosen_weights, select(*responses(rows, logps, ref), selection_ratio=0.4)[0].weights)


def test_options_out_of_range_are_found_without_a_batch() -> None:
    with pytest.raises(ValueError, match="objective must be one of"):
        make_objective("kto", beta=0.1)
    with pytest.raises(ValueError, match="selection_ratio must be in"):
        check_objective(make_objective("selective_dpo", beta=0.1, selection_ratio=1.5))
    with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
        check_objective(make_objective("dpo", beta=0.1), reference=False)


def test_schedules() -> None:
    linear = Schedule(start=1.0, end=0.4, steps=4)
    assert [linear(step) for step in (0, 1, 4, 100)] == [1.0, 0.85, 0.4, 0.4]
    cosine = Schedule(start=1.0, end=0.0, steps=4, shape="cosine")
    assert cosine(1) == round(1 - (1 - math.cos(math.pi / 4)) / 2, 6)
    held = Schedule(start=1.0, end=0.4, steps=4, shape="constant")
    assert [held(3), held(4)] == [1.0, 0.4]
    assert Schedule(start=0.3, end=0.4)(0) == 0.4
    with pytest.raises(ValueError, match="at least 0"):
        Schedule(start=1, end=0, steps=-1)
    with pytest.raises(ValueError, match="shape"):
        Schedule(start=1, end=0, shape="step")  # type: ignore[arg-type]


def test_bits_survive_a_cast_of_floats() -> None:
    logps = torch.tensor([[-1.2345678, 0.0, -math.inf]])
    assert torch.equal(from_bits(to_bits(logps)), logps)
    assert not to_bits(logps).is_floating_point()


def test_differences_of_rounding_are_ties() -> None:
    """One part in 2^23 of the log-prob is rounding, 1e-3 nats are not; NaN and infinities are handed on."""
    policy = torch.tensor([[-1.0, -10.0, -10.0, -2.0, -3.0, -4.0]], requires_grad=True)
    ref = torch.tensor([[-1.0 + 1e-5, -10.0 - 1e-4, -10.0 - 1e-3, math.nan, -math.inf, -4.0]])
    settled = without_rounding(ref, policy)
    assert settled[0, :3].tolist() == [-1.0, -10.0, ref[0, 2].item()]
    assert math.isnan(settled[0, 3])
    assert settled[0, 4].item() == -math.inf
    assert not settled.requires_grad
    exact = without_rounding(ref.double(), policy.double())
    assert exact[0, 0].item() == ref[0, 0].item()  # float64 knows better


def test_rounding_selects_no_token() -> None:
    """A reference that is the policy, computed in another batch: every token tied, no pair won, loss log 2."""
    torch.manual_seed(0)
    logps = -5 * torch.rand(4, 9)
    rows = {"completion_mask": torch.ones(4, 10)}
    noise = logps * (1 + 2e-6 * torch.randn(4, 9))
    for refs in ((noise,), (noise, noise)):
        out = loss_of_batch(make_objective("selective_dpo", beta=0.1, selection_ratio=0.4), rows, logps, *refs)
        numbers = diagnostics(out)
        assert numbers["selection/tied_fraction"].item() == 1
        assert numbers["rewards/accuracies"].item() == 0
        assert numbers["loss"].item() == pytest.approx(math.log(2), abs=1e-7)
