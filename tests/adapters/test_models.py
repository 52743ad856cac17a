"""What is asked of a model before it is trained: whether it can be saved, whether anything learns, what it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from selective_pref_adapters.model_checks import (
    auxiliary_loss_coefficient,
    check_no_auxiliary_loss,
    check_padding,
    check_savable,
    check_trainable,
    trained_outside_adapters,
)
from selective_pref_adapters.models import has_dropout, load_model, load_tokenizer, switch_off_dropout
from tiny import make_mixture, make_model


def test_a_shipped_generation_configuration_that_cannot_be_saved_is_repaired(tmp_path: Path) -> None:
    """Greedy decoding reads no temperature, so leaving it out changes no text."""
    folder = make_model(tmp_path / "model", seed=1)
    shipped = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(shipped))
    model: Any = load_model(str(folder), dtype="float32")
    model.generation_config.pad_token_id = 0  # as the Trainer does; transformers then refuses what it has loaded
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "refused")
    notes = check_savable(model, load_tokenizer(str(folder)))
    assert len(notes) == 1
    assert "temperature, top_p are not read" in notes[0]
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.eos_token_id) == (False, None, None, 2)
    assert check_savable(model) == []


def test_what_cannot_be_repaired_is_refused_with_the_reason(policy_folder: Path) -> None:
    model: Any = load_model(str(policy_folder), dtype="float32")
    model.generation_config.num_return_sequences = 4  # of a greedy search
    with pytest.raises(ValueError, match=r"could not be saved at the end, .*num_return_sequences"):
        check_savable(model)


def test_a_model_of_which_nothing_learns_is_refused(policy_folder: Path) -> None:
    model = load_model(str(policy_folder), dtype="float32")
    check_trainable(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: call requires_grad_"):
        check_trainable(model)


def test_a_mixture_that_asks_for_a_balancing_loss_is_refused(tmp_path: Path) -> None:
    asking = AutoConfig.from_pretrained(make_mixture(tmp_path / "asking", seed=1, output_router_logits=True))
    assert auxiliary_loss_coefficient(asking) == 0.001
    with pytest.raises(
        ValueError, match=r"load-balancing loss .*coefficient 0\.001.*Set output_router_logits to false"
    ):
        check_no_auxiliary_loss(asking)
    for options in ({"output_router_logits": False}, {"router_aux_loss_coef": 0.0}):
        check_no_auxiliary_loss(AutoConfig.for_model("mixtral", **{"output_router_logits": True, **options}))


def test_experts_come_back_as_they_were_saved(tmp_path: Path) -> None:
    model: Any = load_model(str(make_mixture(tmp_path / "mixture", seed=1)), dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    model.save_pretrained(tmp_path / "saved", state_dict={n: p.detach().clone() for n, p in model.named_parameters()})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = dict(model.named_parameters())
    assert any("experts" in name for name in expected)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in again.named_parameters())


def test_dropout_of_a_model_and_its_adapter_is_switched_off(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", seed=1, attention_dropout=0.5))
    ids = torch.arange(8).unsqueeze(0)
    for _ in ("bare", "with an adapter"):
        model.train()
        assert has_dropout(model)
        assert not torch.equal(model(ids).logits, model(ids).logits)
        switch_off_dropout(model)
        assert not has_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
        config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
        model = get_peft_model(model, config)


@pytest.mark.parametrize("name", ["default", "model", "layers"])
def test_what_an_adapter_trains_besides_itself_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", seed=1, attention_bias=True)

    def outside(config: Any) -> list[str]:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        return trained_outside_adapters(get_peft_model(model, config, adapter_name=name))

    lora: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    assert len(outside(LoraConfig(bias="all", **lora))) == 4  # q, k, v, o
    assert outside(LoraConfig(modules_to_save=["lm_head"], **lora)) == []
    assert outside(LoraConfig(trainable_token_indices=[3], **lora)) == []
    assert outside(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")) == []


def test_a_padding_token_that_a_model_does_not_have_is_refused(policy_folder: Path) -> None:
    model: Any = load_model(str(policy_folder), dtype="float32")
    tokenizer = load_tokenizer(str(policy_folder))
    check_padding(tokenizer, {"policy": model})
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"padding token has the id 30, outside the policy's vocabulary of 30: use"):
        check_padding(tokenizer, {"policy": model})
    model.resize_token_embeddings(len(tokenizer))
    check_padding(tokenizer, {"policy": model})
