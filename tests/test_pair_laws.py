"""Which law each loss keeps and which it breaks: the table of docs/maths.md, tried on a fixed set of batches.

A law that a loss keeps holds on every batch. One that it breaks fails on at least one of them, so that no entry of
the table is out of caution. "selected" is the loss of what `select` returns at ratio 0.4.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import oracle
import pair_oracle as po
from oracle import Batch, Side
from pair_strategies import ACROSS_PAIRS, CALLS, WITH_REFERENCE, batch_of, corpus, policies, with_policy
from selective_pref import Response, preference_loss, select
from selective_pref.pair_losses import sigmoid
from strategies import NUMPY, TORCH, numpy_of

over = pytest.mark.parametrize
CORPUS = corpus()
BETAS = (0.5, 2.0)


@dataclass(frozen=True)
class Form:
    """A loss, of all tokens or of the selected ones."""

    name: str
    selected: bool = False
    min_score: float | None = None
    ratio: float = 0.4

    def out(self, batch: Batch, beta: float, ratio: float | None = None, backend: object = NUMPY) -> object:
        chosen, rejected = backend.pair(batch)
        if self.selected:
            options = {"selection_ratio": ratio or self.ratio, "min_score": self.min_score}
            chosen, rejected = select(chosen, rejected, **options)
        return CALLS[self.name](chosen, rejected, beta)

    def losses(self, batch: Batch, beta: float, ratio: float | None = None) -> np.ndarray:
        return self.out(batch, beta, ratio).losses

    @property
    def whole(self) -> bool:
        """Whether only the sum over the batch speaks of something."""
        return self.name in ACROSS_PAIRS


def moves(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps of the policy on both sides, at least 0: of every token by up to 3 nats, and of one token by 1/8."""
    rng = np.random.default_rng(1)
    large = tuple(np.where(side.mask, rng.integers(0, 24, np.shape(side.mask)) / 8, 0.0) for side in batch)
    small = tuple(
        np.where(np.arange(np.shape(side.mask)[1]) == 0, 1 / 8, 0.0) + 0.0 * step
        for side, step in zip(batch, large, strict=True)
    )
    return [large, small]


def signed(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps that help every pair, that hurt every pair, and that do either."""
    rng = np.random.default_rng(2)
    steps = [(s * one, -s * two) for one, two in moves(batch) for s in (1, -1)]
    mixed = tuple(step * rng.choice([-1, 1], step.shape) for step in moves(batch)[0])
    return [*steps, mixed]


# --- laws: (form, batch, beta) → whether it holds ----------------------------------------------------------------


def is_constant_where_policy_and_reference_agree(form: Form, batch: Batch, beta: float) -> bool:
    same = Batch(*(side._replace(policy=side.ref) for side in batch))
    values = np.concatenate([form.losses(same, beta, ratio) for ratio in (0.1, 0.4, 1)])
    return bool(np.all(np.abs(values - AT_THE_REFERENCE.get(form.name, lambda beta: values[0])(beta)) < 1e-9))


def does_not_see_the_other_pairs(form: Form, batch: Batch, beta: float) -> bool:
    part = [1, 0]
    some = Batch(*(Side(*([field[i] for i in part] for field in side)) for side in batch))
    return np.allclose(form.losses(some, beta), form.losses(batch, beta)[part], rtol=1e-12)


def does_not_see_what_policy_and_reference_share(form: Form, batch: Batch, beta: float) -> bool:
    added = [
        side._replace(policy=(np.array(side.policy) + step).tolist(), ref=(np.array(side.ref) + step).tolist())
        for side, step in zip(batch, moves(batch)[0], strict=True)
    ]
    return np.allclose(form.losses(Batch(*added), beta), form.losses(batch, beta), rtol=1e-12)


def never_rises_with_a_chosen_log_prob_nor_falls_with_a_rejected_one(form: Form, batch: Batch, beta: float) -> bool:
    (chosen, rejected), now = policies(batch), form.losses(batch, beta)
    for up, other in moves(batch):
        better = form.losses(with_policy(batch, chosen + up, rejected), beta)
        worse = form.losses(with_policy(batch, chosen, rejected + other), beta)
        if not (np.all(better <= now + 1e-9) and np.all(worse >= now - 1e-9)):
            return False
    return True


def is_convex(form: Form, batch: Batch, beta: float) -> bool:
    (chosen, rejected), here = policies(batch), form.losses(batch, beta)
    for up, other in signed(batch):
        there = form.losses(with_policy(batch, chosen + up, rejected + other), beta)
        inside = form.losses(with_policy(batch, chosen + up / 2, rejected + other / 2), beta)
        excess = inside - (here + there) / 2
        if np.any((np.sum(excess) if form.whole else excess) > 1e-9):
            return False
    return True


def moves_by_at_most_beta_per_nat(form: Form, batch: Batch, beta: float) -> bool:
    (chosen, rejected), here = policies(batch), form.losses(batch, beta)
    steepness = 1.0 if form.name in ("sft", "token_sft") else beta
    for up, other in signed(batch):
        nats = np.abs(up).sum(-1) + np.abs(other).sum(-1)
        change = np.abs(form.losses(with_policy(batch, chosen + up, rejected + other), beta) - here)
        if np.any((np.sum(change) - steepness * np.sum(nats) if form.whole else change - steepness * nats) > 1e-9):
            return False
    return True


Law = Callable[[Form, Batch, float], bool]
LAWS: dict[str, Law] = {
    "start": is_constant_where_policy_and_reference_agree,
    "pairs": does_not_see_the_other_pairs,
    "shift": does_not_see_what_policy_and_reference_share,
    "monotone": never_rises_with_a_chosen_log_prob_nor_falls_with_a_rejected_one,
    "convex": is_convex,
    "Lipschitz": moves_by_at_most_beta_per_nat,
}
LOG2 = np.log(2)
AT_THE_REFERENCE: dict[str, Callable[[float], float]] = {
    **{name: lambda beta: LOG2 for name in ("sigmoid", "sigmoid_norm", "aot", "aot_unpaired", "robust")},
    **{name: lambda beta: LOG2 for name in ("sigmoid_smoothed", *po.DIVERGENCES)},
    "hinge": lambda beta: 1.0,
    "ipo": lambda beta: 1 / (4 * beta**2),
    "exo_pair": lambda beta: -(np.log(1 - 1e-3) + np.log(1e-3)) / 2 - LOG2,
    "nca_pair": lambda beta: 2 * LOG2,
    "bco_pair": lambda beta: np.logaddexp(0, po.DELTA) + np.logaddexp(0, -po.DELTA),
    "sppo_hard": lambda beta: 1 / (2 * beta**2),
    "apo_zero": lambda beta: 1.0,
    "apo_down": lambda beta: 1.0,
    "discopop": lambda beta: LOG2 / 2 + 0.5,
}


def table() -> dict[str, dict[str, str]]:
    """The rows of docs/maths.md: loss → law → "yes", "no" or "plain" (kept without selection only)."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "maths.md").read_text(encoding="utf-8")
    head, *rows = re.findall(r"^\| (?:loss|`[^|]+) \|.*$", page[page.index("### Which law each loss keeps") :], re.M)
    names = [cell.strip() for cell in head.strip("|").split("|")][1:]
    entries = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    return {name: dict(zip(names, cells, strict=True)) for name, *cells in entries}


def holds(law: Law, form: Form) -> bool:
    return all(law(form, batch, beta) for batch in CORPUS for beta in (BETAS if len(batch[0].mask) > 2 else BETAS[:1]))


def test_the_table_has_every_loss_and_every_law() -> None:
    assert list(table()) == list(CALLS)
    assert all(list(row) == list(LAWS) for row in table().values())


@over("law", LAWS)
@over("name", CALLS)
def test_a_law_is_kept_or_shown_to_be_broken_as_the_table_says(name: str, law: str) -> None:
    plain, selected = (holds(LAWS[law], Form(name, selected=selected)) for selected in (False, True))
    assert {(True, True): "yes", (True, False): "plain", (False, False): "no"}[plain, selected] == table()[name][law]


# --- laws that every loss keeps ----------------------------------------------------------------------------------


@over("backend", [NUMPY, TORCH], ids=["numpy", "torch"])
@over("name", CALLS)
def test_ratio_one_is_the_plain_loss_bit_by_bit(name: str, backend: object) -> None:
    for batch in CORPUS[:4]:
        one, plain = (Form(name, selected=s).out(batch, 0.5, 1, backend).losses for s in (True, False))
        np.testing.assert_array_equal(numpy_of(one), numpy_of(plain))


@over("selected", [False, True])
@over("name", CALLS)
def test_padding_and_the_order_of_tokens_are_inert(name: str, selected: bool) -> None:
    rng = np.random.default_rng(2)
    for batch in CORPUS[:2]:
        padded = []
        for side in batch:
            rows, width = np.shape(side.mask)
            fill = ((0, 0), (2, 1))
            columns = rng.permuted(np.tile(np.arange(width + 3), (rows, 1)), axis=1)
            fields = [
                np.pad(np.array(f), fill, constant_values=c) for f, c in zip(side, (np.inf, np.nan, False), strict=True)
            ]
            padded.append(Side(*(np.take_along_axis(f, columns, axis=1).tolist() for f in fields)))
        before, after = (Form(name, selected).losses(b, 0.5) for b in (batch, Batch(*padded)))
        np.testing.assert_allclose(after, before, rtol=1e-12)


@over("selected", [False, True])
@over("name", CALLS)
def test_values_weights_and_gradients_agree_with_the_oracle(name: str, selected: bool) -> None:
    rng = np.random.default_rng(3)
    for beta in BETAS:
        batch = batch_of(rng, pairs=8)
        clean = Batch(*(_without_nan(side) for side in batch))
        weights = oracle.select(clean, 0.4) if selected else oracle.full(clean)
        losses, *gradients = po.values(name, clean, weights, beta)
        chosen, rejected = (
            replace(side, per_token_logps=side.per_token_logps.requires_grad_(), ref_per_token_logps=ref)
            for side in TORCH.pair(batch)
            for ref in [side.ref_per_token_logps.requires_grad_()]
        )
        pair = select(chosen, rejected, selection_ratio=0.4) if selected else (chosen, rejected)
        out = CALLS[name](*pair, beta)
        np.testing.assert_allclose(numpy_of(out.losses), losses, rtol=1e-11, atol=1e-12)
        out.losses.sum().backward()
        for side, gradient, rows in zip((chosen, rejected), gradients, weights, strict=True):
            actual = side.per_token_logps.grad
            actual = np.zeros(np.shape(rows)) if actual is None else numpy_of(actual)
            np.testing.assert_allclose(actual, gradient, rtol=1e-10, atol=1e-12)
            assert not np.any(actual[np.array(rows) == 0])
            assert side.ref_per_token_logps.grad is None
        for report in (out.chosen_rewards, out.rejected_selected_rewards, out.chosen.per_token_logps):
            assert not report.requires_grad


def _without_nan(side: Side) -> Side:
    return Side(*(np.nan_to_num(field).tolist() for field in side[:2]), side.mask)


@over("name", WITH_REFERENCE)
def test_both_sides_cannot_win_after_a_swap(name: str) -> None:
    """The selected margin and that of the flipped pair add up to at most 0, and to 0 at ratio 1."""
    for batch in CORPUS[:4]:
        for ratio in (0.4, 1):
            outs = [Form(name, selected=True).out(pair, 1.0, ratio) for pair in (batch, Batch(*batch[::-1]))]
            both = sum(out.chosen_selected_rewards - out.rejected_selected_rewards for out in outs)
            assert np.all(both <= 1e-9)
            assert ratio != 1 or np.all(np.abs(both) < 1e-9)


@over("name", CALLS)
def test_a_broken_log_prob_is_never_hidden(name: str) -> None:
    sides = 1 if "sft" in name else 2
    for number in range(sides):
        for bad in (np.nan, np.inf, -np.inf):
            batch = CORPUS[0]
            policy = [row.copy() for row in policies(batch)]
            policy[number][5, 0] = bad
            for selected in (False, True):
                with np.errstate(invalid="ignore"):
                    losses = Form(name, selected).losses(with_policy(batch, *policy), 0.5)
                assert not np.all(np.isfinite(losses))
                if name not in ACROSS_PAIRS:
                    assert np.flatnonzero(~np.isfinite(losses)).tolist() == [5]


# --- thresholds, and weights above 1 -----------------------------------------------------------------------------


@over(
    ("min_score", "law", "kept"),
    [
        (0.0, "monotone", True),
        (0.0, "convex", True),
        (0.0, "Lipschitz", True),
        (0.5, "monotone", True),
        (0.5, "convex", False),
        (0.5, "Lipschitz", False),
        (-0.5, "monotone", False),
        (-0.5, "convex", False),
        (-0.5, "Lipschitz", False),
    ],
)
@over("ratio", [0.4, 1])
def test_a_threshold_of_0_keeps_the_shape_of_the_loss_and_others_do_not(
    ratio: float, min_score: float, law: str, kept: bool
) -> None:
    """At τ a token leaves the selection: its log-ratio jumps from −τ to 0. Only at τ = 0 that is no jump."""
    form = Form("sigmoid", selected=True, min_score=min_score, ratio=ratio)
    if law == "monotone" or kept:
        assert holds(LAWS[law], form) is kept
        return
    one = Response(per_token_logps=np.array([[0.0]]), mask=np.ones((1, 1), bool), ref_per_token_logps=np.zeros((1, 1)))

    def loss(log_ratio: float) -> float:
        chosen = replace(one, per_token_logps=np.array([[log_ratio]]))
        pair = select(chosen, one, selection_ratio=ratio, min_score=min_score)
        return float(preference_loss(*pair, pair_loss=sigmoid, beta=1.0).loss)

    before, after = loss(-min_score - 1e-9), loss(-min_score + 1e-9)
    assert abs(after - before) > 0.1  # within 2e-9 nats: no Lipschitz constant, and no convex function jumps


def test_weights_above_one_scale_the_lipschitz_constant_and_keep_the_rest() -> None:
    rng = np.random.default_rng(4)
    steepest = 0.0
    for batch in CORPUS[:4]:
        weights = [rng.random(np.shape(side.mask)) * 4.5 for side in batch]

        def losses(b: Batch, weights: list = weights) -> np.ndarray:
            pair = [replace(side, weights=w) for side, w in zip(NUMPY.pair(b), weights, strict=True)]
            return CALLS["sigmoid"](*pair, 0.5).losses

        one, step, up = policies(batch), signed(batch)[0], moves(batch)[0]
        two = [p + s for p, s in zip(one, step, strict=True)]
        here, there, inside = (
            losses(with_policy(batch, *p)) for p in (one, two, [(p + q) / 2 for p, q in zip(one, two, strict=True)])
        )
        assert np.all(inside <= (here + there) / 2 + 1e-9)
        nats = sum(np.abs(s).sum(-1) for s in step)
        assert np.all(np.abs(here - there) <= 0.5 * 4.5 * nats + 1e-9)
        steepest = max(steepest, float(np.max(np.abs(here - there) / (0.5 * nats))))
        assert np.all(losses(with_policy(batch, one[0] + up[0], one[1])) <= here + 1e-9)
        rows = [np.where(side.mask, w, 0.0).tolist() for side, w in zip(batch, weights, strict=True)]
        expected, *_ = po.values("sigmoid", Batch(*map(_without_nan, batch)), tuple(rows), 0.5)
        np.testing.assert_allclose(here, expected, rtol=1e-11)
    assert steepest > 1  # the law with β alone is broken
