"""Names to objectives, schedules, and the one call that turns a batch's log-probs into losses."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from selective_pref import alignment_scores, diagnostics, select, selective_dpo_loss
from selective_pref_adapters.batch import from_bits, responses, to_bits
from selective_pref_adapters.objectives import (
    Schedule,
    check_objective,
    loss_of_batch,
    make_objective,
    unread,
    without_rounding,
)
from selective_pref_adapters.options import ObjectiveName


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[:, :2] = 0
    return {"completion_mask": mask}, *(-torch.rand(4, 6) for _ in range(3))


@pytest.mark.parametrize("name", get_args(ObjectiveName))
def test_every_name_makes_an_objective(name: str) -> None:
    objective = make_objective(name, beta=0.1, selection_ratio=0.4)
    check_objective(objective)
    rows, logps, ref, start = batch()
    given = [start] if name == "teacher_veto" else []
    assert loss_of_batch(objective, rows, logps, ref, *given).losses.shape == (2,)


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


@pytest.mark.parametrize("counted", [[True, False], [False, True], [True, True], [False, False]])
def test_some_pairs_of_a_batch(counted: list[bool]) -> None:
    """Their losses, weights and scores are those of a batch that holds these pairs alone; where none counts, of all."""
    rows, logps, ref, scoring = batch()
    weights, pairs = torch.tensor([2.0, 3.0]), torch.tensor(counted)
    objective = make_objective("selective_dpo", beta=0.1, selection_ratio=0.4, selection_pool="batch")
    out = loss_of_batch(objective, rows, logps, ref, scoring, pair_weights=weights, pairs=pairs)
    kept = [n for n in range(2) if counted[n] or not any(counted)]
    both = [*kept, *(n + 2 for n in kept)]
    alone = {"completion_mask": rows["completion_mask"][both]}
    expected = loss_of_batch(objective, alone, logps[both], ref[both], scoring[both], pair_weights=weights[kept])
    torch.testing.assert_close(out.losses, expected.losses)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.chosen_weights, expected.chosen_weights)
    half = {"completion_mask": rows["completion_mask"][:2]}
    chosen = loss_of_batch(make_objective("sft"), half, logps[:2], chosen_only=True, pairs=pairs)
    assert len(chosen.losses) == len(kept)


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


def test_the_numbers_of_a_selection_reach_it() -> None:
    rows, logps, ref, _ = batch()
    numbers = {"selection_ratio": (0.8, 0.6), "min_score": 0.1, "selection_ties": "first"}
    ours = loss_of_batch(make_objective("selective_dpo", beta=0.1, **numbers), rows, logps, ref)
    core = select(*responses(rows, logps, ref), selection_ratio=(0.8, 0.6), min_score=0.1, ties="first")
    without = select(*responses(rows, logps, ref), selection_ratio=(0.8, 0.6), ties="first")
    assert not torch.equal(core[0].token_weights, without[0].token_weights)
    assert torch.equal(ours.chosen_weights, core[0].token_weights)
    assert torch.equal(ours.rejected_weights, core[1].token_weights)


@pytest.mark.parametrize("name", ["selective_dpo", "dpo", "simpo"])
def test_the_supervised_term_reads_every_chosen_token(name: str) -> None:
    rows, logps, ref, scoring = batch()
    plain, with_term = (
        loss_of_batch(make_objective(name, beta=0.1, selection_ratio=0.4, sft_weight=weight), rows, logps, ref)
        for weight in (0.0, 0.5)
    )
    expected = plain.losses - 0.5 * logps[:2, 1:].mean(-1)  # the first place is the prompt's
    torch.testing.assert_close(with_term.losses, expected)
    assert torch.equal(with_term.chosen_weights, plain.chosen_weights)
    if name == "selective_dpo":  # a reference that scores is passed on
        objective = make_objective(name, beta=0.1, selection_ratio=0.4, sft_weight=0.5)
        scored = loss_of_batch(objective, rows, logps, ref, scoring)
        assert torch.equal(scored.chosen.scores, alignment_scores(*responses(rows, logps, scoring))[0])


def test_what_an_objective_does_not_read_depends_on_its_losses() -> None:
    assert "label_smoothing" not in unread("dpo", "sigmoid", "reverse_kl")
    assert {"label_smoothing", "discopop_tau", "selection_ratio"} <= set(unread("dpo", ("hinge", "sft"), "reverse_kl"))
    assert "discopop_tau" not in unread("selective_dpo", ("hinge", "discopop"), "reverse_kl")
    assert "f_alpha_divergence_coef" not in unread("selective_dpo", "sigmoid", "alpha_divergence")
    assert "loss_type" in unread("simpo", "sigmoid", "reverse_kl")


def test_pairs_count_for_their_weight() -> None:
    rows, logps, ref, _ = batch()
    weights = torch.tensor([0.5, 3.0])
    objective = make_objective("dpo", beta=0.1)
    plain = loss_of_batch(objective, rows, logps, ref)
    torch.testing.assert_close(
        loss_of_batch(objective, rows, logps, ref, pair_weights=weights).losses, weights * plain.losses
    )
