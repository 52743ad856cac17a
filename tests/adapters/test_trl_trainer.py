"""SelectiveDPOTrainer for real on tiny models: the stock trajectory at ratio 1, one trajectory however a batch is made,
and a clear word on everything that has no meaning under selection."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ranks import run_ranks, run_script
from selective_pref import NonFiniteError, dpo_loss, select, selective_dpo_loss, simpo_loss
from selective_pref_adapters.batch import responses
from selective_pref_adapters.cli import main
from selective_pref_adapters.heads import frozen_per_token_logps, model_per_token_logps
from selective_pref_adapters.pairs import TokenizedPair
from selective_pref_adapters.reference_store import MissingRowsError, ReferenceStore
from selective_pref_adapters.seeing.runs import read_run
from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer, pairs_of
from selective_pref_adapters.trl_trainer import config as trl_config
from selective_pref_adapters.trl_trainer import reference as trl_reference
from selective_pref_adapters.trl_trainer.config import check_trl_version
from tiny import make_mixture, make_model, needs_experts, text_rows, weighted, write_jsonl

Make = Callable[..., SelectiveDPOTrainer]
TRL = tuple(map(int, trl.__version__.split(".")[:2]))
ROWS = text_rows(48)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "report_to": [],
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return {**settings, **changed}


@pytest.fixture
def make(tmp_path: Path, policy_folder: Path, reference_folder: Path) -> Make:
    """A trainer on the shared tiny models; what `given` names goes to the trainer, all else to the configuration."""
    given = {"model", "ref_model", "train_dataset", "eval_dataset", "peft_config", "objective", "compute_metrics"}
    given |= {"data_collator"}

    def build(**changed: Any) -> SelectiveDPOTrainer:
        mine = {name: changed.pop(name) for name in given & changed.keys()}
        model = mine.pop("model", None) or load(policy_folder)
        ref_model = mine.pop("ref_model") if "ref_model" in mine else load(reference_folder)
        return SelectiveDPOTrainer(
            model=model,
            ref_model=ref_model,
            args=SelectiveDPOConfig(**options(tmp_path, **changed)),
            train_dataset=mine.pop("train_dataset", None) or Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(policy_folder),
            **mine,
        )

    return build


def steps_of(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def trained(trainer: Any) -> Any:
    trainer.train()
    return trainer


def forward_calls(model: torch.nn.Module) -> list[int]:
    """A list that grows by one with every call of the model's body."""
    calls: list[int] = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_ratio_1_is_the_stock_trainer_step_by_step(tmp_path: Path, policy_folder: Path, reference_folder: Path) -> None:
    """50 steps: loss, gradient norm and every metric the stock trainer logs, within rounding and without a drift."""
    runs = []
    for trainer, config, more in (
        (DPOTrainer, DPOConfig, {}),
        (SelectiveDPOTrainer, SelectiveDPOConfig, {"selection_ratio": 1.0}),
    ):
        args = config(**options(tmp_path, max_steps=50, per_device_train_batch_size=4, beta=0.1, **more))
        runs.append(
            steps_of(
                trained(
                    trainer(
                        model=load(policy_folder),
                        ref_model=load(reference_folder),
                        args=args,
                        train_dataset=Dataset.from_list(ROWS),
                        processing_class=AutoTokenizer.from_pretrained(policy_folder),
                    )
                )
            )
        )
    stock, ours = runs
    assert len(stock) == len(ours) == 50
    assert stock[0].keys() <= ours[0].keys()
    assert {name.split("/")[0] for name in ours[0].keys() - stock[0].keys()} == {"selection"}
    for name in stock[0]:
        one, two = (torch.tensor([line[name] for line in run], dtype=torch.float64) for run in (stock, ours))
        scale = one.abs().max().clamp(min=1.0)
        assert (one - two).abs().max() < 2e-5 * scale, name
        assert (one - two).mean().abs() < 2e-6 * scale, name
    assert stock[-1]["loss"] < stock[0]["loss"]


def test_the_loss_and_what_is_logged_are_the_core_s(make: Make) -> None:
    trainer = make(selection_ratio=0.3, selection_pool="pair", selection_ties="all", label_smoothing=0.1, beta=0.2)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    out = selective_dpo_loss(
        *responses(
            batch,
            model_per_token_logps(trainer.model, batch),
            frozen_per_token_logps(trainer.ref_model, batch),
        ),
        beta=0.2,
        selection_ratio=0.3,
        pool="pair",
        ties="all",
        label_smoothing=0.1,
    )
    assert torch.equal(trainer.compute_loss(trainer.model, batch), out.loss)
    trainer.log({})
    logged = trainer.state.log_history[-1]
    assert logged["rewards/margins"] == pytest.approx(float((out.chosen_rewards - out.rejected_rewards).mean()))
    selected = out.chosen_selected_rewards - out.rejected_selected_rewards
    assert logged["selection/rewards/margins"] == pytest.approx(float(selected.mean()))
    assert logged["num_tokens"] == int(batch["attention_mask"].sum())
    names = {"fraction", "threshold", "tied_fraction", "nonfinite_rows", "empty_rows"}
    assert {f"selection/{name}" for name in names} <= logged.keys()


def test_one_trajectory_however_the_batch_is_made(make: Make, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    ways: dict[str, dict[str, Any]] = {
        "batch of 8": {},
        "1 x 8 accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "checkpointing": {"gradient_checkpointing": True},
        "reentrant checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "padded to 16": {"pad_to_multiple_of": 16},
        "logits": {"fused_head": False},
        "padded rows": {"share_prefix": "off"},
        "filled store": {"precompute_ref_log_probs": True, "reference_store": store},
        "store alone": {"reference_store": store, "ref_model": None},
    }
    runs = {name: steps_of(trained(make(**way))) for name, way in ways.items()}
    first = runs.pop("batch of 8")
    assert len(first) == 4
    for name, run in runs.items():
        for step, (one, two) in enumerate(zip(first, run, strict=True)):
            for metric in ("loss", "grad_norm", "rewards/margins", "selection/rewards/margins", "entropy"):
                where = f"{name}, step {step}, {metric}"
                assert two[metric] == pytest.approx(one[metric], rel=2e-5, abs=2e-6), where


def test_weights_where_nothing_is_selected_get_no_gradient_from_the_head(make: Make) -> None:
    """The fused head is what trains, and sees a gradient for the kept tokens only."""
    trainer = make(selection_ratio=0.4)
    seen: list[torch.Tensor] = []
    trainer.model.lm_head.register_full_backward_hook(lambda _, inputs, outputs: seen.append(outputs[0]))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.compute_loss(trainer.model, batch).backward()
    kept = sum(math.ceil(0.4 * int(row.sum())) for row in batch["completion_mask"])
    completions = int(batch["completion_mask"][:, 1:].sum())
    assert seen[0].shape == (1, completions)  # log-probs of the completion tokens left the head, not logits
    assert int((seen[0] != 0).sum()) == kept


def test_warm_up_lowers_the_ratio_from_1(make: Make) -> None:
    trainer = trained(make(selection_warmup_steps=2, selection_ratio=0.2, eval_dataset=Dataset.from_list(ROWS[:4])))
    fractions = [line["selection/fraction"] for line in steps_of(trainer)]
    assert fractions[0] == 1.0
    assert [line["selection/ratio"] for line in steps_of(trainer)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert steps_of(trainer)[0]["selection/beta"] == pytest.approx(0.01)
    assert fractions[1] > fractions[2]
    reference = trained(make(selection_ratio=0.2))
    assert fractions[2:] == [line["selection/fraction"] for line in steps_of(reference)[2:]]
    trainer.state.global_step = 0
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.state.log_history[-1]["eval_selection/fraction"] < 0.5  # evaluation: the ratio it trains for


def centred_scores(chosen: Any, rejected: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen.per_token_logps.detach(), rejected.per_token_logps.detach()


def test_scores_and_objectives_of_one_s_own(make: Make) -> None:
    runs = {}
    for name in ("alignment", "excess_loss", "random", f"{__name__}:centred_scores", centred_scores):
        trainer = trained(make(scores=name, max_steps=2))
        assert isinstance(trainer.args.scores, str)
        json.dumps(trainer.args.to_dict())
        runs[str(name)] = steps_of(trainer)[-1]["loss"]
    by_name, by_value = list(runs.values())[-2:]
    assert by_name == by_value
    assert len(set(runs.values())) == 4

    def own(chosen: Any, rejected: Any) -> Any:
        return dpo_loss(*select(chosen, rejected, selection_ratio=0.5), beta=0.3)

    config = trained(make(selection_ratio=0.5, beta=0.3, max_steps=2))
    assert steps_of(trained(make(objective=own, max_steps=2)))[-1]["loss"] == steps_of(config)[-1]["loss"]


def test_an_objective_without_a_reference_runs_without_one(make: Make) -> None:
    trainer = make(objective=partial(simpo_loss, beta=2.0, gamma=1.0), ref_model=None)
    assert trainer.ref_model is None
    logged = steps_of(trained(trainer))
    assert logged[-1]["loss"] != logged[0]["loss"]
    assert "selection/rewards/margins" in logged[0]
    assert trainer.evaluate(Dataset.from_list(ROWS[:4]))["eval_loss"] > 0
    with pytest.raises(ValueError, match="reads no reference"):
        make(objective=partial(simpo_loss, beta=2.0, gamma=1.0))


# --- where the reference comes from ----------------------------------------------------------------------------------


def test_a_reference_by_its_folder_is_the_same_as_the_object(make: Make, reference_folder: Path) -> None:
    one, two = (trained(make(ref_model=ref, max_steps=2)) for ref in (load(reference_folder), str(reference_folder)))
    assert steps_of(one)[-1]["loss"] == steps_of(two)[-1]["loss"]


def test_no_reference_is_the_policy_as_it_was(
    make: Make, policy_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the policy was changed after loading; and not where TRL's reading of it from disk would differ."""
    model = load(policy_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make(model=model, ref_model=None)
    assert caplog.text.count("the reference equals the initial policy") == 1
    logged = steps_of(trained(trainer))
    assert logged[0]["loss"] == pytest.approx(math.log(2))
    assert logged[0]["selection/threshold"] == pytest.approx(0.0, abs=1e-5)
    for name, tensor in trainer.ref_model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, trainer.model.state_dict()[name])


def test_only_a_self_reference_warns(
    make: Make, policy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warning = "the reference equals the initial policy"
    quiet: list[dict[str, Any]] = [
        {},
        {"ref_model": None, "selection_ratio": 1.0},
        {"ref_model": None, "scores": "random"},
        {"ref_model": None, "objective": partial(dpo_loss, beta=0.1)},
    ]
    for way in quiet:
        make(**way)
        assert warning not in caplog.text
    own_store = str(tmp_path / "own")
    loud: list[dict[str, Any]] = [
        {"ref_model": load(policy_folder), "reference_store": own_store},
        {"ref_model": None, "reference_store": own_store},
        {"ref_model": None, "reference_store": own_store, "peft_config": LORA},
        {"ref_model": load(policy_folder)},
        {"ref_model": None, "peft_config": LORA},
        {"ref_model": None, "precompute_ref_log_probs": True, "reference_store": str(tmp_path / "s")},
        {"ref_model": None, "objective": partial(selective_dpo_loss, beta=0.1, selection_ratio=0.4)},
    ]
    for way in loud:
        caplog.clear()
        make(**way)
        assert caplog.text.count(warning) == 1
        assert "Give a stronger ref_model" in caplog.text


def test_lora_takes_the_policy_without_its_adapter(make: Make, policy_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)  # TRL seeds the adapter's weights since 1.15 only
    trainer = make(ref_model=None, peft_config=LORA, max_steps=6)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora" not in name}
    trainer.train()
    assert trainer.ref_model is None
    logged = steps_of(trainer)
    assert logged[0]["loss"] == pytest.approx(math.log(2))
    assert abs(logged[-1]["rewards/margins"]) > 1e-6
    for name, parameter in trainer.model.named_parameters():
        assert ("lora" in name) == parameter.requires_grad
        assert "lora" in name or torch.equal(parameter, base[name])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    modes = [module.training for module in trainer.model.modules()]
    with trainer.reference.source().switched():
        assert not any(module.training for module in trainer.model.modules())  # no dropout, whatever disable_dropout is
    store = {"reference_store": str(tmp_path / "store"), "max_steps": 6}
    torch.manual_seed(0)
    stored = make(ref_model=None, peft_config=LORA, precompute_ref_log_probs=True, **store)
    expected = [pytest.approx(line["loss"], abs=1e-6) for line in logged]
    assert [line["loss"] for line in steps_of(trained(stored))] == expected
    assert len(list((tmp_path / "store").iterdir())) == 1
    assert stored.evaluate(Dataset.from_list(text_rows(60)[48:]))["eval_loss"] > 0  # its reference is still there
    assert torch.equal(trainer.reference.logps_of(batch), frozen_per_token_logps(load_fused(policy_folder), batch))
    assert modes == [module.training for module in trainer.model.modules()]


def load_fused(folder: Path) -> Any:
    from selective_pref_adapters.heads import install_fused_head

    model = load(folder).eval()
    install_fused_head(model)
    return model


def test_a_trained_adapter_is_trained_on_against_its_own_copy(make: Make, policy_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = get_peft_model(load(policy_folder), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(load(policy_folder), tmp_path / "adapter", is_trainable=True)
    trainer = make(model=model, ref_model=None)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    start = trainer.reference.logps_of(batch)
    trainer.train()
    assert steps_of(trainer)[0]["loss"] == pytest.approx(math.log(2))
    assert torch.equal(trainer.reference.logps_of(batch), start)
    adapter.eval()
    torch.testing.assert_close(start, frozen_per_token_logps(adapter, batch))
    trainer.save_model(str(tmp_path / "trained"))
    after = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert not all(torch.equal(after[name], before[name]) for name in before)


def test_soft_prompts(make: Make) -> None:
    from peft import PromptTuningConfig

    trainer = trained(make(ref_model=None, peft_config=PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")))
    assert trainer.model.active_peft_config.num_virtual_tokens == 3
    logged = steps_of(trainer)
    assert logged[0]["grad_norm"] > 0
    assert logged[-1]["loss"] != logged[0]["loss"]


def test_the_store_is_filled_once_and_then_serves_every_run(
    make: Make, reference_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = {"precompute_ref_log_probs": True, "reference_store": str(tmp_path / "store")}
    teacher = load(reference_folder)
    calls = forward_calls(teacher)
    sets = {"eval_dataset": {"one": Dataset.from_list(ROWS[:4]), "two": Dataset.from_list(text_rows(60)[48:])}}
    first = make(ref_model=teacher, **store, **sets)
    computed = len(calls)
    assert computed > len(ROWS)  # row by row, each once
    first_log = steps_of(trained(first))
    assert len(calls) == computed  # no forward while it trains
    other = load(reference_folder)
    calls = forward_calls(other)
    second = trained(make(ref_model=other, beta=0.02, selection_ratio=0.2, seed=3, **store, **sets))
    assert second.evaluate()["eval_one_loss"] > 0
    assert not calls  # another β, ratio, seed: nothing is computed again
    alone = trained(make(ref_model=None, reference_store=store["reference_store"], **sets))
    assert alone.ref_model is None
    assert [line["loss"] for line in steps_of(alone)] == [line["loss"] for line in first_log]
    assert "initial policy" not in caplog.text
    online = steps_of(trained(make()))
    assert [line["loss"] for line in online] == [pytest.approx(line["loss"], abs=1e-6) for line in first_log]
    fresh = Dataset.from_list([{"prompt": "w1 ", "chosen": "w2", "rejected": "w3 w4"}])
    calls = forward_calls(first.ref_model)
    assert first.evaluate(fresh)["eval_loss"] > 0  # new rows are computed when they come
    assert len(calls) == 2
    with pytest.raises(MissingRowsError, match="2 of 2 rows"):
        alone.evaluate(Dataset.from_list([{"prompt": "w2 ", "chosen": "w1", "rejected": "w3 w4"}]))


def test_precomputing_without_a_folder_has_one_for_all_runs(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_reference, "DEFAULT_STORE", tmp_path / "home")
    one = steps_of(trained(make(precompute_ref_log_probs=True, output_dir=str(tmp_path / "a"))))
    shards = sorted((tmp_path / "home").rglob("*.safetensors"))
    two = steps_of(trained(make(precompute_ref_log_probs=True, output_dir=str(tmp_path / "b"))))
    assert shards == sorted((tmp_path / "home").rglob("*.safetensors")) != []
    assert [line["loss"] for line in one] == [line["loss"] for line in two]


def test_a_store_that_lacks_rows_or_speaks_another_language_stops_at_construction(
    make: Make, reference_folder: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "store")
    make(reference_store=path, train_dataset=Dataset.from_list(ROWS[:40]))
    with pytest.raises(MissingRowsError, match=r"of 48 pairs .*train, row 4\d.*selective-pref score"):
        make(reference_store=path, ref_model=None)
    with pytest.raises(MissingRowsError, match="of 40 pairs"):  # cut to another length, rows are other rows
        make(reference_store=path, ref_model=None, train_dataset=Dataset.from_list(ROWS[:40]), max_length=9)
    with pytest.raises(ValueError, match="no reference store at"):
        make(reference_store=str(tmp_path / "absent"), ref_model=None)
    space = next(Path(path).iterdir())
    tokenizer_of_another = make_model(tmp_path / "other", seed=1, words=[f"w{24 - n}" for n in range(24)])
    with pytest.raises(ValueError, match=r"tokenizes? differently: id 6 is 'w24'"):
        SelectiveDPOTrainer(
            model=load(tokenizer_of_another),
            args=SelectiveDPOConfig(**options(tmp_path, reference_store=path, reference_space=space.name)),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(tokenizer_of_another),
        )


def test_rows_that_a_collator_cuts_are_stored_as_they_are_trained(make: Make) -> None:
    trainer = make(max_length=7)
    pairs = pairs_of(trainer.train_dataset, trainer.data_collator, "train")
    batch = trainer.data_collator([trainer.train_dataset[3]])
    assert pairs[3].chosen_ids == batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist()
    assert len(pairs[3].rejected_ids) - pairs[3].rejected_prompt_length == int(batch["completion_mask"][1].sum())
    assert isinstance(pairs[0], TokenizedPair)
    assert pairs[3].place == "train, row 3"

    def prompt_too(examples: list[Any]) -> dict[str, Any]:
        batch = trainer.data_collator(examples)
        batch["completion_mask"][:, 0] = 1
        return batch

    pair = pairs_of(trainer.train_dataset, prompt_too, "train")[3]
    assert pair.chosen_mask.tolist() == [True, *pairs[3].chosen_mask.tolist()[1:]]  # a mask of any form is kept


# --- data, evaluation, resuming --------------------------------------------------------------------------------------


def test_conversations_and_text_without_a_prompt(make: Make) -> None:
    def messages(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text.strip()}]

    talk = [
        {
            "prompt": messages("user", row["prompt"]),
            "chosen": messages("assistant", row["chosen"]),
            "rejected": messages("assistant", row["rejected"]),
        }
        for row in ROWS
    ]
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in talk]
    one, two = (steps_of(trained(make(train_dataset=Dataset.from_list(rows)))) for rows in (talk, whole))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    text = steps_of(trained(make()))
    assert text[0]["num_tokens"] != one[0]["num_tokens"]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_both_truncation_modes(make: Make) -> None:
    for mode in ("keep_start", "keep_end"):
        trainer = make(max_length=8, truncation_mode=mode)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
        assert batch["input_ids"].shape[1] == 8
        logged = steps_of(trained(trainer))
        assert math.isfinite(logged[-1]["loss"])
        assert logged[0]["selection/empty_rows"] == 0.0


def test_evaluation_is_the_mean_over_all_pairs_of_each_set(make: Make) -> None:
    sets = {"a": Dataset.from_list(ROWS[:5]), "b": Dataset.from_list(ROWS[5:12])}
    seen = []
    for size in (2, 8):
        trainer = make(eval_dataset=sets, per_device_eval_batch_size=size, eval_strategy="steps", eval_steps=2)
        metrics = trained(trainer).evaluate()
        assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()
        lines = [line for line in trainer.state.log_history if "eval_rewards/margins" in line]
        assert len(lines) == 2 * 3
        seen.append([line["eval_rewards/margins"] for line in lines])
        assert {"eval_entropy", "eval_selection/fraction", "eval_num_tokens"} <= lines[0].keys()
    assert seen[0] == pytest.approx(seen[1], rel=1e-5, abs=1e-7)
    assert steps_of(trainer)[-1]["num_tokens"] > steps_of(trainer)[0]["num_tokens"]


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics_gets_logits(make: Make) -> None:
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"own": 1.0}

    trainer = make(eval_dataset=Dataset.from_list(ROWS[:4]), compute_metrics=metrics)
    assert trainer.evaluate()["eval_own"] == 1.0
    assert shapes[0][-1] == trainer.model.config.vocab_size


def test_a_resumed_run_ends_where_the_whole_one_does(make: Make, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "selection_warmup_steps": 3}
    whole = trained(make(output_dir=str(tmp_path / "whole"), **settings))
    resumed = make(output_dir=str(tmp_path / "resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [line["loss"] for line in steps_of(resumed)] == [line["loss"] for line in steps_of(whole)]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])
    card = (tmp_path / "whole" / "checkpoint-4" / "README.md").parent.parent / "README.md"
    assert "Selective-DPO" in card.read_text()


def test_bf16_autocast_reports_in_float32(make: Make) -> None:
    logged = steps_of(trained(make(bf16=True)))
    exact = steps_of(trained(make()))
    assert logged[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.05)
    assert logged[-1]["loss"] != exact[-1]["loss"]


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_compiled_model_trains_the_same_and_generates_as_before(make: Make, policy_folder: Path) -> None:
    rows = Dataset.from_list(ROWS[:8])  # one batch, and so one shape
    options = {"train_dataset": rows, "eval_dataset": rows, "max_steps": 2}
    plain = trained(make(**options))
    torch._dynamo.reset()
    compiled = trained(make(**options, torch_compile=True, torch_compile_backend="eager"))
    for one, two in zip(steps_of(plain), steps_of(compiled), strict=True):
        for metric in ("loss", "grad_norm", "rewards/margins", "entropy"):
            assert two[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-5), metric
    assert compiled.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)
    torch._dynamo.reset()
    model, fresh = compiled.model.eval(), load(policy_folder).eval()
    assert "forward" not in vars(plain.model)
    twin = copy.deepcopy(plain.model)
    twin.lm_head.weight.data.zero_()
    assert not twin(input_ids=torch.tensor([[5]])).logits.any()
    fresh.load_state_dict(model.state_dict())
    ids = torch.tensor([[0, 0, 6, 7], [0, 8, 9, 5]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for given in ({"attention_mask": (ids != 0).long()}, {}):
        assert torch.equal(model.generate(ids, **given, **options), fresh.generate(ids, **given, **options))


def test_what_a_collator_gives_the_model_is_read(make: Make, tmp_path: Path, policy_folder: Path) -> None:
    """As by the stock trainer; a store cannot hold it, and says so."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(examples)
        return {**batch, "position_ids": 3 * torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    losses = []
    for collator in (collate, None):
        shared = {"data_collator": collator, "train_dataset": Dataset.from_list(ROWS[:8])}
        stock = DPOTrainer(
            model=load(policy_folder),
            args=DPOConfig(**options(tmp_path, max_steps=2, beta=0.5)),
            processing_class=tokenizer,
            **shared,
        )
        ours = make(ref_model=None, max_steps=2, beta=0.5, selection_ratio=1.0, **shared)
        losses.append([steps_of(trained(trainer))[-1]["loss"] for trainer in (stock, ours)])
    for stock_loss, loss in losses:
        assert loss == pytest.approx(stock_loss, rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-2)
    with pytest.raises(ValueError, match="the collator also gives the model position_ids, and a store holds"):
        make(precompute_ref_log_probs=True, reference_store=str(tmp_path / "store"), data_collator=collate)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_every_option_of_dpoconfig_is_read_or_refused(tmp_path: Path) -> None:
    """Whatever version of TRL is installed: a field that is neither would be ignored without a word."""
    other: dict[str, Any] = {"label_smoothing_factor": 0.1}
    general = {f.name for f in dataclasses.fields(DPOConfig.__mro__[2])} - {"label_smoothing_factor"}
    own = {f.name for f in dataclasses.fields(DPOConfig)} - general
    assert own - trl_config._READ <= other.keys(), "a new option of DPOConfig: decide what becomes of it"
    for name, value in other.items():
        with pytest.raises(ValueError, match=rf"{name}=.* has no meaning under selection: \w+"):
            SelectiveDPOConfig(**options(tmp_path, **{name: value}))
    for name, value in {"loss_type": ["ipos"], "ld_alpha": 2.0}.items():  # set later: found when the trainer is made
        args = SelectiveDPOConfig(**options(tmp_path))
        setattr(args, name, value)
        with pytest.raises(ValueError, match=name):
            SelectiveDPOTrainer(model="absent", args=args, train_dataset=Dataset.from_list(ROWS))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"selection_ratio": 40}, r"selection_ratio must be in \(0, 1\].*0\.4"),
        ({"selection_ratio": 0.0}, r"selection_ratio must be in \(0, 1\]"),
        ({"selection_pool": "row"}, "pool must be"),
        ({"selection_ties": "none"}, "ties must be"),
        ({"beta": 0.0}, "beta must be"),
        ({"label_smoothing": 0.5}, "label_smoothing must be"),
        ({"selection_warmup_steps": -1}, "selection_warmup_steps must be"),
        ({"truncation_mode": "middle"}, "truncation_mode must be"),
        ({"scores": "entropy"}, "scores must be one of .*alignment.*module:function"),
        ({"scores": "absent.module:f"}, "No module named"),
        ({"scores": "math:absent"}, "has no attribute"),
        ({"scores": lambda chosen, rejected: None}, "imported by name.*objective="),
        ({"sync_ref_model": True, "reference_store": "s"}, "sync_ref_model changes the reference"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model changes the reference"),
        ({"reference_space": "a"}, "give reference_store"),
    ],
)
def test_options_out_of_range(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveDPOConfig(**options(tmp_path, **changed))


def test_what_the_trainer_refuses(make: Make, policy_folder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    with pytest.raises(TypeError, match=r"must be a SelectiveDPOConfig.*DPOConfig"):
        SelectiveDPOTrainer(model="m", args=DPOConfig(**options(tmp_path)), train_dataset=rows)
    for name, value in {"beta": 0.1, "selection_ratio": 0.2, "scores": "random", "loss_type": ["ipo"]}.items():
        with pytest.raises(ValueError, match=f"{name} is not read beside objective="):
            make(objective=partial(dpo_loss, beta=0.1), **{name: value})
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    for way in ({"reference_store": str(tmp_path / "s")}, {"precompute_ref_log_probs": True}):
        with pytest.raises(ValueError, match=r"not supported with IterableDataset: .* Give a datasets\.Dataset"):
            make(train_dataset=stream, **way)
    images = rows.add_column("images", [[1]] * len(rows))
    with pytest.raises(ValueError, match="vision-related"):  # TRL's own words
        make(train_dataset=images)
    with pytest.raises(ValueError, match="images cannot have stored reference log-probs"):
        make(train_dataset=images, reference_store=str(tmp_path / "s"))
    model = load(policy_folder)
    with pytest.raises(ValueError, match="are the same object"):
        make(model=model, ref_model=model)
    other = make_model(tmp_path / "other", seed=2, words=[f"w{24 - n}" for n in range(24)])
    for ref_model in (load(other), str(other)):
        with pytest.raises(ValueError, match="tokenize differently: id 6 is 'w0' for the policy and 'w24'"):
            make(ref_model=ref_model)
    small = load(make_model(tmp_path / "small", seed=2, words=["w0"]))
    small.config._name_or_path = ""
    with pytest.raises(ValueError, match=rf"token id {len(tokenizer) - 1} .*outside the reference's vocabulary of 7"):
        make(ref_model=small)
    trained(make(train_dataset=stream, max_steps=1))  # without a store a stream is fine


def test_rows_that_are_left_out_are_counted_and_none_left_is_an_error(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"prompt": "w1 " * 70, "chosen": "w2", "rejected": "w3"}] * 3
    make(train_dataset=Dataset.from_list(ROWS[:5] + long))
    assert "train: 3 of 8 pairs left out: no completion left after truncation" in caplog.text
    store = {"reference_store": str(tmp_path / "store")}
    for way in ({"train_dataset": Dataset.from_list(long)}, {"eval_dataset": Dataset.from_list(long)}):
        for more in ({}, store):
            with pytest.raises(ValueError, match=r"none of 3 pairs of the \w+ data set can be trained on"):
                make(**way, **more)
    with pytest.raises(ValueError, match="the eval data set holds no rows"):
        make(eval_dataset=Dataset.from_list(ROWS).select([]))


def test_ids_that_the_policy_does_not_have_are_refused(make: Make, tmp_path: Path, policy_folder: Path) -> None:
    small = load(make_model(tmp_path / "small", seed=2, words=["w0"]))
    with pytest.raises(ValueError, match=r"token id \d+ is outside the policy's vocabulary of 7"):
        make(model=small, ref_model=load(policy_folder))


def test_what_was_frozen_or_unfrozen_since_is_looked_at_again(make: Make) -> None:
    trainer = make(ref_model=None, peft_config=LORA)
    trainer.model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight would be trained, too"):
        trainer.train()
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainer.train()


def test_the_default_length_is_what_all_models_can_read(make: Make, tmp_path: Path) -> None:
    assert make().args.max_length == make().data_collator.max_length == 64
    short = make_model(tmp_path / "short", seed=2, max_position_embeddings=32)
    for ref_model in (str(short), load(short)):
        assert make(ref_model=ref_model).args.max_length == 32
        with pytest.raises(ValueError, match=r"max_length 33 is longer than the reference can read \(32 tokens\)"):
            make(ref_model=ref_model, max_length=33)
    long = make_model(tmp_path / "long", seed=2, max_position_embeddings=8192)
    assert make(model=load(long), ref_model=load(long)).args.max_length == 4096  # the paper's
    with pytest.raises(ValueError, match=r"max_length 65 is longer than the policy can read \(64 tokens\)"):
        make(max_length=65)


def test_rows_that_were_scored_at_another_length_name_it(make: Make, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    make(reference_store=store)
    with pytest.raises(MissingRowsError, match=r"cut to max_length 7 here; fill the store with the same") as caught:
        make(reference_store=store, ref_model=None, max_length=7)
    assert "The store was filled with max_length 64 (keep_start)." in str(caught.value)


def test_what_would_learn_nothing_is_refused_before_the_first_step(make: Make, policy_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no trainable parameter: call requires_grad_\(True\)"):
        make(model=load(policy_folder).requires_grad_(False))


@pytest.mark.skipif(TRL < (1, 15), reason="TRL 1.14 has the adapters of a frozen model learn")
def test_frozen_adapters_are_refused_before_the_first_step(make: Make, policy_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no trainable parameter: .*is_trainable=True"):
        make(model=get_peft_model(load(policy_folder), LORA).requires_grad_(False), ref_model=None)


def test_a_lora_that_trains_more_than_adapters_is_no_reference(make: Make, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "biased", seed=1, attention_bias=True)
    biased = LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    for way in ({}, {"precompute_ref_log_probs": True, "reference_store": str(tmp_path / "store")}):
        with pytest.raises(ValueError, match=r"q_proj\.base_layer\.bias, .* would be trained, too"):
            make(model=load(folder), ref_model=None, peft_config=biased, **way)
    assert not (tmp_path / "store").exists()
    logged = steps_of(trained(make(model=load(folder), peft_config=biased, max_steps=1)))  # beside a reference it may
    assert logged[0]["grad_norm"] > 0


def test_generation_settings_that_cannot_be_saved_are_repaired(
    make: Make, policy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As models are shipped with them: greedy decoding, and a temperature that it does not read."""
    folder = tmp_path / "shipped"
    shutil.copytree(policy_folder, folder)
    settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    trainer = trained(make(model=str(folder), max_steps=1))
    assert "temperature are not read" in caplog.text
    trainer.save_model(str(tmp_path / "saved"))
    assert "temperature" not in json.loads((tmp_path / "saved" / "generation_config.json").read_text())


def test_a_reference_that_was_left_in_training_mode_has_no_dropout(make: Make, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "dropout", seed=5, attention_dropout=0.5)
    trainer = make(ref_model=load(folder).train(), disable_dropout=False)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert torch.equal(trainer.reference.logps_of(batch), frozen_per_token_logps(load_fused(folder), batch))


def experts(policy_folder: Path) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(policy_folder)),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config)


@needs_experts
def test_a_mixture_of_experts_is_refused_where_a_part_would_be_lost(
    make: Make, policy_folder: Path, tmp_path: Path
) -> None:
    trainer = trained(make(model=experts(policy_folder), router_aux_loss_coef=0.0, max_steps=1))
    assert math.isfinite(steps_of(trainer)[0]["loss"])
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*its experts"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match=r"load_best_model_at_end: .*its experts"):
        make(
            model=experts(policy_folder),
            router_aux_loss_coef=0.0,
            eval_dataset=Dataset.from_list(ROWS[:4]),
            save_steps=2,
            **best,
        )


@pytest.mark.parametrize("filtered", [True, False])
def test_nan_stops_the_run_before_the_weights_change(make: Make, reference_folder: Path, filtered: bool) -> None:
    teacher = load(reference_folder)
    with torch.no_grad():
        teacher.lm_head.weight[20] = math.nan
    trainer = make(ref_model=teacher, logging_nan_inf_filter=filtered)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 1: .*ref_per_token_logps.*rows"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    with pytest.raises(NonFiniteError, match="evaluation after step 0: "):
        make(ref_model=teacher, eval_dataset=Dataset.from_list(ROWS[:8])).evaluate()
    lenient = make(ref_model=teacher, non_finite="ignore", max_steps=1, logging_nan_inf_filter=False)
    trained(lenient)
    assert lenient.state.log_history[0]["selection/nonfinite_rows"] == 1.0


def test_an_unsupported_trl_says_so_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1.14.0", "1.16.0", "1.16.9"):
        check_trl_version(version)
    for version in ("1.13.2", "1.17.0", "2.0.0"):
        with pytest.raises(ImportError, match=rf"supports trl >=1\.14,<1\.17; installed is {version}.*pip install"):
            check_trl_version(version)
    monkeypatch.setattr(trl, "__version__", "1.13.2")
    with pytest.raises(ImportError, match=r"installed is 1\.13\.2"):
        importlib.reload(trl_config)
    pyproject = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"trl>={trl_config.OLDEST_TRL},<{trl_config.FIRST_UNTRIED_TRL}"' in pyproject


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_trains_from_a_recipe(
    policy_folder: Path, reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {policy_folder}\nref_model_name_or_path: {reference_folder}\ndataset_name: {pairs}\n"
        "use_cpu: true\nbf16: false\nmax_steps: 2\nlogging_steps: 1\nreport_to: none\nselection_ratio: 0.25\n"
        "use_peft: true\nlora_target_modules: [q_proj, v_proj]\neval_strategy: no\nsave_strategy: no\n"
    )
    out = tmp_path / "out"
    assert main(["dpo", "--config", str(recipe), "--output_dir", str(out), "--beta", "0.125"]) == 0
    assert (out / "adapter_model.safetensors").is_file()
    args = torch.load(out / "training_args.bin", weights_only=False)
    assert (args.beta, args.selection_ratio, args.max_steps) == (0.125, 0.25, 2)
    capsys.readouterr()
    flags = ["dpo", "--config", str(recipe), "--output_dir", str(out)]
    for more, message in (
        (["--eval_strategy", "epoch"], "no split 'test', only ['train']"),
        (["--dataset_name", str(recipe)], "cannot read"),
        (["--selection_ratio", "40"], "selection_ratio must be in (0, 1]"),
        (["--config", "absent.yaml"], "nor one of the recipes that come with it (trl_paper)"),
        (["--selction_ratio", "0.4"], "--selction_ratio"),
    ):
        words = [*flags, *more] if more[0] != "--config" else ["dpo", *more]
        assert main(words) == 1
        assert message in capsys.readouterr().err
    recipe.write_text(recipe.read_text() + "selction_ratio: 0.4\n")
    assert main(flags) == 1
    assert "there is no option 'selction_ratio': did you mean 'selection_ratio'?" in capsys.readouterr().err


def test_words_that_yaml_reads_as_true_or_false(tmp_path: Path) -> None:
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from selective_pref_adapters.trl_trainer.command import SelectiveDPOArguments, with_config_file

    recipe = tmp_path / "recipe.yaml"

    def read(text: str) -> SelectiveDPOConfig:
        recipe.write_text(text)
        parser = TrlParser((SelectiveDPOArguments, SelectiveDPOConfig, ModelConfig, DatasetMixtureConfig))
        words = with_config_file(parser, ["--config", str(recipe), "--output_dir", str(tmp_path), "--use_cpu"])
        return parser.parse_args_and_config(args=words)[1]

    args = read("report_to: off\nsave_strategy: no\nmax_length: no\nreference_store: no\nbf16: no\nfused_head: off\n")
    assert (args.report_to, args.save_strategy, args.max_length) == ([], "no", None)
    assert (args.reference_store, args.bf16, args.fused_head) == (None, False, False)
    assert read("gradient_checkpointing: yes\nbf16: no\n").gradient_checkpointing
    for line, message in (
        ("eval_strategy: yes", "recipe.yaml: eval_strategy: expected one of no, steps, epoch, got true"),
        ("learning_rate: no", "learning_rate: expected a value, got false"),
    ):
        with pytest.raises(ValueError, match=message):
            read(line)


def test_the_paper_s_recipe(tmp_path: Path) -> None:
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from selective_pref_adapters.trl_trainer.command import SelectiveDPOArguments, with_config_file

    parser = TrlParser((SelectiveDPOArguments, SelectiveDPOConfig, ModelConfig, DatasetMixtureConfig))
    words = with_config_file(parser, ["--config", "trl_paper.yaml", "--output_dir", str(tmp_path), "--use_cpu"])
    settings = Path(words[-1])
    assert words[-2] == "--deepspeed"
    assert settings.parent.name == "dpo"
    script, args, model, _ = parser.parse_args_and_config(args=[*words[:-2], "--deepspeed", ""])
    assert (args.beta, args.selection_ratio, args.num_train_epochs, args.max_length) == (0.01, 0.4, 2, 4096)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 1280
    assert args.bf16
    assert model.dtype == "bfloat16"
    assert script.ref_model_name_or_path is None
    assert json.loads(settings.read_text())["zero_optimization"]["stage"] == 3


def test_the_two_name_change_of_the_page(
    policy_folder: Path, reference_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's stock script runs; with its two names changed it runs with a selection. (CPU options are added.)"""
    page = (Path(__file__).resolve().parents[2] / "docs" / "adapters" / "trl.md").read_text(encoding="utf-8")
    stock = page.split('title="dpo.py" }\n', 1)[1].split("```", 1)[0]
    diff = page.split("```diff\n", 1)[1].split("```", 1)[0].splitlines()
    ours = stock
    for old, new in pairwise(diff):
        if old.startswith("-") and new.startswith("+"):
            assert ours.count(old[1:]) == 1
            ours = ours.replace(old[1:], new[1:])
    assert "DPOConfig" not in ours.replace("SelectiveDPOConfig", "")
    assert "DPOTrainer" not in ours.replace("SelectiveDPOTrainer", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "POLICY").symlink_to(policy_folder)
    (tmp_path / "STRONGER_MODEL").symlink_to(reference_folder)
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    for script, name in ((stock, "DPOTrainer"), (ours, "SelectiveDPOTrainer")):
        cpu = 'output_dir="runs/dpo", use_cpu=True, bf16=False, max_steps=2, logging_steps=1, report_to="none",'
        scope: dict[str, Any] = {}
        exec(script.replace('output_dir="runs/dpo",', cpu), scope)
        assert type(scope["trainer"]).__name__ == name
        assert (tmp_path / "runs" / "dpo" / "model.safetensors").is_file()
        assert ("selection/fraction" in steps_of(scope["trainer"])[0]) == (name != "DPOTrainer")


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_processes(tmp_path: Path, policy_folder: Path, reference_folder: Path, make: Make) -> None:
    """One launch: DDP, ZeRO-2, ZeRO-3, bf16, LoRA, the store, weights, experts, and NaN on one rank alone.

    Two processes share prompts; the one that they are compared with computes padded rows.
    """
    script, log = Path(__file__).with_name("trl_two_processes.py"), tmp_path / "log"
    mixture = make_mixture(tmp_path / "mixture", seed=1)
    codes = run_ranks(run_script, script, policy_folder, reference_folder, mixture, tmp_path, log=log)
    printed = log.read_text()
    assert codes == [0, 0], printed[-8000:]
    lines = {name: line for name, line in (json.loads(text) for text in (tmp_path / "runs.jsonl").open())}
    single = trained(make(eval_dataset=Dataset.from_list(ROWS[:5]), share_prefix="off"))
    single.evaluate()
    alone, evaluated = steps_of(single), single.state.log_history[-1]
    assert all(line["shared"] >= 4 for line in lines.values() if "shared" in line)
    sharded = [f"zero3{case}" for case in ("", " store", " filled", " resumed")]
    for name in ("ddp", "ddp checkpointing", "zero2", "store", *sharded):
        for step, (one, two) in enumerate(zip(alone, lines[name]["steps"], strict=True)):
            counted = () if name == "zero3 resumed" else ("num_tokens",)  # TRL counts from 0 again
            for metric in ("loss", "grad_norm", "rewards/margins", "entropy", "selection/fraction", *counted):
                assert two[metric] == pytest.approx(one[metric], rel=2e-5, abs=2e-6), (name, step, metric)
        for metric in (
            "loss",
            "rewards/margins",
            "selection/fraction",
            "entropy",
        ):  # 5 pairs on 2 processes: 3 repeated
            expected = pytest.approx(evaluated[f"eval_{metric}"], rel=2e-4, abs=2e-6)
            assert lines[name]["eval"][f"eval_{metric}"] == expected, (name, metric)
    same_batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    for name, options, metrics in (
        ("weights", {"train_dataset": Dataset.from_list(weighted(ROWS)), "use_weighting": True}, ("pair_weight",)),
        ("experts", {"model": load(mixture), "router_aux_loss_coef": 0.5}, ("aux_loss",)),
    ):
        steps = steps_of(trained(make(**same_batches, **options)))
        for step, (one, two) in enumerate(zip(steps, lines[name]["steps"], strict=True)):
            for metric in ("loss", "grad_norm", "rewards/margins", *metrics):
                assert two[metric] == pytest.approx(one[metric], rel=5e-5, abs=5e-6), (name, step, metric)
    stored, filled = (ReferenceStore.open(tmp_path / name) for name in ("store", "filled"))
    assert filled.space.identity == stored.space.identity  # by a whole reference, and by the parts of one
    exact = [line["loss"] for line in lines["zero3"]["steps"]]
    for name in ("zero3 bf16", "zero3 bf16 store"):
        assert [line["loss"] for line in lines[name]["steps"]] == pytest.approx(exact, rel=2e-2)
    for name in ("zero3 self", "zero3 lora"):
        assert lines[name]["steps"][0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
        assert lines[name]["steps"][-1]["grad_norm"] > 0
    assert all(line["sharded"] == name.startswith("zero3") for name, line in lines.items() if "sharded" in line)
    assert lines["zero3 bf16 store"]["bits"]
    sizes = [[len(single.train_dataset[row][f"{side}_ids"]) for side in ("chosen", "rejected")] for row in range(3)]
    assert lines["zero3"]["kept"] == [pytest.approx([math.ceil(0.4 * size) for size in pair]) for pair in sizes]
    assert lines["nan"] == {"raised": [True, True], "own": [False, True]}
    assert printed.count("the reference equals the initial policy") == 2  # once a run, on the first process
    assert "served by its logits" not in printed


def test_nothing_is_logged_twice(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="selective_pref_adapters"):
        trained(make())
    assert not [record for record in caplog.records if record.name.startswith("selective_pref_adapters")]


def test_a_store_may_be_shared_with_one_s_own_code(make: Make, tmp_path: Path, reference_folder: Path) -> None:
    """What the trainer stores, `ReferenceStore.lookup` gives; the values are the reference's."""
    trainer = make(reference_store=str(tmp_path / "store"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    batch.pop("ref_per_token_logps_bits")
    stored = ReferenceStore.open(tmp_path / "store").lookup(batch)
    running = frozen_per_token_logps(load_fused(reference_folder), batch)
    torch.testing.assert_close(stored, running, rtol=1e-5, atol=1e-5)


# --- the selection of fixed pairs ------------------------------------------------------------------------------------


def test_the_selection_of_fixed_pairs_is_kept_at_each_evaluation(make: Make, tmp_path: Path) -> None:
    """As the core selects, in files and in TensorBoard, without touching what the run computes."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    held_out = {"one": Dataset.from_list(ROWS[:7]), "two": Dataset.from_list(ROWS[7:9])}
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    plain = steps_of(trained(make(eval_dataset=dict(held_out), **evaluated)))
    changed = {"picture_pairs": 3, "report_to": ["tensorboard"]}
    (tmp_path / "out" / "selection").mkdir(parents=True)
    (tmp_path / "out" / "selection" / "step-000090.json").write_text("of an earlier run")
    trainer = trained(make(eval_dataset=dict(held_out), **evaluated, **changed))
    assert steps_of(trainer) == plain
    trainer.save_state()
    visits = read_run(tmp_path / "out").visits
    assert [visit.step for visit in visits] == [2, 4]
    batch = trainer.data_collator([trainer.eval_dataset["one"][row] for row in range(3)])
    trainer.model.eval()
    logps = [frozen_per_token_logps(model, batch) for model in (trainer.model, trainer.ref_model)]
    out = selective_dpo_loss(*responses(batch, *logps), beta=0.01, selection_ratio=0.4)
    assert len(visits[-1].pairs) == 3
    for row, pair in enumerate(visits[-1].pairs):
        assert pair["place"].endswith(f", row {row}")
        for side in ("chosen", "rejected"):
            kept = getattr(out, f"{side}_weights")[row][getattr(out, side).mask[row]]
            assert pair[side]["weights"] == pytest.approx(kept.tolist())
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={IMAGES: 0}).Reload()
    assert [event.step for event in events.Images("selection/pairs")] == [2, 4]


def test_a_negative_number_of_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="picture_pairs must be at least 0; got -1"):
        SelectiveDPOConfig(**options(tmp_path, picture_pairs=-1))
