"""Means and decisions over processes: one process here, two in a subprocess test."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from selective_pref import Response, dpo_loss
from selective_pref_adapters.models import same_weights
from selective_pref_adapters.monitoring import (
    MetricWindow,
    evaluation_mean,
    finite_everywhere,
    mean_over_pairs,
    non_finite_error,
)


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


def test_same_weights() -> None:
    one, same, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    same.load_state_dict(one.state_dict())
    assert same_weights(one, same)
    assert not same_weights(one, other)
    assert not same_weights(one, None)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    metrics = [{"a": torch.tensor(float(rank + 1))}]
    assert mean_over_pairs(metrics, [1 + 2 * rank]) == {"a": (1 * 1 + 2 * 3) / 4}
    window = MetricWindow()
    window.add({"a": torch.tensor(float(rank + 1))}, pairs=1 + 2 * rank, left_out=rank)
    assert vars(window.close()) == {"values": {"a": (1 * 1 + 2 * 3) / 4}, "pairs": 4, "left_out": 1}
    assert not finite_everywhere(torch.tensor([math.nan if rank else 0.0]))
    assert finite_everywhere(torch.tensor([1.0]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
