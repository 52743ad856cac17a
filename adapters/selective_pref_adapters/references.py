"""Where the reference's log-probs of a batch come from: a running model, the policy without its adapters, or a store.

In: a batch in the trainers' layout. Out: the reference's per-token log-probs [2B T], without a gradient. All three
trainers ask here, so all of them get the same numbers.

    RunningReference       a frozen model beside the policy
    AdapterOffReference    the policy itself, its adapters switched off (PEFT)
    StoredReference        what a `ReferenceStore` holds of the batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from selective_pref_adapters.batch import Batch, from_bits
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head
from selective_pref_adapters.model_checks import trained_outside_adapters
from selective_pref_adapters.models import evaluating
from selective_pref_adapters.options import SharePrefix
from selective_pref_adapters.reference_store.identity import model_identity
from selective_pref_adapters.reference_store.store import ReferenceStore
from selective_pref_adapters.sharded import is_sharded, same_weights, whole


class Reference(Protocol):
    """Anything that gives the reference's log-probs of a batch [2B T], without a gradient."""

    def __call__(self, batch: Batch) -> Tensor:
        """The reference's log-probs of the batch."""
        ...


class RunningReference:
    """A frozen model that runs beside the policy.

    Args:
        model: a causal LM; it is put into evaluation mode, and learns nothing from now on.
        fused_head: whether to compute its log-probs without materialising its logits, where the model allows it.
        share_prefix: with it, whether to compute a prompt once for all rows that begin with it, where the model allows
            it; the same as for the policy.
        start: how to make the model ready (move it, wrap it in an engine), given the device of the first batch; called
            once, at that batch, and may be set until then. None for a model that is ready.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fused_head: bool = True,
        share_prefix: SharePrefix = "auto",
        start: Callable[[nn.Module, torch.device], Any] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if fused_head:
            install_fused_head(model, at_first_call=True, share_prefix=share_prefix)
        self.start = start
        self._running: Any = model if start is None else None

    def __call__(self, batch: Batch) -> Tensor:
        """The model's log-probs of the batch [2B T]."""
        if self._running is None and self.start is not None:
            self._running = self.start(self.model, batch["input_ids"].device)
        return frozen_per_token_logps(self._running, batch)


class AdapterOffReference:
    """The policy with its adapters switched off: what it was before they learnt anything.

    Args:
        model: a PEFT model.
        policy: the same model as it is to be called, inside the engine that wraps it; None for `model` itself.
        adapter: the name of an adapter that is the reference, where the policy trains a copy of it; None for the base
            model alone.

    Raises:
        ValueError: see `check`.
    """

    def __init__(self, model: Any, *, policy: Callable[[], Any] | None = None, adapter: str | None = None) -> None:
        self.model = model
        self.policy: Callable[[], Any] = policy or (lambda: model)
        self.adapter = adapter
        self.check()

    def check(self) -> None:
        """Raises ValueError where training would move the reference: parameters that stay when the adapters are off."""
        if names := trained_outside_adapters(self.model):
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"the policy with its adapters switched off cannot be the reference: {some} would be trained, too, and "
                "stay when the adapters are off. Train adapters only (LoraConfig(bias='none'), modules_to_save for "
                "whole layers), or give a reference model"
            )

    def __call__(self, batch: Batch) -> Tensor:
        """The base model's log-probs of the batch [2B T]; modes and adapters are afterwards as before."""
        with self.switched():
            return frozen_per_token_logps(self.policy(), batch)

    @contextmanager
    def switched(self) -> Iterator[None]:
        """In evaluation mode, with the adapters off, or the reference's adapter on."""
        with evaluating(self.model):
            if self.adapter is None:
                with self.model.disable_adapter():
                    yield
                return
            active = self.model.active_adapter
            self.model.set_adapter(self.adapter)
            try:
                yield
            finally:
                self.model.set_adapter(active)


@dataclass(frozen=True)
class StoredReference:
    """What a store holds of a batch. Rows without a completion need not be stored."""

    store: ReferenceStore

    def __call__(self, batch: Batch) -> Tensor:
        """The stored log-probs of the batch [2B T] float32, on its device.

        Raises:
            MissingRowsError: rows are not stored.
        """
        rows = batch["completion_mask"].any(dim=1)
        logps = torch.zeros(batch["input_ids"][:, 1:].shape, device=batch["input_ids"].device)
        if rows.any():
            logps[rows] = self.store.lookup({name: tensor[rows] for name, tensor in batch.items()})
        return logps


def in_deepspeed(model: nn.Module, accelerator: Any) -> Any:
    """A DeepSpeed engine around a frozen model, in the precision that an accelerator's DeepSpeed settings name.

    Under ZeRO-3 it is sharded; below, there is nothing to shard without an optimiser. One model, one engine: a second
    one would gather its weights twice.
    """
    import deepspeed

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3 if is_deepspeed_zero3_enabled() else 0},
        **{name: settings[name] for name in ("bf16", "fp16", "torch_autocast") if name in settings},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def ref_logps_of(batch: Batch, key: str, reference: Reference | None) -> Tensor | None:
    """The reference's log-probs of a batch: those that the collator looked up (as bits, at `key`), else computed now.

    Args:
        batch: in the trainers' layout.
        key: `REF_LOGPS` or `SCORING_REF_LOGPS`.
        reference: computes them where the batch holds none; None where the objective reads none.
    """
    if key in batch:
        return from_bits(batch[key])
    return None if reference is None else reference(batch)


def is_initial_policy(reference: Reference | None, policy: nn.Module) -> bool:
    """Whether a reference is the policy as it is now, as far as that can be known without a batch.

    Then every alignment score starts at 0, and selection below ratio 1 teaches little. The answer is the same on every
    process, and where weights are sharded every process must ask.
    """
    if isinstance(reference, RunningReference):
        return same_weights(policy, reference.model)
    if isinstance(reference, StoredReference):
        return reference.store.space.identity.get("weights") == model_identity(policy)["weights"]
    if isinstance(reference, AdapterOffReference):
        return _adapters_add_nothing(reference)
    return False


def _adapters_add_nothing(reference: AdapterOffReference) -> bool:
    """Whether switching the adapters changes no logit of a short text: true of adapters that have not learnt yet.

    A sharded model cannot be called outside its engine: there it is whether the second factor of each LoRA is 0.
    """
    model = reference.model
    if is_sharded(model):
        factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name and "_B" in name]
        return reference.adapter is None and bool(factors) and all(_is_zero(factor) for factor in factors)
    ids = torch.arange(8, device=next(model.parameters()).device).unsqueeze(0)

    def logits(mode: Any) -> Tensor:
        with mode, evaluating(model), torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    return torch.equal(logits(nullcontext()), logits(reference.switched()))


def _is_zero(parameter: Tensor) -> bool:
    with whole(parameter) as tensor:
        return not tensor.any().item()
