"""Every recipe of docs/recipes.md against its formula, written out here over Python floats, and against golden values.

The functions are those of the page, which is executed once. The golden values were computed independently, by a script
that shares no code with this project, on the fixture that `models` writes down.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from selective_pref import Response, alignment_scores, dpo_loss, select, selective_dpo_loss, simpo_loss
from selective_pref.fused import fused_logps_and_statistics

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
BETA, ALPHA, ETA = 0.3, 0.7, 0.8


@pytest.fixture(scope="module")
def recipes() -> SimpleNamespace:
    """What the page defines, after it has run."""
    spec = importlib.util.spec_from_file_location("pages", Path(__file__).with_name("test_docs.py"))
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pages
    spec.loader.exec_module(pages)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in pages.blocks_of(PAGE.read_text(encoding="utf-8")):
        exec(compile(block.code, str(PAGE), "exec"), namespace)
    return SimpleNamespace(**{name: value for name, value in namespace.items() if not name.startswith("__")})


# --- the golden fixture: one pair, five tokens in the vocabulary, logits = 2·sin(a + b·t + c·v + d·side) -------------

Y_W, Y_L = [1, 3, 0, 2], [4, 2, 1]
NUMBERS = {
    "policy": (1.0, 1.3, 0.7, 0.5),
    "ref": (0.4, 1.1, 0.9, 0.3),
    "plus": (0.2, 1.2, 0.8, 0.0),
    "minus": (0.9, 1.0, 0.6, 0.2),
}


def logits_of(name: str, side: int) -> Tensor:
    """[1 T V] in float64."""
    a, b, c, d = NUMBERS[name]
    tokens = (Y_W, Y_L)[side]
    rows = [[2 * math.sin(a + b * t + c * v + d * side) for v in range(5)] for t in range(len(tokens))]
    return torch.tensor([rows], dtype=torch.float64)


def golden_pair(policy: str, ref: str, requires_grad: bool = False) -> tuple[Response, Response]:
    """(chosen, rejected) of two of the models."""
    sides = []
    for side, tokens in enumerate((Y_W, Y_L)):
        index = torch.tensor([tokens]).unsqueeze(-1)
        logps, ref_logps = (
            logits_of(name, side).log_softmax(-1).gather(-1, index).squeeze(-1) for name in (policy, ref)
        )
        mask = torch.ones(logps.shape, dtype=torch.bool)
        leaf = logps.requires_grad_(requires_grad)
        sides.append(Response(per_token_logps=leaf, mask=mask, ref_per_token_logps=ref_logps))
    return sides[0], sides[1]


def golden_kl(direction: str, policy: str = "policy") -> list[Tensor]:
    """KL of every token over the five tokens, [1 T_w] and [1 T_l]."""
    found = []
    for side in (0, 1):
        ref, own = logits_of("ref", side).log_softmax(-1), logits_of(policy, side).log_softmax(-1)
        first, second = (ref, own) if direction == "forward" else (own, ref)
        found.append((first.exp() * (first - second)).sum(-1))
    return found


def golden(value: float) -> Any:
    return pytest.approx(value, abs=1e-10)


def test_the_fixture_is_the_golden_one() -> None:
    chosen, rejected = golden_pair("policy", "ref")
    assert chosen.per_token_logps[0].tolist() == pytest.approx(
        [-0.90091877, -3.76294866, -1.72426942, -2.4836243], abs=1e-8
    )
    assert rejected.ref_per_token_logps[0].tolist() == pytest.approx([-4.54568383, -3.2006181, -2.5753421], abs=1e-8)
    assert golden_kl("forward")[0][0].tolist() == pytest.approx(
        [0.08018189, 0.03651702, 0.56269303, 0.10327838], abs=1e-8
    )
    assert golden_kl("reverse")[1][0].tolist() == pytest.approx([0.16811906, 0.10529394, 0.44804058], abs=1e-8)


def test_golden_values_of_selective_dpo_and_simpo() -> None:
    chosen, rejected = golden_pair("policy", "ref")
    assert float(dpo_loss(chosen, rejected, beta=0.1).loss) == golden(0.661475358683)
    out = selective_dpo_loss(chosen, rejected, beta=0.1, selection_ratio=0.4)
    assert float(out.loss) == golden(0.783141829008)
    assert (out.chosen_weights.tolist(), out.rejected_weights.tolist()) == ([[1, 0, 1, 0]], [[1, 1, 0]])
    assert float(simpo_loss(chosen, rejected, beta=2.5, gamma=1.25).loss) == golden(0.097511934279)


def test_golden_values_of_rho1(recipes: SimpleNamespace) -> None:
    pair = golden_pair("policy", "ref")
    assert float(recipes.rho1(*pair, selection_ratio=0.6).loss) == golden(2.129378950163)  # 3 of 4 tokens
    assert float(recipes.rho1(*pair, selection_ratio=0.5).loss) == golden(1.312594096266)  # 2, as floor(0.6 · 4)


def test_golden_values_of_sepo(recipes: SimpleNamespace) -> None:
    """k = 0.5 with the floors of the released code: 2 of 4 and 1 of 3 tokens."""
    chosen, rejected = golden_pair("policy", "ref")
    pair = select(chosen, rejected, selection_ratio=(0.5, 1 / 3), scores=alignment_scores(*golden_pair("ref", "plus")))
    assert (pair[0].weights.tolist(), pair[1].weights.tolist()) == ([[0, 1, 0, 1]], [[0, 0, 1]])
    assert float(simpo_loss(*pair, beta=1, gamma=0).loss) == golden(0.514827848543)
    published = recipes.preference_loss(
        *pair, pair_loss=recipes.pair_losses.sigmoid, beta=2.1, reward=recipes.sepo_reward(0.5)
    )
    assert float(published.loss) == golden(1.811111111157)


def test_golden_values_of_distillation(recipes: SimpleNamespace) -> None:
    pair = golden_pair("policy", "ref")
    assert float(recipes.dpkd(*pair, beta=1.0).loss) == golden(0.594473738926)
    assert float(recipes.dpkd(*pair, beta=0.1).loss) == golden(0.682793341253)
    mask = torch.ones(1, 4, dtype=torch.bool)
    out = recipes.dpkd_as_released(logits_of("policy", 0), logits_of("ref", 0), mask, beta=0.1)
    assert float(out.loss) == golden(0.723760184691)
    assert dpo_loss(out.chosen, out.rejected, beta=0.1).losses.tolist() == pytest.approx(
        [math.log(2), math.log(2), 0.8155992, math.log(2)], abs=1e-7
    )


def test_golden_values_of_tis_dpo(recipes: SimpleNamespace) -> None:
    pair, contrast = golden_pair("policy", "ref"), golden_pair("minus", "plus")
    weighted = recipes.tis_weighted(*pair, contrast)
    assert weighted[0].weights[0].tolist() == pytest.approx([0.88260849, 0.70095567, 1.10853552, 0.60653066], abs=1e-8)
    assert weighted[1].weights[0].tolist() == pytest.approx([0.72290578, 0.84503603, 1.20395196], abs=1e-8)
    kl = golden_kl("reverse")
    assert float(recipes.tis_dpo(*pair, contrast, beta=0.1).loss) == golden(0.680298333977)
    assert float(recipes.tis_dpo(*pair, contrast, beta=0.1, kl=kl).loss) == golden(0.681151490488)
    assert float(recipes.tis_dpo(*pair, contrast, beta=0.1, kl=kl, eta=0.5).loss) == golden(0.680724818944)
    released = recipes.tis_weighted_as_released(*pair, contrast)
    assert released[0].weights[0].tolist() == pytest.approx([0.976, 0.928, 1.02, 0.862], abs=1e-12)
    assert released[1].weights[0].tolist() == pytest.approx([0.936, 0.966, 1.038], abs=1e-12)
    assert float(dpo_loss(*released, beta=0.1).loss) == golden(0.668164171395)


def test_golden_values_of_losses_with_a_divergence(recipes: SimpleNamespace) -> None:
    pair, kl = golden_pair("policy", "ref"), golden_kl("forward")
    assert float(recipes.tdpo1(*pair, kl, beta=0.1).loss) == golden(0.669900710164)
    assert float(recipes.tdpo2(*pair, kl, beta=0.1, alpha=0.5).loss) == golden(0.665678652749)
    ones = [torch.ones_like(side) for side in kl]
    assert float(recipes.sparsepo(*pair, kl, ones, ones, beta=0.1).loss) == golden(0.669900710164)
    m_u, m_d = (
        [torch.tensor([row], dtype=torch.float64) for row in rows]
        for rows in (([0, 1, 0.5, 2], [1, 0, 0.25]), ([1, 0, 0.5, 0], [0.5, 1, 0]))
    )
    out = recipes.sparsepo(*pair, kl, m_u, m_d, beta=0.1)
    assert float(out.loss) == golden(0.591471114769)
    sums = [float(sum(side.sum() for side in masks)) for masks in (m_u, m_d)]
    assert float(out.loss) + 0.01 * sums[0] + 0.02 * sums[1] == golden(0.698971114769)  # with its L1 term
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert recipes.mapo_mask(torch.tensor([[0.2, -0.1, 0.5, 0.3]]), mask)[0].tolist() == pytest.approx(
        [0.5, 0, 1, 2 / 3], abs=1e-6
    )


def test_golden_values_of_weighted_and_selected_tokens(recipes: SimpleNamespace) -> None:
    pair = golden_pair("policy", "ref")
    out = recipes.confpo(*pair, beta=2.5, gamma=1.25)
    assert (out.chosen_weights.tolist(), out.rejected_weights.tolist()) == ([[0, 1, 0, 1]], [[1, 0, 1]])
    assert float(out.loss) == golden(0.318700109019)
    rewards = golden_pair("ref", "plus")
    assert float(recipes.tgdpo(*pair, rewards, beta=0.1, alpha=0.5).loss) == golden(0.661359901190)
    assert float(recipes.d2po(*pair, beta=0.1, gamma=0.98).loss) == golden(0.664272117138)


# --- formulas, over rows of different length -------------------------------------------------------------------------


def ragged(seed: int, requires_grad: bool = False) -> tuple[Response, Response]:
    """Three pairs with padding on both ends and log-probs of no particular value."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for width, spans in ((7, ((0, 7), (1, 5), (2, 3))), (5, ((0, 3), (0, 5), (1, 4)))):
        policy, ref = (-3 * torch.rand(3, width, generator=generator, dtype=torch.float64) for _ in range(2))
        place = torch.arange(width)
        mask = torch.stack([(place >= start) & (place < end) for start, end in spans])
        leaf = policy.requires_grad_(requires_grad)
        sides.append(Response(per_token_logps=leaf, mask=mask, ref_per_token_logps=ref))
    return sides[0], sides[1]


def divergences(seed: int) -> list[Tensor]:
    """Something of the shape of KL [B T] with a gradient, 0 off the mask."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.where(side.mask, torch.rand(side.mask.shape, generator=generator, dtype=torch.float64), 0.0)
        for side in ragged(0)
    ]


def kept(row: Any, mask: Any) -> list[float]:
    return [float(x) for x, here in zip(row, mask, strict=True) if here]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def tokens(side: Response, row: int) -> tuple[list[float], list[float]]:
    """log π_θ and log π_ref of the tokens that count."""
    mask = side.mask[row]
    return kept(side.per_token_logps[row], mask), kept(side.ref_per_token_logps[row], mask)


def by_hand(pair: Any, value: Callable[[int, int], float], beta: float, gamma: float = 0.0) -> list[float]:
    """−log σ(β(value of chosen − value of rejected) − γ) for every pair; value(side, row) is a number."""
    return [softplus(-(beta * (value(0, row) - value(1, row)) - gamma)) for row in range(len(pair[0].mask))]


def delta(pair: Any, side: int, row: int) -> list[float]:
    return [p - q for p, q in zip(*tokens(pair[side], row), strict=True)]


def same(losses: Any, expected: list[float]) -> None:
    assert losses.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def top(scores: list[float], count: int) -> list[bool]:
    order = sorted(scores, reverse=True)
    return [score >= order[count - 1] for score in scores]


def mean_of(values: list[float], here: list[bool]) -> float:
    return math.fsum(x for x, keep in zip(values, here, strict=True) if keep) / sum(here)


def test_rho1_divides_by_the_kept_tokens_of_the_batch(recipes: SimpleNamespace) -> None:
    chosen, rejected = ragged(1)
    rows = [tokens(chosen, row) for row in range(3)]
    excess = [q - p for row in rows for p, q in zip(*row, strict=True)]
    here = top(excess, math.ceil(0.6 * len(excess)))
    expected = -mean_of([p for row in rows for p in row[0]], here)
    out = recipes.rho1(chosen, rejected, selection_ratio=0.6)
    assert float(out.loss) == pytest.approx(expected, abs=1e-10)
    per_row = recipes.sft_loss(*select(chosen, rejected, selection_ratio=0.6, scores=recipes.excess_loss_scores))
    assert abs(float(per_row.loss) - expected) > 0.05  # another loss
    assert not out.rejected_weights.any()


def test_sepo_is_its_formula(recipes: SimpleNamespace) -> None:
    pair, oracle = ragged(2), ragged(3)
    share = 0.4

    def value(side: int, row: int) -> float:
        logps, _ = tokens(pair[side], row)
        base, of_oracle = tokens(oracle[side], row)
        scores = [(o - b) * (1, -1)[side] for o, b in zip(of_oracle, base, strict=True)]
        here = top(scores, math.ceil(share * len(logps)))
        return math.fsum(p for p, keep in zip(logps, here, strict=True) if keep) / (len(logps) * share)

    out = recipes.sepo(*pair, oracle, gamma=2.1, selection_ratio=share)
    same(out.losses, by_hand(pair, value, 2.1))


def test_step_dpo_reads_one_step(recipes: SimpleNamespace) -> None:
    pair = ragged(4)
    steps = [(torch.arange(width) >= 2) & (torch.arange(width) < 4) for width in (7, 5)]

    def value(side: int, row: int) -> float:
        here = kept(steps[side], pair[side].mask[row])
        return math.fsum(d for d, keep in zip(delta(pair, side, row), here, strict=True) if keep)

    same(recipes.step_dpo(*pair, steps, beta=BETA).losses, by_hand(pair, value, BETA))


def test_dpkd_is_its_formula(recipes: SimpleNamespace) -> None:
    pair = ragged(5)

    def value(side: int, row: int) -> float:
        ratios = delta(pair, side, row)
        return math.fsum(ratios) / len(ratios)

    same(recipes.dpkd(*pair, beta=BETA).losses, by_hand(pair, value, BETA))


def test_selective_simpo_and_the_released_rule_are_their_formulas(recipes: SimpleNamespace) -> None:
    pair = ragged(23)
    share = 0.4

    def scores(side: int, row: int) -> list[float]:
        return [(-1, 1)[side] * d for d in delta(pair, side, row)]

    def mean(side: int, row: int) -> float:
        logps, _ = tokens(pair[side], row)
        return mean_of(logps, top(scores(side, row), math.ceil(share * len(logps))))

    out = simpo_loss(*select(*pair, selection_ratio=share), beta=2.0, gamma=0.5)
    same(out.losses, by_hand(pair, mean, 2.0, 0.5))

    def released(side: int, row: int) -> float:
        here = scores(side, row)
        threshold = float(torch.tensor(here, dtype=torch.float64).quantile(1 - share))
        return math.fsum(d for d, s in zip(delta(pair, side, row), here, strict=True) if s >= threshold - 1e-12)

    same(recipes.as_released(*pair, beta=BETA, selection_ratio=share).losses, by_hand(pair, released, BETA))


def test_confpo_is_its_formula_and_keeps_tokens_of_equal_probability(recipes: SimpleNamespace) -> None:
    pair = ragged(6)

    def value(side: int, row: int) -> float:
        logps, _ = tokens(pair[side], row)
        mean = math.fsum(math.exp(p) for p in logps) / len(logps)
        return mean_of(logps, [math.exp(p) <= mean for p in logps])

    same(recipes.confpo(*pair, beta=2.5, gamma=1.25).losses, by_hand(pair, value, 2.5, 1.25))
    even = replace(pair[0], per_token_logps=torch.full_like(pair[0].per_token_logps, -0.3))
    assert recipes.confpo(even, even, beta=2.5, gamma=1.25).chosen_weights.equal(even.mask.double())


def test_tis_dpo_is_its_formula(recipes: SimpleNamespace) -> None:
    pair, contrast, kl = ragged(7), ragged(8), divergences(9)

    def weights(side: int, row: int) -> list[float]:
        minus, plus = tokens(contrast[side], row)
        return [math.exp((1, -1)[side] * min(max(q - p, -0.5), 1.5)) for p, q in zip(minus, plus, strict=True)]

    def value(side: int, row: int) -> float:
        divergence = kept(kl[side][row], pair[side].mask[row])
        parts = zip(weights(side, row), delta(pair, side, row), divergence, strict=True)
        return math.fsum(w * (d - ETA * k) for w, d, k in parts)

    same(recipes.tis_dpo(*pair, contrast, beta=BETA, kl=kl, eta=ETA).losses, by_hand(pair, value, BETA))


def test_tdpo_and_sparsepo_are_their_formulas(recipes: SimpleNamespace) -> None:
    pair, kl = ragged(10), divergences(11)
    masks = [[array.detach() * 3 for array in divergences(seed)] for seed in (12, 13)]

    def sums(side: int, row: int, reward_mask: Any = None, kl_mask: Any = None) -> tuple[float, float]:
        here = pair[side].mask[row]
        one = [1.0] * int(here.sum())
        m_u = one if reward_mask is None else kept(reward_mask[side][row], here)
        m_d = one if kl_mask is None else kept(kl_mask[side][row], here)
        divergence = kept(kl[side][row], here)
        return (
            math.fsum(m * d for m, d in zip(m_u, delta(pair, side, row), strict=True)),
            math.fsum(m * k for m, k in zip(m_d, divergence, strict=True)),
        )

    same(recipes.tdpo1(*pair, kl, beta=BETA).losses, by_hand(pair, lambda s, r: sum(sums(s, r)), BETA))
    out = recipes.tdpo2(*pair, kl, beta=BETA, alpha=ALPHA)
    same(out.losses, by_hand(pair, lambda s, r: sums(s, r)[0] + ALPHA * sums(s, r)[1], BETA))
    out = recipes.sparsepo(*pair, kl, *masks, beta=BETA)
    same(out.losses, by_hand(pair, lambda s, r: sum(sums(s, r, *masks)), BETA))
    same(out.chosen_rewards, [BETA * sums(0, row)[0] for row in range(3)])  # without the term that is added


def test_gradients_to_the_divergences(recipes: SimpleNamespace) -> None:
    """TDPO1 pays the chosen side for its divergence, TDPO2 takes it as a constant, TIS-DPO charges for it."""
    pair, contrast = ragged(14), ragged(15)
    losses = {
        "tdpo1": lambda kl: recipes.tdpo1(*pair, kl, beta=BETA),
        "tdpo2": lambda kl: recipes.tdpo2(*pair, kl, beta=BETA, alpha=ALPHA),
        "tis": lambda kl: recipes.tis_dpo(*pair, contrast, beta=BETA, kl=kl),
    }
    signs = {"tdpo1": (-1, 1), "tdpo2": (0, 1), "tis": (1, -1)}
    for name, loss in losses.items():
        kl = [side.requires_grad_() for side in divergences(16)]
        grads = torch.autograd.grad(loss(kl).losses.sum(), kl, allow_unused=True)
        for grad, sign, side in zip(grads, signs[name], pair, strict=True):
            if sign == 0:
                assert grad is None or not grad.any()
            else:
                assert (sign * grad[side.mask] > 0).all()


def test_tgdpo_and_d2po_are_their_formulas(recipes: SimpleNamespace) -> None:
    pair, rewards = ragged(17), ragged(18)

    def guided(side: int, row: int) -> float:
        ref, of_model = tokens(rewards[side], row)
        signed = [(1, -1)[side] * (q - p) for p, q in zip(ref, of_model, strict=True)]
        return math.fsum((1 + ALPHA * BETA * s) * d for s, d in zip(signed, delta(pair, side, row), strict=True))

    def decayed(side: int, row: int) -> float:
        return math.fsum(0.9 ** (t + 1) * d for t, d in enumerate(delta(pair, side, row)))

    same(recipes.tgdpo(*pair, rewards, beta=BETA, alpha=ALPHA).losses, by_hand(pair, guided, BETA))
    same(recipes.d2po(*pair, beta=BETA, gamma=0.9).losses, by_hand(pair, decayed, BETA))


def test_a_weight_that_a_recipe_makes_negative_is_loud(recipes: SimpleNamespace) -> None:
    pair, rewards = ragged(17), ragged(18)
    assert recipes.tgdpo(*pair, rewards, beta=BETA, alpha=100.0).losses.isnan().all()


def test_losses_by_position_are_cdpo_and_the_released_dpkd(recipes: SimpleNamespace) -> None:
    chosen, _ = ragged(19)
    rejected, _ = ragged(20)
    pair = [replace(side, weights=2 * torch.rand_like(side.per_token_logps)) for side in (chosen, rejected)]
    out = dpo_loss(*recipes.by_position(*pair), beta=BETA)
    expected = []
    for row in range(3):
        for place in range(7):
            margin = 0.0
            if chosen.mask[row, place]:  # both sides have the same masks here
                terms = [float(s.weights[row, place] * s.log_ratios[row, place]) for s in pair]
                margin = terms[0] - terms[1]
            expected.append(softplus(-BETA * margin))
    same(out.losses, expected)  # padding is there, with log 2
    generator = torch.Generator().manual_seed(21)
    student, teacher = (torch.randn(3, 7, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    losses = []
    for row, place in chosen.mask.nonzero().tolist():
        s, p = (array[row, place].log_softmax(-1).tolist() for array in (student, teacher))
        best, own = p.index(max(p)), s.index(max(s))
        losses.append(softplus(-BETA * ((s[best] - s[own]) - (p[best] - p[own]))))
    out = recipes.dpkd_as_released(student, teacher, chosen.mask, beta=BETA)
    assert float(out.loss) == pytest.approx(math.fsum(losses) / len(losses), abs=1e-10)


def test_spans_end_where_both_tokenizers_have_a_boundary(recipes: SimpleNamespace) -> None:
    ends, other = [2, 4, 7, 9, 10], [4, 5, 9, 10]
    spans, other_spans = recipes.shared_spans(ends, other)
    assert (spans, other_spans) == ([0, 0, 1, 1, 2], [0, 1, 1, 2])
    logps = torch.tensor([[-1.0, -2.0, -0.5, -0.25, -4.0]], dtype=torch.float64)
    ref = torch.tensor([[-2.5, -0.5, -1.0, -3.0]], dtype=torch.float64)
    ours, theirs = (
        recipes.over_spans(array, torch.tensor([where]), 3) for array, where in ((logps, spans), (ref, other_spans))
    )
    assert (ours.tolist(), theirs.tolist()) == ([[-3.0, -0.75, -4.0]], [[-2.5, -1.5, -3.0]])
    assert recipes.shared_spans(ends, ends)[0] == [0, 1, 2, 3, 4]  # one tokenizer: spans are tokens
    leaf = logps.requires_grad_()
    (gradient,) = torch.autograd.grad(recipes.over_spans(leaf, torch.tensor([spans]), 3)[0, 1], leaf)
    assert gradient.tolist() == [[0, 0, 1, 1, 0]]


def test_the_divergence_of_two_heads_serves_tdpo(recipes: SimpleNamespace) -> None:
    """Hidden states to loss and back, against logits: the policy's head and hidden states get the whole gradient."""
    hidden, head = (array.clone().requires_grad_() for array in recipes.policy)
    labels = recipes.labels
    here = (labels[:, 1:] != -100).chunk(2)

    def gradients(kl: Any) -> Any:
        pair = recipes.responses((hidden, head), recipes.reference)
        return torch.autograd.grad(recipes.tdpo2(*pair, kl, beta=BETA, alpha=ALPHA).loss, (hidden, head))

    ref = (recipes.reference[0] @ recipes.reference[1].T)[:, :-1].log_softmax(-1)
    own = (hidden @ head.T)[:, :-1].log_softmax(-1)
    dense = [torch.where(m, x, 0.0) for m, x in zip(here, (ref.exp() * (ref - own)).sum(-1).chunk(2), strict=True)]
    ours = recipes.token_kl((hidden, head), recipes.reference, "forward")
    for one, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients(ours), gradients(dense), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_controls_select_by_what_they_say(recipes: SimpleNamespace) -> None:
    chosen, rejected = recipes.responses(recipes.policy, recipes.reference)
    entropies = recipes.entropy_scores(recipes.policy)
    hidden, head = recipes.policy
    _, statistics = fused_logps_and_statistics(hidden[:, :-1], head, recipes.labels[:, 1:])
    for entropy, fused, side in zip(entropies, statistics.entropy.chunk(2), (chosen, rejected), strict=True):
        torch.testing.assert_close(entropy[side.mask], fused[side.mask], rtol=1e-10, atol=1e-10)
    out = select(chosen, rejected, selection_ratio=0.4, scores=entropies)
    for side, entropy in zip(out, entropies, strict=True):
        for row in range(len(side.mask)):
            taken, left = (entropy[row][side.mask[row] & (side.weights[row] == w)] for w in (1, 0))
            assert taken.min() > left.max()
    first, second = (recipes.random_scores(chosen, rejected)[0] for _ in range(2))
    assert not first.equal(second)


def test_recipes_raise_what_the_core_raises(recipes: SimpleNamespace) -> None:
    chosen, rejected = ragged(22)
    alone = replace(chosen, ref_per_token_logps=None)
    with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
        recipes.dpkd(alone, rejected, beta=BETA)
    with pytest.raises(ValueError, match="selection_ratio must be in"):
        recipes.rho1(chosen, rejected, selection_ratio=60)
    with pytest.raises(ValueError, match="per_token_logps"):
        recipes.tis_dpo(chosen, rejected, (rejected, chosen), beta=BETA)
    with pytest.raises(ValueError, match="weights must be"):
        recipes.sparsepo(chosen, rejected, divergences(0), divergences(0)[::-1], divergences(0), beta=BETA)
