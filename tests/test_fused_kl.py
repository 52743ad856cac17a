"""The KL divergence of two heads: same numbers as logits, fewer operations, no wrong number on bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from selective_pref import _tiles, fused_kl
from selective_pref.fused_kl import fused_per_token_kl

N, D, D_REF, V = 13, 6, 4, 37
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "reverse"])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"logit_scale": 0.3, "temperature": 2.0},
    {"softcap": 2.0, "logit_scale": 1.5, "temperature": 0.7},
    {"softcap": 2.0, "ref_softcap": None, "logit_scale": 0.5, "ref_logit_scale": 1.5},
]


def logps_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, heat: float) -> Any:
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    return ((z if cap is None else cap * torch.tanh(z / cap)) / heat).log_softmax(-1)


def dense(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    direction: str,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The definition, with every logit in memory."""
    scale, cap, heat = options.get("logit_scale", 1.0), options.get("softcap"), options.get("temperature", 1.0)
    logps = logps_of(hidden, weight, bias, scale, cap, heat)
    ref_scale, ref_cap = options.get("ref_logit_scale", scale), options.get("ref_softcap", cap)
    ref_logps = logps_of(ref_hidden, ref_weight, ref_bias, ref_scale, ref_cap, heat)
    first, second = (logps, ref_logps) if direction == "reverse" else (ref_logps, logps)
    kl = (first.exp() * (first - second)).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    policy = {"hidden": normal(N, D), "weight": normal(V, D), "bias": normal(V)}
    ref = {"ref_hidden": normal(N, D_REF), "ref_weight": normal(V, D_REF), "ref_bias": normal(V)}
    mask = torch.ones(N, dtype=torch.bool)
    mask[[2, 7]] = False
    return {name: array.requires_grad_() for name, array in policy.items()} | ref | {"mask": mask}


def leaves_of(data: dict[str, Tensor]) -> list[Tensor]:
    return [array for array in data.values() if array.requires_grad]


def upstream(dtype: torch.dtype = torch.float64) -> Tensor:
    """Ordinary, zero and negative gradients."""
    gradient = torch.linspace(-1, 2, N, dtype=dtype)
    gradient[[0, 4, 5]] = 0
    return gradient


@DIRECTIONS
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("vocab_tile", "rows", "with_bias"), [(1, 5, True), (5, 4, True), (100, 1, False), (None, None, True)]
)
def test_divergences_and_gradients_equal_those_of_logits(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    vocab_tile: int | None,
    rows: int | None,
    with_bias: bool,
    direction: Any,
) -> None:
    if rows is not None:
        monkeypatch.setattr(fused_kl, "_ROWS", rows)
    data = inputs()
    if not with_bias:
        del data["bias"], data["ref_bias"]
    ours = fused_per_token_kl(**data, direction=direction, **options, vocab_tile=vocab_tile)
    expected = dense(**data, direction=direction, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert ours.min() >= 0
    for got, wanted in zip(
        torch.autograd.grad(ours, leaves_of(data), upstream()),
        torch.autograd.grad(expected, leaves_of(data), upstream()),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@DIRECTIONS
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_divergences(options: dict[str, Any], direction: Any) -> None:
    data = inputs()
    for name, places in (("hidden", N), ("ref_hidden", N), ("mask", N), ("weight", V), ("ref_weight", V)):
        data[name] = data[name].detach()[: 4 if places == N else 9].requires_grad_(data[name].requires_grad)
    data["bias"], data["ref_bias"] = data["bias"].detach()[:9].requires_grad_(), data["ref_bias"][:9]
    fixed = {name: array for name, array in data.items() if not array.requires_grad}
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: fused_per_token_kl(
            hidden, weight, bias=bias, direction=direction, vocab_tile=4, **fixed, **options
        ),
        leaves_of(data),
    )


@DIRECTIONS
def test_no_gradient_reaches_the_reference_head(direction: Any) -> None:
    data = inputs()
    reference = [data[name].requires_grad_() for name in ("ref_hidden", "ref_weight", "ref_bias")]
    fused_per_token_kl(**data, direction=direction).sum().backward()
    assert data["hidden"].grad is not None
    assert not any(array.grad is not None for array in reference)


@DIRECTIONS
def test_a_policy_that_is_its_reference_has_divergence_and_gradient_0(direction: Any) -> None:
    data = inputs()
    same = {f"ref_{name}": data[name].detach().clone() for name in ("hidden", "weight", "bias")}
    kl = fused_per_token_kl(**data | same, direction=direction, vocab_tile=5)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(kl.sum(), data["hidden"])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@DIRECTIONS
def test_tokens_cut_off_by_minus_infinity_add_nothing(direction: Any) -> None:
    data = inputs()
    with torch.no_grad():
        data["bias"][20:] = data["ref_bias"][20:] = -torch.inf
    cut = {**data, **{name: data[name][:20] for name in ("weight", "bias", "ref_weight", "ref_bias")}}
    expected = fused_per_token_kl(**cut, direction=direction)
    for tile in (3, None):
        kl = fused_per_token_kl(**data, direction=direction, vocab_tile=tile)
        torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad(kl.sum(), data["hidden"])[0]
        torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), data["hidden"], retain_graph=True)[0])


def test_a_token_that_only_the_second_distribution_excludes_makes_the_divergence_infinite() -> None:
    data = inputs()
    data["ref_bias"][20:] = -torch.inf
    assert fused_per_token_kl(**data, direction="reverse", vocab_tile=5)[data["mask"]].isposinf().all()
    assert fused_per_token_kl(**data, direction="forward", vocab_tile=5).isfinite().all()


def flops(action: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@DIRECTIONS
@pytest.mark.parametrize("selected", [0, 1, 5, 11])
def test_operations_are_two_products_forward_and_four_backward_per_selected_row(direction: Any, selected: int) -> None:
    data = inputs(torch.float32)
    results: list[Tensor] = []
    forward = flops(lambda: results.append(fused_per_token_kl(**data, direction=direction, vocab_tile=8)))
    assert forward == 2 * (N - 2) * V * (D + D_REF)  # rows off the mask are not projected
    gradient = torch.zeros(N)
    gradient[data["mask"].nonzero().squeeze(-1)[:selected]] = 1.0
    backward = flops(lambda: results[0].backward(gradient))
    assert backward == selected * V * (6 * D + 2 * D_REF)


def test_no_product_for_a_gradient_that_nobody_wants() -> None:
    for frozen in ("weight", "hidden"):
        data = inputs(torch.float32)
        data[frozen] = data[frozen].detach()
        kl = fused_per_token_kl(**data, direction="forward")
        assert flops(lambda kl=kl: kl.backward(torch.ones(N))) == (N - 2) * V * (4 * D + 2 * D_REF)
        assert data[frozen].grad is None


@DIRECTIONS
def test_nothing_of_the_size_of_the_logits_is_held(monkeypatch: pytest.MonkeyPatch, direction: Any) -> None:
    """The largest array that the walk makes, seen by the dispatcher, is a tile, whatever N and V are."""
    monkeypatch.setattr(_tiles, "BUFFER", 8 * 64)
    monkeypatch.setattr(_tiles, "TILE", (16, 64))
    monkeypatch.setattr(fused_kl, "_ROWS", 8)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    rows, vocabulary = 60, 200
    hidden, weight = torch.randn(rows, 2, requires_grad=True), torch.randn(vocabulary, 2, requires_grad=True)
    with Sizes():
        kl = fused_per_token_kl(hidden, weight, torch.randn(rows, 2), torch.randn(vocabulary, 2), direction=direction)
        kl.sum().backward()
    assert largest <= 8 * 64 < rows * vocabulary / 10


@DIRECTIONS
def test_positions_off_the_mask_are_0_and_may_hold_anything(direction: Any) -> None:
    data = inputs()
    clean = fused_per_token_kl(**data, direction=direction)
    expected = torch.autograd.grad(clean.sum(), data["weight"])[0]
    dirty = {name: data[name].detach().clone() for name in ("hidden", "ref_hidden")}
    for array in dirty.values():
        array[[2, 7]] = torch.nan
    dirty["hidden"].requires_grad_()
    kl = fused_per_token_kl(**data | dirty, direction=direction)
    assert kl.equal(clean)
    assert kl[2] == kl[7] == 0
    d_hidden, d_weight = torch.autograd.grad(kl.sum(), (dirty["hidden"], data["weight"]))
    assert d_weight.equal(expected)
    assert not d_hidden[[2, 7]].any()


@DIRECTIONS
def test_nan_at_a_counted_position_is_not_hidden(direction: Any) -> None:
    for name in ("hidden", "ref_hidden"):
        data = inputs()
        with torch.no_grad():
            data[name][3, 0] = torch.nan
        kl = fused_per_token_kl(**data, direction=direction, vocab_tile=5)
        assert kl.isnan().tolist() == [place == 3 for place in range(N)]
        gradient = torch.autograd.grad(kl.sum(), data["hidden"])[0]
        assert gradient[3].isnan().all()
        assert gradient[[0, 1, 4]].isfinite().all()


def test_shapes_fold_an_empty_mask_is_attached_and_autocast_changes_nothing() -> None:
    data = inputs()
    del data["bias"], data["ref_bias"]
    whole = fused_per_token_kl(**data, direction="forward")
    folded = {name: data[name][:12].view(3, 4, -1) for name in ("hidden", "ref_hidden")}
    folded["mask"] = data["mask"][:12].view(3, 4)
    torch.testing.assert_close(fused_per_token_kl(**data | folded, direction="forward"), whole[:12].view(3, 4))
    nothing = fused_per_token_kl(**data | {"mask": torch.zeros(N, dtype=torch.bool)}, direction="forward")
    assert not nothing.any()
    nothing.sum().backward()
    assert not data["hidden"].grad.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_per_token_kl(**data, direction="forward").equal(whole)
    every = fused_per_token_kl(**{**data, "mask": None}, direction="forward")
    assert every[data["mask"]].allclose(whole[data["mask"]])
    assert every[2] > 0


@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_divergences_are_better_than_those_of_low_precision_logits(
    dtype: torch.dtype, direction: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 32), (500, 32)) * 2]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    names = ("hidden", "weight", "ref_hidden", "ref_weight")
    data = dict(zip(names, tensors, strict=True))
    truth = dense(**{name: array.double() for name, array in data.items()}, direction=direction)
    ours, naive = fused_per_token_kl(**data, direction=direction), dense(**data, direction=direction)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() <= 1e-4
    assert (ours - truth).abs().max() < (naive - truth).abs().max()
    leaves = tensors[:2]
    true, got, low = (torch.autograd.grad(kl.sum(), leaves) for kl in (truth, ours, naive))
    for exact, one, other in zip(true, got, low, strict=True):
        assert one.dtype == dtype
        assert (one - exact).float().norm() <= (other - exact).float().norm() * 1.05 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["reverse"])
def test_compiled_divergences_are_the_same(monkeypatch: pytest.MonkeyPatch, direction: Any) -> None:
    data = inputs(torch.float32)
    eager = fused_per_token_kl(**data, **OPTIONS[2], direction=direction, vocab_tile=8)
    expected = torch.autograd.grad(eager, leaves_of(data), upstream(torch.float32))
    monkeypatch.setattr(_tiles, "compiles", lambda _: True)
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    compiled = fused_per_token_kl(**data, **OPTIONS[2], direction=direction, vocab_tile=8)
    got = torch.autograd.grad(compiled, leaves_of(data), upstream(torch.float32))
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_of_a_divergence_is_refused_and_inputs_stay_as_they_are() -> None:
    data = inputs()
    before = {name: array.detach().clone() for name, array in data.items()}
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused_per_token_kl(**data, direction="forward").sum(), data["hidden"], create_graph=True)
    fused_per_token_kl(**data, direction="reverse", softcap=2.0).sum().backward()
    assert all(array.detach().equal(before[name]) for name, array in data.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"direction": "sideways"}, ValueError, r"direction must be 'forward', KL\(ref ‖ policy\), or 'reverse'"),
        ({"mask": torch.ones(N)}, TypeError, "mask must be bool; got torch.float32"),
        ({"mask": torch.ones(N + 1, dtype=torch.bool)}, ValueError, r"mask must be \(13,\) like hidden"),
        ({"hidden": torch.zeros(N, D + 1, dtype=torch.float64)}, ValueError, r"hidden must be \[… D\] and weight"),
        ({"ref_hidden": torch.zeros(N, D)}, ValueError, r"ref_hidden must be \[… D_ref\] and ref_weight \[V D_ref\]"),
        ({"ref_hidden": torch.zeros(N + 1, D_REF)}, ValueError, "must hold the same positions"),
        ({"ref_weight": torch.zeros(V + 3, D_REF), "ref_bias": None}, ValueError, "one vocabulary; got V = 37 and 40"),
        ({"ref_weight": torch.zeros(V, D_REF, dtype=torch.int64)}, TypeError, "ref_weight must have a real floating"),
        (
            {"ref_weight": torch.zeros(V, D_REF, device="meta")},
            ValueError,
            "ref_weight must be on the device of hidden",
        ),
        ({"ref_bias": torch.zeros(V + 1)}, ValueError, r"ref_bias must be \[V\]"),
        ({"vocab_tile": 0}, ValueError, "vocab_tile"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0"),
        ({"ref_softcap": -1.0}, ValueError, "softcap must be"),
        ({"ref_logit_scale": 0.0}, ValueError, "logit_scale must be"),
    ],
)
def test_bad_heads_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_per_token_kl(**{**inputs(), "direction": "forward", **change})
