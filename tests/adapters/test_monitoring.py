"""Means and decisions over processes: one process here, two in one test."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from selective_pref import Response, dpo_loss
from selective_pref_adapters.monitoring import (
    MetricWindow,
    evaluation_mean,
    finite_everywhere,
    mean_over_pairs,
    non_finite_error,
    verdict,
)
from selective_pref_adapters.sharded import same_weights


def one_pair(logp: float, ref: float = -1.0) -> tuple[Response, Response]:
    mask = torch.ones(1, 1, dtype=torch.bool)
    return tuple(
        Response(per_token_logps=torch.tensor([[value]]), mask=mask, ref_per_token_logps=torch.tensor([[ref]]))
        for value in (logp, -1.0)
    )  # type: ignore[return-value]


def test_means_weigh_batches_by_their_pairs() -> None:
    batches = [{"a": torch.tensor(1.0)}, {"a": torch.tensor(4.0)}]
    assert mean_over_pairs(batches, [1, 2]) == {"a": 3.0}
    assert mean_over_pairs([], []) == {}


def test_a_window_weighs_batches_by_their_pairs_and_counts_what_was_left_out() -> None:
    window = MetricWindow()
    assert window.close().values == {}
    window.add({"a": torch.tensor(1.0)}, pairs=1)
    window.add({"a": torch.tensor(4.0)}, pairs=2, left_out=1)
    window.add({"a": torch.tensor(math.nan)}, pairs=0, left_out=3)  # a batch of which nothing is left
    means = window.means()
    assert (means.values, means.pairs, means.left_out) == ({"a": 3.0}, 3, 4)
    assert window.close() == means
    window.add({"a": torch.tensor(5.0)}, pairs=1)
    assert window.close().values == {"a": 5.0}


def test_the_mean_of_an_evaluation_counts_some_pairs_only() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert evaluation_mean(losses, torch.tensor([True, True, False])) == 1.5
    assert evaluation_mean(losses, torch.tensor([False, False, False])) == 0.0


def test_the_error_names_what_is_broken() -> None:
    broken = dpo_loss(*one_pair(math.nan), beta=0.1)
    assert not finite_everywhere(broken.losses)
    assert "step 3: non-finite values inside the mask: response 0 (per_token_logps): rows 0 (tokens 0)" in str(
        non_finite_error(broken, "step 3")
    )
    assert "another process" in str(non_finite_error(dpo_loss(*one_pair(-1.0), beta=0.1), "step 3"))
    huge = dpo_loss(*one_pair(3e38), beta=1e30)
    assert "although every log-prob is" in str(non_finite_error(huge, "step 3"))


def evaluations(*numbers: tuple[float, float]) -> list[dict[str, float | None]]:
    return [{"eval_rewards/margins": margin, "eval_rewards/accuracies": accuracy} for margin, accuracy in numbers]


def test_the_end_of_a_run_says_whether_full_margin_and_accuracy_rose_or_fell() -> None:
    rose = verdict([{"loss": 1.0}, *evaluations((-0.1, 0.25), (0.5, 0.75))]).sentences
    assert rose == [
        "The full margin (eval_rewards/margins) rose from -0.1 to 0.5, the full accuracy (eval_rewards/accuracies) "
        "rose from 0.25 to 0.75."
    ]
    fell = verdict(evaluations((0.5, 0.75), (-0.1, 0.25))).sentences
    assert "fell from 0.5 to -0.1" in fell[0]
    assert fell[1].startswith("Warning: the full-sequence margin (eval_rewards/margins) is falling")
    mixed = verdict(
        evaluations((0.5, 0.5), (0.25, 0.5))
    ).sentences  # a little lower at one of two evaluations may be noise
    assert len(mixed) == 1
    assert "accuracy (eval_rewards/accuracies) stayed at 0.5" in mixed[0]


def test_the_end_of_a_run_knows_the_signs_of_the_callback() -> None:
    low = verdict(evaluations(*[(step / 10, 0.4) for step in range(6)])).sentences
    assert "rose from 0 to 0.5" in low[0]
    assert "has been below one half for long" in low[1]
    training: list[dict[str, float | None]] = [
        {"rewards/margins": -step / 10, "rewards/accuracies": 0.6} for step in range(20)
    ]
    falling = verdict(training).sentences
    assert "(rewards/margins) fell from 0 to -1.9" in falling[0]
    assert "(rewards/margins) is falling" in falling[1]
    assert verdict([]).sentences == verdict(evaluations((0.5, 0.75))).sentences == []
    assert verdict([{"eval_rewards/margins": None, "eval_rewards/accuracies": None}] * 2).sentences == []


def test_same_weights() -> None:
    one, same, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    same.load_state_dict(one.state_dict())
    assert same_weights(one, same)
    assert not same_weights(one, other)
    assert not same_weights(one, None)


def _rank() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics = [{"a": torch.tensor(float(rank + 1))}]
    assert mean_over_pairs(metrics, [1 + 2 * rank]) == {"a": (1 * 1 + 2 * 3) / 4}
    window = MetricWindow()
    window.add({"a": torch.tensor(float(rank + 1))}, pairs=1 + 2 * rank, left_out=rank)
    assert vars(window.close()) == {"values": {"a": (1 * 1 + 2 * 3) / 4}, "pairs": 4, "left_out": 1}
    assert not finite_everywhere(torch.tensor([math.nan if rank else 0.0]))
    assert finite_everywhere(torch.tensor([1.0]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree() -> None:
    assert run_ranks(_rank) == [0, 0]


def test_the_signs_of_single_lines_count_where_tokens_are_selected() -> None:
    tied: list[dict[str, float | None]] = [{"step": 1, "selection/tied_fraction": 0.6}]
    assert list(verdict(tied, selection_ratio=0.4).warnings) == ["ties"]
    assert verdict(tied).warnings == {}
    assert verdict([{**tied[0], "selection/ratio": 1.0}], selection_ratio=0.4).warnings == {}
    equal: list[dict[str, float | None]] = [{"step": 0, "eval_rewards/chosen": 0.0, "eval_rewards/rejected": 0.0}]
    assert list(verdict(equal, selection_ratio=0.4).warnings) == ["self_reference"]
    assert list(verdict([{"step": 3, "eval_selection/skipped_pairs": 0.1}]).warnings) == ["non_finite"]


def test_margins_are_compared_at_the_last_beta() -> None:
    lines: list[dict[str, float | None]] = [
        {"rewards/margins": 1 / step, "rewards/accuracies": 0.6, "selection/beta": 1 / step**2} for step in (1, 2, 4)
    ]
    said = verdict(lines)
    assert said.rose
    assert "rose from 0.0625 to 0.25" in said.moved
    assert said.warnings == {}
