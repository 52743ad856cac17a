"""Whose log-probs a store holds: a model, its adapters and its tokenizer → the identity that names a `Space`.

In: a causal LM, whole on this process or sharded over all, and its tokenizer. Out: names and values that decide the
log-probs it gives: digests of weights, adapters, configuration and vocabulary, dtype, attention implementation and the
version of the code.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from selective_pref_adapters.models import own_vocabulary
from selective_pref_adapters.pairs import Tokenizer
from selective_pref_adapters.reference_store.shards import StoreError
from selective_pref_adapters.reference_store.spaces import Space, digest_of_json, vocabulary_digest
from selective_pref_adapters.sharded import whole_tensors

LOGPS_VERSION = 1
"""Part of every reference's identity: raised whenever a change of this code changes the numbers it gives."""

_DECIDES_NOTHING = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),  # trainers set them to the tokenizer's
    *("output_router_logits", "router_aux_loss_coef"),  # of the loss of experts, not of their log-probs
)
"""Names in a configuration, or in one nested in it, that change no log-prob of a given row."""


def reference_space(model: nn.Module, tokenizer: Tokenizer, *, label: str = "reference") -> Space:
    """The identity of a local reference: everything that decides the log-probs it gives.

    A model under adapters that are switched off is its base model: what they learn changes nothing, and their rows are
    found by the bare model, too.

    Args:
        model: a causal LM, or a PEFT model around one with its adapters on or off as they will be while it is asked.
            Of one that is sharded (ZeRO-3, FSDP2) every process must call this; all get the identity of the whole.
        tokenizer: the reference's own.
        label: what people call it; decides nothing.

    Raises:
        StoreError: weights are not here to be digested (on the meta device), or the model prepends
            virtual tokens, so that its log-probs do not belong to the row's tokens.
    """
    vocabulary = own_vocabulary(tokenizer)
    identity = {**model_identity(model), "vocabulary": vocabulary_digest(vocabulary)}
    return Space(identity=identity, vocabulary=vocabulary, label=label)


def model_identity(model: nn.Module) -> dict[str, Any]:
    """The part of a space's identity that the model alone decides. Reads every weight: about a second for a GB."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise StoreError(f"a {type(config).__name__} puts virtual tokens before a row: it cannot be a reference")
    config = _deciding(causal.config.to_dict())
    if first_positions := _first_positions(causal):
        config["first_positions"] = first_positions
    weights, adapter = _digests_of_weights(model)
    return {
        "kind": "local model",
        "scoring_version": LOGPS_VERSION,
        "architecture": next(kind.__name__ for kind in type(causal).__mro__ if not issubclass(kind, FSDPModule)),
        "config": digest_of_json(config),
        "weights": weights,
        "adapter": adapter,
        "dtype": str(causal.dtype).removeprefix("torch."),
        "attention": str(causal.config._attn_implementation),
    }


def _digests_of_weights(model: nn.Module) -> tuple[str, str]:
    """(digest of the base model's weights, digest of what its adapters add, "none" where they add nothing)."""
    adapted = {name: module for name, module in model.named_modules() if getattr(module, "adapter_layer_names", ())}
    base, added = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    adds = False
    for name, module in sorted(adapted.items()):
        state = _adapter_state(module)
        if state is not None:
            adds = True
            added.update(f"{name} {digest_of_json(state)};".encode())
    for name, tensor in whole_tensors(model):
        if not isinstance(tensor, Tensor):
            continue  # what a quantised layer notes about itself
        owner, adapter = _adapter_of(name, adapted)
        if owner is None:
            plain = (
                name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
            )
            _digest_tensor(base, plain, tensor)
        elif not owner.disable_adapters and adapter in owner.active_adapters:
            _digest_tensor(added, name, tensor)
    return base.hexdigest(), added.hexdigest() if adds else "none"


def _deciding(config: Any) -> Any:
    """A configuration, and those nested in it, without what changes no log-prob."""
    if not isinstance(config, dict):
        return config
    return {k: _deciding(v) for k, v in config.items() if k not in _DECIDES_NOTHING and not str(k).startswith("_")}


def _first_positions(model: nn.Module) -> dict[str, int]:
    """The padding index of every table of positions: RoBERTa's family counts positions from its pad token's id."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {n: t.padding_idx for n, t in tables.items() if "position" in n and t.padding_idx is not None}


def _adapter_state(module: Any) -> dict[str, Any] | None:
    """What an adapted layer does besides its weights; None where it passes its base through untouched."""
    merged = list(getattr(module, "merged_adapters", ()))
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in _adapters(module)]
    if not merged and not active:
        return None
    scaling = getattr(module, "scaling", {})
    return {
        "kind": type(module).__name__,
        "active": active,
        "merged": merged,
        "scaling": {n: scaling.get(n) for n in active},
    }


def _adapters(module: Any) -> set[str]:
    """The names of the adapters that a layer has."""
    return {name for part in module.adapter_layer_names for name in getattr(module, part, {})}


def _adapter_of(name: str, adapted: dict[str, Any]) -> tuple[Any, str | None]:
    """(the adapted layer that owns the tensor of this name as an adapter's, the adapter); (None, None) for others."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        owner = adapted.get(".".join(parts[:cut]))
        if owner is not None and len(parts) > cut + 1 and parts[cut] in owner.adapter_layer_names:
            return owner, parts[cut + 1]
    return None, None


def _digest_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise StoreError(
            f"the weights of {name} are not here (offloaded): a reference's identity is the digest of all its weights"
        )
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), 64 << 20):  # from the device piece by piece
        digest.update(flat[start : start + (64 << 20)].cpu().numpy())
