"""One implementation, every library: parity, compilers, and devices on which nothing can be read back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import oracle
import strategies as s
from oracle import Batch, Side
from pair_strategies import CALLS
from selective_pref import (
    PreferenceLoss,
    Response,
    diagnostics,
    dpo_loss,
    per_token_logps,
    quantile_weights,
    ratio_digits,
    select,
    selective_dpo_loss,
    top_fraction_weights,
    weigh_pairs,
)
from strategies import FLOAT64, LOSSES, NUMPY, STRICT, TORCH, Backend, Loss, Settings, batches, named, numpy_of

ids = {"ids": lambda value: getattr(value, "id", None)}


def random_batch(rows: int, width: int, other: int, seed: int = 0) -> Batch:
    """Real-valued log-probs, a fifth of the cells off the mask, one tie in each row."""
    rng = np.random.default_rng(seed)
    sides = []
    for columns in (width, other):
        policy, ref = (np.round(-rng.exponential(2.0, (rows, columns)), 3) for _ in range(2))
        mask = rng.random((rows, columns)) < 0.8
        mask[:, :2] = True
        policy[:, 1], ref[:, 1] = policy[:, 0], ref[:, 0]
        policy[~mask] = math.nan
        sides.append(Side(policy.tolist(), ref.tolist(), mask.tolist()))
    return Batch(*sides)


def numbers_of(out: PreferenceLoss) -> list[np.ndarray]:
    """Everything a loss returns, and its diagnostics."""
    arrays = [out.losses, out.loss, out.chosen_weights, out.rejected_weights, out.chosen_rewards, out.rejected_rewards]
    arrays += [out.chosen_selected_rewards, out.rejected_selected_rewards]
    return [numpy_of(a) for a in (*arrays, *diagnostics(out).values())]


def all_close(actual: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-12) -> None:
    for one, two in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


# --- parity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, **ids)
@settings(max_examples=8)
@given(batch=batches(values=s.REAL), numbers=s.SETTINGS)
def test_torch_and_strict_agree_with_numpy(loss: Loss, batch: Batch, numbers: Settings) -> None:
    expected = numbers_of(loss(*NUMPY.pair(batch), numbers))
    for backend in (TORCH, STRICT):
        all_close(numbers_of(loss(*backend.pair(batch), numbers)), expected)


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_jax_agrees_with_the_oracle_jitted_and_not_gradients_included(loss: Loss) -> None:
    batch = random_batch(3, 7, 9)
    numbers = Settings()
    chosen, rejected = Backend("jax").pair(batch)

    def out_of(one: jax.Array, two: jax.Array) -> PreferenceLoss:
        pair = (
            Response(per_token_logps=one, mask=chosen.mask, ref_per_token_logps=chosen.ref_per_token_logps),
            Response(per_token_logps=two, mask=rejected.mask, ref_per_token_logps=rejected.ref_per_token_logps),
        )
        return loss(*pair, numbers)

    policies = (chosen.per_token_logps, rejected.per_token_logps)
    weights = loss.weights(batch, numbers)
    truth = oracle.losses(loss.family, batch, weights, **loss.numbers(numbers))
    eager = out_of(*policies)
    jitted = jax.jit(lambda one, two: [out_of(one, two).losses, out_of(one, two).chosen_weights])(*policies)
    all_close([numpy_of(eager.losses), numpy_of(jitted[0])], [np.array(truth)] * 2)
    all_close([numpy_of(eager.chosen_weights), numpy_of(jitted[1])], [np.array(weights[0])] * 2)
    expected = [np.array(g) for g in oracle.gradients(loss.family, batch, weights, **loss.numbers(numbers))]
    grad = jax.grad(lambda one, two: out_of(one, two).losses.sum(), argnums=(0, 1))
    for transformed in (grad, jax.jit(grad)):
        gradients = [numpy_of(g) for g in transformed(*policies)]
        all_close(gradients, expected)
        for mine, weight in zip(gradients, weights, strict=True):
            assert not np.any(mine[np.array(weight) == 0])


def test_in_jax_no_gradient_reaches_reference_scores_and_reports() -> None:
    chosen, rejected = Backend("jax").pair(random_batch(2, 5, 5))
    scores = (jnp.ones((2, 5)).cumsum(-1), jnp.ones((2, 5)).cumsum(-1))

    def loss(ref: jax.Array, scores: tuple[jax.Array, jax.Array], policy: jax.Array) -> tuple[jax.Array, jax.Array]:
        pair = (Response(per_token_logps=policy, mask=chosen.mask, ref_per_token_logps=ref), rejected)
        out = named("selective")[0].of_weighted(*select(*pair, selection_ratio=0.5, scores=scores), Settings())
        reported = sum(value for value in diagnostics(out).values())
        return out.loss, reported + out.chosen_rewards.sum() + out.chosen.per_token_logps[0, 0]

    inputs = (chosen.ref_per_token_logps, scores, chosen.per_token_logps)
    ref, score, policy = jax.grad(lambda *a: loss(*a)[0], argnums=(0, 1, 2))(*inputs)
    assert not np.any(ref)
    assert not np.any(score[0])
    assert not np.any(score[1])
    assert np.any(policy)
    for gradient in jax.tree.leaves(jax.grad(lambda *a: loss(*a)[1], argnums=(0, 1, 2))(*inputs)):
        assert not np.any(gradient)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_low_precision_comes_out_as_float32(dtype: str) -> None:
    batch = Batch(*(side._replace(policy=side.ref) for side in random_batch(2, 5, 4)))
    out = named("selective")[0](*Backend("jax", dtype).pair(batch), Settings())
    assert out.losses.dtype == jnp.float32
    np.testing.assert_allclose(out.losses, [math.log(2)] * 2, rtol=1e-6)


def test_jax_with_32_bit_types_only() -> None:
    batch = random_batch(3, 40, 33)
    for loss in named("selective-batch", "simpo"):
        with s.with_x64(False):
            losses = numpy_of(loss(*Backend("jax", "float32").pair(batch), Settings()).losses)
        expected = numpy_of(loss(*Backend("torch", "float32").pair(batch), Settings()).losses)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


# --- compilers ---------------------------------------------------------------------------------------------------

compiled = pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning", "ignore:.*torch.*:DeprecationWarning")


def _pieces(loss: Loss) -> Callable[..., tuple[torch.Tensor, ...]]:
    def call(
        one: torch.Tensor,
        mask: torch.Tensor,
        ref: torch.Tensor,
        two: torch.Tensor,
        other_mask: torch.Tensor,
        other_ref: torch.Tensor,
        ratio: float,
    ) -> tuple[torch.Tensor, ...]:
        out = loss(
            Response(per_token_logps=one, mask=mask, ref_per_token_logps=ref),
            Response(per_token_logps=two, mask=other_mask, ref_per_token_logps=other_ref),
            Settings(ratio=ratio),
        )
        return out.losses, out.chosen_weights, out.rejected_weights, *diagnostics(out).values()

    return call


def _run(call: Callable[..., tuple[torch.Tensor, ...]], batch: Batch, ratio: float) -> list[np.ndarray]:
    """Values, then gradients."""
    chosen, rejected = s.torch_leaf(batch)
    fields = [a for r in (chosen, rejected) for a in (r.per_token_logps, r.mask, r.ref_per_token_logps)]
    values = call(*fields, ratio)
    values[0].sum().backward()
    grads = [r.per_token_logps.grad for r in (chosen, rejected)]
    return [numpy_of(v) for v in (*values, *(torch.zeros(()) if g is None else g for g in grads))]


@compiled
@pytest.mark.parametrize("loss", named("selective-batch", "selective-first", "selective-all", "simpo"), **ids)
def test_compiled_without_a_graph_break_for_one_shape_equals_eager(loss: Loss) -> None:
    torch.compiler.reset()
    call = _pieces(loss)
    static = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    batch = random_batch(2, 5, 7)
    all_close(_run(static, batch, 0.4), _run(call, batch, 0.4))


@compiled
def test_compiled_for_dynamic_shapes_equals_eager_and_lengths_do_not_recompile() -> None:
    torch.compiler.reset()
    call, counter = _pieces(named("selective")[0]), CompileCounter()
    dynamic = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for number, width in enumerate((5, 6, 9, 17)):
        batch = random_batch(2, width, width + 2, seed=number)
        all_close(_run(dynamic, batch, 0.4), _run(call, batch, 0.4))
    assert counter.frame_count == 1
    batch = random_batch(3, 8, 8)
    for ratio in (0.07, 1.0):
        all_close(_run(dynamic, batch, ratio), _run(call, batch, ratio))


@pytest.mark.slow
@compiled
def test_compiled_to_machine_code_equals_eager() -> None:
    torch.compiler.reset()

    def call(*fields: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _pieces(named("selective")[0])(*fields)[:3]

    batch = random_batch(2, 5, 7)
    machine = torch.compile(call, fullgraph=True, dynamic=False)
    all_close(_run(machine, batch, 0.4), _run(call, batch, 0.4))


@compiled
def test_compiled_log_probs_and_layouts_equal_eager() -> None:
    torch.compiler.reset()

    def call(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logps, mask = per_token_logps(logits, labels)
        pair = Response.from_stacked(per_token_logps=logps, mask=mask, ref_per_token_logps=logps * 0.5)
        packed = Response.from_packed(per_token_logps=logps.reshape(-1), lengths=[3, 1, 2, 2])
        loss = named("selective")[0](*pair, Settings())
        return loss.losses.sum() + named("simpo")[0](*packed, Settings()).losses.sum()

    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, 0, 10, 9, 8]])
    expected = call(logits, labels)
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(logits, labels)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)


SCHEDULE = [round(1 - 0.03 * step, 2) for step in range(20)]


@compiled
@pytest.mark.parametrize("everything", [False, True])
def test_a_ratio_given_as_its_digits_is_no_reason_to_compile_again(everything: bool) -> None:
    """Responses go in and a `PreferenceLoss` comes out; with `everything`, two ratios, β and the lengths change too."""
    torch.compiler.reset()
    counter = CompileCounter()

    def call(chosen: Response, rejected: Response, ratio: object, beta: float) -> PreferenceLoss:
        return selective_dpo_loss(chosen, rejected, beta=beta, selection_ratio=ratio)

    step = torch.compile(call, fullgraph=True, dynamic=everything, backend=counter)
    for place, ratio in enumerate(SCHEDULE):
        pair = TORCH.pair(random_batch(2, 9, 11 + everything * place))
        beta, numbers = 0.1 + 0.01 * place * everything, (ratio, 1.1 - ratio) if everything else ratio
        digits = [ratio_digits(r, like=pair[0].mask) for r in (ratio, 1.1 - ratio)]
        out, eager = step(*pair, tuple(digits) if everything else digits[0], beta), call(*pair, numbers, beta)
        assert isinstance(out, PreferenceLoss)
        for actual, expected in ((out.chosen_weights, eager.chosen_weights), (out.losses, eager.losses)):
            np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert counter.frame_count == 1


def test_jax_traces_a_schedule_once_and_takes_and_returns_responses_and_losses() -> None:
    traces = []

    @jax.jit
    def call(chosen: Response, rejected: Response, digits: jax.Array) -> PreferenceLoss:
        traces.append(1)
        return selective_dpo_loss(chosen, rejected, beta=0.1, selection_ratio=digits)

    batch = random_batch(3, 7, 9)
    pair = Backend("jax").pair(batch)
    for ratio in SCHEDULE:
        out = call(*pair, ratio_digits(ratio, like=pair[0].mask))
        expected = selective_dpo_loss(*NUMPY.pair(batch), beta=0.1, selection_ratio=ratio)
        for name in ("losses", "chosen_weights", "rejected_weights", "chosen_rewards", "rejected_selected_rewards"):
            np.testing.assert_allclose(numpy_of(getattr(out, name)), getattr(expected, name), rtol=1e-12)
    assert len(traces) == 1
    assert isinstance(out, PreferenceLoss)
    assert isinstance(out.chosen, Response)


def test_in_jax_responses_and_losses_are_pytrees_that_placeholders_may_pass_through() -> None:
    pair = Backend("jax").pair(random_batch(2, 4, 3))
    out = jax.jit(lambda *sides: weigh_pairs(dpo_loss(*sides, beta=0.1), jnp.ones(2)))(*pair)
    for tree in (pair[0], out):
        leaves, structure = jax.tree.flatten(tree)
        again = structure.unflatten(leaves)
        assert type(again) is type(tree)
        assert [one is two for one, two in zip(jax.tree.leaves(again), leaves, strict=True)] == [True] * len(leaves)
        assert len(jax.tree.leaves(structure.unflatten([object() for _ in leaves]))) == len(
            leaves
        )  # as JAX does itself
        assert jax.tree.leaves(jax.tree.map(lambda leaf: None, tree)) == []
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(out)]
    assert {".losses", ".chosen.per_token_logps", ".rejected.mask", ".pair_weights"} <= set(paths)


def test_every_pair_loss_agrees_across_libraries() -> None:
    batch = random_batch(4, 6, 5)

    def all_of(chosen: Response, rejected: Response) -> list[object]:
        pair = select(chosen, rejected, selection_ratio=0.4)
        return [loss(*pair, 0.5).losses for loss in CALLS.values()]

    expected = [numpy_of(losses) for losses in all_of(*NUMPY.pair(batch))]
    for backend, call in ((TORCH, all_of), (STRICT, all_of), (Backend("jax"), jax.jit(all_of))):
        all_close([numpy_of(losses) for losses in call(*backend.pair(batch))], expected, 1e-11)


@compiled
def test_pair_losses_compile_without_a_graph_break() -> None:
    torch.compiler.reset()
    pair = TORCH.pair(random_batch(4, 6, 5))

    def call(chosen: Response, rejected: Response) -> list[torch.Tensor]:
        return [CALLS[name](chosen, rejected, 0.5).losses for name in ("hinge", "aot", "alpha_divergence")]

    losses = torch.compile(call, fullgraph=True, backend="eager")(*pair)
    all_close([numpy_of(one) for one in losses], [numpy_of(one) for one in call(*pair)])


# --- nothing is read back ----------------------------------------------------------------------------------------


def _on(device: str, rows: int, width: int) -> Response:
    return Response(
        per_token_logps=torch.zeros(rows, width, device=device, requires_grad=True),
        mask=torch.ones(rows, width, dtype=torch.bool, device=device),
        ref_per_token_logps=torch.zeros(rows, width, device=device),
    )


def _everything(loss: Loss, device: str) -> None:
    chosen, rejected = _on(device, 2, 4), _on(device, 2, 5)
    out = loss(chosen, rejected, Settings())
    assert out.losses.shape == (2,)
    for value in diagnostics(out).values():
        assert value.shape == ()
    out.loss.backward()
    assert chosen.per_token_logps.grad.shape == (2, 4)


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_losses_diagnostics_and_backward_run_where_no_value_exists(loss: Loss) -> None:
    _everything(loss, "meta")


def test_pair_losses_read_nothing_back() -> None:
    with FakeTensorMode():
        for loss in CALLS.values():
            assert loss(_on("cpu", 2, 4), _on("cpu", 2, 5), 0.5).losses.shape == (2,)


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_losses_diagnostics_and_backward_run_on_fake_tensors(loss: Loss) -> None:
    with FakeTensorMode():
        _everything(loss, "cpu")
        with pytest.raises(DataDependentOutputException):
            torch.zeros(()).item()  # so one read-back anywhere above would have raised


def test_the_rest_of_the_core_runs_where_no_value_exists() -> None:
    meta = {"device": "meta"}
    logps, mask = per_token_logps(torch.zeros(2, 4, 9, **meta), torch.zeros(2, 4, dtype=torch.int64, **meta))
    assert (logps.shape, mask.dtype) == ((2, 3), torch.bool)
    flat, reference = torch.zeros(7, **meta), torch.zeros(7, **meta)
    chosen, rejected = Response.from_packed(per_token_logps=flat, lengths=[4, 3], ref_per_token_logps=reference)
    assert (chosen.mask.shape, rejected.mask.shape) == ((1, 4), (1, 3))
    assert chosen.mask.device.type == "meta"
    stacked = Response.from_stacked(per_token_logps=logps, mask=mask)
    assert [side.mask.shape for side in stacked] == [(1, 3), (1, 3)]
    digits = torch.zeros(9, dtype=torch.int32, **meta)
    for ties in ("share", "first", "all"):
        for ratio in (0.4, digits):
            assert top_fraction_weights(logps, mask, ratio, ties=ties, min_score=0.0).shape == (2, 3)
    assert quantile_weights(logps, mask, 0.4).shape == (2, 3)


# --- determinism -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*FLOAT64, s.JAX, Backend("torch", "float32")], **ids)
def test_repeated_runs_are_equal_bit_by_bit(backend: Backend) -> None:
    pair = backend.pair(random_batch(4, 300, 280))
    runs = [numbers_of(named("selective")[0](*pair, Settings())) for _ in range(3)]
    for run in runs[1:]:
        for one, two in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(one, two)


def test_every_library_selects_the_same_tokens_at_realistic_lengths() -> None:
    batch = random_batch(4, 700, 650, seed=3)
    expected = oracle.select(batch, 0.4)
    for backend in (*FLOAT64, s.JAX):
        sides = select(*backend.pair(batch), selection_ratio=0.4)
        for side, weights in zip(sides, expected, strict=True):
            np.testing.assert_allclose(numpy_of(side.weights), weights, rtol=1e-15)


def test_reports_are_plain_numbers_for_logging() -> None:
    out = named("selective")[0](*TORCH.pair(random_batch(2, 5, 5)), Settings())
    assert json.loads(json.dumps({name: value.item() for name, value in diagnostics(out).items()}))["loss"] > 0
