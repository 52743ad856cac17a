"""One row, the same tokens through every door: over schemas, templates, tokenizers and truncation.

The expected ids are worked out here, a row at a time, from the tokenizer's own single calls; nothing is taken from the
library but the doors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, disable_progress_bars
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selective_pref_adapters.deepspeed_loop.data import load_pairs as load_training_pairs
from selective_pref_adapters.hf_trainer.collator import PreferenceCollator
from selective_pref_adapters.options import ScoreConfig, TrainConfig
from selective_pref_adapters.pairs import RowError, collate, read_rows, tokenize_pairs
from selective_pref_adapters.reference_store.command import load_pairs
from selective_pref_adapters.trl_trainer.data import PairCollator, dataset_of_rows, prepared
from small_tokenizers import KINDS, WORDS, small_tokenizer
from tiny import write_jsonl

disable_progress_bars()

TEXTS = st.lists(st.sampled_from([*WORDS.split(), "\n", "  ", "é", "👍", "x1"]), min_size=1, max_size=7).map(" ".join)


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(schema, row, the same row as prompt, chosen and rejected written out)."""
    asked, good, bad, system = (draw(TEXTS) for _ in range(4))
    assume(good.strip() and bad.strip() and good.strip() != bad.strip() and asked.strip() and system.strip())
    turns = {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }
    if draw(st.booleans()):
        turns["prompt"] = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "no"}, *turns["prompt"]]
    with_system = {**turns, "prompt": [{"role": "system", "content": system}, *turns["prompt"]]}
    head = f"\n\nHuman: {asked}\n\nAssistant:"
    schema = draw(
        st.sampled_from(["text", "text", "text", "hh", "chat", "whole", "sharegpt", "alpaca", "orca", "openai"])
    )
    if schema == "text":
        start, end = draw(st.sampled_from(["", "<s>"])), draw(st.sampled_from(["", "</s>", "</s>\n", "</s></s>"]))
        row = {"prompt": start + asked + " ", "chosen": good + end, "rejected": bad + end}
        return schema, row, {"prompt": asked + " ", "chosen": good, "rejected": bad, "bos": bool(start)}
    if schema == "hh":
        row = {"chosen": f"{head} {good}", "rejected": f"{head} {bad}"}
        return schema, row, {"prompt": head, "chosen": " " + good, "rejected": " " + bad, "bos": False}
    whole = {side: turns["prompt"] + turns[side] for side in ("chosen", "rejected")}
    speakers = {"user": "human", "assistant": "gpt"}
    conversation = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns["prompt"]]
    history = [["so?", "no"]] if len(turns["prompt"]) > 1 else []
    by_schema: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "chat": (turns, turns),
        "whole": (whole, turns),
        "sharegpt": ({"conversations": conversation, "chosen": good, "rejected": bad}, turns),
        "alpaca": ({"instruction": asked, "history": history, "chosen": good, "rejected": bad}, turns),
        "orca": (
            {"system": system, "question": asked, "history": history, "chosen": good, "rejected": bad},
            with_system,
        ),
        "openai": (
            {
                "input": {"messages": turns["prompt"]},
                "preferred_output": turns["chosen"],
                "non_preferred_output": turns["rejected"],
            },
            turns,
        ),
    }
    return schema, *by_schema[schema]


def shared_start(*some: list[int]) -> int:
    at = 0
    while all(at < len(ids) for ids in some) and len({ids[at] for ids in some}) == 1:
        at += 1
    return at


def by_hand(read: dict[str, Any], tokenizer: Any, adds_bos: bool) -> tuple[int, list[int], list[int]]:
    """(tokens of the prompt, ids of prompt + chosen, ids of prompt + rejected)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if isinstance(read["prompt"], str):
        start = [bos] if adds_bos or read["bos"] else []
        bare = [
            tokenizer(("<s>" if read["bos"] else "") + text, add_special_tokens=False)["input_ids"]
            for text in (read["prompt"], read["prompt"] + read["chosen"], read["prompt"] + read["rejected"])
        ]
        bare = [ids[1:] if read["bos"] else ids for ids in bare]
        prompt, chosen, rejected = start + bare[0], [*start, *bare[1], eos], [*start, *bare[2], eos]
    else:
        prompt, chosen, rejected = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)["input_ids"]
            for messages, asks in (
                (read["prompt"], True),
                (read["prompt"] + read["chosen"], False),
                (read["prompt"] + read["rejected"], False),
            )
        )
    return min(shared_start(prompt, chosen), shared_start(prompt, rejected)), chosen, rejected


def cut(ids: list[int], start: int, length: int, mode: str) -> tuple[list[int], list[bool]]:
    mask = [at >= start for at in range(len(ids))]
    return (ids[:length], mask[:length]) if mode == "keep_start" else (ids[-length:], mask[-length:])


def rows_of_batch(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[bool]]]:
    """(ids, mask) of every row of a batch, without padding."""
    out = []
    for ids, attended, mask in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        out.append((ids[attended == 1].tolist(), (mask[attended == 1] == 1).tolist()))
    return out


def through_every_door(row: dict[str, Any], tokenizer: Any, length: int, mode: Any, path: Path) -> dict[str, Any]:
    """Door → (ids, mask) of chosen and rejected; None where the row is left out."""
    read = read_rows(write_jsonl(path, [row]))
    seen: dict[str, Any] = {}
    try:
        pairs, _ = tokenize_pairs(read, tokenizer, max_length=length, truncation_mode=mode)
        seen["Python"] = rows_of_batch(collate(pairs, tokenizer.pad_token_id))
    except ValueError:
        seen["Python"] = None
    try:
        run = TrainConfig(model="m", pairs=str(path), truncation_mode=mode, eval_fraction=0)
        trained, _, _ = load_training_pairs(run, tokenizer, length, progress=False)
        seen["the loop"] = rows_of_batch(collate(trained, tokenizer.pad_token_id))
    except ValueError:
        seen["the loop"] = None
    try:
        config = ScoreConfig(store="s", pairs=str(path), max_length=length, truncation_mode=mode)
        scored, _ = load_pairs(config, tokenizer, None, progress=False)
        seen["score"] = rows_of_batch(collate(scored, tokenizer.pad_token_id))
    except ValueError:
        seen["score"] = None
    try:
        batch = PreferenceCollator(tokenizer, max_length=length, truncation_mode=mode)([row])
        seen["hf"] = rows_of_batch({**batch, "completion_mask": batch["labels"]["completion_mask"]})
    except RowError:
        seen["hf"] = None
    collator = PairCollator(pad_token_id=tokenizer.pad_token_id, max_length=length, truncation_mode=mode)
    for name, data in (("trl, raw", Dataset.from_list([row])), ("trl, read", dataset_of_rows(read))):
        try:
            done = prepared(data, tokenizer, "train", max_length=length, truncation_mode=mode)
            seen[name] = rows_of_batch(collator([done[0]]))
        except ValueError:
            seen[name] = None
    return seen


@settings(max_examples=max(40, settings.default.max_examples))
@given(
    row=rows(),
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(["chatml", "headers", "marked", "reasoning"]),
    adds_bos=st.booleans(),
    adds_eos=st.booleans(),
    length=st.sampled_from([4, 9, 17, 4096]),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_every_door_gives_the_tokens_worked_out_by_hand(
    tmp_path_factory: pytest.TempPathFactory,
    row: tuple[str, dict[str, Any], dict[str, Any]],
    kind: str,
    template: str,
    adds_bos: bool,
    adds_eos: bool,
    length: int,
    mode: str,
) -> None:
    tokenizer = small_tokenizer(kind, adds_bos=adds_bos, adds_eos=adds_eos, template=template)
    _, raw, read = row
    start, *sides = by_hand(read, tokenizer, adds_bos)
    expected = [cut(ids, start, length, mode) for ids in sides]
    path = tmp_path_factory.getbasetemp() / "row.jsonl"
    seen = through_every_door(raw, tokenizer, length, mode, path)
    if not all(any(mask) for _, mask in expected):
        assert set(map(str, seen.values())) == {"None"}
        return
    assert seen.pop("score") == expected  # it also scores what teaches nothing
    if sides[0] == sides[1] or expected[0] == expected[1]:
        assert set(map(str, seen.values())) == {"None"}
        return
    for door, ids in seen.items():
        assert ids == expected, door
    if length == 4096:
        for ids, mask in expected:
            told = [token for token, counts in zip(ids, mask, strict=True) if counts]
            assert told.count(tokenizer.eos_token_id) == (
                1 if isinstance(read["prompt"], str) or template == "headers" else 0
            )
            assert ids.count(tokenizer.bos_token_id) <= 1


def test_a_set_through_every_door(tmp_path: Path) -> None:
    """Many rows of all schemas at once, in order, streamed too; places go along."""
    tokenizer = small_tokenizer("byte-level BPE", adds_bos=True)
    some: list[dict[str, Any]] = []
    for n in range(30):
        text = {"prompt": f"{n} eggs ", "question": None, "chosen": f"boil {n}", "rejected": "no"}
        turns = {
            "prompt": None,
            "question": f"{n} eggs?",
            "chosen": f"boil {n}",
            "rejected": "no" if n % 2 else f"boil {n}",
        }
        some.append(text if n % 3 else turns)
    path = write_jsonl(tmp_path / "rows.jsonl", some)
    pairs, report = tokenize_pairs(read_rows(path), tokenizer, max_length=64)
    assert report.kept == 25
    expected = rows_of_batch(collate(pairs, tokenizer.pad_token_id))
    collator = PairCollator(pad_token_id=tokenizer.pad_token_id, max_length=64)
    stream = IterableDataset.from_generator(lambda: iter(some[1:3] * 4))
    for data in (Dataset.from_list(some), dataset_of_rows(read_rows(path))):
        done = prepared(data, tokenizer, "train", max_length=64, truncation_mode="keep_start")
        assert rows_of_batch(collator(list(done))) == expected
    assert [row["place"] for row in done] == [pair.place for pair in pairs]
    streamed = list(prepared(stream, tokenizer, "train", max_length=64, truncation_mode="keep_start"))
    assert len(streamed) == 8
    assert prepared(done, tokenizer, "train", max_length=64, truncation_mode="keep_start") is done


def test_bad_rows_of_a_data_set_are_named_or_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = small_tokenizer("WordLevel")
    good = {"prompt": "the ", "chosen": "egg", "rejected": "pot"}
    data = Dataset.from_list([good, {"prompt": "the ", "chosen": "egg", "rejected": None}, good])
    options: dict[str, Any] = {"max_length": 8, "truncation_mode": "keep_start"}
    with pytest.raises(RowError, match=r"train, row 1: no 'rejected'.*skip_malformed_rows leaves"):
        prepared(data, tokenizer, "train", **options)
    assert len(prepared(data, tokenizer, "train", skip_malformed_rows=True, **options)) == 2
    assert "1 malformed rows left out, the first: train, row 1: no 'rejected'" in caplog.text
    with pytest.raises(ValueError, match="none of 1 pairs of the train data set can be trained on: 1 of 1"):
        prepared(Dataset.from_list([{**good, "chosen": " "}]), tokenizer, "train", **options)
    renamed = Dataset.from_list([{"q": "the ", "a": "egg", "b": "pot"}])
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (pair,) = PreferenceCollator(tokenizer, columns=columns).pairs(renamed)
    assert pair.chosen_ids == tokenizer.convert_tokens_to_ids(["the", "egg", "</s>"])
    done = prepared(renamed, tokenizer, "train", columns=columns, **options)
    assert done[0]["chosen_ids"] == tokenizer.convert_tokens_to_ids(["egg", "</s>"])


def test_rows_of_a_stream_that_are_left_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = small_tokenizer("WordLevel")
    good, equal = ({"prompt": "the ", "chosen": "egg", "rejected": other} for other in ("pot", "egg"))
    rows = [good, equal, {"prompt": "the ", "chosen": "egg"}, equal, good, *[equal] * 3]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    options: dict[str, Any] = {"max_length": 8, "truncation_mode": "keep_start", "skip_malformed_rows": True}
    done = prepared(stream, tokenizer, "train", **options)
    assert len(list(done)) == 2
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3  # at the first, the second and the fourth of six
    assert told[0] == (
        "train: 1 streamed rows left out so far: 1 chosen and rejected are equal (neither is better; repair or remove "
        "the rows)"
    )
    assert "2 streamed rows left out so far: 1 chosen and rejected are equal" in told[1]
    assert "; 1 malformed; the last: train, row 2: no 'rejected'" in told[1]
    assert "4 streamed rows left out so far: 3 chosen and rejected are equal" in told[2]
