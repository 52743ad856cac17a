"""Prompts shared between rows: the numbers of the padded layout, from fewer tokens; and where the padded one stays."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from selective_pref_adapters.batch import labels_of
from selective_pref_adapters.heads import (
    frozen_per_token_logps,
    install_fused_head,
    model_logps_and_statistics,
    model_per_token_logps,
    row_per_token_logps,
    scores_rows_by_themselves,
)
from selective_pref_adapters.shared_prefix import layout as layout_module
from selective_pref_adapters.shared_prefix.exact import UNLIMITED, examine
from selective_pref_adapters.shared_prefix.groups import Group, groups_of
from selective_pref_adapters.shared_prefix.packed import first_fit, pack
from test_heads import ARCHITECTURES as HEADS
from test_heads import TINY

Batch = dict[str, Tensor]
Pair = tuple[int, int, int]  # tokens of the prompt, of the chosen and of the rejected response

WINDOW = {"sliding_window": 6, "num_hidden_layers": 4}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"experts_implementation": "eager", "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, EXPERTS if name in ("mixtral", "qwen3_moe") else {}) for name in HEADS},
    "gemma2, short window": ("gemma2", WINDOW),
    "gemma3, short window": ("gemma3_text", MIXED),
    "mistral, short window": ("mistral", WINDOW),
    "gpt_oss": ("gpt_oss", {**MIXED, **EXPERTS, "num_local_experts": 4}),
    "olmo3": ("olmo3", WINDOW),
}
CONTINUED_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "falcon, ALiBi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    ),
}
LOGITS: dict[str, tuple[str, dict[str, Any]]] = {  # no fused head serves it
    "llama4, short chunks": (
        "llama4_text",
        {"attention_chunk_size": 8, "num_local_experts": 2, "num_hidden_layers": 4, "intermediate_size_mlp": 48},
    ),
}
NEITHER: dict[str, tuple[str, dict[str, Any]]] = {
    "jamba": (
        "jamba",
        {
            "use_mamba_kernels": False,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}
PAIRS: list[Pair] = [(40, 9, 5), (30, 3, 12), (3, 6, 4)]


def make(name: str, **options: Any) -> Any:
    """A tiny model with hidden states of some size, so that what it attends to matters."""
    kind, own = {**MODELS, **CONTINUED_ONLY, **LOGITS, **NEITHER}[name]
    settings = {**TINY, **HEADS.get(kind, {}), **own, **options}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{key: value for key, value in settings.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def make_batch(pairs: list[Pair] = PAIRS, *, side: str = "right", seed: int = 1) -> Batch:
    """Random pairs in the trainers' layout, with padding on one side."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 60, (prompt,), generator=generator) for prompt, _, _ in pairs]
    responses = [torch.randint(3, 60, (pair[place],), generator=generator) for place in (1, 2) for pair in pairs]
    return collate([*zip(prompts * 2, responses, strict=True)], side=side)


def collate(rows: list[tuple[Tensor, Tensor]], *, side: str = "right") -> Batch:
    width = max(len(prompt) + len(response) for prompt, response in rows) + 2
    batch = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        start = width - length if side == "left" else 0
        batch["input_ids"][number, start : start + length] = torch.cat([prompt, response])
        batch["attention_mask"][number, start : start + length] = 1
        batch["completion_mask"][number, start + len(prompt) : start + length] = 1
    return batch


def logps_and_gradients(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logps = model_per_token_logps(model, batch)
    model.zero_grad()
    (logps * torch.randn(logps.shape, generator=torch.Generator().manual_seed(2)).to(logps)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model: Any, batch: Batch, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from rows as they are."""
    model._share_prefix = "off"
    found = logps_and_gradients(model, batch)
    model._share_prefix = "auto"
    return found


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = max(1.0, float(other[1][name].abs().max()))
        torch.testing.assert_close(gradient / scale, other[1][name] / scale, rtol=0, atol=tolerance, msg=name)


class Count:
    """Tokens that enter a model's body, and calls of it."""

    def __init__(self, model: nn.Module) -> None:
        self.restart()
        model.get_input_embeddings().register_forward_hook(self.add)

    def add(self, _: nn.Module, args: Any, __: Any) -> None:
        self.tokens += args[0].numel()
        self.calls += 1

    def restart(self) -> None:
        self.tokens = self.calls = 0


@pytest.fixture(autouse=True)
def calls_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the short rows of these tests are worth sharing."""
    monkeypatch.setattr(layout_module, "CALL_TOKENS", 2)
    monkeypatch.setattr(layout_module, "CPU_ROW_TOKENS", 0)  # a row for each prompt


@pytest.fixture(params=["continued", "packed"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Only this layout is there, with gradients and without."""
    if request.param == "packed":
        monkeypatch.setattr(layout_module, "continues", lambda causal: False)
    else:
        monkeypatch.setattr(layout_module, "examine", only_continued)
    return request.param


def only_continued(causal: Any, layout: str) -> tuple[int, str]:
    return examine(causal, layout) if layout == "continued" else (0, "not in this test")


def laid_out(model: Any, batch: Batch, *, compiled: bool = False) -> Any:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = layout_module.lay_out(model, inputs, labels_of(batch), compiled=compiled)
    assert found is not None
    return found


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


@pytest.mark.parametrize("name", MODELS)
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
    assert scores_rows_by_themselves(model)
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


# --- odd batches -----------------------------------------------------------------------------------------------------


def ids(count: int, seed: int) -> Tensor:
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed))


ODD: dict[str, tuple[list[tuple[Tensor, Tensor]], int]] = {
    "prompts that differ at the end": (
        [(ids(20, 1), ids(5, 2)), (torch.cat([ids(20, 1)[:-1], ids(1, 9)]), ids(6, 3))],
        51,
    ),
    "a pair cut at its start": ([(ids(20, 1)[4:], ids(9, 2)), (ids(20, 1), ids(5, 3))], 50),
    "equal responses": ([(ids(20, 1), ids(5, 2)), (ids(20, 1), ids(5, 2))], 30),
    "a response that is empty": ([(ids(20, 1), ids(0, 2)), (ids(20, 1), ids(5, 2))], 25),
    "one prompt for two pairs": ([(ids(20, 1), ids(4, number)) for number in range(4)], 36),
    "rows without a token": (
        [(ids(20, 1), ids(5, 2)), (ids(0, 1), ids(0, 2)), (ids(20, 1), ids(6, 3)), (ids(0, 1), ids(0, 2))],
        31,
    ),
    "a row without its pair": ([(ids(20, 1), ids(5, 2)), (ids(20, 1), ids(5, 3)), (ids(22, 4), ids(3, 5))], 55),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("side", ["right", "left"])
def test_odd_batches(case: str, side: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "LEAST_SAVING", -9.0)  # also where it saves nothing
    rows, tokens = ODD[case]
    model, batch = make("qwen2").double(), collate(rows, side=side)
    install_fused_head(model)
    expected = plain(model, batch)
    model_per_token_logps(model, batch)
    count = Count(model)
    assert_same(logps_and_gradients(model, batch), expected, 1e-6)
    assert count.tokens == tokens
    torch.testing.assert_close(frozen_per_token_logps(model, batch), expected[0], rtol=1e-6, atol=1e-6)


def test_an_empty_prompt(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing precedes the first token, so nothing predicts it: its log-prob is left at 0."""
    monkeypatch.setattr(layout_module, "LEAST_SAVING", -9.0)
    model, batch = make("qwen2").double(), collate([(ids(0, 1), ids(8, 2)), (ids(0, 1), ids(5, 3))])
    install_fused_head(model)
    assert_same(logps_and_gradients(model, batch), plain(model, batch), 1e-6)
    right = model_per_token_logps(model, batch)
    left = model_per_token_logps(model, collate([(ids(0, 1), ids(8, 2)), (ids(0, 1), ids(5, 3))], side="left"))
    torch.testing.assert_close(left[0, 2:], right[0, :-2])
    assert left[0, 1] == 0


def test_several_turns(layout: str) -> None:
    """What stands between the counted tokens of a row belongs to its response, and is not predicted."""
    model, batch = make("llama").double(), make_batch()
    batch["completion_mask"][:, 33:42:2] = 0
    install_fused_head(model)
    expected = plain(model, batch)
    assert_same(logps_and_gradients(model, batch), expected, 1e-6)


def test_nothing_to_predict() -> None:
    model, batch = make("llama"), make_batch()
    batch["completion_mask"].zero_()
    install_fused_head(model)
    logps = model_per_token_logps(model, batch)
    assert logps.requires_grad
    assert not logps.any()


# --- when the padded rows stay ---------------------------------------------------------------------------------------


def test_where_there_is_nothing_to_share(layout: str) -> None:
    model, batch = make("llama"), make_batch([(1, 20, 20)] * 3)
    batch = {name: tensor[:, :-2] for name, tensor in batch.items()}
    install_fused_head(model)
    model_per_token_logps(model, make_batch())
    count = Count(model)
    model_per_token_logps(model, batch)
    assert (count.tokens, count.calls) == (batch["input_ids"].numel(), 1)


def test_positions_of_the_batch_s_own(layout: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make("llama"), make_batch()
    install_fused_head(model)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]).clone()
    model_per_token_logps(model, batch)
    count = Count(model)
    model_per_token_logps(model, batch)
    assert count.tokens == sum(map(sum, PAIRS))
    batch["position_ids"][:, 30:] += 5
    expected = plain(model, batch)
    with caplog.at_level(logging.WARNING):
        assert_same(logps_and_gradients(model, batch), expected, 0)
    assert "are not counted from the first token" in caplog.text


def test_switched_off(layout: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make("llama"), make_batch()
    assert install_fused_head(model, share_prefix="off")
    count = Count(model)
    with caplog.at_level(logging.WARNING):
        model_per_token_logps(model, batch)
    assert (count.tokens, count.calls) == (batch["input_ids"].numel(), 1)
    assert not caplog.text
    with pytest.raises(ValueError, match="share_prefix must be 'auto' or 'off'; got 'on'"):
        install_fused_head(make("llama"), share_prefix="on")


class Deaf(nn.Module):
    """A body that does not listen to one of its inputs."""

    def __init__(self, body: Any, to: str) -> None:
        super().__init__()
        self.own_forward, self.to_what = body.forward, to

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        if self.to_what == "position_ids" and options.get("past_key_values") is None:
            position_ids = None
        if self.to_what == "attention_mask" and attention_mask.ndim == 4:
            attention_mask = None
        return self.own_forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("to", "words"), [("position_ids", "position ids"), ("attention_mask", "a mask")])
def test_a_model_that_ignores_what_it_is_given(
    to: str, words: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where its attention hardly matters, and rounding would hide it."""
    model, batch = make("llama").to(dtype), make_batch()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
    assert install_fused_head(model, at_first_call=True)
    expected = plain(model, batch)
    monkeypatch.setattr(layout_module, "continues", lambda causal: False)
    model.model.forward = Deaf(model.model, to).forward
    with caplog.at_level(logging.WARNING):
        assert_same(logps_and_gradients(model, batch), expected, 0)
        logps_and_gradients(model, batch)
    assert caplog.text.count(f"once for each side: it ignores {words}") == 1


@pytest.mark.parametrize("name", ["mistral, short window", "gemma3, short window"])
def test_a_window_too_long_to_be_tried_is_not_crossed(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from selective_pref_adapters.shared_prefix import exact

    monkeypatch.setattr(exact, "LONGEST_WINDOW", 5)
    model = make(name, sliding_window=48).double()
    assert examine(model, layout) == (48, "")
    install_fused_head(model)
    fits, crosses = make_batch([(40, 8, 5)]), make_batch([(40, 9, 5)])
    model_per_token_logps(model, fits)
    count = Count(model)
    with caplog.at_level(logging.WARNING):
        for batch, tokens in ((fits, 53), (crosses, 40 + 9 + 40 + 5 if layout == "continued" else 102)):
            count.restart()
            with torch.no_grad():
                model_per_token_logps(model, batch)
            assert count.tokens == tokens
    assert ("for rows of 48 tokens at most" in caplog.text) == (layout == "packed")


def test_frequencies_that_change_with_the_length(layout: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 48}
    model = make(
        "phi3",
        max_position_embeddings=96,
        original_max_position_embeddings=48,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    assert examine(model, layout) == (48, "")


# --- packing ---------------------------------------------------------------------------------------------------------


def group_of(tokens: int) -> Group:
    return Group(prompt=torch.zeros(tokens, dtype=torch.int64), responses=[])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 40))
def test_first_fit(lengths: list[int], width: int) -> None:
    groups = [group_of(length) for length in lengths]
    rows = first_fit(groups, width)
    assert sorted(id(group) for row in rows for group in row) == sorted(map(id, groups))
    loads = [sum(group.tokens for group in row) for row in rows]
    assert all(len(row) == 1 or load <= width for row, load in zip(rows, loads, strict=True))
    assert len(rows) < 2 or sum(sorted(loads)[:2]) > width  # no two rows that would fit into one


@pytest.mark.parametrize(
    ("width", "shapes"), [(0, [(1, 54)] * 1 + [(1, 45), (1, 13)]), (60, [(1, 58), (1, 54)]), (200, [(1, 112)])]
)
def test_several_pairs_in_a_row(width: int, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "CPU_ROW_TOKENS", width)
    model, batch = make("llama").double(), make_batch()
    install_fused_head(model)
    found = laid_out(model, batch)
    assert sorted(packed.input_ids.shape for packed in found.packed) == sorted(shapes)
    assert_same(logps_and_gradients(model, batch), plain(model, batch), 1e-6)
    together = laid_out(model, batch, compiled=True)
    assert [packed.input_ids.shape for packed in together.packed] == [(len(shapes), shapes[0][1])]
    torch.testing.assert_close(together.states(model), found.states(model), rtol=1e-6, atol=1e-6)


def test_rows_of_whole_blocks() -> None:
    """As flex attention needs them."""
    model, batch = make("llama").double(), make_batch()
    install_fused_head(model)
    found = laid_out(model, batch)
    wider = [pack([found.groups], multiple=128)]
    assert wider[0].input_ids.shape == (1, 128)
    places = torch.cat([wider[0].predictors[row] for row in range(6)])
    states = replace(found, packed=wider, predictors=places).states(model)
    torch.testing.assert_close(states, found.states(model), rtol=1e-6, atol=1e-6)


def test_what_a_packed_token_sees() -> None:
    group = groups_of(
        torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        torch.tensor([[-100, -100, 7, 8], [-100, -100, 9, -100]]),
    )
    packed = pack([group], multiple=6)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 0]]

    def seen(kind: str, size: int) -> list[str]:
        sees = packed.sees(kind, size)
        return ["".join(".x"[int(sees(0, query, key))] for key in range(6)) for query in range(6)]

    assert seen("full_attention", 0) == ["x.....", "xx....", "xxx...", "xxxx..", "xx..x.", ".....x"]
    assert seen("sliding_attention", 2) == ["x.....", "xx....", ".xx...", "..xx..", ".x..x.", ".....x"]
    assert seen("chunked_attention", 2) == ["x.....", "xx....", "..x...", "..xx..", "....x.", ".....x"]


def test_compiled_models_share_by_packed_rows() -> None:
    model, batch = make("llama"), make_batch()
    install_fused_head(model)
    expected = plain(model, batch)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        logps, gradients = logps_and_gradients(compiled, batch)
        named = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
        assert_same((logps, named), expected, 1e-4)
