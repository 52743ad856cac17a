"""The fused head inside real architectures, wrappers and engines: same log-probs and gradients as their logits."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

from selective_pref_adapters.heads import (
    frozen_per_token_logps,
    install_fused_head,
    model_logps_and_statistics,
    model_per_token_logps,
)
from selective_pref_adapters.model_inputs import check_stored_inputs, inputs_of

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {},
    "mistral": {},
    "phi3": {},
    "phi": {},  # a head with a bias
    "gpt2": GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "olmo2": {},
    "mixtral": {"experts_implementation": "eager"},  # a torch of 2025 has the other kind on GPUs alone
    "qwen3_moe": {"experts_implementation": "eager"},
}


def make(name: str, **options: Any) -> nn.Module:
    settings = {**TINY, **ARCHITECTURES[name], **options}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{key: value for key, value in settings.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # logits of some size, so that scales and caps matter
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 9:] = 0
    completion_mask = attention_mask.clone()
    completion_mask[:, :4] = 0
    return {"input_ids": ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def logps_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logps = model_per_token_logps(model, batch)
    gradient = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    logps.backward(gradient * (gradient > 0))  # rows without a gradient, as after a selection
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), gradients


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=1e-5, msg=name)


def count_logits(model: nn.Module) -> list[int]:
    """Numbers of columns that leave the head, call by call."""
    seen: list[int] = []

    def note(_: nn.Module, __: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).shape[-1])

    model.get_output_embeddings().register_forward_hook(note)
    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, batch: dict[str, torch.Tensor]) -> None:
    model = make(name)
    dense = logps_and_gradients(model, batch)
    assert install_fused_head(model)
    columns = count_logits(model)
    assert_same(logps_and_gradients(model, batch), dense)
    assert columns == [batch["input_ids"].shape[1] - 1]  # log-probs left the head, not 64 logits
    model(input_ids=batch["input_ids"])
    assert columns[-1] == TINY["vocab_size"]  # its own forward is as it was
    fused, fused_statistics, _ = model_logps_and_statistics(model, batch)
    plain, statistics, _ = model_logps_and_statistics(make(name), batch)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_statistics.entropy, statistics.entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_statistics.mean_logits, statistics.mean_logits, rtol=1e-4, atol=1e-4)
    assert fused_statistics.is_top1.equal(statistics.is_top1)
    off = batch["completion_mask"][:, 1:] == 0
    assert not any(part[off].any() for part in (fused_statistics.entropy, statistics.entropy, statistics.is_top1))
    assert install_fused_head(model)


def test_what_is_decided_at_the_first_call(batch: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """For a model that an engine will cast or shard first: nothing is tried before, and the answer is the same."""
    model = make("llama")
    dense = logps_and_gradients(model, batch)
    columns = count_logits(model)
    assert install_fused_head(model, at_first_call=True)
    assert install_fused_head(model)
    assert not columns
    assert_same(logps_and_gradients(model, batch), dense)
    assert columns[-1] == batch["input_ids"].shape[1] - 1
    other = make("llama")
    other.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    expected = model_per_token_logps(other, batch)
    assert install_fused_head(other, at_first_call=True)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(model_per_token_logps(other, batch), expected)
        torch.testing.assert_close(model_logps_and_statistics(other, batch)[0], expected)
    assert caplog.text.count("served by its logits") == 1


def test_a_soft_prompt_is_left_out(batch: dict[str, torch.Tensor]) -> None:
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    dense = logps_and_gradients(model, batch)
    assert install_fused_head(model)
    assert_same(logps_and_gradients(model, batch), dense)
    assert dense[0].shape == batch["input_ids"][:, 1:].shape
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(model_per_token_logps(model, batch), dense[0])


def test_a_load_balancing_loss_needs_no_second_call_of_the_head(batch: dict[str, torch.Tensor]) -> None:
    """FSDP2 gathers norm and head when the first of them is called, and lets go of them when both were."""
    model: Any = make("mixtral")
    assert install_fused_head(model)
    calls = list[str]()
    for name in ("model.norm", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    labels = batch["input_ids"].where(batch["completion_mask"] == 1, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logps, *_, auxiliary = model(**inputs, completion_labels=labels, output_router_logits=True)
    assert calls == ["model.norm", "lm_head"]
    torch.testing.assert_close(auxiliary, make("mixtral")(**inputs, output_router_logits=True).aux_loss)
    torch.testing.assert_close(logps, model(**inputs, completion_labels=labels))


def test_tied_weights_and_a_frozen_body(batch: dict[str, torch.Tensor]) -> None:
    model = make("llama", tie_word_embeddings=True)
    dense = logps_and_gradients(model, batch)
    assert install_fused_head(model)
    assert_same(logps_and_gradients(model, batch), dense)
    model = make("llama", tie_word_embeddings=False)
    model.model.requires_grad_(False)
    dense = logps_and_gradients(model, batch)
    assert install_fused_head(model)
    assert dense[1].keys() == {"lm_head.weight"}
    assert_same(logps_and_gradients(model, batch), dense)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_model_gives_the_bits_of_a_policy_with_its_weights(
    batch: dict[str, torch.Tensor], fused: bool, dtype: torch.dtype
) -> None:
    """The same call with the same shapes, so a policy that starts at its reference has scores of exactly 0."""
    policy, reference = make("qwen3").to(dtype).train(), make("qwen3").to(dtype)
    if fused:
        install_fused_head(policy)
        install_fused_head(reference)
    frozen = frozen_per_token_logps(reference, batch)
    assert torch.equal(frozen, model_per_token_logps(policy, batch))
    assert not frozen.requires_grad
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for row in range(4):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        padded = {name: torch.nn.functional.pad(tensor, (5, 3)) for name, tensor in alone.items()}
        near = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(frozen_per_token_logps(reference, alone), frozen[row : row + 1], **near)
        torch.testing.assert_close(frozen_per_token_logps(reference, padded)[:, 5:-3], frozen[row : row + 1], **near)
    model = reference
    empty = {name: torch.zeros_like(tensor) for name, tensor in batch.items()}
    assert torch.equal(frozen_per_token_logps(model, empty), torch.zeros(4, 11))


def test_gradient_checkpointing(batch: dict[str, torch.Tensor]) -> None:
    model = make("llama")
    dense = logps_and_gradients(model, batch)
    install_fused_head(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(logps_and_gradients(model, batch), dense)


def test_under_lora_with_the_adapter_on_and_off(batch: dict[str, torch.Tensor]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(make("llama"), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    dense = logps_and_gradients(model, batch)
    with model.disable_adapter(), torch.no_grad():
        base = model_per_token_logps(model, batch)
    assert install_fused_head(model)
    assert_same(logps_and_gradients(model, batch), dense)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model_per_token_logps(model, batch), base)
    assert not torch.allclose(dense[0], base)


def test_an_adapter_on_the_head_itself_is_served_by_logits(
    batch: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it came after the fused head was installed: its low-rank part must count."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head"])
    for install_first in (False, True):
        plain = make("llama")
        if install_first:
            assert install_fused_head(plain)
        torch.manual_seed(4)
        model = get_peft_model(plain, settings)
        if not install_first:
            with caplog.at_level(logging.WARNING):
                assert not install_fused_head(model)
            assert "served by its logits" in caplog.text
            expected = logps_and_gradients(model, batch)
        else:
            assert_same(logps_and_gradients(model, batch), expected)


class Capped(LlamaForCausalLM):
    """A Llama whose logits differ from what its configuration says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = torch.tanh(out.logits / 30) * 30
        return out


def test_a_change_of_logits_that_no_configuration_names_is_found(
    batch: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Even one that today's small logits would hardly show."""
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    model.__class__ = Capped
    with caplog.at_level(logging.WARNING):
        assert not install_fused_head(model)
    assert "in a way that its configuration does not name" in caplog.text
    assert type(model) is Capped
    logps_and_gradients(model, batch)


def test_a_layer_between_body_and_head_is_found(caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    extra = nn.Linear(32, 32)
    model.lm_head.register_forward_pre_hook(lambda _, args: (extra(args[0]),))
    with caplog.at_level(logging.WARNING):
        assert not install_fused_head(model)
    assert "something stands between its body and its head" in caplog.text


# --- a model is as it was --------------------------------------------------------------------------------------------


@pytest.fixture
def left_padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows with 0, 3, 5 and 1 places of padding on their left."""
    padding = torch.tensor([[0], [3], [5], [1]])
    attention_mask = (torch.arange(12) >= padding).long()
    return {**batch, "attention_mask": attention_mask, "completion_mask": attention_mask * (torch.arange(12) >= 6)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
@pytest.mark.parametrize("used", [False, True])
def test_a_model_with_a_fused_head_is_otherwise_as_it_was(
    name: str, used: bool, left_padded: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plain, model = make(name), make(name)
    assert install_fused_head(model)
    if used:
        model_per_token_logps(model, left_padded).sum().backward()
        model.zero_grad()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert str(type(model)) == str(type(plain))
    assert isinstance(model, type(plain))
    assert type(model.get_output_embeddings()) is nn.Linear
    assert "forward" not in {**vars(model), **vars(model.get_output_embeddings())}
    ids, mask = left_padded["input_ids"], left_padded["attention_mask"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for given in ({"attention_mask": mask}, {}):  # without a mask it is inferred from the padding's id
        texts = [some.generate(ids.masked_fill(mask == 0, 0), **given, **options) for some in (plain, model)]
        assert torch.equal(*texts)
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        read = pickle.loads(pickle.dumps(model))
        assert type(read) is type(plain)
        assert torch.equal(read(input_ids=ids, attention_mask=mask).logits, expected)
        model.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).architectures == [type(plain).__name__]
        for kind in (AutoModelForCausalLM, type(model)):
            # the kernel of the experts, which decides bits, is no part of a saved configuration
            kernel = {key: value for key, value in ARCHITECTURES[name].items() if key == "experts_implementation"}
            again = kind.from_pretrained(tmp_path, **kernel).eval()
            assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
            ours = model_per_token_logps(again, left_padded)
            torch.testing.assert_close(ours, model_per_token_logps(plain, left_padded))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_copy_answers_for_itself(name: str, batch: dict[str, torch.Tensor]) -> None:
    model = make(name)
    install_fused_head(model)
    twin = copy.deepcopy(model)
    columns = count_logits(twin)
    with torch.no_grad():
        before = model(input_ids=batch["input_ids"]).logits
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        ours, theirs = model_per_token_logps(model, batch), model_per_token_logps(twin, batch)
        assert columns == [batch["input_ids"].shape[1] - 1]  # it has the fused head, too
        assert not torch.allclose(ours, theirs)
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)
        assert not torch.allclose(twin(input_ids=batch["input_ids"]).logits, before)
    fresh = make(name)
    fresh.load_state_dict(twin.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model_per_token_logps(fresh, batch), theirs)


@pytest.mark.parametrize("at_first_call", [False, True])
def test_mixed_precision_of_accelerate_goes_around_the_fused_head_and_comes_off_again(
    at_first_call: bool, batch: dict[str, torch.Tensor]
) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, plain = make("llama"), make("llama")
    assert install_fused_head(model, at_first_call=at_first_call)
    AcceleratorState._reset_state(reset_partial_state=True)  # a trainer in this process may have set another precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapped, other = accelerator.prepare(model, plain)
    assert inspect.signature(wrapped.forward) == inspect.signature(other.forward)
    low = model_per_token_logps(wrapped, batch)
    assert not torch.is_autocast_enabled("cpu")  # it is left as often as it was entered
    torch.testing.assert_close(low, model_per_token_logps(other, batch), rtol=0.05, atol=0.1)
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    exact = model_per_token_logps(unwrapped, batch)
    assert not torch.equal(low, exact)
    torch.testing.assert_close(exact, model_per_token_logps(make("llama"), batch))


def test_modes_of_parts_are_kept(batch: dict[str, torch.Tensor]) -> None:
    model = make("llama").train()
    model.model.eval()  # a frozen body
    assert install_fused_head(model)
    assert (model.training, model.model.training, model.model.layers[0].training) == (True, False, False)


# --- what a model is given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma2"])
def test_padding_on_the_left_changes_nothing(name: str, fused: bool, left_padded: dict[str, torch.Tensor]) -> None:
    """Also to a model with learned positions: they are counted from the first token that is attended to."""
    model = make(name)
    assert not fused or install_fused_head(model)
    with torch.no_grad():
        together = model_per_token_logps(model, left_padded)
        torch.testing.assert_close(model_logps_and_statistics(model, left_padded)[0], together)
        torch.testing.assert_close(frozen_per_token_logps(model, left_padded), together, rtol=1e-5, atol=1e-5)
        for row, padding in enumerate((0, 3, 5, 1)):
            ids = left_padded["input_ids"][row : row + 1, padding:]
            logits = model(input_ids=ids).logits[0, :-1]
            alone = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            alone = alone * left_padded["completion_mask"][row, padding + 1 :]
            torch.testing.assert_close(together[row, padding:], alone, rtol=1e-5, atol=1e-5)


def test_padding_on_the_right_leaves_positions_to_what_they_are_by_default(batch: dict[str, torch.Tensor]) -> None:
    positions = inputs_of(make("llama"), batch)["position_ids"]
    assert torch.equal(positions, torch.arange(12).expand(4, -1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_everything_that_the_forward_takes_is_passed_on(name: str, fused: bool, batch: dict[str, torch.Tensor]) -> None:
    """And nothing else; row by row, too, where each row has its own part."""
    plain, model = make("gpt2"), make("gpt2")
    assert not fused or install_fused_head(model)
    generator = torch.Generator().manual_seed(7)
    further = {name: torch.randint(1, 60, (4, 12), generator=generator), "labels": batch["input_ids"], "no_input": None}
    full = {**batch, **further}
    with torch.no_grad():
        logits = plain(**{key: full[key] for key in ("input_ids", "attention_mask", name)}).logits[:, :-1]
        expected = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        expected = expected * batch["completion_mask"][:, 1:]
        for ask in (
            model_per_token_logps,
            frozen_per_token_logps,
            lambda some, given: model_logps_and_statistics(some, given)[0],
        ):
            torch.testing.assert_close(ask(model, full), expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(ask(model, batch), expected, atol=0.1)
    with pytest.raises(ValueError, match=f"also gives the model {name}, and a store"):
        check_stored_inputs(model, full)
    check_stored_inputs(model, batch)


IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def make_of_text_and_images(name: str, **text: Any) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"text_config": {**TINY, **text}, "vision_config": IMAGES, "image_token_index": 61}
    if name == "gemma3":
        settings |= {"mm_tokens_per_image": 4, "boi_token_index": 62, "eoi_token_index": 63}
    if name == "paligemma":
        settings["text_config"]["model_type"] = "gemma2"
        settings["projection_dim"] = settings["vision_config"]["projection_dim"] = 32
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)  # Gemma's projection of images starts at 0
    return model.eval()


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_a_configuration_that_nests_its_text_part(name: str, batch: dict[str, torch.Tensor]) -> None:
    """Its soft cap stands there, and counts where the model's own forward applies it; images are passed on."""
    model = make_of_text_and_images(name, final_logit_softcapping=3.0).double()
    assert not hasattr(model.config, "final_logit_softcapping")
    ids = batch["input_ids"].clone()
    ids[:, :4] = 61
    pixels = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = {**batch, "input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 61).long()}
    dense = logps_and_gradients(model, batch)
    frozen = frozen_per_token_logps(model, batch)
    other = frozen_per_token_logps(model, {**batch, "pixel_values": -pixels})
    assert install_fused_head(model)
    columns = count_logits(model)
    assert_same(logps_and_gradients(model, batch), dense)
    assert columns == [batch["input_ids"].shape[1] - 1]
    torch.testing.assert_close(frozen, dense[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(frozen, other, atol=1e-2)


class Counter(nn.Module):
    """A model of its own making: the logits of token v are v · (number of the token), on any device."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        logits = torch.ones(8, device=input_ids.device) * input_ids.unsqueeze(-1)
        return type("Output", (), {"logits": logits})()


def test_a_reference_answers_on_the_device_of_the_batch(batch: dict[str, torch.Tensor]) -> None:
    """Row by row on a CPU only; `meta` stands for the accelerators that are not here."""
    away = {name: tensor.to("meta") for name, tensor in batch.items()}
    answer = frozen_per_token_logps(Counter(), away)
    assert answer.device.type == "meta"
    assert answer.shape == (4, 11)


# --- models that are served by their logits --------------------------------------------------------------------------


def dispatched(model: Any, folder: Path) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device="cpu")


def offloaded_to_disk(model: Any, folder: Path) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, str(folder), execution_device="cpu")


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("place", [dispatched, offloaded, offloaded_to_disk])
@pytest.mark.parametrize("at_first_call", [False, True])
def test_hooks_of_accelerate(
    place: Callable[..., Any],
    at_first_call: bool,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = make("llama")
    model = place(make("llama"), tmp_path)
    forward = model.forward
    with caplog.at_level(logging.WARNING, "selective_pref_adapters"):
        assert not install_fused_head(model, at_first_call=at_first_call)
        with torch.no_grad():
            torch.testing.assert_close(model_per_token_logps(model, batch), model_per_token_logps(plain, batch))
        torch.testing.assert_close(frozen_per_token_logps(model, batch), frozen_per_token_logps(plain, batch))
    assert caplog.text.count("served by its logits") == 1
    assert "accelerate has put hooks on it" in caplog.text
    assert model.forward is forward


def test_hooks_on_the_head_alone(batch: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """Before the fused head is installed or after it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    expected = logps_and_gradients(make("llama"), batch)
    for install_first in (False, True):
        model = make("llama")
        if install_first:
            assert install_fused_head(model)
        add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
        if not install_first:
            with caplog.at_level(logging.WARNING):
                assert not install_fused_head(model)
            assert "the forward of its output layer is not its class's own" in caplog.text
        assert_same(logps_and_gradients(model, batch), expected)


class Asserting(nn.Linear):
    """Like layers with quantised weights that are not where they have to be."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.is_cuda
        return super().forward(hidden)


def test_a_layer_that_asserts_something_is_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Asserting
    with caplog.at_level(logging.WARNING):
        assert not install_fused_head(model)
    assert "its forward cannot be taken apart: AssertionError" in caplog.text
    assert "forward" not in vars(model.lm_head)


# --- engines and wrappers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_first_call", [False, True])
def test_compiled(at_first_call: bool, batch: dict[str, torch.Tensor]) -> None:
    """The body is compiled once, and the decision is not part of any graph."""
    model = make("llama")
    dense = logps_and_gradients(model, batch)
    assert install_fused_head(model, at_first_call=at_first_call)
    columns = count_logits(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        logps = model_per_token_logps(compiled, batch)
        torch.testing.assert_close(logps.detach(), dense[0], rtol=1e-5, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert columns[-3:] == [batch["input_ids"].shape[1] - 1] * 3
    assert graphs == 1
    assert not at_first_call or len(columns) == 4  # the test run
    torch._dynamo.reset()


def test_autocast(batch: dict[str, torch.Tensor]) -> None:
    model = make("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model_per_token_logps(model, batch).detach()
        install_fused_head(model)
        ours = model_per_token_logps(model, batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.detach(), dense, rtol=0.05, atol=0.1)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One gloo process, unless a test before this one left a group open."""
    import torch.distributed as dist

    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    if mine:
        dist.destroy_process_group()


@pytest.mark.parametrize(("own_unit", "tied"), [(False, False), (False, True), (True, False)])
def test_fsdp2(batch: dict[str, torch.Tensor], process_group: None, own_unit: bool, tied: bool) -> None:
    """Weights are gathered around modules, for the backward pass too: with the head in the root's unit or its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make("llama", tie_word_embeddings=tied)
    dense = logps_and_gradients(model, batch)
    assert install_fused_head(model)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_unit:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    logps, gradients = logps_and_gradients(model, batch)
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    assert_same((logps, whole), dense)


def test_a_body_that_casts_before_its_head_is_served_by_its_logits(batch: dict[str, torch.Tensor]) -> None:
    """Mamba in bfloat16: its residual stream is float32, and is cast for the head."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "pad_token_id": 0}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes), dtype=torch.bfloat16).eval()
    expected = model_per_token_logps(model, batch)
    assert not install_fused_head(model)
    assert torch.equal(model_per_token_logps(model, batch), expected)
