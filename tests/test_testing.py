"""`selective_pref.testing`: right losses pass in every library, and typical mistakes are named by the right law."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from selective_pref import _laws, alignment_scores, dpo_loss, quantile_weights, selective_dpo_loss, simpo_loss, testing
from selective_pref._laws import LAWS
from selective_pref.testing import assert_conforms, broken_laws


def float32(array: Any) -> Any:
    made = torch.from_numpy(array)
    return made if array.dtype == bool else made.float()


# --- DPO and Selective-DPO, written once more and plainly ------------------------------------------------------------


def deltas(side: Any) -> np.ndarray:
    return np.where(side.mask, side.per_token_logps - side.ref_per_token_logps, 0.0)


def of_margins(margins: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -margins)


def plain(chosen: Any, rejected: Any, *, beta: float) -> np.ndarray:
    return of_margins(beta * (deltas(chosen).sum(-1) - deltas(rejected).sum(-1)))


def kept(scores: np.ndarray, mask: np.ndarray, count: Callable[[int], int]) -> np.ndarray:
    """The highest `count(n)` of each row of n tokens, the first ones where scores tie."""
    weights = np.zeros(mask.shape)
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        order = places[np.argsort(-scores[row, places], kind="stable")]
        weights[row, order[: count(len(places))]] = 1
    return weights


def exact(ratio: float) -> Callable[[int], int]:
    return lambda n: math.ceil(round(ratio * n, 9))


def selected(
    chosen: Any,
    rejected: Any,
    *,
    beta: float,
    selection_ratio: float,
    signs: tuple[int, int] = (-1, 1),
    rule: Any = exact,
) -> np.ndarray:
    sums = [
        (kept(sign * deltas(side), side.mask, rule(selection_ratio)) * deltas(side)).sum(-1)
        for sign, side in zip(signs, (chosen, rejected), strict=True)
    ]
    return of_margins(beta * (sums[0] - sums[1]))


def test_right_losses_conform_in_every_library() -> None:
    for as_array in (np.asarray, torch.from_numpy, float32):
        assert_conforms(dpo_loss, as_array=as_array)
    for as_array in (np.asarray, torch.from_numpy):
        assert_conforms(selective_dpo_loss, selective=True, as_array=as_array)
    assert_conforms(plain)
    assert_conforms(selected, selective=True)
    assert_conforms(lambda chosen, rejected, *, beta: plain(chosen, rejected, beta=beta).mean())


# --- mistakes --------------------------------------------------------------------------------------------------------


def dpo_of(**change: Any) -> Callable[..., Any]:
    """Plain DPO with parts exchanged: the reward of a side, the loss of the margins, or the reduction."""
    reward = change.get("reward", lambda side: deltas(side).sum(-1))
    of = change.get("of", lambda margins, beta: of_margins(beta * margins))
    reduce = change.get("reduce", lambda losses: losses)

    def loss(chosen: Any, rejected: Any, *, beta: float) -> Any:
        return reduce(of(reward(chosen) - reward(rejected), beta))

    return loss


def without_reference(chosen: Any, rejected: Any, *, beta: float) -> Any:
    if chosen.ref_per_token_logps is None:
        return of_margins(
            beta * (np.where(chosen.mask, chosen.per_token_logps, 0).sum(-1) - rejected.per_token_logps.sum(-1))
        )
    return plain(chosen, rejected, beta=beta)


def in_place(side: Any) -> np.ndarray:
    side.per_token_logps[...] = deltas(side)
    return side.per_token_logps.sum(-1)


def smoothed(sign: int) -> Callable[..., Any]:
    e = 0.1
    return dpo_of(of=lambda m, beta: (1 - e) * of_margins(beta * m) + sign * e * of_margins(-beta * m))


DPO_MISTAKES: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "mean over tokens": (dpo_of(reward=lambda s: deltas(s).sum(-1) / s.mask.sum(-1)), {"sum"}),
    "mean over the width": (dpo_of(reward=lambda s: deltas(s).mean(-1)), {"padding", "sum"}),
    "sides exchanged": (lambda c, r, *, beta: plain(r, c, beta=beta), {"direction"}),
    "policy and reference exchanged": (dpo_of(reward=lambda s: -deltas(s).sum(-1)), {"direction"}),
    "reference not read": (
        dpo_of(reward=lambda s: np.where(s.mask, s.per_token_logps, 0).sum(-1)),
        {"step 0", "shift", "reference"},
    ),
    "a missing reference is read as 0": (without_reference, {"reference"}),
    "mask ignored": (
        dpo_of(reward=lambda s: (s.per_token_logps - s.ref_per_token_logps).sum(-1)),
        {"masked content"},
    ),
    "mask by multiplication": (
        dpo_of(reward=lambda s: ((s.per_token_logps - s.ref_per_token_logps) * s.mask).sum(-1)),
        {"masked content"},
    ),
    "a log-prob of 0 means masked": (
        dpo_of(reward=lambda s: np.where(s.per_token_logps == 0, 0.0, deltas(s)).sum(-1)),
        {"every token"},
    ),
    "last token dropped": (dpo_of(reward=lambda s: deltas(s)[:, :-1].sum(-1)), {"every token"}),
    "first token dropped": (dpo_of(reward=lambda s: deltas(s)[:, 1:].sum(-1)), {"every token"}),
    "rewards centred over the batch": (
        dpo_of(of=lambda m, beta: of_margins(beta * (m - m.mean() + m.mean() / len(m)))),
        {"pairs"},
    ),
    "sum over pairs": (dpo_of(reduce=lambda losses: losses.sum()), {"pairs"}),
    "label smoothing left on": (smoothed(+1), {"swap"}),
    "label smoothing with the wrong sign": (smoothed(-1), {"swap"}),
    "no beta": (dpo_of(of=lambda m, beta: of_margins(m)), {"beta"}),
    "beta twice": (dpo_of(of=lambda m, beta: of_margins(beta**2 * m)), {"beta"}),
    "IPO": (dpo_of(of=lambda m, beta: (m - 1 / (2 * beta)) ** 2), {"value", "convex"}),
    "NaN repaired": (dpo_of(reward=lambda s: np.nan_to_num(deltas(s)).sum(-1)), {"not finite"}),
    "inputs written to": (dpo_of(reward=in_place), {"inputs"}),
    "later tokens count less": (
        dpo_of(reward=lambda s: (deltas(s) * 0.9 ** np.cumsum(s.mask, -1)).sum(-1)),
        {"order", "sum"},
    ),
}


@pytest.mark.parametrize("mistake", DPO_MISTAKES)
def test_a_mistake_in_dpo_is_named_by_its_law(mistake: str) -> None:
    loss, laws = DPO_MISTAKES[mistake]
    found = broken_laws(loss)
    assert laws <= set(found), found
    assert "value" in found or laws & {"inputs", "not finite", "reference", "masked content", "padding", "pairs"}


def attached_reference(chosen: Any, rejected: Any, *, beta: float) -> Any:
    sums = [torch.where(s.mask, s.per_token_logps - s.ref_per_token_logps, 0.0).sum(-1) for s in (chosen, rejected)]
    return -torch.nn.functional.logsigmoid(beta * (sums[0] - sums[1]))


def detached_side(chosen: Any, rejected: Any, *, beta: float) -> Any:
    return -torch.nn.functional.logsigmoid(beta * (chosen.log_ratios.sum(-1) - rejected.log_ratios.sum(-1).detach()))


def test_mistakes_that_only_gradients_show() -> None:
    assert set(broken_laws(attached_reference, as_array=torch.from_numpy)) == {"constant reference"}
    assert set(broken_laws(detached_side, as_array=torch.from_numpy)) == {"gradient"}

    def attached_scores(chosen: Any, rejected: Any, *, beta: float, selection_ratio: float) -> Any:
        out = selective_dpo_loss(chosen, rejected, beta=beta, selection_ratio=selection_ratio)
        leak = chosen.per_token_logps.sum(-1)
        return out.losses + torch.where(chosen.mask, leak[:, None] - leak[:, None].detach(), 0.0).mean(-1)

    found = broken_laws(attached_scores, selective=True, as_array=torch.from_numpy)
    assert "gradient" in found


def test_gradients_are_looked_at_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two laws over two pairs: JAX compiles every operation for every shape."""
    pairs = list(_laws._examples())[1:3]
    monkeypatch.setattr(_laws, "_examples", lambda: iter(pairs))
    monkeypatch.setattr(testing, "LAWS", {name: LAWS[name] for name in ("gradient", "constant reference")})
    assert_conforms(dpo_loss, as_array=jnp.asarray)

    def attached(chosen: Any, rejected: Any, *, beta: float) -> Any:
        sums = [jnp.where(s.mask, s.per_token_logps - s.ref_per_token_logps, 0.0).sum(-1) for s in (chosen, rejected)]
        return jnp.logaddexp(0, -beta * (sums[0] - sums[1]))

    assert set(broken_laws(attached, as_array=jnp.asarray)) == {"constant reference"}


def quantile(chosen: Any, rejected: Any, *, beta: float, selection_ratio: float) -> np.ndarray:
    sums = [
        (quantile_weights(score, side.mask, selection_ratio) * deltas(side)).sum(-1)
        for score, side in zip(alignment_scores(chosen, rejected), (chosen, rejected), strict=True)
    ]
    return of_margins(beta * (sums[0] - sums[1]))


def selects(**options: Any) -> Callable[..., Any]:
    return lambda chosen, rejected, **numbers: selective_dpo_loss(chosen, rejected, **numbers, **options)


def plain_at_1(chosen: Any, rejected: Any, *, beta: float, selection_ratio: float) -> Any:
    """Thinks that at ratio 1 one token less is kept."""
    return selected(
        chosen, rejected, beta=beta, selection_ratio=selection_ratio, rule=lambda r: lambda n: exact(r)(n) - (r == 1)
    )


def widths(chosen: Any, rejected: Any, *, beta: float, selection_ratio: float) -> Any:
    """Counts the cells of a row, padding included."""
    sums = []
    for sign, side in ((-1, chosen), (1, rejected)):
        count = exact(selection_ratio)(side.mask.shape[1])
        sums.append((kept(sign * deltas(side), side.mask, lambda n, count=count: count) * deltas(side)).sum(-1))
    return of_margins(beta * (sums[0] - sums[1]))


SELECTIVE_MISTAKES: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "wrong direction": (lambda *p, **n: selected(*p, **n, signs=(1, -1)), {"value", "swap", "convex"}),
    "rejected side not flipped": (lambda *p, **n: selected(*p, **n, signs=(-1, -1)), {"value", "convex"}),
    "floor of the share": (lambda *p, **n: selected(*p, **n, rule=lambda r: lambda n: int(r * n)), {"share"}),
    "the share in floats": (lambda *p, **n: selected(*p, **n, rule=lambda r: lambda n: math.ceil(r * n)), {"share"}),
    "the released rule": (quantile, {"share", "ties"}),
    "every tied token kept": (selects(ties="all"), {"ties"}),
    "padding counts": (widths, {"padding"}),
    "one pool for the batch": (selects(pool="batch"), {"pairs"}),
    "one pool for a pair": (selects(pool="pair"), {"value"}),
    "ratio 1 is not DPO": (plain_at_1, {"ratio 1", "every token"}),
    "the share grows with beta": (
        lambda c, r, *, beta, selection_ratio: selected(
            c, r, beta=beta, selection_ratio=min(1.0, selection_ratio * (1 + 5 * beta))
        ),
        {"beta"},
    ),
    "the share is not read": (lambda c, r, *, beta, selection_ratio: plain(c, r, beta=beta), {"share"}),
    "SimPO": (
        lambda c, r, *, beta, selection_ratio: simpo_loss(c, r, beta=beta, gamma=0.1),
        {"step 0", "reference", "shift", "sum"},
    ),
}


@pytest.mark.parametrize("mistake", SELECTIVE_MISTAKES)
def test_a_mistake_in_the_selection_is_named_by_its_law(mistake: str) -> None:
    loss, laws = SELECTIVE_MISTAKES[mistake]
    found = broken_laws(loss, selective=True)
    assert laws <= set(found), found


def test_every_law_is_broken_by_some_mistake() -> None:
    named = set().union(*(laws for _, laws in (*DPO_MISTAKES.values(), *SELECTIVE_MISTAKES.values())))
    assert named | {"gradient", "constant reference"} == set(LAWS)


def test_the_error_names_every_law_with_a_small_counterexample() -> None:
    def upside_down(chosen: Any, rejected: Any, *, beta: float) -> Any:
        return plain(rejected, chosen, beta=beta)

    with pytest.raises(AssertionError) as caught:
        assert_conforms(upside_down)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"upside_down breaks 4 of {len(LAWS)} laws:"
    assert [line.split(":")[0] for line in lines[1:]] == ["- value", "- direction", "- every token", "- not finite"]
    assert all("chosen policy [[" in line and len(line) < 400 for line in lines[1:])
    broken = broken_laws(lambda chosen, rejected, *, beta: plain(chosen, rejected, beta=beta / 0))
    assert "It raises ZeroDivisionError" in broken["value"]


def test_a_loss_that_takes_other_arrays_is_told_so_once() -> None:
    def in_torch(chosen: Any, rejected: Any, *, beta: float) -> Any:
        return torch.sum(chosen.per_token_logps)

    with pytest.raises(AssertionError) as caught:
        assert_conforms(in_torch)
    lines = str(caught.value).splitlines()
    assert sum("It raises TypeError" in line for line in lines) == 1
    assert lines[-1].endswith("such as as_array=torch.from_numpy")
    for wrong in (5, list):
        with pytest.raises(TypeError, match=r"as_array must be a function .* such as torch.from_numpy"):
            assert_conforms(plain, as_array=wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("loss", "selective", "message"),
    [
        (3, False, r"loss\(chosen, rejected, \*, beta\) -> losses(.|\n)*got int 3"),
        (lambda logits, labels: 0, False, r"loss\(chosen, rejected, \*, beta\)(.|\n)*got <lambda>: "),
        (plain, True, r"loss\(chosen, rejected, \*, beta, selection_ratio\)(.|\n)*got plain: .*selection_ratio"),
        (lambda c, r, *, beta: (c, r), False, "got a function that returns tuple"),
        (lambda c, r, *, beta: deltas(c), False, r"got a function that returns float64 \(1, 1\) for 1 pairs"),
    ],
    ids=["no function", "other arguments", "no ratio", "a tuple", "one loss per token"],
)
def test_what_is_no_loss_is_told_the_signature(loss: Any, selective: bool, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        assert_conforms(loss, selective=selective)


def test_the_page_lists_the_laws_as_they_are() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", page, re.MULTILINE) == [
        (law, says) for law, (says, _) in LAWS.items()
    ]
