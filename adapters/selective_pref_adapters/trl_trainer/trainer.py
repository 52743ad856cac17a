"""TRL's `DPOTrainer` with a selection of tokens: change two names in a script, and everything else stays.

In: what `DPOTrainer` takes. Out: what it trains, logs and saves, with the loss of this library. Data, collation,
models, LoRA, DeepSpeed, checkpoints are TRL's; ours are the loss (`compute_loss`), what is logged of it, and where the
reference's per-token log-probs come from: a frozen model, the policy with its adapter off, or a `ReferenceStore`.

    batch → per-token log-probs of policy and reference → objective → loss
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import DPOTrainer

from selective_pref import NonFiniteError, Objective, PreferenceLoss
from selective_pref.fused import LogitStatistics
from selective_pref_adapters.batch import SCORING_REF_LOGPS, Batch
from selective_pref_adapters.heads import install_fused_head, model_logps_and_statistics
from selective_pref_adapters.launching.processes import leave_at_exit
from selective_pref_adapters.model_checks import check_reloadable, check_trainable
from selective_pref_adapters.model_inputs import check_stored_inputs, inputs_of
from selective_pref_adapters.models import switch_off_dropout, usable_length
from selective_pref_adapters.monitoring import (
    SELF_REFERENCE,
    MetricWindow,
    evaluation_mean,
    finite_everywhere,
    non_finite_error,
    own_pairs,
)
from selective_pref_adapters.objectives import logged_numbers, loss_of_batch, make_objective, needs_reference
from selective_pref_adapters.pairs import parse_columns
from selective_pref_adapters.reference_store.store import ReferenceStore
from selective_pref_adapters.references import ref_logps_of
from selective_pref_adapters.seeing.trackers import SelectionPictures
from selective_pref_adapters.trl_trainer.checks import (
    check_arguments,
    check_built,
    check_ids,
    check_left,
    selects_by_alignment,
)
from selective_pref_adapters.trl_trainer.config import SelectiveDPOConfig
from selective_pref_adapters.trl_trainer.data import (
    READ_ROW,
    TRAINED_COLUMNS,
    all_sets,
    as_datasets,
    check_collator,
    own_collator,
    prepared,
)
from selective_pref_adapters.trl_trainer.forward import take_back_forward
from selective_pref_adapters.trl_trainer.images import images_must_fit
from selective_pref_adapters.trl_trainer.metrics import batch_metrics, token_means
from selective_pref_adapters.trl_trainer.pictures import shown_rows
from selective_pref_adapters.trl_trainer.reference import TrainerReference, config_of, has_adapter
from selective_pref_adapters.trl_trainer.stored import WithStoredReference, bare, pairs_of
from selective_pref_adapters.trl_trainer.weights import WEIGHT_COLUMN, batch_weights, with_pair_weights

logger = logging.getLogger(__name__)

_TITLE = (
    "Not All Preferences are What You Need for Post-Training: Selective Alignment Strategy for Preference Optimization"
)
_CITATION = f"""@article{{dong2025selective,
    title  = {{{{{_TITLE}}}}},
    author = {{Zhijin Dong}},
    year   = 2025,
}}"""


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
            tokenises them, as for every other trainer here, unless `args.stock_tokenization` says that TRL shall. A
            column `weight` multiplies the losses of its rows.
        data_collator, processing_class, compute_metrics, callbacks, optimizers, quantization_config, peft_config: as
            in `DPOTrainer`.
        objective: any callable (chosen, rejected) → PreferenceLoss in place of the Selective-DPO that `args`
            describes; or the name of one, as "teacher_veto", with its default numbers. It is asked once whether it
            needs a reference; one that does not runs without.

    Raises:
        TypeError: `args` is no `SelectiveDPOConfig`.
        ValueError: an option, model, reference, store or data set that has no meaning here; says what to do instead.
    """

    _name = "Selective-DPO"
    _tag_names: ClassVar[list[str]] = ["trl", "dpo", "selective-dpo"]
    _paper: ClassVar[dict[str, str]] = {"title": _TITLE, "citation": _CITATION}

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: SelectiveDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        objective: str | Objective | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SelectiveDPOConfig(f"{name.split('/')[-1]}-SelectiveDPO")
        objective = make_objective(objective) if isinstance(objective, str) else objective
        self._custom_objective = objective
        train_dataset, eval_dataset = as_datasets(train_dataset), as_datasets(eval_dataset)
        self._windows = {"train": MetricWindow(), "eval": MetricWindow()}
        self._checked = False
        check_arguments(args, objective, [train_dataset, *all_sets(eval_dataset)])
        configs = {"policy": config_of(model, args, revision=(args.model_init_kwargs or {}).get("revision"))}
        if ref_model is not None:
            configs["reference"] = config_of(ref_model, args)
        args.max_length = usable_length(args.max_length, configs)
        self.reference = TrainerReference(
            self,
            args,
            needed=needs_reference(objective or args.objective()),
            policy=model,
            ref_model=ref_model,
            adapter=has_adapter(model, peft_config),
            quantization_config=quantization_config,
        )
        with self.reference.loaded_by_us() as beside_policy:
            super().__init__(
                model=model,
                ref_model=beside_policy,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        take_back_forward(self.model)
        self._use_own_collator()
        sets = [self.train_dataset, *all_sets(self.eval_dataset)]
        self.data_collator = with_pair_weights(self.data_collator, args.loss_type, sets)
        if args.disable_dropout:  # TRL reaches the rates of `nn.Dropout` alone
            switch_off_dropout(self.model)
        self._check_once()
        if args.fused_head:
            install_fused_head(self.model, at_first_call=True, share_prefix=args.share_prefix)
        self.precompute_ref_logps = self.reference.built()
        self._use_scoring_store()
        if args.picture_pairs:
            self.add_callback(SelectionPictures(self, args.picture_pairs, partial(shown_rows, self)))
        selects = selects_by_alignment(args, objective) and args.scoring_reference_store is None
        if selects and self.reference.is_initial_policy() and self.accelerator.is_main_process:
            logger.warning("%s", SELF_REFERENCE)
        leave_at_exit()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `DPOTrainer.train`.

        Raises:
            ValueError: nothing of the policy learns, its reference would move, or a run is resumed whose checkpoints
                transformers' `Trainer` does not load back completely.
        """
        if resume_from_checkpoint:
            check_reloadable(self, "resume_from_checkpoint")
        check_trainable(self.model)  # again: parameters may have been frozen, or unfrozen, since
        self.reference.check()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """transformers' hook: from here on it is known how models are sharded, and no model has been moved yet."""
        super().create_accelerator_and_postprocess()
        self.reference.shard()

    # --- data --------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's hook for tokenising. Here the one reader of this library does it; rows with images are left to TRL."""
        if args.stock_tokenization or isinstance(processing_class, ProcessorMixin):
            if READ_ROW in (dataset.column_names or ()):
                raise ValueError(
                    "stock_tokenization needs raw rows: give the data set as it is, not after read_rows"
                    if args.stock_tokenization
                    else "this policy reads images, so TRL tokenises its rows: set stock_tokenization, and give the "
                    "data set as it is"
                )
            if isinstance(dataset, Dataset) and not len(dataset):
                check_left(dataset_name, dataset, dataset, args.max_length)
            tokenised = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            check_left(dataset_name, dataset, tokenised, args.max_length)
            return tokenised
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
        if isinstance(self._signature_columns, list):
            own = {*TRAINED_COLUMNS, WEIGHT_COLUMN} - set(self._signature_columns)
            self._signature_columns += sorted(own)

    def _use_own_collator(self) -> None:
        """Puts our collator in the place of TRL's; one that was given stays, if it can do what the data ask of it."""
        if not isinstance(self.data_collator, WithStoredReference):
            self.data_collator = own_collator(self.data_collator)
            for dataset in (self.train_dataset, *all_sets(self.eval_dataset)):
                check_collator(self.data_collator, dataset, "given")

    def _use_scoring_store(self) -> None:
        """The collator also looks up the second reference's log-probs; rows that it lacks are an error now."""
        if self.args.scoring_reference_store is None:
            return
        store = ReferenceStore.open(self.args.scoring_reference_store, self.args.scoring_reference_space)
        store.check_tokenizer(self._tokenizer)
        for dataset in (self.train_dataset, *all_sets(self.eval_dataset)):
            if dataset is not None:
                workers = self.args.dataset_num_proc
                pairs = pairs_of(dataset, bare(self.data_collator), "data set", workers=workers)
                store.check(pairs, together=True)
        self.data_collator = WithStoredReference(collator=self.data_collator, store=store, key=SCORING_REF_LOGPS)

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **options: Any) -> dict[str, float]:
        """As in `DPOTrainer`; rows as `read_rows` gives them will do, too."""
        return super().evaluate(as_datasets(eval_dataset), *arguments, **options)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of a micro-batch: the place where TRL's trainer calls this library.

        In an evaluation on several processes, pairs that were repeated to fill up the last batch are not counted.
        """
        with images_must_fit(self.args.max_length):
            logps, statistics, auxiliary = model_logps_and_statistics(
                model, inputs, auxiliary_loss=self.aux_loss_enabled
            )
        ref_logps = self.reference.logps_of(inputs)
        pair_weights = batch_weights(inputs, logps, statistics if self.args.use_weighting else None)
        scoring = ref_logps_of(inputs, SCORING_REF_LOGPS, None)
        out = loss_of_batch(self.objective, inputs, logps, ref_logps, scoring, pair_weights=pair_weights)
        if self.args.non_finite == "raise" and not finite_everywhere(out.losses):
            error = non_finite_error(out, self._where)
            raise NonFiniteError(f"{error}. With non_finite='ignore' the run goes on, as with DPOTrainer") from error
        pairs = len(out.losses)
        own = pairs if self._mode == "train" else own_pairs(pairs)
        self._add_metrics(inputs, out, logps, ref_logps, statistics, auxiliary, own)
        counted = torch.arange(pairs, device=out.losses.device) < own
        loss = out.loss if self._mode == "train" else evaluation_mean(out.losses, counted)
        if auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * auxiliary.to(loss.device)
        if not return_outputs:
            return loss
        with torch.no_grad():  # the logits that `compute_metrics` asks for were never made
            return loss, model(**inputs_of(model, inputs))

    @property
    def objective(self) -> Objective:
        """(chosen, rejected) → PreferenceLoss, at this step."""
        return self._custom_objective or self.args.objective(self._step)

    @property
    def _step(self) -> int | None:
        """The optimiser step in training; None in an evaluation, whose loss must not depend on it."""
        return self.state.global_step if self._mode == "train" else None

    @property
    def _where(self) -> str:
        """What errors begin with."""
        step = self.state.global_step
        return f"step {step + 1}" if self._mode == "train" else f"evaluation after step {step}"

    # --- before the first step ---------------------------------------------------------------------------------------

    def _check_once(self) -> None:
        """Checks the models that TRL has loaded, before they compute log-probs of a row."""
        if not self._checked:
            check_built(self, self.reference.model, self.reference.tokenizer)
            check_ids(self.model, [self.train_dataset, *all_sets(self.eval_dataset)])
            self.reference.check()
            self._checked = True

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's hook that computes one float per sequence; here every token's log-prob is in the store afterwards."""
        if not self.reference.stored:
            return dataset
        self._check_once()
        self._use_own_collator()
        collator = bare(self.data_collator)
        pairs = pairs_of(dataset, collator, name, workers=self.args.dataset_num_proc)
        check_stored_inputs(self.model, collator([dataset[0]]))
        take_back_forward(self.model)
        store = self.reference.store_rows(pairs, batch_size)
        if not isinstance(self.data_collator, WithStoredReference):
            self.data_collator = WithStoredReference(collator=self.data_collator, store=store)
        return dataset

    # --- what is logged ----------------------------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _add_metrics(
        self,
        inputs: Batch,
        out: PreferenceLoss,
        logps: Tensor,
        ref_logps: Tensor | None,
        statistics: LogitStatistics,
        auxiliary: Tensor | None,
        own: int,
    ) -> None:
        """Adds a micro-batch to what is logged next: its first `own` pairs; others were seen before."""
        pairs = len(out.losses)
        if 0 < own < pairs:
            counted = torch.arange(pairs) < own
            scoring = ref_logps_of(inputs, SCORING_REF_LOGPS, None)
            weights = {"pair_weights": out.pair_weights, "pairs": counted}
            out = loss_of_batch(self.objective, inputs, logps, ref_logps, scoring, **weights)
            rows = counted.repeat(2)
            inputs = {"attention_mask": inputs["attention_mask"][rows]}
            statistics = LogitStatistics(**{name: array[rows] for name, array in vars(statistics).items()})
        metrics = batch_metrics(inputs, out, statistics)
        if auxiliary is not None:
            metrics["aux_loss"] = auxiliary
        if self._custom_objective is None:
            numbers = logged_numbers("selection/ratio", self.args.ratio(self._step))
            numbers["selection/beta"] = self.args.beta
            metrics |= {name: out.losses.new_tensor(value) for name, value in numbers.items()}
        self._windows[self._mode].add(metrics, pairs=own)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log over all pairs of all processes, under TRL's names."""
        mode = self._mode
        means = self._windows[mode].close()
        if means.pairs:
            values = dict(means.values)
            tokens = values.pop("tokens") * means.pairs
            if mode == "train":
                self._total_train_tokens += round(tokens) // getattr(self, "_tp_size", 1)
            for name, value in token_means(values).items():
                self._metrics[mode][name].append(value)
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)
