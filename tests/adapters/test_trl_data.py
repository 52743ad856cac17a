"""TRL's trainer on the ids of the one reader: raw rows of any schema, rows that are read, a store that is filled."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from selective_pref_adapters.cli import main
from selective_pref_adapters.pairs import collate, read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import rows_of_pairs
from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer, pairs_of, stored
from selective_pref_adapters.trl_trainer.command import LocalSplits, split_of
from selective_pref_adapters.trl_trainer.data import PairCollator
from tiny import text_rows, write_jsonl

TEXT = text_rows(12)
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
SETS: dict[str, list[dict[str, Any]]] = {
    "hh": [
        {side: f"{HUMAN}{row['prompt']}{ASSISTANT}w3 {row[side]}" for side in ("chosen", "rejected")} for row in TEXT
    ],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": row["prompt"]}],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in TEXT
    ],
    "alpaca": [
        {"instruction": row["prompt"], "input": "", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in TEXT
    ],
    "ultrafeedback": [
        {
            "prompt": row["prompt"],
            **{
                side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
        for row in TEXT
    ],
}


def trainer(folder: Path, policy: Path, rows: Any, **changed: Any) -> SelectiveDPOTrainer:
    given = {name: changed.pop(name) for name in ("data_collator", "eval_dataset") if name in changed}
    args = SelectiveDPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=False,
        **changed,
    )
    return SelectiveDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(policy),
        **given,
    )


@pytest.mark.parametrize("name", SETS)
def test_the_trainer_has_the_ids_of_training(tmp_path: Path, policy_folder: Path, name: str) -> None:
    """Raw data sets and rows that are read; the prompt of every schema is there, and no loss counts it."""
    path = write_jsonl(tmp_path / "rows.jsonl", SETS[name])
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    rows = read_rows(path)
    pairs, _ = tokenize_pairs(rows, tokenizer, max_length=64)
    expected = collate(pairs, tokenizer.pad_token_id)
    for data in (Dataset.from_list(SETS[name]), rows):
        made = trainer(tmp_path, policy_folder, data, max_length=64, eval_dataset=rows[:4])
        batch = made.data_collator(list(made.train_dataset))
        for key, tensor in expected.items():
            assert torch.equal(batch[key], tensor), key
        made.train()
        assert made.evaluate(rows[:5])["eval_loss"] > 0


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize(("length", "mode"), [(6, "keep_start"), (4, "keep_start"), (6, "keep_end"), (3, "keep_end")])
def test_the_trainer_cuts_and_leaves_out_as_training_does(
    tmp_path: Path, policy_folder: Path, length: int, mode: Any
) -> None:
    """From the options of its configuration on, through its own collator."""
    turns = [
        {"role": role, "content": word} for role, word in (("assistant", "w1"), ("user", "w2"), ("assistant", "w3"))
    ]
    talk = {"prompt": [{"role": "user", "content": "w0"}], "chosen": turns, "rejected": turns[2:]}
    alike = [{"prompt": "w9 ", "chosen": f"{word} w1 w2", "rejected": "w7 w1 w2"} for word in ("w7", "w8")]
    rows = read_rows(write_jsonl(tmp_path / "rows.jsonl", [*TEXT, talk, *alike]))
    pairs, report = tokenize_pairs(
        rows, AutoTokenizer.from_pretrained(policy_folder), max_length=length, truncation_mode=mode
    )
    assert report.truncated
    assert report.left_out
    made = trainer(tmp_path, policy_folder, rows, max_length=length, truncation_mode=mode)
    assert [row["place"] for row in made.train_dataset] == [pair.place for pair in pairs]
    batch = made.data_collator(list(made.train_dataset))
    for key, tensor in collate(pairs, made.processing_class.pad_token_id).items():
        assert torch.equal(batch[key], tensor), key


def test_a_store_that_score_filled_serves_dpo(
    tmp_path: Path, policy_folder: Path, reference_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For implicit prompts, too, and with several turns, tools, malformed rows and rows that teach nothing."""
    turns = [
        {"role": "assistant", "content": "w1 w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
    ]
    talk = {"prompt": [{"role": "user", "content": "w0"}], "chosen": turns, "rejected": turns[2:]}
    equal = {"prompt": "w1 ", "chosen": "w2", "rejected": "w2"}
    rows = [*SETS["hh"], talk, equal, {"prompt": "w0"}]
    path, store = write_jsonl(tmp_path / "rows.jsonl", rows), str(tmp_path / "store")
    policy, out = str(policy_folder), str(tmp_path / "out")
    same = ["--pairs", str(path), "--store", store, "--skip-malformed-rows", "--max-length", "64"]
    assert main(["score", "--ref-model", str(reference_folder), "--tokenizer", policy, *same]) == 0
    flags = ["--use_cpu", "--bf16", "false", "--max_steps", "1", "--report_to", "none", "--max_length", "64"]
    flags += ["--skip_malformed_rows", "--reference_store", store, "--output_dir", out]
    capsys.readouterr()
    assert main(["dpo", "--model_name_or_path", policy, "--dataset_name", str(path), *flags]) == 0
    said = capsys.readouterr()
    assert "model saved" in said.out
    assert "note: rows.jsonl: TRL standard, implicit prompt rows: 12" in said.err
    assert "note: 1 malformed rows left out, the first: rows.jsonl:15: no 'chosen'" in said.err


def test_splits_columns_and_errors_of_the_command(
    tmp_path: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = str(policy_folder)
    flags = ["dpo", "--model_name_or_path", policy, "--use_cpu", "--bf16", "false", "--max_steps", "1"]
    flags += ["--report_to", "none", "--output_dir", str(tmp_path / "out")]
    folder = tmp_path / "data"
    folder.mkdir()
    renamed = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in TEXT]
    write_jsonl(folder / "train.jsonl", renamed)
    write_jsonl(folder / "test.jsonl", renamed[:3])
    assert main([*flags, "--dataset_name", str(folder)]) == 1
    assert "train.jsonl:1: no 'chosen'; a preference row needs a prompt and two answers" in capsys.readouterr().err
    columns = ["--columns", "prompt=q,chosen=good,rejected=bad", "--eval_strategy", "epoch"]
    assert main([*flags, "--dataset_name", str(folder), *columns]) == 0
    said = capsys.readouterr().err
    assert "data: read train.jsonl; not read: test.jsonl" in said
    assert "data:test: TRL standard rows: 3" in said
    assert main([*flags, "--dataset_name", str(folder), *columns, "--stock_tokenization"]) == 1
    assert "which stock_tokenization switches off" in capsys.readouterr().err


def test_stock_tokenization_is_trls(tmp_path: Path, policy_folder: Path) -> None:
    """What TRL does with an implicit prompt in text: it cuts after the common characters."""
    made = trainer(tmp_path, policy_folder, Dataset.from_list(SETS["hh"]), stock_tokenization=True)
    ours = trainer(tmp_path, policy_folder, Dataset.from_list(SETS["hh"]))
    tokenizer = made.processing_class
    assert tokenizer.decode(made.train_dataset[0]["prompt_ids"]).endswith(("w3", "w3 w1"))  # the latter in TRL 1.14
    assert tokenizer.decode(ours.train_dataset[0]["prompt_ids"]).endswith("<unk>")  # "Assistant:"
    assert made.train_dataset[0]["prompt_ids"] != ours.train_dataset[0]["prompt_ids"]
    with pytest.raises(ValueError, match="stock_tokenization needs raw rows"):
        trainer(tmp_path, policy_folder, read_rows(write_jsonl(tmp_path / "r.jsonl", TEXT)), stock_tokenization=True)


def test_a_collator_of_ones_own_must_know_of_other_turns(tmp_path: Path, policy_folder: Path) -> None:
    class Own(DataCollatorForPreference):
        pass

    class Knowing(PairCollator):
        pass

    turns = [
        {"role": "assistant", "content": "w1 w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
    ]
    talk = {"prompt": [{"role": "user", "content": "w0"}], "chosen": turns, "rejected": turns[2:]}
    with pytest.raises(ValueError, match=r"hold turns of users or tools, which do not count: derive data_collator"):
        trainer(tmp_path, policy_folder, Dataset.from_list([talk]), data_collator=Own(pad_token_id=0))
    made = trainer(tmp_path, policy_folder, Dataset.from_list([talk]), data_collator=Knowing(pad_token_id=0))
    (pair,) = pairs_of(made.train_dataset, made.data_collator, "train")
    words = made.processing_class.convert_ids_to_tokens(pair.chosen_ids)
    told = [word for word, counts in zip(words, pair.chosen_mask, strict=True) if counts]
    assert told == ["w1", "w2", "</s>", "w4", "</s>"]
    trainer(tmp_path, policy_folder, Dataset.from_list(TEXT), data_collator=Own(pad_token_id=0)).train()


def test_rows_are_cut_once_for_a_store(tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each row by itself is cut; found again on the disk, but not with other settings or a collator of one's own."""
    Dataset.from_list(SETS["alpaca"]).save_to_disk(str(tmp_path / "rows"))
    made = trainer(tmp_path, policy_folder, load_from_disk(str(tmp_path / "rows")))
    calls: list[int] = []
    whole = stored.uncounted_spans
    monkeypatch.setattr(stored, "uncounted_spans", lambda *sides: calls.append(1) or whole(*sides))

    class Own(PairCollator):
        pass

    cut = partial(PairCollator, pad_token_id=made.processing_class.pad_token_id)
    short = partial(cut, max_length=9)
    own = Own(pad_token_id=0)
    for collator, sides in ((cut(), 24), (cut(), 0), (short(), 24), (cut(), 0), (short(), 0), (own, 24), (own, 24)):
        calls.clear()
        pairs = pairs_of(made.train_dataset, collator, "train")
        assert len(calls) == sides
        for pair, row in zip(pairs, made.train_dataset, strict=True):
            batch = collator([row])
            for number, (_, ids, mask) in enumerate(pair.sides()):
                attended = batch["attention_mask"][number] == 1
                assert ids == batch["input_ids"][number][attended].tolist()
                assert mask.tolist() == batch["completion_mask"][number][attended].bool().tolist()
        known, held = rows_of_pairs(pairs), rows_of_pairs(list(pairs))
        assert known.keys.tobytes() == held.keys.tobytes()


def test_a_file_is_read_once_and_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*SETS["alpaca"], {"prompt": "w1"}])
    args = SelectiveDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, skip_malformed_rows=True)
    rows = split_of(LocalSplits(str(path), args), "train")
    assert len(rows) == 12
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [line[:30] for line in said] == ["note: rows.jsonl: Alpaca rows:", "note: 1 malformed rows left ou"]
    with pytest.raises(ValueError, match=r"the data set has no split 'test', only \['train'\]"):
        split_of(LocalSplits(str(path), args), "test")
