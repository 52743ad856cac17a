"""TRL's `DPOTrainer` with a selection of tokens: change two names in a script, and everything else stays.

In: what `DPOTrainer` takes. Out: what it trains, logs and saves, with the loss of this library. Data, collation,
models, LoRA, DeepSpeed, checkpoints are TRL's; ours are the loss (`compute_loss`), what is logged of it, and where the
reference's per-token log-probs come from: a frozen model, the policy with its adapter off, or a `ReferenceStore`.

    batch → per-token log-probs of policy and reference → objective → loss
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import DatasetDict
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from transformers import AutoTokenizer
from trl import DPOTrainer

from selective_pref import Objective, PreferenceLoss, diagnostics
from selective_pref_adapters.batch import REF_LOGPS, Batch, from_bits, to_bits
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head, model_logps_and_statistics
from selective_pref_adapters.monitoring import (
    SELF_REFERENCE,
    finite_everywhere,
    mean_over_pairs,
    non_finite_error,
    same_weights,
)
from selective_pref_adapters.objectives import loss_of_batch
from selective_pref_adapters.pairs import TokenizedPair, parse_columns
from selective_pref_adapters.reference_cache import ReferenceStore
from selective_pref_adapters.scoring import fill_store, model_identity, reference_space
from selective_pref_adapters.trl_config import (
    SelectiveDPOConfig,
    check_arguments,
    check_models,
    check_stored_dataset,
    needs_reference,
    selects_by_alignment,
)
from selective_pref_adapters.trl_data import (
    READ_ROW,
    TRAINED_COLUMNS,
    check_collator,
    dataset_of_rows,
    is_list_of_rows,
    mask_as_spans,
    own_collator,
    prepared,
)

from trl.trainer.utils import create_model_from_path, use_adapter  # isort: skip

logger = logging.getLogger(__name__)

DEFAULT_STORE = Path(HF_HOME) / "selective_pref" / "reference_store"
"""Where `precompute_ref_log_probs` keeps its results unless `reference_store` says otherwise."""


class SelectiveDPOTrainer(DPOTrainer):
    """`DPOTrainer` whose loss looks at the tokens that matter.

    Args:
        model: as in `DPOTrainer`.
        ref_model: a model, a folder or a hub id; None for the initial policy (legal, and nearly useless below ratio 1:
            a warning says so), or for whatever `args.reference_store` holds. It may have another size, but must have
            the policy's tokenizer.
        args: a `SelectiveDPOConfig`.
        train_dataset, eval_dataset: raw rows as in `DPOTrainer`, of any schema that the reader of `pairs` knows; rows
            as `read_rows` gives them; or rows with `prompt_ids`, `chosen_ids` and `rejected_ids`. The reader splits and
            tokenises them, as for every other trainer here, unless `args.stock_tokenization` says that TRL shall.
        data_collator, processing_class, others: as in `DPOTrainer`.
        objective: any callable (chosen, rejected) → PreferenceLoss in place of the Selective-DPO that `args`
            describes. It is asked once whether it needs a reference; one that does not runs without.

    Raises:
        TypeError: `args` is no `SelectiveDPOConfig`.
        ValueError: an option, model, reference, store or data set that has no meaning here; says what to do instead.
    """

    _name = "Selective-DPO"
    _tag_names: ClassVar[list[str]] = ["trl", "dpo", "selective-dpo"]
    _paper: ClassVar[dict[str, str]] = {}  # the model card would cite DPO's for it; the project's CITATION.cff has both

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: SelectiveDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        objective: Objective | None = None,
        **others: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SelectiveDPOConfig(f"{name.split('/')[-1]}-SelectiveDPO")
        self._custom_objective = objective
        train_dataset, eval_dataset = _as_datasets(train_dataset), _as_datasets(eval_dataset)
        check_arguments(args, objective, processing_class, [train_dataset, *_all_sets(eval_dataset)])
        self._needs_reference = needs_reference(objective or args.objective())
        self._stores = self._needs_reference and (args.reference_store is not None or args.precompute_ref_log_probs)
        self._fills = self._stores and (args.precompute_ref_log_probs or ref_model is not None)
        self._store: ReferenceStore | None = None
        self._logged: dict[str, list[tuple[dict[str, Tensor], int]]] = defaultdict(list)
        if ref_model is model and not isinstance(model, str):
            raise ValueError("model and ref_model are the same object: leave ref_model out for the policy as it is now")
        if not self._needs_reference and (ref_model is not None or args.reference_store is not None):
            raise ValueError("this objective reads no reference: leave ref_model and reference_store out")

        self._ref_tokenizer = None if ref_model is None else tokenizer_of(ref_model, args)
        adapter = others.get("peft_config") is not None or (not isinstance(model, str) and is_peft_model(model))
        if ref_model is not None or (self._needs_reference and not adapter and not self._stores):
            ref_model = load_reference(ref_model, model, args, others.get("quantization_config"))
        self._scorer = ref_model if self._stores else None  # it never runs beside the policy

        precompute = args.precompute_ref_log_probs
        # TRL loads a reference of its own unless it is told that all has been computed: `_precompute_ref_logps` below.
        args.precompute_ref_log_probs = self._stores or not self._needs_reference
        try:
            super().__init__(
                model=model,
                ref_model=None if self._stores else ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **others,
            )
        finally:
            args.precompute_ref_log_probs = precompute
        self._use_own_collator()
        check_models(self.model, ref_model, self.processing_class, self._ref_tokenizer)
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                "this mixture of experts would add its load-balancing loss, which no objective here reads: set "
                "router_aux_loss_coef=0.0"
            )
        if args.fused_head:
            install_fused_head(self.model, at_first_call=True)
        self.precompute_ref_logps = self._fills = self._stores and precompute  # rows that only an evaluation brings
        if self._store is not None:
            self.data_collator = WithStoredReference(collator=self.data_collator, store=self._store)
            self.ref_model = self._scorer = self._scorer if precompute else None
        if self.accelerator.is_main_process and self._is_self_referenced(ref_model):
            logger.warning("%s", SELF_REFERENCE)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of a micro-batch; the seam between TRL and this library."""
        logps, statistics = model_logps_and_statistics(model, inputs)
        out = loss_of_batch(self.objective, inputs, logps, self._ref_logps(inputs))
        if self.args.raise_on_non_finite and not finite_everywhere(out.losses):
            raise non_finite_error(out, f"step {self.state.global_step + 1}")
        metrics = batch_metrics(inputs, out, statistics)
        if self._custom_objective is None:
            metrics["selection/ratio"] = out.losses.new_tensor(self.args.ratio(self._step))
            metrics["selection/beta"] = out.losses.new_tensor(self.args.beta)
        self._logged[self._mode].append((metrics, len(out.losses)))
        if not return_outputs:
            return out.loss
        with torch.no_grad():  # the logits that `compute_metrics` asks for were never made
            return out.loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    @property
    def objective(self) -> Objective:
        """(chosen, rejected) → PreferenceLoss, at this step."""
        if self._custom_objective is not None:
            return self._custom_objective
        return self.args.objective(self._step)

    @property
    def _step(self) -> int | None:
        """The optimiser step, as far as the loss depends on it: an evaluation's does not."""
        return self.state.global_step if self._mode == "train" else None

    def _ref_logps(self, inputs: Batch) -> Tensor | None:
        """The reference's log-probs of a batch [2B T], wherever they come from."""
        if not self._needs_reference:
            return None
        if REF_LOGPS in inputs:
            return from_bits(inputs[REF_LOGPS])
        with self._reference() as reference:
            return frozen_per_token_logps(reference, inputs)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The reference model; without one, the policy in evaluation mode, its adapter switched off or TRL's copy."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            if is_peft_model(self.model):
                with use_adapter(self.model, "ref" if "ref" in self.model.peft_config else None):
                    yield self.model
            else:
                yield self.model
        finally:
            for module, training in modes.items():
                module.training = training

    # --- data --------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's hook for tokenising. Here the one reader of this library does it."""
        if args.stock_tokenization:
            if READ_ROW in (dataset.column_names or ()):
                raise ValueError(
                    "stock_tokenization needs raw rows: give the data set as it is, not rows that are read"
                )
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        with PartialState().main_process_first():
            return prepared(
                dataset,
                processing_class,
                dataset_name,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                columns=parse_columns(args.columns),
                skip_malformed_rows=args.skip_malformed_rows,
                num_proc=args.dataset_num_proc,
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in TRAINED_COLUMNS if name not in self._signature_columns]

    def _use_own_collator(self) -> None:
        """Puts our collator in the place of TRL's; one that was given stays, if it can do what the data ask of it."""
        if not isinstance(self.data_collator, WithStoredReference):
            self.data_collator = own_collator(self.data_collator)
            for dataset in (self.train_dataset, *_all_sets(self.eval_dataset)):
                check_collator(self.data_collator, dataset, "given")

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **options: Any) -> dict[str, float]:
        """As in `DPOTrainer`; rows as `read_rows` gives them will do, too."""
        return super().evaluate(_as_datasets(eval_dataset), *arguments, **options)

    # --- stored references -------------------------------------------------------------------------------------------

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's hook for one float a sequence. Here every token's log-prob is in the store afterwards, or it raises."""
        if not self._stores:
            return dataset
        self._use_own_collator()
        pairs = pairs_of(dataset, getattr(self.data_collator, "collator", self.data_collator), name)
        if self._fills:
            with self._reference() if self._scorer is None else nullcontext(self._scorer) as reference:
                self._fill(reference, pairs, batch_size)
        elif self._store is None:
            self._use_store(ReferenceStore.open(self.args.reference_store, self.args.reference_space))
        self._store.check(pairs)
        return dataset

    def _fill(self, reference: Any, pairs: list[TokenizedPair], batch_size: int) -> None:
        """Scores what the store lacks, each process its share."""
        if is_sharded(reference):
            raise ValueError(
                "under ZeRO-3 no process holds the whole reference, so it cannot fill a store: fill it first "
                "(selective-pref score), and give reference_store without ref_model and precompute_ref_log_probs"
            )
        if not hasattr(reference, "hf_device_map"):
            reference.to(self.accelerator.device)
        if self._store is None:
            tokenizer, label = self._ref_tokenizer or self.processing_class, reference.config._name_or_path
            space = reference_space(reference, tokenizer, label=label or "reference")
            self._use_store(ReferenceStore.create(self.args.reference_store or DEFAULT_STORE, space))
        fill_store(
            self._store,
            pairs,
            reference,
            pad_token_id=self.processing_class.pad_token_id,
            batch_tokens=2 * batch_size * (self.args.max_length or 1024),
            progress=not self.args.disable_tqdm,
        )

    def _use_store(self, store: ReferenceStore) -> None:
        store.check_tokenizer(self.processing_class)
        self._store = store

    # --- what is logged ----------------------------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log over all pairs of all processes, under TRL's names."""
        mode = self._mode
        if batches := self._logged.pop(mode, []):
            metrics, pairs = zip(*batches, strict=True)
            means = mean_over_pairs(metrics, pairs)
            total = self.accelerator.reduce(torch.tensor(sum(pairs), device=self.accelerator.device))
            tokens = means.pop("tokens") * int(total)
            if mode == "train":
                self._total_train_tokens += round(tokens) // getattr(self, "_tp_size", 1)
            for name, value in token_means(means).items():
                self._metrics[mode][name].append(value)
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def _is_self_referenced(self, reference: Any) -> bool:
        """Whether tokens are selected by how far the policy is from its own start."""
        if not self._needs_reference or not selects_by_alignment(self.args, self._custom_objective):
            return False
        if reference is not None:
            return same_weights(self.model, reference)
        if self._fills or self._store is None:
            return True
        return not is_sharded(self.model) and model_identity(self.model)["weights"] == self._store.space.identity.get(
            "weights"
        )


@dataclass(frozen=True, kw_only=True)
class WithStoredReference:
    """A collator that adds the stored log-probs of a batch, as int32 bits: trainers cast floats, and leave integers."""

    collator: Any
    store: ReferenceStore

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collated batch with `REF_LOGPS` [2B T]."""
        batch = self.collator(examples)
        return {**batch, REF_LOGPS: to_bits(self.store.lookup(batch))}


def pairs_of(dataset: Any, collator: Any, name: str) -> list[TokenizedPair]:
    """The token ids of every row as the collator will cut them.

    Raises:
        ValueError: the data set cannot be read twice.
    """
    check_stored_dataset(name, dataset)
    pairs = []
    for number, example in enumerate(dataset):
        batch = collator([example])
        sides = []
        for row in range(2):
            attended = batch["attention_mask"][row] != 0
            ids = batch["input_ids"][row][attended].tolist()
            sides.append((ids, *mask_as_spans(batch["completion_mask"][row][attended] != 0)))
        (chosen_ids, chosen_start, chosen_unscored), (rejected_ids, rejected_start, rejected_unscored) = sides
        pairs.append(
            TokenizedPair(
                chosen_ids=chosen_ids,
                rejected_ids=rejected_ids,
                chosen_prompt_length=chosen_start,
                rejected_prompt_length=rejected_start,
                chosen_unscored=chosen_unscored,
                rejected_unscored=rejected_unscored,
                place=example.get("place", f"{name}, row {number}"),
            )
        )
    return pairs


# --- metrics ---------------------------------------------------------------------------------------------------------


def batch_metrics(inputs: Batch, out: PreferenceLoss, statistics: Any) -> dict[str, Tensor]:
    """What a micro-batch adds to the log, 0-d: `diagnostics`, and per pair what `token_means` divides later."""
    metrics = diagnostics(out)
    del metrics["loss"]  # the trainer logs it
    (chosen_logits, rejected_logits), (chosen_top1, _) = statistics.mean_logits.chunk(2), statistics.is_top1.chunk(2)
    sums = {
        "tokens": inputs["attention_mask"],
        "chosen_tokens": out.chosen.mask,
        "rejected_tokens": out.rejected.mask,
        "entropy": statistics.entropy,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "chosen_top1": chosen_top1,
    }
    return metrics | {name: array.sum() / len(out.losses) for name, array in sums.items()}


def token_means(means: Mapping[str, float]) -> dict[str, float]:
    """The metrics of `batch_metrics` with sums over tokens turned into means over tokens."""
    means = dict(means)
    chosen, rejected = means.pop("chosen_tokens"), means.pop("rejected_tokens")
    parts = {
        "entropy": (means.pop("entropy"), chosen + rejected),
        "logits/chosen": (means.pop("chosen_logits"), chosen),
        "logits/rejected": (means.pop("rejected_logits"), rejected),
        "mean_token_accuracy": (means.pop("chosen_top1"), chosen),
    }
    return means | {name: total / count if count else 0.0 for name, (total, count) in parts.items()}


# --- models ----------------------------------------------------------------------------------------------------------


def load_reference(reference: Any, policy: Any, args: SelectiveDPOConfig, quantization_config: Any) -> nn.Module:
    """The reference as a model that does not learn: itself, from its name, or the policy with its weights of now."""
    if reference is None:
        shards = not isinstance(policy, str) and is_sharded(policy)  # cannot be copied
        reference = (
            policy if isinstance(policy, str) else policy.config._name_or_path if shards else copy.deepcopy(policy)
        )
    if isinstance(reference, str):
        reference = load_model(reference, policy, args, quantization_config)
    if args.fused_head:
        install_fused_head(reference, at_first_call=True)
    return reference.eval().requires_grad_(False)


def load_model(name: str, policy: Any, args: SelectiveDPOConfig, quantization_config: Any) -> nn.Module:
    """A reference from a folder or hub id, loaded as `DPOTrainer` loads the policy."""
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


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has cut the weights, so that this process holds parts only."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def tokenizer_of(reference: Any, args: SelectiveDPOConfig) -> Any:
    """The reference's own tokenizer; None, with a word in the log, where there is none to compare."""
    name = reference if isinstance(reference, str) else reference.config._name_or_path
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer with the reference %s, so it is not compared with the policy's: %s", name, error)
        return None


def _as_datasets(data: Any) -> Any:
    """Data sets as TRL takes them: lists of rows that are read become one."""
    if isinstance(data, Mapping) and not isinstance(data, DatasetDict):
        return {name: _as_datasets(one) for name, one in data.items()}
    return dataset_of_rows(data) if is_list_of_rows(data) else data


def _all_sets(datasets: Any) -> list[Any]:
    """The evaluation sets as a list."""
    return [] if datasets is None else list(datasets.values()) if isinstance(datasets, Mapping) else [datasets]
