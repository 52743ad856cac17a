"""Rows → token ids: every format, the boundary, truncation, what is left out, and every kind of bad row."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from selective_pref_adapters.pairs import (
    PreferenceRow,
    RowError,
    check_same_tokenizer,
    collate,
    parse_columns,
    preference_row,
    read_rows,
    split_by_prompt,
    tokenize_pairs,
)
from tiny import WORDS, make_tokenizer, text_rows, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["user", "assistant", *WORDS])


def row(prompt="w0 w1 ", chosen="w2 w3", rejected="w4", place="here") -> PreferenceRow:
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, place=place)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# --- reading ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = text_rows(6)
    dataset = Dataset.from_list(rows)
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "plain"))
    dataset.to_json(str(tmp_path / "lines.json"))
    DatasetDict(train=dataset).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files" / "data").mkdir(parents=True)
    dataset.select(range(4)).to_parquet(str(tmp_path / "files" / "data" / "train-0.parquet"))
    dataset.select(range(4, 6)).to_parquet(str(tmp_path / "files" / "data" / "train-1.parquet"))
    expected = [(r["prompt"], r["chosen"], r["rejected"]) for r in rows]
    for name in ("a.jsonl", "a.json", "lines.json", "a.parquet", "plain", "splits", "files"):
        assert [(r.prompt, r.chosen, r.rejected) for r in read_rows(tmp_path / name)] == expected, name


def test_rows_have_weights_under_any_name(tmp_path: Path, tokenizer: Any) -> None:
    """Numbers, or the text that a .csv file has in their place; they stay with their row through cutting."""
    rows = [{**row, "weight": weight} for row, weight in zip(text_rows(3), [0, 1.5, 2], strict=True)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    names = ["prompt", "chosen", "rejected", "weight"]
    (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, line)) for line in [names, *map(dict.values, rows)]))
    for name in ("a.jsonl", "a.csv"):
        assert [row.weight for row in read_rows(tmp_path / name)] == [0.0, 1.5, 2.0]
    pairs, _ = tokenize_pairs(read_rows(tmp_path / "a.jsonl"), tokenizer, max_length=8)
    assert [pair.weight for pair in pairs] == [0.0, 1.5, 2.0]
    assert [row.weight for row in read_rows(write_jsonl(tmp_path / "b.jsonl", text_rows(2)))] == [None, None]
    renamed = parse_columns("prompt=prompt,chosen=chosen,rejected=rejected,weight=grams")
    assert preference_row({**text_rows(1)[0], "grams": 2, "weight": "heavy"}, "here", renamed).weight == 2.0
    without = parse_columns("prompt=prompt,chosen=chosen,rejected=rejected,weight=none")
    assert preference_row({**rows[0], "weight": "heavy"}, "here", without).weight is None


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "heavy", "1_0", True, [1.0]])
def test_a_weight_that_is_none(weight: Any) -> None:
    with pytest.raises(RowError, match=r"here: 'weight', .* must be a finite number, at least 0; got .*weight=none"):
        preference_row({**text_rows(1)[0], "weight": weight}, "here")


def test_conversations_survive_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [
        {
            "prompt": [message("user", "w0")],
            "chosen": [message("assistant", "w1")],
            "rejected": [message("assistant", "w2")],
        }
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    (read,) = read_rows(tmp_path / "a.parquet")
    assert (read.prompt, read.chosen, read.rejected) == (rows[0]["prompt"], rows[0]["chosen"], rows[0]["rejected"])


def test_implicit_prompts(tmp_path: Path) -> None:
    turns = [message("system", "w9"), message("user", "w0")]
    rows = [
        {"chosen": [*turns, message("assistant", "w1")], "rejected": [*turns, message("assistant", "w2")]},
        {"chosen": "\n\nHuman: w0\n\nAssistant: w1", "rejected": "\n\nHuman: w0\n\nAssistant: w2", "prompt": None},
    ]
    messages, text = read_rows(write_jsonl(tmp_path / "a.jsonl", rows))
    assert (messages.prompt, messages.chosen, messages.rejected) == (
        turns,
        [message("assistant", "w1")],
        [message("assistant", "w2")],
    )
    assert (text.prompt, text.chosen, text.rejected) == ("\n\nHuman: w0\n\nAssistant:", " w1", " w2")


def test_a_text_prompt_beside_whole_conversations_must_be_what_they_begin_with(tmp_path: Path) -> None:
    """UltraFeedback's form: the prompt is said twice."""
    turns = [message("system", "w9"), message("user", "w0")]
    row = {"chosen": [*turns, message("assistant", "w1")], "rejected": [*turns, message("assistant", "w2")]}
    (read,) = read_rows(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "w0", **row}]))
    assert (read.prompt, read.chosen, read.rejected) == (
        turns,
        [message("assistant", "w1")],
        [message("assistant", "w2")],
    )
    with pytest.raises(RowError, match=r"b\.jsonl:1: 'prompt' is a text beside whole conversations, but no message"):
        read_rows(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "w3", **row}]))


GOOD = {"prompt": "w0", "chosen": "w1", "rejected": "w2"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{not json", "not valid JSON"),
        ({"prompt": "w0", "rejected": "w1"}, "no 'chosen'"),
        ({"prompt": "w0", "chosen": "w1", "rejected": None}, "no 'rejected'"),
        ({"prompt": "w0", "chosen": 7, "rejected": "w1"}, "'chosen' must be text or a list of messages; got int"),
        ({"prompt": 1.5, "chosen": "w2", "rejected": "w1"}, "'prompt' must be text or a list of messages; got float"),
        ("[1, 2]", "expected an object"),
        ({"prompt": "w0", "chosen": [message("assistant", "w1")], "rejected": "w1"}, "both text or both messages"),
        ({"prompt": [{"role": "user"}], "chosen": [], "rejected": []}, "'role' and 'content'"),
        ({"prompt": [{"role": "user", "content": 3}], "chosen": [], "rejected": []}, "text content; got int"),
        ({"chosen": "w1", "rejected": "w2"}, "no 'prompt'"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"}, "prompt differs"),
        (
            {
                "chosen": [message("user", "a"), message("assistant", "x")],
                "rejected": [message("user", "b"), message("assistant", "x")],
            },
            "prompt differs",
        ),
        ({"chosen": [message("user", "a")], "rejected": [message("user", "a")]}, "ends with an assistant message"),
    ],
)
def test_a_malformed_row_is_named_and_can_be_left_out(tmp_path: Path, line, what: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, "", line, GOOD])
    with pytest.raises(RowError) as error:
        read_rows(path)
    assert "rows.jsonl:3" in str(error.value)
    assert what in str(error.value)
    malformed: list[str] = []
    assert len(read_rows(path, malformed)) == 2
    assert len(malformed) == 1
    assert what in malformed[0]


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "w0", "chosen": "\xff\xfe", "rejected": "w1"}\n')
    with pytest.raises(RowError, match=r"rows\.jsonl:1"):
        read_rows(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no preference pairs at"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(write_jsonl(tmp_path / "empty.jsonl", []))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected \.jsonl"):
        read_rows(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_text("this is no Parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_rows(tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="neither a folder written by"):
        read_rows(tmp_path / "folder")
    (tmp_path / "a.json").write_text('"prompt"')
    with pytest.raises(RowError, match="expected a list of rows"):
        read_rows(tmp_path / "a.json")


# --- splitting -------------------------------------------------------------------------------------------------------


def test_no_prompt_stands_on_both_sides_and_the_split_depends_on_the_seed_alone() -> None:
    rows = [row(prompt=f"p{i % 10}", place=str(i)) for i in range(50)]
    train, held_out = split_by_prompt(rows, 0.2, seed=3)
    assert len(train) + len(held_out) == 50
    assert len(held_out) == 10
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    again = split_by_prompt(rows[::-1], 0.2, seed=3)[1]
    assert {r.place for r in again} == {r.place for r in held_out}
    assert split_by_prompt(rows, 0, seed=3)[1] == []


def test_a_split_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="all 3 rows have the same prompt"):
        split_by_prompt([row()] * 3, 0.1, seed=0)
    with pytest.raises(ValueError, match="must be in"):
        split_by_prompt([row()], 1.0, seed=0)


# --- tokenising ------------------------------------------------------------------------------------------------------


def test_text_ids_boundary_and_eos(tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids
    (pair,), report = tokenize_pairs([row(chosen="w2 w3", rejected="w4</s>")], tokenizer, max_length=64)
    assert pair.chosen_ids == ids(["w0", "w1", "w2", "w3", "</s>"])
    assert pair.rejected_ids == ids(["w0", "w1", "w4", "</s>"])
    assert (pair.chosen_prompt_length, pair.rejected_prompt_length) == (2, 2)
    assert (report.rows, report.kept, report.lines()) == (1, 1, [])


def test_a_tokenizer_that_adds_an_eos_by_itself_does_not_add_a_second_one() -> None:
    from tokenizers.processors import TemplateProcessing

    eager = make_tokenizer(["user", "assistant", *WORDS])
    eager.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (pair,), _ = tokenize_pairs([row()], eager, max_length=64)
    assert pair.chosen_ids == eager.convert_tokens_to_ids(["<s>", "w0", "w1", "w2", "w3", "</s>"])
    assert pair.chosen_prompt_length == 3


def test_conversation_ids(tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids
    conversation = row([message("user", "w0")], [message("assistant", "w1")], [message("assistant", "w2 w3")])
    (pair,), _ = tokenize_pairs([conversation], tokenizer, max_length=64)
    assert pair.chosen_ids == ids(["user", "w0", "assistant", "w1", "</s>"])
    assert pair.chosen_prompt_length == 3
    assert pair.rejected_ids == ids(["user", "w0", "assistant", "w2", "w3", "</s>"])


def test_a_prompt_that_merges_with_the_completion_ends_where_the_ids_diverge(tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids
    (pair,), report = tokenize_pairs([row("w0 w", "1 w2 ", "3 w4 ")], tokenizer, max_length=64)
    assert pair.chosen_ids[: pair.chosen_prompt_length] == ids(["w0"])
    assert pair.chosen_ids[pair.chosen_prompt_length :] == ids(["w1", "w2", "</s>"])
    assert report.boundary_merged == 1


def test_a_prompt_that_merges_on_one_side_ends_there_on_both(tokenizer) -> None:
    """The earlier of the two places, so that both sides have one prompt: the other side repeats its last tokens."""
    ids = tokenizer.convert_tokens_to_ids
    sides = (("1 w2", ["w1", "w2", "</s>"]), (" w3", ["<unk>", "w3", "</s>"]))
    for chosen, rejected in (sides, sides[::-1]):
        (pair,), _ = tokenize_pairs([row("w0 w", chosen[0], rejected[0])], tokenizer, max_length=64)
        assert (pair.chosen_prompt_length, pair.rejected_prompt_length) == (1, 1)
        assert pair.chosen_ids[1:] == ids(chosen[1])
        assert pair.rejected_ids[1:] == ids(rejected[1])


def test_truncation_keeps_the_start_or_the_end(tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids
    rows = [row("w0 w1 w2 ", "w3 w4 ", "w5 ")]
    (pair,), report = tokenize_pairs(rows, tokenizer, max_length=4)
    assert pair.chosen_ids == ids(["w0", "w1", "w2", "w3"])
    assert pair.chosen_prompt_length == 3
    assert report.truncated == 1
    (pair,), _ = tokenize_pairs(rows, tokenizer, max_length=4, truncation_mode="keep_end")
    assert pair.chosen_ids == ids(["w2", "w3", "w4", "</s>"])
    assert (pair.chosen_prompt_length, pair.rejected_prompt_length) == (1, 2)


def test_rows_that_teach_nothing_are_left_out_and_counted(tokenizer) -> None:
    rows = [
        row("w0 ", "w1 ", "w2 "),
        row("w0 ", "", "w2"),
        row("w0 ", "w1", "w1"),
        row("w0 w1 w2 w3 w4 ", "w5", "w6"),
        row("w0 w1 ", "w2 w3 ", "w2 w4 "),
        row([message("user", "w0")], [message("assistant", "")], [message("assistant", "w1")]),
    ]
    pairs, report = tokenize_pairs(rows, tokenizer, max_length=3)
    assert len(pairs) == report.kept == 1
    assert report.left_out == Counter(
        {
            "empty completion": 2,
            "chosen and rejected are equal": 1,
            "no completion left after truncation": 1,
            "chosen and rejected are equal after truncation": 1,
        }
    )
    assert any("2 of 6 pairs left out: empty completion" in line for line in report.lines())
    kept, report = tokenize_pairs(rows, tokenizer, max_length=3, keep_unteachable=True)
    assert len(kept) == 4
    assert report.left_out == Counter({"no completion left after truncation": 2})
    assert kept[2].chosen_ids == kept[2].rejected_ids
    assert report.kept - report.unteachable.total() == len(pairs)
    assert "3 of 4 kept pairs teach nothing (" in report.lines()[-1]
    assert "training leaves them out, unless TRL tokenises by itself" in report.lines()[-1]


def test_options_and_tokenizers_that_do_not_work(tokenizer) -> None:
    with pytest.raises(ValueError, match="none of 1 pairs"):
        tokenize_pairs([row(chosen="", rejected="w1")], tokenizer, max_length=8)
    with pytest.raises(ValueError, match="max_length"):
        tokenize_pairs([row()], tokenizer, max_length=1)
    with pytest.raises(ValueError, match="truncation_mode"):
        tokenize_pairs([row()], tokenizer, max_length=8, truncation_mode="middle")
    bare = make_tokenizer(WORDS)
    bare.chat_template = None
    conversation = row([message("user", "w0")], [message("assistant", "w1")], [message("assistant", "w2")])
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_pairs([conversation], bare, max_length=8)
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match=r"here: the chat template rejects .* roles must alternate"):
        tokenize_pairs([conversation], bare, max_length=8)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        tokenize_pairs([row()], bare, max_length=8)


def test_tokenizers_that_disagree_name_the_first_differing_token(tokenizer) -> None:
    swapped = make_tokenizer(["user", "assistant", "w0", "w2", "w1", *WORDS[3:]])
    with pytest.raises(ValueError, match="id 7 is 'w1' for the policy and 'w2' for the reference"):
        check_same_tokenizer(tokenizer, swapped)
    check_same_tokenizer(tokenizer, make_tokenizer(["user", "assistant", *WORDS, "more"]))
    with pytest.raises(ValueError, match="'w23' for the policy and no token for the reference"):
        check_same_tokenizer(tokenizer, make_tokenizer(["user", "assistant", *WORDS[:-1]]))


@pytest.mark.parametrize("name", ["gsm8k_pairs", "chat_pairs_en"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.slow
def test_batches_equal_those_of_trl_on_real_rows(shared: Path, tmp_path: Path, name: str, mode: str) -> None:
    """Same ids, masks and padding as TRL's own preparation and collator, row by row."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = str(shared / "models" / "stories260k")
    path = shared / "data" / f"{name}.jsonl"
    lines = path.read_text().splitlines()[:60]
    real = write_jsonl(tmp_path / path.name, lines)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        ref_model=AutoModelForCausalLM.from_pretrained(folder),
        args=DPOConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            max_length=512,
            truncation_mode=mode,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=str(real), split="train", cache_dir=str(tmp_path / "cache")),
        processing_class=tokenizer,
    )
    ours, report = tokenize_pairs(read_rows(real), tokenizer, max_length=512, truncation_mode=mode)
    assert report.kept == len(trainer.train_dataset)
    for start in range(0, report.kept, 8):
        theirs = trainer.data_collator([trainer.train_dataset[i] for i in range(start, min(start + 8, report.kept))])
        batch = collate(ours[start : start + 8], tokenizer.pad_token_id)
        for key in ("input_ids", "attention_mask", "completion_mask"):
            assert batch[key].equal(theirs[key]), key
