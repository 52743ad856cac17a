"""LoRA adapters on the policy (PEFT): made before the engine, saved in PEFT's format."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from selective_pref_adapters.options import TrainConfig

WEIGHTS = "adapter_model.safetensors"


def with_adapters(config: TrainConfig, policy: nn.Module) -> Any:
    """The policy with fresh adapters, which add nothing yet; they alone learn. The policy itself without `lora_r`.

    Raises:
        ValueError: no layer has one of the names in `lora_target_modules`.
    """
    if config.lora_r is None:
        return policy
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=2 * config.lora_r if config.lora_alpha is None else config.lora_alpha,  # pyright: ignore
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets is None else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(policy, settings, autocast_adapter_dtype=False)  # pyright: ignore
    except ValueError as error:
        linear = sorted(
            {name.split(".")[-1] for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ValueError(
            f"lora_target_modules {' '.join(targets or ())}: no layer gets an adapter ({error}). Its linear layers: "
            f"{', '.join(sorted(linear))}"
        ) from error


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What the adapters hold, by the names of the model's parameters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_names(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the adapters by the names under which PEFT saves them."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
