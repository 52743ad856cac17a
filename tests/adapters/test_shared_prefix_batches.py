"""Which batches share their prompts, where the padded rows stay, and how rows are packed."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from selective_pref_adapters.batch import labels_of
from selective_pref_adapters.heads import (
    frozen_per_token_logps,
    install_fused_head,
    model_per_token_logps,
)
from selective_pref_adapters.shared_prefix import layout as layout_module
from selective_pref_adapters.shared_prefix.exact import UNLIMITED, examine
from selective_pref_adapters.shared_prefix.groups import Group, groups_of
from selective_pref_adapters.shared_prefix.packed import first_fit, pack
from shared_prefix_cases import (  # noqa: F401 (cheap_calls and one_layout are fixtures)
    PAIRS,
    Count,
    assert_same,
    cheap_calls,
    collate,
    laid_out,
    logps_and_gradients,
    make,
    make_batch,
    one_layout,
    plain,
)

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


def test_gathered_weights_are_examined_at_the_first_batch_whatever_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at a model calls it, and each call gathers its weights: all processes must call it equally often."""
    monkeypatch.setattr(layout_module, "is_sharded", lambda _: True)
    model, batch = make("llama"), make_batch()
    count = Count(model)
    nothing = torch.full_like(labels_of(batch), -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert layout_module.lay_out(model, inputs, nothing) is None
    assert count.calls > 0
    count.restart()
    assert laid_out(model, batch)
    assert count.calls == 0


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


def test_a_window_longer_than_the_made_up_pair_is_tried() -> None:
    """Local attention of a model's own making, which packed rows cannot follow."""
    model = make("gpt_neo", window_size=48, max_position_embeddings=256)
    limit, reason = examine(model, "packed")
    assert (limit, "hidden states differ" in reason) == (0, True), reason
    assert examine(model, "continued") == (UNLIMITED, "")


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
