"""Prompts shared between rows: the numbers of the padded layout, from fewer tokens."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from selective_pref_adapters.heads import (
    computes_rows_by_themselves,
    frozen_per_token_logps,
    install_fused_head,
    model_logps_and_statistics,
    model_per_token_logps,
    row_per_token_logps,
)
from selective_pref_adapters.shared_prefix.exact import UNLIMITED, examine
from shared_prefix_cases import (  # noqa: F401 (cheap_calls and one_layout are fixtures)
    CONTINUED_ONLY,
    MODELS,
    NEITHER,
    PAIRS,
    Count,
    assert_same,
    cheap_calls,
    logps_and_gradients,
    make,
    make_batch,
    one_layout,
    plain,
)


class Float64Throughout(TorchFunctionMode):
    """Norms, rotary angles and softmax of many models ask for float32; here they get float64, so that 1e-10 is told
    from rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wider = {torch.float32: torch.float64}
        args = [wider.get(value, value) if isinstance(value, torch.dtype) else value for value in args]
        kwargs = {
            name: wider.get(value, value) if isinstance(value, torch.dtype) else value
            for name, value in (kwargs or {}).items()
        }
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


# --- the same numbers ------------------------------------------------------------------------------------------------


BY_TURNS = [(name, ("packed", "continued")[number % 2]) for number, name in enumerate(MODELS)]
WINDOWS = [("mistral, short window", "packed"), ("mistral, short window", "continued"), ("gpt_oss", "packed")]


@pytest.mark.parametrize(("name", "layout"), dict.fromkeys(BY_TURNS + WINDOWS), indirect=["layout"])
def test_architectures(name: str, layout: str) -> None:
    model = make(name).double()
    assert install_fused_head(model)
    count = Count(model)
    assert examine(model, layout) == (UNLIMITED, "")
    model_per_token_logps(model, make_batch())  # where it is examined
    for side in ("right", "left"):
        batch = make_batch(side=side)
        with Float64Throughout():
            expected = plain(model, batch)
            count.restart()
            assert_same(logps_and_gradients(model, batch), expected, 1e-10)
        assert count.tokens == sum(map(sum, PAIRS))
        assert count.calls == (9 if layout == "continued" else 3)


@pytest.mark.parametrize("name", CONTINUED_ONLY)
def test_a_model_that_packed_rows_do_not_serve(name: str, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    """A bias by distance, or windows that no mask can move: exact with a cache, and otherwise left as it was."""
    model, batch = make(name), make_batch()
    assert install_fused_head(model)
    expected = plain(model, batch)
    count = Count(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model_per_token_logps(model, batch)
            count.restart()
            assert_same(logps_and_gradients(model, batch), expected, 1e-4)
    if layout == "continued":
        assert count.tokens == sum(map(sum, PAIRS))
    else:
        assert count.tokens == batch["input_ids"].numel()
        assert caplog.text.count("computes a pair's prompt once for each side") == 1


def test_chunks_of_attention() -> None:
    model = make("llama4, short chunks")
    assert [examine(model, layout) for layout in ("continued", "packed")] == [(UNLIMITED, "")] * 2


@pytest.mark.parametrize("name", NEITHER)
def test_recurrent_layers_keep_the_padded_rows(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make(name), make_batch()
    assert install_fused_head(model)
    expected = plain(model, batch)
    count = Count(model)
    with caplog.at_level(logging.WARNING):
        model_per_token_logps(model, batch)
        count.restart()
        assert_same(logps_and_gradients(model, batch), expected, 0)
    assert (count.tokens, count.calls) == (batch["input_ids"].numel(), 1)
    assert caplog.text.count("computes a pair's prompt once for each side: layers of the kind") == 1


def test_bf16_is_as_exact_as_plain_bf16(layout: str) -> None:
    exact, batch = make("llama").double(), make_batch()
    low = make("llama").to(torch.bfloat16)
    for model in (exact, low):
        assert install_fused_head(model)
    truth, padded, shared = plain(exact, batch), plain(low, batch), logps_and_gradients(low, batch)
    error, naive = ((found[0] - truth[0]).abs() for found in (shared, padded))
    assert error.max() <= 1.5 * naive.max()
    assert error.mean() <= 1.2 * naive.mean()
    ours, theirs, right = (
        torch.cat([part.double().flatten() for part in one[1].values()]) for one in (shared, padded, truth)
    )
    assert (ours - right).norm() <= 1.2 * (theirs - right).norm()


def test_statistics(layout: str) -> None:
    model, batch = make("qwen3").double(), make_batch()
    install_fused_head(model)
    shared = model_logps_and_statistics(model, batch)
    model._share_prefix = "off"
    padded = model_logps_and_statistics(model, batch)
    torch.testing.assert_close(shared[0], padded[0])
    for name in ("entropy", "mean_logits"):
        torch.testing.assert_close(getattr(shared[1], name), getattr(padded[1], name), rtol=1e-5, atol=1e-6)
    assert shared[1].is_top1.equal(padded[1].is_top1)


def test_gradient_checkpointing_shares_by_packed_rows() -> None:
    model, batch = make("llama").double(), make_batch()
    install_fused_head(model)
    expected = plain(model, batch)
    model.gradient_checkpointing_enable()
    model.train()
    model_per_token_logps(model, batch)
    count = Count(model)
    assert_same(logps_and_gradients(model, batch), expected, 1e-6)
    assert (count.tokens, count.calls) == (sum(map(sum, PAIRS)), 3)


def test_under_lora_with_the_adapter_on_and_off(layout: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(make("llama"), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    assert install_fused_head(model)
    batch, causal = make_batch(), model.get_base_model()
    causal._share_prefix = "off"
    expected = logps_and_gradients(model, batch)
    causal._share_prefix = "auto"
    model_per_token_logps(model, batch)
    count = Count(model)
    assert_same(logps_and_gradients(model, batch), expected, 1e-4)
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(model_per_token_logps(model, batch), expected[0])
    assert count.tokens == 2 * sum(map(sum, PAIRS))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_soft_prompts_keep_the_padded_rows(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    import peft

    torch.manual_seed(5)
    model = peft.get_peft_model(make("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = make_batch()
    expected = logps_and_gradients(model, batch)
    assert install_fused_head(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(logps_and_gradients(model, batch), expected, 1e-4)
        assert torch.allclose(frozen_per_token_logps(model, batch), expected[0], atol=1e-4)
    assert caplog.text.count("computes a pair's prompt once for each side: its body is") == 1


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_one_side_never_moves_the_other(side: str, layout: str) -> None:
    """Not by a bit: by rows continued, whatever happens to the other side; by packed ones, where its length stays."""
    model, batch = make("llama"), make_batch()
    install_fused_head(model)
    moved, kept = (slice(0, 3), slice(3, 6)) if side == "chosen" else (slice(3, 6), slice(0, 3))
    score = row_per_token_logps if layout == "continued" else frozen_per_token_logps
    before = score(model, batch)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    where = changed["completion_mask"][moved] != 0
    changed["input_ids"][moved][where] = (changed["input_ids"][moved][where] + 7) % 60
    after = score(model, changed)
    assert torch.equal(after[kept], before[kept])
    assert not torch.isclose(after[moved][where[:, 1:]], before[moved][where[:, 1:]]).all()
    if layout == "continued":
        changed["attention_mask"][moved, 43:] = changed["completion_mask"][moved, 43:] = 0  # one is cut
        assert torch.equal(score(model, changed)[kept], before[kept])


def test_the_bits_of_a_row_that_is_scored_for_a_store_depend_on_it_alone() -> None:
    """Beside its other side, beside others, on whichever side padded, or by itself."""
    model, batch = make("qwen3"), make_batch()
    install_fused_head(model)
    assert computes_rows_by_themselves(model)
    count = Count(model)
    whole = row_per_token_logps(model, batch)
    assert count.tokens == sum(map(sum, PAIRS))
    torch.testing.assert_close(whole, frozen_per_token_logps(model, batch))
    for row in range(6):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        padded = {name: nn.functional.pad(tensor, (5, 3)) for name, tensor in alone.items()}
        assert torch.equal(row_per_token_logps(model, alone), whole[row : row + 1])
        assert torch.equal(row_per_token_logps(model, padded)[:, 5:-3], whole[row : row + 1])
    order = [5, 0, 3, 1]
    some = {name: tensor[order] for name, tensor in batch.items()}
    assert torch.equal(row_per_token_logps(model, some), whole[order])


def test_a_reference_of_equal_weights_gives_equal_bits(layout: str) -> None:
    """The policy's call with the policy's shapes: with a gradient and without, learning and not."""
    model, batch = make("llama"), make_batch()
    install_fused_head(model)
    policy = model_per_token_logps(model.train(), batch)
    assert torch.equal(frozen_per_token_logps(model.eval(), batch), policy)
