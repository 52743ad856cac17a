"""Supervised training: rows of a prompt and one answer, and the chosen side of pairs, through every door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from selective_pref import excess_loss_scores, select, sft_loss
from selective_pref_adapters.cli import main
from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.deepspeed_loop.engine import loading
from selective_pref_adapters.deepspeed_loop.sampling import FILLER, evaluation_batches
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import (
    RowError,
    TokenizedPair,
    collate,
    parse_columns,
    preference_row,
    read_rows,
    tokenize_pairs,
)
from selective_pref_adapters.seeing.report import films, findings
from selective_pref_adapters.seeing.runs import read_run
from selective_pref_adapters.seeing.shown import shown_pairs
from selective_pref_adapters.seeing.terminal import selection_text
from small_tokenizers import small_tokenizer
from tiny import text_rows, write_jsonl

NUMBERS = range(10)
Q = [f"How do I boil {n} eggs?" for n in NUMBERS]
A = [f"In boiling water, {n + 5} minutes." for n in NUMBERS]


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


ASKED = [([turn("user", Q[n])], [turn("assistant", A[n])]) for n in NUMBERS]
UNDER_SYSTEM = [([turn("system", "You cook."), *asked], answer) for asked, answer in ASKED]
SEVERAL = [
    ([turn("user", "Hi")], [turn("assistant", "Hello."), turn("user", Q[n]), turn("assistant", A[n])]) for n in NUMBERS
]
SCHEMAS: dict[str, tuple[str, Callable[[int], dict[str, Any]], list[tuple[Any, Any]]]] = {
    "completion": (
        "prompt-completion",
        lambda n: {"prompt": Q[n] + " ", "completion": A[n]},
        [(Q[n] + " ", A[n]) for n in NUMBERS],
    ),
    "completion, messages": (
        "prompt-completion",
        lambda n: {"prompt": [turn("user", Q[n])], "completion": [turn("assistant", A[n])]},
        ASKED,
    ),
    "response": (
        "prompt-response",
        lambda n: {"prompt": Q[n] + " ", "response": A[n]},
        [(Q[n] + " ", A[n]) for n in NUMBERS],
    ),
    "wanted answers": (
        "prompt-completion",
        lambda n: {"prompt": Q[n] + " ", "completion": A[n], "label": True},
        [(Q[n] + " ", A[n]) for n in NUMBERS],
    ),
    "alpaca": (
        "Alpaca",
        lambda n: {"instruction": "How do I boil", "input": f"{n} eggs?", "output": A[n], "text": "all of it"},
        [([turn("user", f"How do I boil\n{n} eggs?")], answer) for n, (_, answer) in enumerate(ASKED)],
    ),
    "dolly": (
        "Alpaca",
        lambda n: {"instruction": Q[n], "context": "" if n else "Eggs.", "response": A[n], "category": "qa"},
        [([turn("user", f"{Q[0]}\nEggs.")], ASKED[0][1]), *ASKED[1:]],
    ),
    "llama-factory": (
        "Alpaca",
        lambda n: {"instruction": Q[n], "input": "", "output": A[n], "system": "You cook.", "history": []},
        UNDER_SYSTEM,
    ),
    "gsm8k": ("question-answer", lambda n: {"question": Q[n], "answer": A[n]}, ASKED),
    "open orca": (
        "question-response",
        lambda n: {"id": "1", "system_prompt": "You cook.", "question": Q[n], "response": A[n]},
        UNDER_SYSTEM,
    ),
    "query": ("query-response", lambda n: {"query": Q[n], "response": A[n]}, ASKED),
    "messages": ("messages", lambda n: {"messages": [turn("user", Q[n]), turn("assistant", A[n])]}, ASKED),
    "ultrachat": (
        "messages",
        lambda n: {"prompt": "Hi", "prompt_id": "1", "messages": SEVERAL[n][0] + SEVERAL[n][1]},
        SEVERAL,
    ),
    "sharegpt": (
        "ShareGPT",
        lambda n: {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": Q[n]},
                {"from": "gpt", "value": A[n]},
            ],
            "system": "",
        },
        SEVERAL,
    ),
    "pairs": (
        "TRL standard",
        lambda n: {"prompt": Q[n], "chosen": A[n], "rejected": "No."},
        [(Q[n], A[n]) for n in NUMBERS],
    ),
    "pairs without a rejected side": ("question-chosen", lambda n: {"question": Q[n], "chosen": A[n]}, ASKED),
    "pairs, openai": (
        "OpenAI preference",
        lambda n: {
            "input": {"messages": [turn("user", Q[n])]},
            "preferred_output": [turn("assistant", A[n])],
            "non_preferred_output": [turn("assistant", "No.")],
        },
        ASKED,
    ),
    "pairs, a conversation": (
        "TRL conversational, implicit prompt",
        lambda n: {"chosen": [turn("user", Q[n]), turn("assistant", A[n])], "rejected": None},
        ASKED,
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_ten_rows_of_one_answer_are_read_as_a_person_reads_them(tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    schema, row, expected = SCHEMAS[name]
    rows = [row(n) for n in NUMBERS]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    for file in ("rows.jsonl", "rows.parquet"):
        notes: list[str] = []
        read = read_rows(tmp_path / file, notes=notes, chosen_only=True)
        assert [(one.prompt, one.chosen, one.rejected) for one in read] == [(*two, None) for two in expected], file
        assert notes == [f"{file}: {schema} rows: 10"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"no 'completion'; supervised training needs a prompt and an answer.*chosen=answer$"),
        (
            {"prompt": "a", "response": "b", "output": "c"},
            r"'response' and 'output' may both be the answer.*chosen=resp",
        ),
        ({"prompt": "a", "completion": "b", "label": False}, r"'label' is false, so 'completion' is an answer that is"),
        ({"question": "a", "answer": "b", "context": "c"}, r"its column 'context' is not in the prompt.*chosen=…; if"),
        ({"messages": [turn("user", "a")]}, r"'messages' must begin with what is asked and end with an assistant"),
        ({"messages": []}, r"got roles \[\]"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, r"'conversations' must begin with what is asked"),
        ({"prompt": "x" * 40, "completion": "x" * 40 + "b"}, r"the answers begin with the prompt"),
        ({"prompt": "a", "completion": 3}, r"'completion' must be text or a list of messages; got int"),
        ({"text": "a"}, r"no 'prompt'; supervised.*Nearest schema: prompt-completion \(prompt, completion\)"),
    ],
)
def test_rows_of_one_answer_that_are_none(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message) as error:
        preference_row(row, "rows.jsonl:1", chosen_only=True)
    assert str(error.value).startswith("rows.jsonl:1: ")


def test_columns_of_one_answer_may_be_named() -> None:
    row = {"q": "a ", "good": "b", "output": "c", "context": "d"}
    read = preference_row(row, "here", parse_columns("prompt=q,chosen=good,rejected=absent"), chosen_only=True)
    assert (read.prompt, read.chosen, read.rejected) == ("a ", "b", None)
    with pytest.raises(RowError, match="no column 'absent', which --columns names"):
        preference_row(row, "here", parse_columns("prompt=q,chosen=absent"), chosen_only=True)


def test_only_the_answers_of_a_conversation_count_through_every_door(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("WordLevel", adds_bos=True)
    raw = {"messages": [turn("user", "why?"), turn("assistant", "yes"), turn("user", "so?"), turn("assistant", "no")]}
    path = write_jsonl(tmp_path / "rows.jsonl", [raw, {"prompt": "the egg ", "completion": "is hard"}])
    pairs, report = tokenize_pairs(read_rows(path, chosen_only=True), tokenizer, max_length=64)
    told = [
        [word for word, counts in zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True) if counts]
        for pair in pairs
        for _, ids, mask in pair.sides()
    ]
    assert told == [["yes", "<|im_end|>", "no", "<|im_end|>"], ["is", "hard", "</s>"]]
    assert (report.kept, report.unit) == (2, "rows")
    collator = PreferenceCollator(tokenizer, chosen_only=True)
    batch = collator([json.loads(line) for line in path.read_text().splitlines()])
    expected = collate(pairs, tokenizer.pad_token_id)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["labels"]["completion_mask"], expected["completion_mask"])
    assert (batch["labels"].pairs, batch["labels"].chosen_only, len(batch["input_ids"])) == (2, True, 2)


def test_what_cannot_teach_is_judged_by_the_answer_alone(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("WordLevel")
    rows = [
        {"prompt": "the ", "chosen": "egg", "rejected": "egg"},
        {"prompt": "the ", "chosen": "egg", "rejected": ""},
        {"prompt": "the ", "completion": "  "},
        {"prompt": "the egg boils for five minutes ", "completion": "yes"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    pairs, report = tokenize_pairs(read_rows(path, chosen_only=True), tokenizer, max_length=6)
    assert [pair.place for pair in pairs] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert "1 of 4 rows left out: completion of white space alone" in report.lines()[0]
    assert "max_length 6, keep_start: the prompt alone is as long" in report.lines()[1]


def test_rows_of_one_answer_go_no_further_where_pairs_are_needed(
    tmp_path: Path, policy_folder: Path, reference_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "w1 ", "completion": "w2"}]))
    model, other = str(policy_folder), str(reference_folder)
    for command in (
        ["train", "--model", model, "--ref-model", other, "--pairs", path, "--output-dir", str(tmp_path / "a")],
        ["score", "--ref-model", other, "--pairs", path, "--store", str(tmp_path / "store")],
        [
            "dpo",
            "--model_name_or_path",
            model,
            "--dataset_name",
            path,
            "--output_dir",
            str(tmp_path / "b"),
            "--use_cpu",
        ],
    ):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "rows.jsonl:1: no 'chosen'; a preference row needs a prompt and two answers (with one answer: " in said
        assert "selective-pref train --objective sft" in said


def test_the_command_shows_rows_of_one_answer(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "w1 ", "completion": "w2 w3"}, {"prompt": "w1 ", "chosen": "w2", "rejected": "w2"}]
    command = ["rows", "--pairs", str(write_jsonl(tmp_path / "rows.jsonl", rows)), "--tokenizer", str(policy_folder)]
    assert main(command) == 1
    capsys.readouterr()
    assert main([*command, "--objective", "sft"]) == 0
    text = capsys.readouterr().out
    assert "rows.jsonl:1: prompt-completion\n  chosen: 1 prompt tokens, 3 of 3 completion tokens count" in text
    assert "2 of 2 rows can be trained on" in text
    assert "rejected" not in text
    assert "equal sides" not in text
    assert main([*command, "--objective", "sft", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["objective"], "rejected" in out["rows"][1]) == ("sft", False)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen_ids(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The ids of every call of the policy's body, in training and evaluation."""
    seen: list[torch.Tensor] = []
    load = loading.load_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        return model

    monkeypatch.setattr(loading, "load_model", watched)
    return seen


def test_no_rejected_side_goes_through_the_model(
    tmp_path: Path, policy_folder: Path, seen_ids: list[torch.Tensor]
) -> None:
    """Pairs train as rows of their chosen side do: to the same weights, with as many tokens through the body."""
    rows = [{**row, "rejected": f"w23 {row['rejected']}"} for row in text_rows(24)]
    rows = json.loads(json.dumps([{**row, "chosen": row["chosen"].replace("w23", "w22")} for row in rows]))
    rows = [{**row, "prompt": row["prompt"].replace("w23", "w22")} for row in rows]
    forms = {
        "pairs": rows,
        "alone": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows],
    }
    ids: dict[str, list[torch.Tensor]] = {}
    results = {}
    for name, some in forms.items():
        seen_ids.clear()
        config = TrainConfig(
            model=str(policy_folder),
            pairs=str(write_jsonl(tmp_path / f"{name}.jsonl", some)),
            output_dir=str(tmp_path / name),
            objective="sft",
            batch_size=4,
            max_steps=5,
            eval_fraction=0.3,
            eval_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            share_prefix="off",
        )
        results[name] = train(config)
        ids[name] = list(seen_ids)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    absent = tokenizer.convert_tokens_to_ids("w23")
    assert ids["pairs"]
    assert not any((batch == absent).any() for batch in ids["pairs"])
    assert [batch.tolist() for batch in ids["pairs"]] == [batch.tolist() for batch in ids["alone"]]
    assert max(len(batch) for batch in ids["pairs"][1:]) == 4  # B rows; the first call looks at the head
    ours, theirs = (load_file(result.output_dir / "model.safetensors") for result in results.values())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert results["pairs"].metrics == results["alone"].metrics

    result = results["alone"]
    held_out, _ = tokenize_pairs(read_rows(tmp_path / "alone.jsonl", chosen_only=True), tokenizer, max_length=64)
    shown = {pair["place"]: pair for pair in read_run(result.output_dir).visits[-1].pairs}
    by_place = {pair.place: pair for pair in held_out}
    batch = collate([by_place[place] for place in shown], 0)
    with torch.no_grad():
        logps = model_per_token_logps(AutoModelForCausalLM.from_pretrained(result.output_dir), batch)
    mask = batch["completion_mask"][:, 1:] != 0
    for row, pair in enumerate(shown.values()):
        assert "rejected" not in pair
        assert pair["chosen"]["per_token_logps"] == pytest.approx(logps[row][mask[row]].tolist(), abs=1e-4)
        assert pair["loss"] == pytest.approx(-logps[row][mask[row]].mean().item(), abs=1e-4)
    names = {name for line in result.metrics for name in line}
    assert not [name for name in names if "rejected" in name or "margins" in name or "accuracies" in name]
    assert {"loss", "logps/chosen", "rewards/chosen", "selection/fraction", "eval_loss"} <= names
    assert all(value == value for line in result.metrics for value in line.values())
    run = read_run(result.output_dir)
    assert [found.kind for found in findings(run)] == ["good"]
    assert findings(run)[0].text.startswith("The loss (eval_loss) fell from ")
    assert len(films(run)) == 2
    assert all(film["title"].endswith(", chosen") for film in films(run))


def test_a_filler_has_no_rejected_side_either() -> None:
    pair = TokenizedPair(chosen_ids=[1, 2], rejected_ids=[1, 3, 4], chosen_prompt_length=1, rejected_prompt_length=1)
    for kind in (pair, pair.chosen_only()):
        batches = [list(evaluation_batches([kind] * 3, 2, rank, 2)) for rank in range(2)]
        assert [[count for _, count in one] for one in batches] == [[2], [1]]
        rows = [len(collate(pairs, 0)["input_ids"]) for one in batches for pairs, _ in one]
        assert rows == [2 * len(list(kind.sides()))] * 2
    with pytest.raises(ValueError, match="a chosen side alone, and other pairs of the batch have both"):
        collate([pair, FILLER.chosen_only()], 0)


# --- the Hugging Face Trainer ----------------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path: Path, policy_folder: Path) -> Callable[..., Trainer]:
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)

    def make(
        rows: list[Any], loss: SelectivePreferenceLoss, collator: dict[str, Any] | None = None, **options: Any
    ) -> Trainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "remove_unused_columns": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "train_sampling_strategy": "sequential",
        }
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(policy_folder),
            args=TrainingArguments(**{**settings, **options}),
            train_dataset=rows,
            eval_dataset=rows[:6],
            data_collator=PreferenceCollator(tokenizer, share_prefix="off", **(collator or {})),
            compute_loss_func=loss,
        )
        SelectionCallback(picture_pairs=2).attach(trainer)
        return trainer

    return make


def test_the_hf_trainer_learns_from_the_chosen_side_alone(build: Callable[..., Trainer], tmp_path: Path) -> None:
    rows = [{**row, "rejected": f"w23 {row['rejected']}"} for row in text_rows(12)]
    seen: list[torch.Tensor] = []
    logs = {}
    for name, some in {
        "pairs": rows,
        "alone": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows],
    }.items():
        trainer = build(some, SelectivePreferenceLoss("sft"), eval_strategy="steps", eval_steps=2)
        seen.clear()
        trainer.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        trainer.train()
        assert [len(batch) for batch in seen].count(4) >= 3
        assert max(len(batch) for batch in seen) == 4
        logs[name] = [
            {key: value for key, value in line.items() if "runtime" not in key and "per_second" not in key}
            for line in trainer.state.log_history
        ]
    pairs = trainer.data_collator.pairs(rows[:6])
    assert logs["pairs"] == logs["alone"]
    names = {name for line in logs["pairs"] for name in line}
    assert not [name for name in names if "rejected" in name or "margins" in name or "accuracies" in name]
    with torch.no_grad():
        batch = collate(pairs, 0)
        logps, mask = model_per_token_logps(trainer.model, batch), batch["completion_mask"][:, 1:] != 0
    expected = torch.stack([-row[kept].mean() for row, kept in zip(logps, mask, strict=True)]).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-4)
    assert "rejected" not in json.loads((tmp_path / "out" / "selection" / "step-000002.json").read_text())["pairs"][0]


def test_a_preference_objective_refuses_rows_of_one_answer(build: Callable[..., Trainer], policy_folder: Path) -> None:
    rows = [{"prompt": "w1 ", "completion": "w2"}] * 4
    reference = AutoModelForCausalLM.from_pretrained(policy_folder)
    loss = SelectivePreferenceLoss("dpo", ref_model=reference, beta=0.1)
    with pytest.raises(ValueError, match="objective 'dpo' compares two answers, and the pairs have no rejected side"):
        build(rows, loss, {"chosen_only": True})
    with pytest.raises(RowError, match=r"train_dataset, row 0: no 'chosen'.*--objective sft"):
        build(rows, loss)
    collator = PreferenceCollator(AutoTokenizer.from_pretrained(policy_folder), chosen_only=True)
    labels = collator(rows)["labels"]
    with pytest.raises(ValueError, match="objective 'dpo' compares two answers"):
        loss(torch.zeros(4, labels["input_ids"].shape[1] - 1), labels, 4)
    given = {"chosen_ids": [5, 6, 2], "chosen_prompt_length": 1}
    assert collator.pairs([given])[0].sides().__next__()[1] == [5, 6, 2]


def test_supervised_training_on_selected_tokens(
    build: Callable[..., Trainer], policy_folder: Path, reference_folder: Path
) -> None:
    """Rho-1: the tokens of largest excess loss against a reference, of the chosen side alone."""

    def objective(chosen: Any, rejected: Any) -> Any:
        return sft_loss(*select(chosen, rejected, selection_ratio=0.5, scores=excess_loss_scores))

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in text_rows(8)]
    reference = AutoModelForCausalLM.from_pretrained(reference_folder)
    trainer = build(rows, SelectivePreferenceLoss(objective, ref_model=reference), {"chosen_only": True})
    labels = trainer.data_collator(rows[:4])["labels"]
    with torch.no_grad():
        policy, ref = (model_per_token_logps(model.eval(), labels) for model in (trainer.model, reference))
    mask = labels["completion_mask"][:, 1:] != 0
    expected = []
    for logps, others, counts in zip(policy, ref, mask, strict=True):
        excess = (others - logps)[counts]
        kept = excess.argsort(descending=True)[: -(-int(counts.sum()) // 2)]
        expected.append(-logps[counts][kept].mean())
    value = trainer.compute_loss_func(policy, labels, 4)
    torch.testing.assert_close(value, torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert 0.5 <= line["selection/fraction"] < 0.8
    assert "selection/threshold" in line
    assert "rewards/margins" not in line


def test_pairs_without_a_rejected_side_are_shown() -> None:
    tokenizer = small_tokenizer("WordLevel")
    rows = [{"prompt": "the egg ", "completion": "is hard"}, {"prompt": "the pot ", "completion": "boils"}]
    read = [preference_row(row, f"row {n}", chosen_only=True) for n, row in enumerate(rows)]
    pairs, _ = tokenize_pairs(read, tokenizer, max_length=16)
    batch = collate(pairs, tokenizer.pad_token_id)
    mask = batch["completion_mask"][:, 1:] != 0
    from selective_pref_adapters.batch import responses

    out = sft_loss(*responses(batch, -torch.rand(mask.shape), chosen_only=True))
    shown = shown_pairs(out, batch["input_ids"], tokenizer, places=["a", "b"])
    assert [[name for name, _ in pair.sides] for pair in shown] == [["chosen"]] * 2
    assert "rejected" not in shown[0].record()
    text = selection_text(out, batch["input_ids"], tokenizer)
    assert "margin" not in text
    assert "chosen: kept 3 of 3" in text
