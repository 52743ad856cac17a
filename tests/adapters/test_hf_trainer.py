"""The plain Hugging Face Trainer with our loss, collator and callback, for real on tiny models."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ranks import run_ranks, run_script
from selective_pref import (
    NonFiniteError,
    combine_losses,
    dpo_loss,
    pair_losses,
    preference_loss,
    select,
    selective_dpo_loss,
    sft_loss,
    simpo_loss,
    token_sft_loss,
    weigh_pairs,
)
from selective_pref_adapters.batch import PAIR_WEIGHTS, REF_LOGPS, from_bits, responses
from selective_pref_adapters.heads import frozen_per_token_logps, model_per_token_logps
from selective_pref_adapters.hf_trainer import (
    PreferenceCollator,
    Schedule,
    SelectionCallback,
    SelectivePreferenceLoss,
    SelectivePreferenceMixin,
    SelectivePreferenceTrainer,
)
from selective_pref_adapters.models import switch_off_dropout
from selective_pref_adapters.monitoring import wrong_signs
from selective_pref_adapters.pairs import TokenizedPair, collate, read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import MissingRowsError, ReferenceStore, fill_store, reference_space
from selective_pref_adapters.references import AdapterOffReference, RunningReference
from tiny import make_model, needs_experts, text_rows, write_jsonl
from trajectories import COMPARED, STEPS, hf_trajectory, loop_trajectory, trl_trajectory

Run = Callable[..., Trainer]
ROOT = Path(__file__).resolve().parents[2]
UNTIMED = ("runtime", "per_second", "flos")


def model_of(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(policy_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def pairs(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[TokenizedPair]:
    rows = read_rows(write_jsonl(tmp_path_factory.mktemp("hf") / "pairs.jsonl", text_rows(40)))
    return tokenize_pairs(rows, tokenizer, max_length=64)[0]


@pytest.fixture(scope="module")
def store(
    tokenizer: Any, pairs: list[TokenizedPair], reference_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> ReferenceStore:
    reference = model_of(reference_folder)
    made = ReferenceStore.create(tmp_path_factory.mktemp("store"), reference_space(reference, tokenizer))
    fill_store(made, pairs, reference, pad_token_id=0, progress=False)
    return made


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    def make(**options: Any) -> TrainingArguments:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "remove_unused_columns": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "train_sampling_strategy": "sequential",
        }
        return TrainingArguments(**{**settings, **options})

    return make


@pytest.fixture
def build(
    arguments: Callable[..., TrainingArguments],
    tokenizer: Any,
    pairs: list[TokenizedPair],
    policy_folder: Path,
    reference_folder: Path,
) -> Run:
    """A plain Trainer with the three objects; `options` of this function first, the others are TrainingArguments."""

    def make(
        *,
        model: Any = None,
        loss: SelectivePreferenceLoss | None = None,
        callback: SelectionCallback | None = None,
        collator: Any = None,
        train: Any = None,
        evaluation: Any = None,
        extra: list[TrainerCallback] | None = None,
        trainer_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Trainer:
        return Trainer(
            model=model or model_of(policy_folder),
            args=arguments(**options),
            train_dataset=pairs[:30] if train is None else train,
            eval_dataset=evaluation,
            data_collator=collator or PreferenceCollator(tokenizer),
            compute_loss_func=loss or SelectivePreferenceLoss(ref_model=model_of(reference_folder)),
            callbacks=[callback or SelectionCallback(), *(extra or [])],
            **(trainer_options or {}),
        )

    return make


def logged(trainer: Trainer, key: str = "loss") -> list[dict[str, float]]:
    """The log's lines that hold `key`, without what depends on the clock."""
    lines = [line for line in trainer.state.log_history if key in line]
    return [{n: v for n, v in line.items() if not any(word in n for word in UNTIMED)} for line in lines]


def callback_of(trainer: Trainer) -> SelectionCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, SelectionCallback))


def assert_alike(ours: list[dict[str, float]], theirs: list[dict[str, float]], **tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, **(tolerance or {"rel": 1e-4, "abs": 1e-5}))


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_rows_count_for_their_weight(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair], policy_folder: Path, reference_folder: Path
) -> None:
    """The loss is the core's of weighted pairs; in a run a weight of 2 is as good as the row twice."""
    weighted = [dataclasses.replace(pair, weight=weight) for pair, weight in zip(pairs, [0.0, 1.0, 2.0], strict=False)]
    model, batch = model_of(policy_folder), PreferenceCollator(tokenizer)([vars(pair) for pair in weighted])
    labels, logps = batch["labels"], frozen_per_token_logps(model, batch["labels"])
    loss = SelectivePreferenceLoss(beta=0.3, ref_model=model_of(reference_folder))
    ref_logps = frozen_per_token_logps(model_of(reference_folder), labels)
    expected = selective_dpo_loss(*responses(labels, logps, ref_logps), beta=0.3, selection_ratio=0.4)
    expected = weigh_pairs(expected, torch.tensor([0.0, 1.0, 2.0]), total=3.0)
    torch.testing.assert_close(loss(logps, labels, 3), expected.losses.mean())

    def first(some: Any, evaluation: Any = None) -> tuple[dict[str, float], Trainer]:
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 1}
        trainer = build(train=some, evaluation=evaluation, **options)
        trainer.train()
        return logged(trainer)[0], trainer

    got, trainer = first(Dataset.from_list([vars(pair) for pair in weighted]), weighted)
    same, other = first([pairs[1], pairs[2], pairs[2]], [pairs[1], pairs[2], pairs[2]])
    for name in ("loss", "grad_norm"):
        assert got[name] == pytest.approx(same[name], rel=1e-5)
    assert got["pair_weight"] == pytest.approx(1.0)
    assert "pair_weight" not in same
    assert trainer.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], rel=1e-4)
    raw = [{**row, "weight": weight} for row, weight in zip(text_rows(3), [0.0, 1.0, 2.0], strict=True)]
    labels = PreferenceCollator(tokenizer)(raw)["labels"]
    assert from_bits(labels[PAIR_WEIGHTS]).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([0.0, 0.0], {}, "train_dataset: every weight is 0"),
        ([1.0, None], {}, "train_dataset: 1 of 2 rows have a weight"),
        ([1.0, math.nan], {}, "train_dataset, row 1: 'weight', .* a finite number, at least 0; got nan"),
        ([1.0, 2.0], {"loss_type": "aot"}, "pairs cannot be weighted .* under aot"),
    ],
)
def test_weights_that_mean_nothing(
    build: Run, reference_folder: Path, weights: list[float], options: Any, message: str
) -> None:
    rows = [{**row, "weight": weight} for row, weight in zip(text_rows(2), weights, strict=True)]
    with pytest.raises(ValueError, match=message):
        build(train=rows, loss=SelectivePreferenceLoss(ref_model=model_of(reference_folder), **options))


def test_the_loss_is_the_cores_on_the_same_log_probs(
    tokenizer: Any, pairs: list[TokenizedPair], store: ReferenceStore, policy_folder: Path, reference_folder: Path
) -> None:
    """From logits or log-probs, with an online reference or a store, divided by what the Trainer counts."""
    model, batch = model_of(policy_folder), PreferenceCollator(tokenizer)(pairs[:6])
    labels, outputs = batch["labels"], model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logps = model_per_token_logps(model, collate(pairs[:6], 0))
    ref_logps = frozen_per_token_logps(model_of(reference_folder).eval(), labels)
    sides, bare = responses(labels, logps, ref_logps), responses(labels, logps)
    expected = {
        "selective_dpo": selective_dpo_loss(*sides, beta=0.3, selection_ratio=0.5, pool="pair", label_smoothing=0.1),
        "dpo": dpo_loss(*sides, beta=0.3, label_smoothing=0.1),
        "simpo": simpo_loss(*bare, beta=0.3, gamma=0.7, label_smoothing=0.1),
        "sft": sft_loss(*bare),
    }
    mixed = combine_losses(
        (0.8, preference_loss(*select(*sides, selection_ratio=(0.5, 0.2)), pair_loss=pair_losses.hinge, beta=0.3)),
        (0.2, token_sft_loss(*select(*sides, selection_ratio=(0.5, 0.2)))),
    )
    named = {"loss_type": ("hinge", "sft"), "loss_weights": (0.8, 0.2), "selection_ratio": (0.5, 0.2), "beta": 0.3}
    value = SelectivePreferenceLoss(ref_model=model_of(reference_folder), **named)(logps, labels, 6)
    torch.testing.assert_close(value, mixed.loss)
    numbers = {"beta": 0.3, "label_smoothing": 0.1}
    options = {
        "selective_dpo": {**numbers, "selection_ratio": 0.5, "selection_pool": "pair"},
        "dpo": numbers,
        "simpo": {**numbers, "gamma": 0.7},
        "sft": {},
    }
    count = (labels[..., 1:].ne(-100).sum() + 2 * labels.ne(-100).sum()).item()  # as the Trainer counts three batches
    assert count == 3 * 6
    for name, out in expected.items():
        reference = {"ref_model": model_of(reference_folder)} if name in ("selective_dpo", "dpo") else {}
        loss = SelectivePreferenceLoss(name, **options[name], **reference)
        for answer in (outputs, logps):
            value = loss(answer, labels, num_items_in_batch=count)
            torch.testing.assert_close(value, out.loss / 3)
            assert value.requires_grad
    stored = PreferenceCollator(tokenizer, reference_store=store)(pairs[:6])["labels"]
    torch.testing.assert_close(from_bits(stored[REF_LOGPS]), ref_logps, rtol=1e-5, atol=1e-5)
    custom = SelectivePreferenceLoss(lambda *pair: dpo_loss(*pair, beta=0.3))
    torch.testing.assert_close(custom(logps, stored, 6), dpo_loss(*sides, beta=0.3).loss)


def test_scoring_references_select_and_do_not_anchor(
    tokenizer: Any, pairs: list[TokenizedPair], store: ReferenceStore, policy_folder: Path, tmp_path: Path
) -> None:
    other = model_of(make_model(tmp_path / "other", seed=7))
    labels = PreferenceCollator(tokenizer, reference_store=store)(pairs[:4])["labels"]
    logps = model_per_token_logps(model_of(policy_folder), labels)
    anchor, scoring = from_bits(labels[REF_LOGPS]), frozen_per_token_logps(other.eval(), labels)
    chosen, rejected = responses(labels, logps, anchor)
    difference = torch.chunk(scoring - logps.detach(), 2)
    expected = selective_dpo_loss(
        chosen, rejected, beta=0.01, selection_ratio=0.4, scores=(difference[0], -difference[1])
    )
    loss = SelectivePreferenceLoss(scoring_ref_model=other)
    torch.testing.assert_close(loss(logps, labels, 4), expected.loss)


def test_both_ways_give_the_same_numbers(build: Run, arguments: Any, tokenizer: Any, pairs: Any) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    schedule = {
        "selection_ratio": Schedule(start=1.0, end=0.4, steps=3),
        "beta": Schedule(start=0.1, end=0.01, steps=2),
    }
    plain = build(evaluation=pairs[30:], callback=SelectionCallback(**schedule), **options)
    plain.train()
    loss = plain.compute_loss_func
    again = SelectivePreferenceLoss(ref_model=copy.deepcopy(loss.references[REF_LOGPS].model))

    class Mine(SelectivePreferenceMixin, Trainer):
        """Adds nothing to the loss and looks at what is logged."""

        seen: list[dict[str, float]] = []  # noqa: RUF012

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            self.seen.append(dict(logs))
            super().log(logs, *args, **kwargs)

    torch.manual_seed(0)
    mine = Mine(
        model=model_of(plain.model.config._name_or_path),
        args=arguments(**options),
        train_dataset=pairs[:30],
        eval_dataset=pairs[30:],
        processing_class=tokenizer,
        preference_loss=again,
        selection_callback=SelectionCallback(**schedule),
    )
    mine.train()
    assert logged(mine) == logged(plain)
    assert logged(mine, "eval_loss") == logged(plain, "eval_loss")
    assert len(logged(mine)) == 4
    assert any("selection/fraction" in logs for logs in mine.seen)
    for ours, theirs in zip(mine.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_twenty_steps_are_those_of_the_deepspeed_loop_and_of_trl(
    policy_folder: Path, reference_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    ours = hf_trajectory(policy_folder, reference_folder, pairs_file, tmp_path / "hf")
    for trajectory in (loop_trajectory, trl_trajectory):
        theirs = trajectory(policy_folder, reference_folder, pairs_file, tmp_path / trajectory.__name__)
        assert len(ours) == len(theirs) == STEPS
        for name in COMPARED:
            expected = pytest.approx([line[name] for line in theirs], rel=2e-4, abs=2e-6)
            assert [line[name] for line in ours] == expected, (trajectory.__name__, name)
    assert ours[0]["loss"] != pytest.approx(ours[-1]["loss"], rel=1e-3)  # it moved


def test_accumulation_makes_the_steps_of_a_larger_batch(build: Run, pairs: list[TokenizedPair]) -> None:
    """Uneven ends of the epoch included: 27 pairs are 8 + 8 + 8 + 3, or micro-batches of 2 with a last one of 1."""
    options = {"num_train_epochs": 2, "max_steps": -1, "train": pairs[:27]}
    whole = build(per_device_train_batch_size=8, **options)
    parts = build(per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    for trainer in (whole, parts):
        trainer.train()
        assert len(logged(trainer)) == 8
    names = {"loss", "grad_norm", *COMPARED}
    ours, theirs = ([{n: line[n] for n in names} for line in logged(trainer)] for trainer in (parts, whole))
    assert_alike(ours, theirs)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_store_gives_the_numbers_of_the_online_reference(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair], store: ReferenceStore
) -> None:
    """Up to rounding, as the store's rows were computed one by one; also in data-loader workers."""
    options = {"evaluation": pairs[30:], "eval_strategy": "steps", "eval_steps": 4}
    online = build(**options)
    stored = build(
        loss=SelectivePreferenceLoss(),
        collator=PreferenceCollator(tokenizer, reference_store=store),
        dataloader_num_workers=1,
        **options,
    )
    for trainer in (online, stored):
        trainer.train()
    assert_alike(logged(stored), logged(online), rel=1e-4, abs=1e-6)
    assert_alike(logged(stored, "eval_loss"), logged(online, "eval_loss"), rel=1e-4, abs=1e-6)


def test_rows_of_every_kind_make_the_same_batch(tokenizer: Any, pairs: list[TokenizedPair]) -> None:
    collator, rows = PreferenceCollator(tokenizer, max_length=64), text_rows(40)[:4]
    expected = collator(pairs[:4])
    raw = collator(rows)
    table = collator(list(Dataset.from_list([vars(pair) for pair in pairs[:4]])))
    from_table = collator(list(Dataset.from_list(rows)))
    for batch in (raw, table, from_table):
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["labels"]["completion_mask"], expected["labels"]["completion_mask"])
    assert raw["labels"].places[2] == "batch, row 2"
    assert table["labels"].places == [pair.place for pair in pairs[:4]]
    for broken, message in (
        ([{}], "set remove_unused_columns=False"),
        ([{"prompt": "w0", "chosen": "w1"}], "batch, row 0: no 'rejected'"),
        ([{"prompt": "w0", "chosen": "w1", "rejected": "w1"}], "batch, row 0 cannot be trained on: .*are equal"),
    ):
        with pytest.raises(ValueError, match=message):
            collator(broken)
    with pytest.raises(TypeError, match="a row must be a TokenizedPair or a dict"):
        collator(["w0"])


def test_a_dataset_of_raw_rows_trains(build: Run, pairs: list[TokenizedPair]) -> None:
    rows = Dataset.from_list(text_rows(30))
    raw, stream, ready = build(train=rows), build(train=rows.to_iterable_dataset()), build()
    for trainer in (raw, stream, ready):
        trainer.train()
    assert logged(raw) == logged(ready)
    assert [line["loss"] for line in logged(stream)] == [line["loss"] for line in logged(ready)]
    assert raw.data_collator.max_length == 64  # what the model can read


# --- schedules, resume -----------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Ends the process's training at a step as a kill does: nothing is run or written afterwards."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("restore", [False, True])
def test_a_killed_run_goes_on_where_the_schedule_stood(build: Run, pairs: list[TokenizedPair], restore: bool) -> None:
    """With and without the Trainer's own restoring of callbacks, which makes new ones."""

    def start(**options: Any) -> Trainer:
        return build(
            callback=SelectionCallback(
                selection_ratio=Schedule(start=1.0, end=0.4, steps=6, shape="cosine"),
                beta=Schedule(start=0.01, end=0.1, steps=8),
                patience=2,
            ),
            evaluation=pairs[30:],
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            max_steps=9,
            restore_callback_states_from_checkpoint=restore,
            **options,
        )

    whole = start()
    whole.train()
    killed = start(extra=[Stop(5)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = start()
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-3"))
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    ratios = [line["selection/ratio"] for line in logged(resumed)]
    assert ratios == [Schedule(start=1.0, end=0.4, steps=6, shape="cosine")(step) for step in range(9)]
    assert [line["selection/beta"] for line in logged(resumed)][3] == pytest.approx(0.01 + 0.09 * 3 / 8)
    assert callback_of(resumed).state() == callback_of(whole).state()
    state = json.loads((Path(resumed.args.output_dir) / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SelectionCallback"]["attributes"]["history"][""]


def test_steps_use_the_schedules_numbers_and_evaluations_their_end(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair], store: ReferenceStore
) -> None:
    """The weights stay where they are, so each loss is the core's with the numbers of its step."""
    ratio, beta = Schedule(start=1.0, end=0.4, steps=2), Schedule(start=0.5, end=0.1, steps=2)
    trainer = build(
        callback=SelectionCallback(selection_ratio=ratio, beta=beta),
        train=pairs[:4] * 2,
        evaluation=pairs[:4],
        max_steps=2,
        learning_rate=0.0,
    )
    trainer.train()
    losses = [line["loss"] for line in logged(trainer)] + [trainer.evaluate()["eval_loss"]]
    labels = PreferenceCollator(tokenizer, reference_store=store)(pairs[:4])["labels"]
    with torch.no_grad():
        sides = responses(labels, model_per_token_logps(trainer.model, labels), from_bits(labels[REF_LOGPS]))
    expected = [selective_dpo_loss(*sides, beta=beta(step), selection_ratio=ratio(step)).loss for step in range(3)]
    assert losses == pytest.approx([float(loss) for loss in expected], rel=1e-5)
    assert len({round(loss, 4) for loss in losses}) == 3


# --- logs ------------------------------------------------------------------------------------------------------------


class Heard(TrainerCallback):
    """What a logger hears that stands before every other callback."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_statistics_reach_the_history_and_every_logger(build: Run, pairs: list[TokenizedPair], tmp_path: Path) -> None:
    """W&B, trackio and others hear `on_log` as `Heard` does; TensorBoard's file is read back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = build(
        evaluation={"one": pairs[30:35], "two": pairs[35:]},
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        gradient_accumulation_steps=2,
    )
    heard = Heard()
    trainer.callback_handler.callbacks.insert(0, heard)
    trainer.train()
    names = {"rewards/margins", "selection/rewards/margins", "selection/fraction", "selection/threshold"}
    (first, *_) = logged(trainer)
    assert names | {"selection/ratio", "selection/beta", "rewards/accuracies", "logps/chosen"} <= set(first)
    history = [{n: v for n, v in line.items() if n != "step"} for line in trainer.state.log_history]
    assert [logs for logs in heard.logs if "loss" in logs] == [line for line in history if "loss" in line]
    for name in ("one", "two"):
        (line, *_) = logged(trainer, f"eval_{name}_loss")
        assert {f"eval_{name}_{metric}" for metric in names} <= set(line)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    values = [event.value for event in events.Scalars("train/selection/rewards/margins")]
    assert values == pytest.approx([line["selection/rewards/margins"] for line in logged(trainer)])
    assert {"train/selection/ratio", "eval/one_rewards/margins"} <= set(events.Tags()["scalars"])


def test_logged_means_are_over_all_pairs_since_the_last_log(build: Run) -> None:
    every, second = build(), build(logging_steps=2)
    for trainer in (every, second):
        trainer.train()
    fine, coarse = logged(every), logged(second)
    for name in ("loss", "rewards/margins", "selection/fraction"):
        means = [(fine[i][name] + fine[i + 1][name]) / 2 for i in (0, 2)]
        assert [line[name] for line in coarse] == pytest.approx(means, rel=1e-5)


def test_evaluation_is_the_mean_over_its_pairs_and_the_best_model_is_loaded(
    build: Run, pairs: list[TokenizedPair]
) -> None:
    options = {"evaluation": pairs[30:], "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    trainer = build(
        per_device_eval_batch_size=3,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,
        **options,
    )
    trainer.train()
    lines = logged(trainer, "eval_loss")
    assert trainer.state.best_metric == min(line["eval_rewards/margins"] for line in lines)
    best = next(line for line in lines if line["eval_rewards/margins"] == trainer.state.best_metric)
    trainer.args.per_device_eval_batch_size = 10
    again = trainer.evaluate()
    for name in best.keys() - {"epoch", "step"}:
        assert again[name] == pytest.approx(best[name], rel=1e-4, abs=1e-6), name
    tested = trainer.predict(pairs[30:], metric_key_prefix="test")
    assert tested.predictions is None
    assert tested.metrics["test_rewards/margins"] == again["eval_rewards/margins"]


# --- what looks wrong ------------------------------------------------------------------------------------------------


def test_signs_that_training_goes_wrong() -> None:
    rising, falling = [(i / 10, 0.6) for i in range(8)], [(-i / 10, 0.6) for i in range(8)]
    noise = [(0.1 * (-1) ** i, 0.6) for i in range(8)]
    assert wrong_signs(rising, 4) == wrong_signs(noise, 4) == wrong_signs(falling[:7], 4) == []
    assert wrong_signs(falling, 4) == ["falling"]
    assert wrong_signs([(i / 10, 0.4) for i in range(8)], 4) == ["below_half"]
    assert wrong_signs([(0.0, 0.4)] * 7 + [(0.0, 0.5)], 4) == []


def test_a_run_that_goes_the_wrong_way_says_so_once(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair], caplog: pytest.LogCaptureFixture
) -> None:
    """The evaluation's pairs are swapped, so that its margin falls while the training's rises."""
    swapped = [
        TokenizedPair(
            chosen_ids=pair.rejected_ids,
            rejected_ids=pair.chosen_ids,
            chosen_prompt_length=pair.rejected_prompt_length,
            rejected_prompt_length=pair.chosen_prompt_length,
        )
        for pair in pairs[:16]
    ]
    callback = SelectionCallback(patience=2)
    trainer = build(
        callback=callback,
        loss=SelectivePreferenceLoss("dpo", beta=0.5, ref_model=model_of(build().model.config._name_or_path)),
        train=pairs[:16],
        evaluation=swapped,
        max_steps=16,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=3e-3,
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    kinds = [warning["kind"] for warning in callback.warnings]
    assert "falling" in kinds
    assert "below_half" in kinds
    assert len(kinds) == len(set(kinds))
    assert caplog.text.count("(eval_rewards/margins) is falling") == 1


def test_a_reference_that_is_the_initial_policy_is_named(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair], policy_folder: Path, tmp_path: Path
) -> None:
    """As a second copy, as a store, as a fresh adapter switched off; and not where nothing is selected."""
    policy = model_of(policy_folder)
    space = reference_space(policy, tokenizer)
    own = ReferenceStore.create(tmp_path / "own", space)
    fill_store(own, pairs[:30], policy, pad_token_id=0, progress=False)
    for loss, collator, expected in (
        (SelectivePreferenceLoss(ref_model=policy), None, ["self_reference", "ties"]),
        (SelectivePreferenceLoss(), PreferenceCollator(tokenizer, reference_store=own), ["self_reference", "ties"]),
        (SelectivePreferenceLoss("dpo"), PreferenceCollator(tokenizer, reference_store=own), []),
    ):
        callback = SelectionCallback()
        build(loss=loss, collator=collator, callback=callback, max_steps=1).train()
        assert [warning["kind"] for warning in callback.warnings] == expected
    callback = SelectionCallback()
    build(callback=callback).train()
    assert callback.warnings == []


def broken_store(store: ReferenceStore, pair: TokenizedPair) -> Any:
    """The store, with a NaN among what it says of one pair."""

    class Broken(ReferenceStore):
        def __init__(self) -> None:
            super().__init__(store.folder, store.space)

        def lookup(self, batch: Any) -> torch.Tensor:
            found = super().lookup(batch)
            for row, ids in enumerate(batch["input_ids"].tolist()):
                if ids[: len(pair.chosen_ids)] == pair.chosen_ids:
                    found[row, batch["completion_mask"][row, 1:].nonzero()[0]] = math.nan
            return found

    return Broken()


def test_a_broken_number_stops_the_run_before_the_step(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair], store: ReferenceStore
) -> None:
    """The Trainer's own filter would hide it from the logs and take the step."""
    collator = PreferenceCollator(tokenizer, reference_store=broken_store(store, pairs[9]))
    trainer = build(loss=SelectivePreferenceLoss(), collator=collator, logging_nan_inf_filter=True)
    with pytest.raises(NonFiniteError, match=rf"step 3: .*ref_per_token_logps.*rows 1 .*{pairs[9].place}"):
        trainer.train()
    with pytest.raises(NonFiniteError, match="evaluation at step 3: "):
        trainer.evaluate(pairs[8:12])
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_pairs_with_a_broken_reference_can_be_left_out(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair], store: ReferenceStore
) -> None:
    broken = PreferenceCollator(tokenizer, reference_store=broken_store(store, pairs[9]))
    callback = SelectionCallback()
    loss = SelectivePreferenceLoss(non_finite="skip")
    trainer = build(loss=loss, collator=broken, callback=callback, evaluation=pairs[8:12])
    trainer.train()
    lines = logged(trainer)
    assert [line["selection/skipped_pairs"] for line in lines] == [0, 0, 1 / 4, 0]
    assert [(warning["kind"], warning["step"]) for warning in callback.warnings] == [("non_finite", 3)]
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    rest = build(
        model=trainer.model,
        loss=SelectivePreferenceLoss(),
        collator=PreferenceCollator(tokenizer, reference_store=store),
        evaluation=[pairs[8], *pairs[10:12]],
    ).evaluate()
    with_broken = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_selection/fraction"):
        assert with_broken[name] == pytest.approx(rest[name], rel=1e-5), name


def test_a_broken_policy_is_never_left_out(build: Run, tmp_path: Path, pairs: list[TokenizedPair], store: Any) -> None:
    folder = make_model(tmp_path / "nan", seed=1)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loss = SelectivePreferenceLoss(ref_model=model_of(make_model(tmp_path / "ref", seed=2)), non_finite="skip")
    with pytest.raises(NonFiniteError, match=r"step 1: .*\(per_token_logps\)"):
        build(model=model_of(folder), loss=loss).train()


# --- PEFT, precision, processes --------------------------------------------------------------------------------------


def lora(folder: Path, trained: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=not trained, task_type="CAUSAL_LM")
    return get_peft_model(model_of(folder), config)


def test_an_adapter_switched_off_is_a_reference(build: Run, pairs: list[TokenizedPair], policy_folder: Path) -> None:
    """It gives the numbers of the base model as a reference of its own, and leaves adapter and mode as they were."""
    options = {"evaluation": pairs[30:], "eval_strategy": "steps", "eval_steps": 2}
    runs = []
    for own in (True, False):
        model = lora(policy_folder, trained=True)
        loss = SelectivePreferenceLoss(ref_model=model if own else model_of(policy_folder))
        trainer = build(model=model, loss=loss, **options)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer.train()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all("lora_" in name for name in changed)
        runs.append(trainer)
    assert_alike(logged(runs[0]), logged(runs[1]), rel=1e-5, abs=1e-7)
    assert_alike(logged(runs[0], "eval_loss"), logged(runs[1], "eval_loss"), rel=1e-5, abs=1e-7)
    callback = SelectionCallback()
    fresh = lora(policy_folder)
    for mode in (True, False):
        fresh.train(mode)
        AdapterOffReference(fresh)(
            PreferenceCollator(AutoTokenizer.from_pretrained(policy_folder))(pairs[:2])["labels"]
        )
        assert fresh.training is mode
    build(model=fresh, loss=SelectivePreferenceLoss(ref_model=fresh), callback=callback, max_steps=1).train()
    assert callback.warnings[0]["kind"] == "self_reference"


def test_bf16(build: Run, tokenizer: Any, pairs: list[TokenizedPair], store: ReferenceStore) -> None:
    """Under autocast and with bf16 weights: finite, and near the float32 run; log-probs and losses stay float32."""
    collator = PreferenceCollator(tokenizer, reference_store=store)
    options = {"loss": SelectivePreferenceLoss(), "collator": collator, "evaluation": pairs[30:], "max_steps": 2}
    exact = build(**options)
    exact.train()
    half = build().model.to(torch.bfloat16)
    for trainer in (build(bf16=True, **options), build(model=half, **options)):
        trainer.train()
        loss = logged(trainer)[0]["loss"]
        assert loss == pytest.approx(logged(exact)[0]["loss"], rel=2e-2)
        assert loss != float(torch.tensor(loss).bfloat16())
        assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_trains_the_same(build: Run, pairs: list[TokenizedPair], backend: str) -> None:
    options = {"train": pairs[:4], "max_steps": 2}  # one batch, and so one shape
    plain = build(**options)
    torch._dynamo.reset()
    compiled = build(**options, torch_compile=True, torch_compile_backend=backend)
    for trainer in (plain, compiled):
        trainer.train()
    torch._dynamo.reset()
    assert_alike(logged(compiled), logged(plain))


class Spreading(PreferenceCollator):
    """Reads every text with gaps between its positions; `told` says whether the reference is told."""

    told = False

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = super().__call__(rows)
        positions = 3 * torch.arange(batch["input_ids"].shape[1]).repeat(len(batch["input_ids"]), 1)
        if self.told:
            batch["labels"]["position_ids"] = positions
        return {**batch, "position_ids": positions}


def test_what_a_collator_gives_the_model_the_reference_reads_too(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair], store: ReferenceStore, policy_folder: Path
) -> None:
    collator = Spreading(tokenizer)
    with pytest.raises(ValueError, match=r"gives the model position_ids, and the reference does not see it: put it"):
        build(collator=collator)
    stored = Spreading(tokenizer, reference_store=store)
    with pytest.raises(ValueError, match="gives the model position_ids, and a store holds log-probs of token ids"):
        build(collator=stored, loss=SelectivePreferenceLoss())
    collator.told = True
    same = SelectivePreferenceLoss("dpo", ref_model=model_of(policy_folder))
    trainer = build(collator=collator, loss=same, max_steps=1)
    trainer.train()
    assert logged(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference read the same
    assert logged(trainer)[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_two_processes(
    policy_folder: Path, reference_folder: Path, pairs_file: Path, build: Run, tmp_path: Path
) -> None:
    """One launch for everything that needs a second process: DDP, broken numbers on one of them, ZeRO-3.

    Under ZeRO-3 also one process, which holds all parts.
    """
    script, log = Path(__file__).with_name("hf_two_processes.py"), tmp_path / "log"
    models = (policy_folder, reference_folder, pairs_file)
    (tmp_path / "alone").mkdir()
    assert run_ranks(run_script, script, *models, tmp_path / "alone", world_size=1, log=log) == [0], log.read_text()
    alone = json.loads((tmp_path / "alone" / "rank0.json").read_text())
    codes = run_ranks(run_script, script, *models, tmp_path, log=log)
    assert codes == [0, 0], log.read_text()[-4000:]
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["ddp"]["train"] == results[1]["ddp"]["train"]
    rows = tokenize_pairs(read_rows(pairs_file), AutoTokenizer.from_pretrained(policy_folder), max_length=64)[0]
    single = build(
        train=rows[:24],
        evaluation=rows[24:31],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=3,
    )
    single.train()
    for name in ("ddp", "zero3", "zero3_stored"):
        for found in (results[0][name], *([alone[name]] if name in alone else [])):
            assert_alike(found["train"], logged(single), rel=2e-4, abs=1e-5)
            assert_alike(found["eval"], logged(single, "eval_loss"), rel=2e-4, abs=1e-5)
    assert alone.keys() == {"zero3", "zero3_stored"}
    assert [("another process" in result["nan"]) for result in results] == [True, False]
    assert results[0]["zero3_bf16"]["bits"]
    assert results[0]["zero3_bf16"]["resumed"] == results[0]["zero3_bf16"]["whole"]
    assert results[0]["zero3_lora"]["kinds"] == ["self_reference", "ties"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def partial_store(tokenizer: Any, pairs: Any, reference_folder: Path, tmp_path: Path) -> Iterator[ReferenceStore]:
    reference = model_of(reference_folder)
    made = ReferenceStore.create(tmp_path / "partial", reference_space(reference, tokenizer))
    fill_store(made, pairs[:20], reference, pad_token_id=0, progress=False)
    yield made
    made.close()


@pytest.fixture
def parts(
    tokenizer: Any, pairs: Any, store: ReferenceStore, partial_store: ReferenceStore, policy_folder: Path
) -> SimpleNamespace:
    """What the table of refused trainers is made of."""
    return SimpleNamespace(
        tokenizer=tokenizer,
        pairs=pairs,
        policy_folder=policy_folder,
        policy=model_of(policy_folder),
        stored=PreferenceCollator(tokenizer, reference_store=store),
        partly_stored=PreferenceCollator(tokenizer, reference_store=partial_store),
    )


def policy_and_reference(model: Any) -> dict[str, Any]:
    return {"model": model, "loss": SelectivePreferenceLoss(ref_model=model)}


def pair_of(chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair(chosen_ids=chosen, rejected_ids=rejected, chosen_prompt_length=1, rejected_prompt_length=1)


REFUSED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "columns removed": (lambda it: {"remove_unused_columns": True}, "remove_unused_columns=True takes .* to False"),
    "token labels smoothed": (
        lambda it: {"label_smoothing_factor": 0.1},
        r"set SelectivePreferenceLoss\(label_smoothing=",
    ),
    "another collator": (
        lambda it: {"collator": DataCollatorWithPadding(it.tokenizer)},
        r"PreferenceCollator\(tokenizer\); got DataCollatorWith",
    ),
    "another loss": (lambda it: {"loss": lambda *_: None}, "compute_loss_func=SelectivePreferenceLoss"),
    "no reference": (
        lambda it: {"loss": SelectivePreferenceLoss()},
        r"there is none: give SelectivePreferenceLoss\(ref_model=...\) or PreferenceCollator\(reference_st",
    ),
    "two references": (lambda it: {"collator": it.stored}, "both reference_store and ref_model are given"),
    "training rows not stored": (
        lambda it: {"loss": SelectivePreferenceLoss(), "collator": it.partly_stored},
        "10 of 30 pairs.*selective-pref score",
    ),
    "evaluation rows not stored": (
        lambda it: {
            "loss": SelectivePreferenceLoss(),
            "collator": it.partly_stored,
            "train": it.pairs[:20],
            "evaluation": it.pairs[18:24],
        },
        "4 of 6 pairs",
    ),
    "a store that is not read": (
        lambda it: {"loss": SelectivePreferenceLoss("simpo"), "collator": it.stored},
        "'simpo' reads no reference: leave reference_store out",
    ),
    "a scoring reference that is not read": (
        lambda it: {"loss": SelectivePreferenceLoss("dpo", ref_model=it.policy, scoring_ref_model=it.policy)},
        "'dpo' selects no tokens: leave scoring_ref_model out",
    ),
    "the policy as its reference": (
        lambda it: policy_and_reference(it.policy),
        "the reference is the policy itself",
    ),
    "a frozen adapter as its reference": (
        lambda it: policy_and_reference(lora(it.policy_folder).requires_grad_(False)),
        "the reference is the policy itself.*is_trainable=True",
    ),
    "a reference that could be trained": (
        lambda it: {"loss": SelectivePreferenceLoss(ref_model=lora(it.policy_folder))},
        "another PEFT model",
    ),
    "a frozen policy": (
        lambda it: {"model": model_of(it.policy_folder).requires_grad_(False)},
        r"no trainable parameter: call requires_grad_\(True\)",
    ),
    "a frozen adapter": (
        lambda it: {"model": lora(it.policy_folder).requires_grad_(False)},
        "no trainable parameter: .*is_trainable=True",
    ),
    "max_length beyond the context": (
        lambda it: {"collator": PreferenceCollator(it.tokenizer, max_length=65)},
        r"max_length 65 is longer than the policy can read \(64 tokens\)",
    ),
    "rows beyond the context": (
        lambda it: {"train": [pair_of([5] * 65, [6, 7])]},
        "train_dataset holds 65 tokens in one row, more than the policy can read",
    ),
    "ids beyond the vocabulary": (
        lambda it: {"train": [pair_of([5, 99], [5, 7])]},
        "train_dataset: token id 99 is outside the policy's vocabulary",
    ),
    "no rows": (lambda it: {"train": []}, "train_dataset is empty"),
    "rows that are no pairs": (lambda it: {"train": [{"prompt": "w0"}]}, "train_dataset, row 0: no 'chosen'"),
    "split batches": (lambda it: {"accelerator_config": {"split_batches": True}}, "tear pairs apart"),
    "dispatched batches": (lambda it: {"accelerator_config": {"dispatch_batches": True}}, "tear pairs apart"),
    "other label names": (lambda it: {"label_names": ["start_positions"]}, "set label_names="),
    "metrics of predictions": (
        lambda it: {"trainer_options": {"compute_metrics": lambda _: {}}},
        "compute_metrics gets two rows per pair",
    ),
    "two callbacks": (lambda it: {"extra": [SelectionCallback()]}, "one SelectionCallback is enough"),
    "a schedule to a wrong value": (
        lambda it: {"callback": SelectionCallback(beta=Schedule(start=0.1, end=0.0, steps=3))},
        "beta must be a finite number",
    ),
    "a schedule that is not read": (
        lambda it: {
            "loss": SelectivePreferenceLoss("dpo", ref_model=it.policy),
            "callback": SelectionCallback(selection_ratio=Schedule(start=1, end=0.4)),
        },
        "'dpo' does not read selection_ratio: leave its schedule out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_is_refused_before_the_first_step(build: Run, parts: SimpleNamespace, case: str) -> None:
    options, message = REFUSED[case]
    expected = MissingRowsError if "not stored" in case else (ValueError, TypeError)
    with pytest.raises(expected, match=message):
        build(**options(parts))


def test_attach_is_what_a_trainer_under_construction_does(build: Run, pairs: list[TokenizedPair]) -> None:
    """`attach` adds the callback once, and the run is the one with the callback given to the Trainer."""
    given = build(evaluation=pairs[30:])
    attached = build(evaluation=pairs[30:])
    attached.remove_callback(callback_of(attached))
    callback = SelectionCallback()
    callback.attach(attached)
    callback.attach(attached)
    assert callback_of(attached) is callback
    for trainer in (given, attached):
        trainer.train()
    assert logged(attached) == logged(given)
    with pytest.raises(ValueError, match="one SelectionCallback is enough"):
        SelectionCallback().attach(attached)


def test_a_reference_that_was_left_in_training_mode_has_no_dropout(tokenizer: Any, pairs: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "dropout", seed=5, attention_dropout=0.5)
    labels = PreferenceCollator(tokenizer)(pairs[:4])["labels"]
    expected = RunningReference(model_of(folder).eval())(labels)
    loss = SelectivePreferenceLoss(ref_model=model_of(folder).train())
    assert torch.equal(loss.references[REF_LOGPS](labels), expected)


def test_what_was_frozen_or_unfrozen_since_is_looked_at_again(build: Run, policy_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy: Any = get_peft_model(model_of(policy_folder), config)
    trainer = build(model=policy, loss=SelectivePreferenceLoss(ref_model=policy))
    policy.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight would be trained, too"):
        trainer.train()
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainer.train()


def test_a_collator_that_pads_on_the_left_gives_positions(
    build: Run, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    """The Trainer passes a batch on as it is: to learned positions, padding on the left would be text."""

    def flipped(batch: Any) -> None:
        length = batch["attention_mask"].sum(1, keepdim=True)
        places = torch.arange(batch["attention_mask"].shape[1])
        for name in ("input_ids", "completion_mask", "completion_labels", "attention_mask"):
            if name in batch:
                batch[name] = batch[name].gather(1, (places + length) % len(places))

    class PaddedOnTheLeft(PreferenceCollator):
        positions = False

        def __call__(self, rows: Any) -> dict[str, Any]:
            batch = super().__call__(rows)
            for part in (batch, batch["labels"]):
                flipped(part)
                if self.positions:
                    part["position_ids"] = (part["attention_mask"].cumsum(1) - 1).clamp(min=0)
            return batch

    collator = PaddedOnTheLeft(tokenizer)
    with pytest.raises(ValueError, match="pads on the left, and the policy would count the padding as positions"):
        build(collator=collator)
    collator.positions = True
    build(collator=collator)


def test_dropout_of_the_policy_is_told(build: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(make_model(tmp_path / "dropout", seed=5, attention_dropout=0.5))
    build(model=model)
    assert "switch_off_dropout(model) before the Trainer is made" in caplog.text
    caplog.clear()
    switch_off_dropout(model)
    build(model=model)
    assert "dropout" not in caplog.text


def test_trained_biases_move_a_policy_with_its_adapter_off(
    tokenizer: Any, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    """So such a policy cannot be its own reference; whole layers in `modules_to_save` are switched off with it."""
    from peft import LoraConfig, get_peft_model

    folder = make_model(tmp_path / "biased", seed=1, attention_bias=True)
    labels = PreferenceCollator(tokenizer)(pairs[:4])["labels"]

    def moved(**options: Any) -> float:
        """How far the log-probs with the adapter off have moved once all that is trainable has, in nats."""
        lora_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        model = get_peft_model(model_of(folder), lora_config).eval()
        with model.disable_adapter():
            before = frozen_per_token_logps(model, labels)
        for parameter in model.parameters():
            parameter.data += 0.3 * parameter.requires_grad
        with model.disable_adapter():
            return float((frozen_per_token_logps(model, labels) - before).abs().max())

    with pytest.warns(UserWarning, match="disabling adapter layers with bias"):
        assert moved(bias="all") > 0.1
    assert moved(modules_to_save=["norm", "lm_head"]) == 0.0
    biased = get_peft_model(
        model_of(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="all")
    )
    with pytest.raises(ValueError, match=r"q_proj.base_layer.bias, .* and 1 more would be trained"):
        SelectivePreferenceLoss(ref_model=biased)
    whole = get_peft_model(
        model_of(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["norm"])
    )
    reference = SelectivePreferenceLoss(ref_model=whole).references[REF_LOGPS]
    whole.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight would be trained"):
        reference.check()


def experts(folder: Path, **options: Any) -> Any:
    """A small mixture of experts, loaded from its folder as users load it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=64, **options)).save_pretrained(folder)
    return model_of(folder)


@needs_experts
def test_a_trainer_does_not_load_the_experts_of_a_checkpoint_back(
    build: Run, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    """So resuming and the best model are refused; a run without them trains."""
    options = {"loss": SelectivePreferenceLoss("simpo"), "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = build(model=experts(tmp_path / "experts"), **options)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    lost = trainer.model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False).missing_keys
    assert any("experts" in name for name in lost)
    saved = model_of(checkpoint).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*MixtralForCausalLM \(its experts\)"):
        build(model=experts(tmp_path / "experts"), **options).train(resume_from_checkpoint=str(checkpoint))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "evaluation": pairs[30:]}
    with pytest.raises(ValueError, match=r"load_best_model_at_end: .*from_pretrained"):
        build(model=experts(tmp_path / "experts"), **best, **options)
    with pytest.raises(ValueError, match="load-balancing loss"):
        build(model=experts(tmp_path / "balanced", output_router_logits=True), **options)


def test_options_of_the_objects_that_make_no_sense(
    tokenizer: Any, pairs: Any, policy_folder: Path, arguments: Any, store: ReferenceStore
) -> None:
    for make, message in (
        (lambda: SelectivePreferenceLoss("kto"), "objective must be one of"),
        (lambda: SelectivePreferenceLoss(beta=0.0), "beta must be a finite number above 0"),
        (lambda: SelectivePreferenceLoss(ratio=0.4), "a loss has no option ratio; it has beta, discopop_tau,"),
        (lambda: SelectivePreferenceLoss(selection_ratio=40), "40 % is 0.4"),
        (lambda: SelectivePreferenceLoss("dpo", selection_ratio=0.4), "'dpo' does not read selection_ratio"),
        (lambda: SelectivePreferenceLoss(loss_type="sigmod"), "got 'sigmod': did you mean 'sigmoid'"),
        (lambda: SelectivePreferenceLoss(loss_type="hinge", label_smoothing=0.1), "does not read label_smoothing"),
        (lambda: SelectivePreferenceLoss(sft_loss, beta=0.1), "numbers bound already"),
        (lambda: SelectivePreferenceLoss(ref_model="a/name"), "must be a loaded model; got str 'a/name'"),
        (lambda: SelectivePreferenceLoss(non_finite="hide"), "'raise' or 'skip'"),
        (lambda: SelectionCallback(beta=0.1), r"SelectivePreferenceLoss\(beta=...\)"),
        (lambda: SelectionCallback(patience=1), "patience must be at least 2"),
        (lambda: PreferenceCollator(tokenizer, reference_store="folder"), "must be a ReferenceStore"),
        (lambda: SelectivePreferenceTrainer(model=model_of(policy_folder)), "give data_collator"),
        (lambda: SelectionCallback().on_init_end(None, None, None), "call its attach"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            make()
    with pytest.raises(ValueError, match="remove_unused_columns"):
        SelectivePreferenceTrainer(
            model=model_of(policy_folder),
            args=arguments(remove_unused_columns=True),
            processing_class=tokenizer,
            reference_store=store,
            train_dataset=pairs[:4],
        )
    labels = PreferenceCollator(tokenizer)(pairs[:2])["labels"]
    with pytest.raises(TypeError, match="needs the batches of PreferenceCollator"):
        SelectivePreferenceLoss()(None, torch.ones(2, 3), 2)
    with pytest.raises(ValueError, match="there is none"):
        SelectivePreferenceLoss()(torch.zeros(4, labels["input_ids"].shape[1] - 1), labels, 2)


# --- pictures, the page ----------------------------------------------------------------------------------------------


def test_pictures_of_fixed_pairs(build: Run, pairs: list[TokenizedPair], tmp_path: Path) -> None:
    """At each evaluation, without touching what the evaluation reports; in files and in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    options = {"evaluation": {"one": pairs[30:35], "two": pairs[35:]}, "eval_strategy": "steps", "eval_steps": 2}
    drawn = build(callback=SelectionCallback(picture_pairs=2), report_to="tensorboard", **options)
    plain = build(**options)
    for trainer in (drawn, plain):
        trainer.train()
    assert logged(drawn) == logged(plain)
    for name in ("eval_one_loss", "eval_two_loss"):
        assert logged(drawn, name) == logged(plain, name)
    files = sorted((tmp_path / "out" / "selection").iterdir())
    assert [file.name for file in files] == [
        f"step-{n}.{kind}" for n in ("000002", "000004") for kind in ("json", "svg")
    ]
    root = ElementTree.fromstring(files[1].read_text(encoding="utf-8"))
    titles = [text.text for text in root.findall(".//{*}text") if text.get("class") == "title"]
    expected = [f"{pair.place}, {side}" for pair in pairs[30:32] for side in ("chosen", "rejected")]
    assert [title.split(": ")[0] for title in titles] == [title.replace(": ", ":") for title in expected]
    tokens = len(pairs[30].chosen_ids) - pairs[30].chosen_prompt_length
    assert titles[0].endswith(f"{math.ceil(0.4 * tokens)} of {tokens} tokens")
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={IMAGES: 0}).Reload()
    assert [event.step for event in events.Images("selection/pairs")] == [2, 4]


def test_the_script_of_the_page_trains_on_real_pairs(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "adapters" / "hf.md").read_text(encoding="utf-8")
    script = page.split("``` { .python }\n")[1].split("```\n")[0]
    assert 'os.environ["PAIRS"]' in script
    assert len(script.splitlines()) <= 40
    teacher = tmp_path / "teacher"
    model = model_of(shared / "models" / "stories260k")
    torch.manual_seed(0)
    for parameter in model.parameters():  # stands in for a stronger model of the same tokenizer
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(teacher)
    AutoTokenizer.from_pretrained(shared / "models" / "stories260k").save_pretrained(teacher)
    for name, value in {
        "PAIRS": shared / "data" / "gsm8k_pairs.jsonl",
        "MODEL": shared / "models" / "stories260k",
        "REFERENCE": teacher,
        "STEPS": 2,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    exec(compile(script, "hf.md", "exec"), namespace)
    trainer = namespace["trainer"]
    assert len(logged(trainer, "selection/fraction")) >= 2
    assert logged(trainer, "eval_selection/fraction")
    assert list((tmp_path / "runs" / "hf" / "selection").iterdir())
    assert list((tmp_path / "runs" / "hf" / "runs").iterdir())
    assert (tmp_path / "runs" / "hf" / "checkpoint-2" / "trainer_state.json").is_file()
