"""Tiny models, batches with padding, and what comes out of them, for the tests of shared prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from selective_pref_adapters.batch import labels_of
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.shared_prefix import layout as layout_module
from selective_pref_adapters.shared_prefix.exact import examine
from test_heads import ARCHITECTURES as HEADS
from test_heads import TINY

Batch = dict[str, Tensor]
Pair = tuple[int, int, int]  # tokens of the prompt, of the chosen and of the rejected response

WINDOW = {"sliding_window": 6, "num_hidden_layers": 4}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"experts_implementation": "eager", "num_experts_per_tok": 2, "num_experts": 4}
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
            "experts_implementation": "eager",
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


def only_continued(causal: Any, layout: str) -> tuple[int, str]:
    return examine(causal, layout) if layout == "continued" else (0, "not in this test")


def laid_out(model: Any, batch: Batch, *, compiled: bool = False) -> Any:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = layout_module.lay_out(model, inputs, labels_of(batch), compiled=compiled)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def cheap_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the short rows of these tests are worth sharing."""
    monkeypatch.setattr(layout_module, "CALL_TOKENS", 2)
    monkeypatch.setattr(layout_module, "CPU_ROW_TOKENS", 0)  # a row for each prompt


@pytest.fixture(name="layout", params=["continued", "packed"])
def one_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Only this layout is there, with gradients and without."""
    if request.param == "packed":
        monkeypatch.setattr(layout_module, "continues", lambda causal: False)
    else:
        monkeypatch.setattr(layout_module, "examine", only_continued)
    return request.param
