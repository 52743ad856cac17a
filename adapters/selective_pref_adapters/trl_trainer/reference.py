"""Where the reference log-probs of a `SelectiveDPOTrainer` come from.

In: what the trainer was given (a reference model or none, a store or none, adapters or none). Out: one `Reference` that
gives a batch's log-probs to the loss, or none, where the objective reads none.

    a model, beside the policy       RunningReference
    the policy with its adapter off  AdapterOffReference; of an adapter that was trained before, TRL's frozen copy of it
    a store                          StoredReference, filled before training where there is something to fill it with
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import create_model_from_path

from selective_pref_adapters.batch import REF_LOGPS, Batch
from selective_pref_adapters.fsdp import asks_for_fsdp, enable_fsdp, shard_reference
from selective_pref_adapters.models import model_config
from selective_pref_adapters.pairs.large import PairTable
from selective_pref_adapters.reference_store.fill import fill_store
from selective_pref_adapters.reference_store.identity import reference_space
from selective_pref_adapters.reference_store.store import MissingRowsError, ReferenceStore
from selective_pref_adapters.references import (
    AdapterOffReference,
    Reference,
    RunningReference,
    StoredReference,
    evaluating,
    in_deepspeed,
    is_initial_policy,
    ref_logps_of,
)
from selective_pref_adapters.sharded import give_freed_memory_back, is_sharded
from selective_pref_adapters.trl_trainer.checks import check_named_models
from selective_pref_adapters.trl_trainer.config import SelectiveDPOConfig

logger = logging.getLogger(__name__)

DEFAULT_STORE = Path(HF_HOME) / "selective_pref" / "reference_store"
"""Where `precompute_ref_log_probs` keeps its results unless `reference_store` says otherwise."""


class TrainerReference:
    """The reference of one trainer: chosen before TRL loads the policy, used from the first batch on.

    Args:
        trainer: the `SelectiveDPOTrainer`, not yet built.
        args: its options.
        needed: whether the objective reads a reference.
        policy: a model, its folder or its hub id.
        ref_model: likewise, or None.
        adapter: whether the policy has adapters, or will be given some.
        quantization_config: of models that are loaded by name.

    Attributes:
        model: the model that runs beside the policy, or fills the store; None for the policy itself, or a store alone.
        tokenizer: of `ref_model`; None where it has none to compare.
        stored: whether the loss reads log-probs from a store.

    Raises:
        ValueError: a reference that the objective does not read, or that is the policy object itself.
    """

    def __init__(
        self,
        trainer: Any,
        args: SelectiveDPOConfig,
        *,
        needed: bool,
        policy: Any,
        ref_model: Any,
        adapter: bool,
        quantization_config: Any,
    ) -> None:
        if ref_model is policy and not isinstance(policy, str):
            raise ValueError("model and ref_model are the same object: leave ref_model out for the policy as it is now")
        if not needed and (ref_model is not None or args.reference_store is not None):
            raise ValueError("this objective reads no reference: leave ref_model and reference_store out")
        self._trainer = trainer
        self._args = args
        self._needed = needed
        self._reference: Reference | None = None
        self.stored = needed and (args.reference_store is not None or args.precompute_ref_log_probs)
        self._fills = self.stored and (args.precompute_ref_log_probs or ref_model is not None)
        self.tokenizer = None if ref_model is None else tokenizer_of(ref_model, args)
        self.model: nn.Module | None = None
        self._fsdp = asks_for_fsdp(args)
        self._adapter = adapter
        self._engine: Any = None
        # FSDP2 shards the policy only when training begins, and ZeRO-3 lets no second engine gather its weights.
        if zero_3 := is_deepspeed_zero3_enabled():
            give_freed_memory_back()
        check_named_models(args, policy, ref_model, twice=needed and not adapter and not self.stored)
        copies = not self.stored or ((self._fsdp or zero_3) and self._fills)
        if zero_3 and self._fills and adapter and ref_model is None:
            raise ValueError(
                "under ZeRO-3 the policy with its adapters off cannot fill a store: give the model that it stands on "
                "as ref_model beside reference_store, or fill the store first (selective-pref score)"
            )
        if ref_model is not None or (needed and not adapter and copies):
            loaded = load_reference(ref_model, policy, args, quantization_config)
            # TRL wraps the model while it builds the trainer: what runs is known at the first batch.
            running = RunningReference(
                loaded,
                fused_head=args.fused_head,
                share_prefix=args.share_prefix,
                start=lambda *_: trainer.ref_model,
            )
            self.model, self._reference = loaded, running

    @contextmanager
    def loaded_by_us(self) -> Iterator[nn.Module | None]:
        """While TRL builds the trainer: gives the model to run beside the policy, and keeps TRL from loading another.

        TRL loads a reference of its own unless it is told that all log-probs have been computed; it then calls
        `_precompute_ref_logps`, which the trainer overrides. Under FSDP it loads one all the same, unless it has one.
        """
        asked = self._args.precompute_ref_log_probs
        self._args.precompute_ref_log_probs = self.stored or not self._needed
        try:
            beside = None if self.stored else self.model
            yield _nothing() if beside is None and self._fsdp and not self._adapter else beside
        finally:
            self._args.precompute_ref_log_probs = asked

    def shard(self) -> None:
        """Once there is an accelerator: shards the model layer by layer, where FSDP2 shards the policy.

        TRL would gather all of it at once. What fills a store computes in the dtype of its weights.
        """
        if enable_fsdp(self._trainer) and self.model is not None:
            shard_reference(self.model, self._trainer.accelerator, mixed_precision=not self.stored)

    def check(self) -> None:
        """Raises ValueError where training would move the reference: see `AdapterOffReference.check`."""
        asked = self._fills or not self.stored
        if self._needed and asked and self.model is None and is_peft_model(self._trainer.model):
            self._adapter_off()

    def built(self) -> bool:
        """After TRL has built the trainer: drops a model that has filled the store and is not needed any more.

        Returns:
            Whether log-probs of further data sets, given to `evaluate`, are to be computed and stored.
        """
        if not self.stored:
            self.source()
            if self.model is None:
                self._trainer.ref_model = None
            return False
        self._fills = self._args.precompute_ref_log_probs
        if not self._fills:
            self.model = self._engine = None
        self._trainer.ref_model = self.model
        return self._fills

    def logps_of(self, batch: Batch) -> Tensor | None:
        """The reference's log-probs of a batch [2B T]: those that the collator looked up, else computed now.

        None where the objective reads no reference.
        """
        return ref_logps_of(batch, REF_LOGPS, self.source())

    def source(self) -> Reference | None:
        """What gives the log-probs of a batch that brings none; None where the objective reads no reference."""
        if self._needed and self._reference is None:
            self._reference = self._adapter_off()
        return self._reference

    def is_initial_policy(self) -> bool:
        """Whether the reference is what the policy is now, as far as that can be known without a batch.

        TRL makes an adapter, or copies a trained one, so that the policy begins as its own reference.
        """
        reference = self.source()
        return isinstance(reference, AdapterOffReference) or is_initial_policy(reference, self._trainer.model)

    def store_rows(self, pairs: PairTable, batch_size: int) -> ReferenceStore:
        """The store, holding every row of `pairs`: what it lacked has been computed, if there is a model at hand.

        Raises:
            MissingRowsError: it lacks rows, and there is no reference at hand.
            ValueError: the reference cannot fill a store.
        """
        store = self._reference.store if isinstance(self._reference, StoredReference) else None
        if store is None and not self._fills:
            store = ReferenceStore.open(self._args.reference_store, self._args.reference_space)
            store.check_tokenizer(self._trainer._tokenizer)
        if self._fills:
            with self._filling_model() as model:
                store = self._filled(store, model, pairs, batch_size)
        assert store is not None
        self._reference = StoredReference(store)
        if self._fills:
            return store  # which has every row
        try:
            store.check(pairs, together=True)
        except MissingRowsError as error:
            raise MissingRowsError(
                f"{error} (rows are cut to max_length {self._args.max_length} here; fill the store with the same "
                "--max-length and --truncation-mode)"
            ) from error
        return store

    @contextmanager
    def _filling_model(self) -> Iterator[Any]:
        """The model that fills the store: the reference, or the policy before it has learnt anything."""
        policy = self._trainer.model
        if self.model is not None:
            yield self.model
        elif is_peft_model(policy):
            with self._adapter_off().switched():
                yield policy
        else:  # TRL refuses to precompute another data set once such a policy has been trained
            with evaluating(policy):
                yield policy

    def _adapter_off(self) -> AdapterOffReference:
        model = self._trainer.model
        return AdapterOffReference(model, adapter="ref" if "ref" in model.peft_config else None)

    def _filled(self, store: ReferenceStore | None, model: Any, pairs: PairTable, batch_size: int) -> ReferenceStore:
        """Computes what the store lacks, each process its share."""
        trainer, args = self._trainer, self._args
        if not hasattr(model, "hf_device_map") and not is_sharded(model):
            model.to(trainer.accelerator.device)
        if store is None:
            label = model.config._name_or_path or "reference"
            space = reference_space(model, self.tokenizer or trainer._tokenizer, label=label)
            store = ReferenceStore.create(args.reference_store or DEFAULT_STORE, space)
            store.check_tokenizer(trainer._tokenizer)
        fill_store(
            store,
            pairs,
            model,
            pad_token_id=trainer._tokenizer.pad_token_id,
            batch_tokens=2 * batch_size * args.max_length,
            progress=not args.disable_tqdm,
            engine=partial(self._sharded_engine, model) if is_sharded(model) and trainer.is_deepspeed_enabled else None,
            cut=(args.max_length, args.truncation_mode),
        )
        return store

    def _sharded_engine(self, model: nn.Module) -> Any:
        """What is called in place of a model that ZeRO-3 has cut; one, however many data sets fill the store."""
        if self._engine is None:
            self._engine = in_deepspeed(model, self._trainer.accelerator)
        return self._engine


def _nothing() -> nn.Module:
    """What TRL is given in the place of a reference that is not there."""
    module: Any = nn.Identity()
    module.config = PretrainedConfig()
    return module


def load_reference(reference: Any, policy: Any, args: SelectiveDPOConfig, quantization_config: Any) -> nn.Module:
    """The reference: a model, one loaded by its name as `DPOTrainer` loads the policy, or a copy of the policy."""
    if reference is None and not isinstance(policy, str):
        reference = policy.config._name_or_path if is_sharded(policy) else copy.deepcopy(policy)
    if not isinstance(name := policy if reference is None else reference, str):
        return name
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if not isinstance(policy, str):
        options.setdefault("dtype", policy.dtype)
        options.setdefault("attn_implementation", policy.config._attn_implementation)
    if name != policy:
        options.pop("revision", None)  # the policy's
    return create_model_from_path(name, **options)


def config_of(model: Any, args: SelectiveDPOConfig, *, revision: str | None = None) -> Any:
    """The configuration of a model, or of one that is named; its weights are not loaded."""
    if not isinstance(model, str):
        return model.config
    which = {} if revision is None else {"revision": revision}
    return model_config(model, trust_remote_code=args.trust_remote_code, **which)


def has_adapter(policy: Any, peft_config: Any) -> bool:
    """Whether the policy has adapters, or will be given some."""
    return peft_config is not None or (not isinstance(policy, str) and is_peft_model(policy))


def tokenizer_of(reference: Any, args: SelectiveDPOConfig) -> Any:
    """The reference's own tokenizer; None, with a warning, where there is none to compare."""
    name = reference if isinstance(reference, str) else reference.config._name_or_path
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer with the reference %s, so it is not compared with the policy's: %s", name, error)
        return None
