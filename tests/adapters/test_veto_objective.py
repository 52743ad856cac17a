"""`teacher_veto` by name: the objective, and the three trainers that take it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref import teacher_veto_loss
from selective_pref_adapters.batch import responses
from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.heads import frozen_per_token_logps
from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectivePreferenceLoss
from selective_pref_adapters.objectives import TeacherVeto, loss_of_batch, make_objective, needs_reference
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import collate, read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space
from tiny import text_rows, write_jsonl

ROWS = text_rows(16)


def batch(rows: int = 4, width: int = 6) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """A mask, and log-probs of a policy, a teacher and a start."""
    torch.manual_seed(0)
    mask = torch.ones(rows, width + 1, dtype=torch.int64)
    mask[:, :2] = 0
    return {"completion_mask": mask}, *(-3 * torch.rand(rows, width) for _ in range(3))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def store(tmp_path: Path, policy_folder: Path, reference_folder: Path) -> str:
    """Log-probs of the teacher and of the start."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    pairs, _ = tokenize_pairs(read_rows(write_jsonl(tmp_path / "rows.jsonl", ROWS)), tokenizer, max_length=64)
    for folder in (policy_folder, reference_folder):
        model = load(folder)
        space = reference_space(model, tokenizer, label=folder.name)
        fill_store(ReferenceStore.create(tmp_path / "store", space), pairs, model, pad_token_id=0, progress=False)
    return str(tmp_path / "store")


def expected_loss(policy_folder: Path, reference_folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> float:
    """Of the policy as it is, in the core's own words."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    pairs, _ = tokenize_pairs(read_rows(write_jsonl(tmp_path / "some.jsonl", rows)), tokenizer, max_length=64)
    inputs = collate(pairs, 0)
    start, teacher = (frozen_per_token_logps(load(folder), inputs) for folder in (policy_folder, reference_folder))
    return float(teacher_veto_loss(*responses(inputs, start, teacher), start_per_token_logps=start.chunk(2)).loss)


def test_the_name_is_the_core_s_loss_with_its_numbers() -> None:
    rows, logps, teacher, start = batch()
    objective = make_objective("teacher_veto", veto_threshold=0.5, veto_floor=1.0, veto_sides="labelled")
    out = loss_of_batch(objective, rows, logps, teacher, start)
    expected = teacher_veto_loss(
        *responses(rows, logps, teacher),
        start_per_token_logps=start.chunk(2),
        threshold=0.5,
        floor=1.0,
        sides="labelled",
    )
    torch.testing.assert_close(out.losses, expected.losses)
    assert needs_reference(objective)
    some = loss_of_batch(objective, rows, logps, teacher, start, pairs=torch.tensor([False, True]))
    torch.testing.assert_close(some.losses, expected.losses[1:])
    with pytest.raises(ValueError, match="the policy's own start as scoring_ref_model"):
        loss_of_batch(objective, rows, logps, teacher)


@pytest.mark.parametrize(("far", "warned"), [(0.0, False), (0.05, False), (0.3, True)])
def test_a_teacher_that_vetoes_much_is_warned_of_once(far: float, warned: bool, caplog: Any) -> None:
    rows, logps, _, start = batch(64, 130)
    teacher = torch.where(torch.rand(start.shape) < far, start - 2, start)
    objective = make_objective("teacher_veto")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            loss_of_batch(objective, rows, logps, teacher, start)
    assert ["writes in another style" in record.getMessage() for record in caplog.records] == [True] * warned


def test_the_loop_takes_it(store: str, tmp_path: Path, policy_folder: Path, reference_folder: Path) -> None:
    def run(name: str, **options: Any) -> list[dict[str, Any]]:
        config = TrainConfig(
            model=str(policy_folder),
            pairs=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / name),
            objective="teacher_veto",
            eval_fraction=0.0,
            batch_size=16,
            max_steps=2,
            logging_steps=1,
            max_length=64,
            learning_rate=1e-3,
            **options,
        )
        return train(config).metrics

    running = run("running", ref_model=str(reference_folder), scoring_ref_model=str(policy_folder))
    spaces = {"reference_space": reference_folder.name, "scoring_reference_space": policy_folder.name}
    stored = run("stored", reference_store=store, scoring_reference_store=store, **spaces)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (running, stored)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] == pytest.approx(expected_loss(policy_folder, reference_folder, ROWS, tmp_path), rel=1e-4)
    assert losses[0][1] != losses[0][0]
    with pytest.raises(ValueError, match="the policy's own start as scoring_ref_model"):
        run("without", ref_model=str(reference_folder))
    with pytest.raises(ValueError, match="does not read beta"):
        run("beta", ref_model=str(reference_folder), scoring_ref_model=str(policy_folder), beta=0.5)


def test_the_hugging_face_trainer_takes_it(
    store: str, tmp_path: Path, policy_folder: Path, reference_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    pairs, _ = tokenize_pairs(read_rows(tmp_path / "rows.jsonl"), tokenizer, max_length=64)
    stores = [ReferenceStore.open(store, folder.name) for folder in (reference_folder, policy_folder)]
    collator = PreferenceCollator(tokenizer, reference_store=stores[0], scoring_reference_store=stores[1])
    labels = collator(pairs[:4])["labels"]
    logps = frozen_per_token_logps(load(policy_folder), labels)
    expected = expected_loss(policy_folder, reference_folder, ROWS[:4], tmp_path)
    loss = SelectivePreferenceLoss("teacher_veto")
    assert float(loss(logps, labels, 4)) == pytest.approx(expected, rel=1e-4)
    before = loss._bound().seen[0]
    loss(logps, labels, 4)
    assert loss._bound().seen[0] == before + int((labels["completion_mask"][:, 1:] != 0).sum())  # over all batches
    plain = PreferenceCollator(tokenizer, reference_store=stores[0])(pairs[:4])["labels"]
    with pytest.raises(ValueError, match="the policy's own start as scoring_ref_model"):
        loss(logps, plain, 4)
    both = SelectivePreferenceLoss(
        "teacher_veto", ref_model=load(reference_folder), scoring_ref_model=load(policy_folder)
    )
    running = both(logps, PreferenceCollator(tokenizer)(pairs[:4])["labels"], 4)
    assert float(running) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("teacher_runs", [True, False])
def test_trl_takes_it(
    teacher_runs: bool, store: str, tmp_path: Path, policy_folder: Path, reference_folder: Path
) -> None:
    from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer

    def trainer(**options: Any) -> Any:
        stored = {} if teacher_runs else {"reference_store": store, "reference_space": reference_folder.name}
        args = SelectiveDPOConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=16,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            max_length=64,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **stored,
            **options,
        )
        return SelectiveDPOTrainer(
            model=load(policy_folder),
            ref_model=load(reference_folder) if teacher_runs else None,
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(policy_folder),
            objective="teacher_veto",
        )

    start = {"scoring_reference_store": store, "scoring_reference_space": policy_folder.name}
    made = trainer(**start)
    assert isinstance(made.objective, TeacherVeto)
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    expected = expected_loss(policy_folder, reference_folder, ROWS, tmp_path)
    assert losses[0] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="the policy's own start as scoring_ref_model"):
        trainer().train()
    with pytest.raises(ValueError, match="give scoring_reference_store, too"):
        trainer(scoring_reference_space="start")
