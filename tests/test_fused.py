"""The fused head: same numbers as logits, fewer operations, no wrong number on bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from selective_pref import _tiles
from selective_pref.fused import LogitStatistics, fused_logps_and_statistics, fused_per_token_logps

N, D, V = 13, 6, 37
OPTIONS: list[dict[str, Any]] = [
    {},
    {"logit_scale": 0.3},
    {"softcap": 2.0, "logit_scale": 1.5, "temperature": 0.7},
    {"temperature": 2.0},
]


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The definition, with every logit in memory."""
    z = (hidden @ weight.T + (0 if bias is None else bias)) * options.get("logit_scale", 1.0)
    if (cap := options.get("softcap")) is not None:
        z = cap * torch.tanh(z / cap)
    logps = (z / options.get("temperature", 1.0)).log_softmax(-1)
    picked = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, 0.0, picked)


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(V, (N,), generator=generator)
    labels[[2, 7]] = -100
    return {"hidden": normal(N, D), "weight": normal(V, D), "bias": normal(V), "labels": labels}


def upstream(dtype: torch.dtype = torch.float64) -> Tensor:
    """Ordinary, zero and negative gradients."""
    gradient = torch.linspace(-1, 2, N, dtype=dtype)
    gradient[[0, 4, 5]] = 0
    return gradient


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("vocab_tile", [1, 5, V, 100, None])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_those_of_logits(
    options: dict[str, Any], keep_logits: bool, vocab_tile: int | None, with_bias: bool
) -> None:
    data = inputs()
    if not with_bias:
        data.pop("bias")
    leaves = [array for array in data.values() if array.requires_grad]
    ours = fused_per_token_logps(**data, **options, vocab_tile=vocab_tile, keep_logits=keep_logits)
    expected = dense(**data, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    for got, wanted in zip(
        torch.autograd.grad(ours, leaves, upstream()), torch.autograd.grad(expected, leaves, upstream()), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def dense_statistics(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, **options: Any) -> LogitStatistics:
    """The definitions, with every logit in memory."""
    every = torch.stack([dense(hidden, weight, torch.full_like(labels, v), bias, **options) for v in range(V)], -1)
    counts = labels != -100
    z = (hidden @ weight.T + bias) * options.get("logit_scale", 1.0)
    if (cap := options.get("softcap")) is not None:
        z = cap * torch.tanh(z / cap)
    z = z / options.get("temperature", 1.0)
    return LogitStatistics(
        entropy=-(every.exp() * every).sum(-1) * counts,
        mean_logits=z.mean(-1) * counts,
        is_top1=(every.argmax(-1) == labels) & counts,
        log_sum_sq_probs=(every.exp() ** 2).sum(-1).log() * counts,
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocab_tile", [1, 5, V, None])
def test_statistics_of_the_same_walk_are_those_of_the_logits(options: dict[str, Any], vocab_tile: int | None) -> None:
    data = inputs()
    with torch.no_grad():
        top = dense_statistics(**data, **options).is_top1  # make sure that some labels are the top one
        data["labels"][4:6] = (data["hidden"] @ data["weight"].T + data["bias"]).argmax(-1)[4:6]
    assert top.sum() < dense_statistics(**data, **options).is_top1.sum()
    logps, found = fused_logps_and_statistics(**data, **options, vocab_tile=vocab_tile)
    plain = fused_per_token_logps(**data, **options, vocab_tile=vocab_tile)
    torch.testing.assert_close(logps, plain, rtol=1e-13, atol=1e-13)
    expected = dense_statistics(**data, **options)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.mean_logits, expected.mean_logits, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.log_sum_sq_probs, expected.log_sum_sq_probs, rtol=1e-11, atol=1e-12)
    assert found.is_top1.equal(expected.is_top1)
    assert not any(part.requires_grad for part in vars(found).values())
    leaves = (data["hidden"], data["weight"], data["bias"])
    for got, wanted in zip(
        torch.autograd.grad(logps, leaves, upstream()), torch.autograd.grad(plain, leaves, upstream()), strict=True
    ):
        assert got.equal(wanted)


def test_statistics_where_logits_are_masked_or_nothing_counts() -> None:
    """A padded vocabulary is often cut off by −inf: those tokens have probability 0 and no share in the entropy."""
    data = inputs()
    with torch.no_grad():
        data["bias"][20:] = -torch.inf
        data["labels"].clamp_(max=19)
        cut = {**data, "weight": data["weight"][:20], "bias": data["bias"][:20]}
    for tile in (3, None):
        logps, found = fused_logps_and_statistics(**data, vocab_tile=tile)
        want_logps, want = fused_logps_and_statistics(**cut, vocab_tile=tile)
        torch.testing.assert_close(logps, want_logps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.entropy, want.entropy, rtol=1e-12, atol=1e-12)
        assert found.is_top1.equal(want.is_top1)
    nothing = {**data, "labels": torch.full((N,), -100)}
    logps, found = fused_logps_and_statistics(**nothing)
    assert not any(part.any() for part in (logps, found.entropy, found.mean_logits, found.is_top1))
    logps.sum().backward()  # attached all the same


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("keep_logits", [False, True])
def test_the_compiled_fold_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], keep_logits: bool
) -> None:
    """What CUDA runs compiled, compiled for the CPU: ragged tiles, and the tile buffer left alone."""
    data = inputs(torch.float32)
    leaves = (data["hidden"], data["weight"], data["bias"])
    settings = {**options, "keep_logits": keep_logits, "vocab_tile": 8}
    eager = fused_per_token_logps(**data, **settings)
    expected = torch.autograd.grad(eager, leaves, upstream(torch.float32))
    used: list[bool] = []

    def compiles(_: Tensor) -> bool:
        used.append(True)
        return True

    monkeypatch.setattr(_tiles, "compiles", compiles)
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    compiled = fused_per_token_logps(**data, **settings)
    got = torch.autograd.grad(compiled, leaves, upstream(torch.float32))
    assert len(used) == 2 * 5
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_compiled_statistics_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = inputs(torch.float32)
    logps, found = fused_logps_and_statistics(**data, **OPTIONS[2], vocab_tile=8)
    monkeypatch.setattr(_tiles, "compiles", lambda _: True)
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    compiled, theirs = fused_logps_and_statistics(**data, **OPTIONS[2], vocab_tile=8)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(compiled, logps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.entropy, found.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.mean_logits, found.mean_logits, rtol=1e-5, atol=1e-6)
    assert theirs.is_top1.equal(found.is_top1)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_over_ragged_tiles(options: dict[str, Any]) -> None:
    data = inputs()
    labels = data.pop("labels")
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: fused_per_token_logps(hidden, weight, labels, bias=bias, vocab_tile=5, **options),
        tuple(data.values()),
    )


def test_leading_dimensions() -> None:
    data = inputs()
    whole = fused_per_token_logps(**data)
    folded = {**data, "hidden": data["hidden"][:12].view(3, 4, D), "labels": data["labels"][:12].view(3, 4)}
    assert fused_per_token_logps(**folded).equal(whole[:12].view(3, 4))


def flops(action: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("selected", [0, 1, 5, 11])
def test_operations_are_two_forward_and_six_or_four_per_selected_row(keep_logits: bool, selected: int) -> None:
    data = inputs(torch.float32)
    data.pop("bias")
    counted = N - 2  # rows labelled -100 are not projected
    results: list[Tensor] = []
    forward = flops(lambda: results.append(fused_per_token_logps(**data, vocab_tile=8, keep_logits=keep_logits)))
    assert forward == 2 * counted * V * D
    gradient = torch.zeros(N)
    rows = (data["labels"] != -100).nonzero().squeeze(-1)
    gradient[rows[:selected]] = 1.0
    backward = flops(lambda: results[0].backward(gradient))
    assert backward == (4 if keep_logits else 6) * selected * V * D


class Waits(TorchDispatchMode):
    """Names the operations for which a program waits until its device is done: the host needs what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if by_mask or name in ("nonzero", "_local_scalar_dense", "masked_select", "repeat_interleave", "_unique2"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_logits", [False, True])
def test_the_device_is_waited_for_once_forward_and_once_backward(keep_logits: bool) -> None:
    """How many rows count, and how many of them have a gradient: nothing else has to be known on the host."""
    for data in (inputs(torch.float32), {**inputs(torch.float32), "labels": torch.full((N,), -100)}):
        with Waits() as forward:
            out = fused_per_token_logps(**data, vocab_tile=8, keep_logits=keep_logits)
        gradient = upstream(torch.float32)
        with Waits() as backward:
            out.backward(gradient)
        assert forward.names == backward.names == ["nonzero"]
    with Waits() as forward:
        fused_logps_and_statistics(**inputs(torch.float32), vocab_tile=8)
    assert forward.names == ["nonzero"]


def test_no_work_for_what_needs_no_gradient() -> None:
    data = inputs(torch.float32)
    data.pop("bias")
    for frozen, per_row in (("weight", 4), ("hidden", 4)):
        leaves = {**data, frozen: data[frozen].detach()}
        out = fused_per_token_logps(**leaves, vocab_tile=8)
        assert flops(lambda out=out: out.backward(torch.ones(N))) == per_row * (N - 2) * V * D
        assert leaves[frozen].grad is None


def test_rows_labelled_ignore_are_never_projected_and_may_hold_anything() -> None:
    data = inputs()
    clean = fused_per_token_logps(**data)
    expected = torch.autograd.grad(clean.sum(), data["weight"])[0]
    dirty = data["hidden"].detach().clone()
    dirty[[2, 7]] = torch.nan
    dirty.requires_grad_()
    out = fused_per_token_logps(**{**data, "hidden": dirty})
    assert out.equal(clean)
    assert out[2] == out[7] == 0
    d_hidden, d_weight = torch.autograd.grad(out.sum(), (dirty, data["weight"]))
    assert d_weight.equal(expected)
    assert not d_hidden[[2, 7]].any()
    none = torch.full((N,), -100)
    assert flops(lambda: fused_per_token_logps(data["hidden"], data["weight"], none)) == 0


def test_skipping_rows_changes_no_digit_of_the_gradient() -> None:
    """The same gradient with the skipped rows kept in play by a multiplication that makes their share exactly zero."""
    data = inputs(torch.float32)
    gradient = upstream(torch.float32)
    sparse = torch.autograd.grad(fused_per_token_logps(**data), (data["hidden"], data["weight"]), gradient)
    live = gradient != 0
    chosen = {**data, "hidden": data["hidden"][live], "labels": data["labels"][live]}
    alone = torch.autograd.grad(fused_per_token_logps(**chosen), (data["hidden"], data["weight"]), gradient[live])
    assert sparse[0].equal(alone[0])
    assert sparse[1].equal(alone[1])
    assert not sparse[0][~live].any()


@pytest.mark.parametrize("case", ["all ignored", "zero gradient"])
def test_a_graph_without_work_is_attached_and_gives_zeros(case: str) -> None:
    data = inputs(torch.float32)
    if case == "all ignored":
        data["labels"] = torch.full((N,), -100)
    fired: list[Tensor] = []
    data["weight"].register_hook(fired.append)
    out = fused_per_token_logps(**data)
    (out * (1.0 if case == "all ignored" else 0.0)).sum().backward()
    assert len(fired) == 1
    for name in ("hidden", "weight", "bias"):
        assert data[name].grad is not None
        assert not data[name].grad.any()


def test_nan_in_a_counted_row_propagates_and_is_never_skipped() -> None:
    data = inputs()
    hidden = data["hidden"].detach().clone()
    hidden[3, 1] = torch.nan
    out = fused_per_token_logps(**{**data, "hidden": hidden})
    assert out.isnan().nonzero().flatten().tolist() == [3]
    gradient = torch.zeros(N, dtype=torch.float64)
    gradient[5] = torch.nan
    (d_weight,) = torch.autograd.grad(fused_per_token_logps(**data), data["weight"], gradient)
    assert d_weight.isnan().all()


def test_a_whole_tile_of_minus_infinity_is_legal() -> None:
    """Padded vocabulary entries are sometimes switched off by a bias of −inf."""
    data = inputs()
    bias = data["bias"].detach().clone()
    bias[:10] = -torch.inf
    data["labels"] = data["labels"].where(data["labels"] < 0, 10 + data["labels"] % 27)
    out = fused_per_token_logps(**{**data, "bias": bias}, vocab_tile=5)
    torch.testing.assert_close(out, dense(**{**data, "bias": bias}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_below_that_of_low_precision_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(500, 32, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(500, (64,), generator=generator)
    truth = dense(hidden.double(), weight.double(), labels)
    ours = fused_per_token_logps(hidden, weight, labels)
    naive = dense(hidden, weight, labels)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() <= 1e-4
    assert (ours - truth).abs().max() < (naive - truth).abs().max()
    wanted = torch.autograd.grad(truth.sum(), (hidden, weight))
    got = torch.autograd.grad(ours.sum(), (hidden, weight))
    low = torch.autograd.grad(naive.sum(), (hidden, weight))
    for true, exact, rough in zip(wanted, got, low, strict=True):
        assert exact.dtype == dtype
        assert (exact - true).float().norm() <= (rough - true).float().norm() * 1.05 + 1e-6


def test_mixed_dtypes_and_autocast_give_wide_results() -> None:
    data = inputs(torch.float32)
    wide = fused_per_token_logps(**data)
    mixed = fused_per_token_logps(**{**data, "hidden": data["hidden"].bfloat16()})
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, wide, rtol=0.05, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_per_token_logps(**data).equal(wide)


def test_a_second_derivative_is_refused() -> None:
    data = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused_per_token_logps(**data).sum(), data["hidden"], create_graph=True)


def test_inputs_are_not_modified() -> None:
    data = inputs()
    before = {name: array.detach().clone() for name, array in data.items()}
    fused_per_token_logps(**data, softcap=2.0, keep_logits=True).sum().backward()
    assert all(array.detach().equal(before[name]) for name, array in data.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.full((N,), V)}, ValueError, rf"labels must be in \[0, {V}\) or -100; got {V}"),
        ({"labels": torch.full((N,), -1)}, ValueError, "got -1"),
        ({"labels": torch.tensor([-100] * (N - 1) + [V])}, ValueError, f"got {V}"),
        ({"labels": torch.tensor([-101] + [0] * (N - 1))}, ValueError, "got -101"),
        ({"labels": torch.zeros(N)}, TypeError, "labels must be int64"),
        ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, r"labels must be \(13,\)"),
        ({"hidden": torch.zeros(N, D, dtype=torch.int64)}, TypeError, "hidden must have a real floating dtype"),
        ({"hidden": torch.zeros(N, D + 1, dtype=torch.float64)}, ValueError, r"\[… D\] and weight \[V D\]"),
        ({"hidden": torch.zeros(N, D, device="meta")}, ValueError, "device"),
        ({"bias": torch.zeros(V + 1)}, ValueError, r"bias must be \[V\]"),
        ({"vocab_tile": 0}, ValueError, "vocab_tile"),
        ({"vocab_tile": 2.5}, ValueError, "vocab_tile"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_per_token_logps(**{**inputs(), **change})


@pytest.mark.slow
def test_gradient_error_is_not_above_that_of_trl() -> None:
    kernel = pytest.importorskip("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(96, 64, generator=generator).requires_grad_()
    weight = torch.randn(3000, 64, generator=generator).requires_grad_()
    labels = torch.randint(3000, (96,), generator=generator)
    gradient = torch.randn(96, generator=generator)
    leaves = (hidden, weight)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.autograd.grad(dense(*wide, labels), wide, gradient.double())
    ours = torch.autograd.grad(fused_per_token_logps(*leaves, labels), leaves, gradient)
    theirs = torch.autograd.grad(kernel.apply(*leaves[:2], None, labels, 1.0, 512, None, 1.0, ())[0], leaves, gradient)
    for true, a, b in zip(truth, ours, theirs, strict=True):
        assert (a - true).norm() <= (b - true).norm() * 1.1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiles_cover_the_vocabulary_fill_the_buffer_and_have_even_widths(device: str) -> None:
    buffer = {"cpu": _tiles.BUFFER, "cuda": _tiles.CUDA_BUFFER}[device]
    low, high = {"cpu": _tiles.TILE, "cuda": _tiles.CUDA_TILE}[device]
    head = _tiles.make_head(logit_scale=1.0, softcap=None, temperature=1.0, vocab_tile=None)
    for rows in (1, 7, 410, 1024, 1638, 4096, 100_003):
        for vocabulary in (1, 500, 32_000, 151_937):
            tiles = list(head.tiles(rows, vocabulary, torch.device(device)))
            assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
            assert tiles[-1].stop == vocabulary
            widths = {tile.stop - tile.start for tile in tiles[:-1]}
            assert len(widths) <= 1
            for width in widths:
                assert width % low == 0  # a matrix product whose rows are not aligned is several times slower on a GPU
                assert low <= width <= high
                assert width == low or rows * width <= buffer
