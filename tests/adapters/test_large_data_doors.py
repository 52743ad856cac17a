"""Rows that are not in memory through the doors: the loop, the Hugging Face Trainer, TRL's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import selective_pref_adapters.deepspeed_loop.loop as loop
from ranks import step_engine_of_the_loop, stop_at
from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.deepspeed_loop.checks import check_config
from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import RowError, read_rows, tokenize_pairs
from selective_pref_adapters.pairs.large import Making, making, streamed_pairs, tokenized_rows
from tiny import text_rows, weighted, write_jsonl


@pytest.fixture
def options(tmp_path: Path, policy_folder: Path, reference_folder: Path) -> dict[str, Any]:
    return {
        "model": str(policy_folder),
        "ref_model": str(reference_folder),
        "pairs": str(write_jsonl(tmp_path / "pairs.jsonl", weighted(text_rows(40)))),
        "batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "picture_pairs": 0,
        "max_length": 14,
    }


def test_a_run_whose_ids_are_found_is_the_run_that_made_them(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of a run without a cache: numbers, notes and counts; it is resumed as the same run."""

    def run(name: str, cache: str, **more: Any) -> Any:
        settings = {**options, "eval_fraction": 0.2, "output_dir": str(tmp_path / name), "data_cache": cache, **more}
        return train(TrainConfig(**settings, group_by_length=True, max_steps=3))

    made = run("made", str(tmp_path / "ids"), save_steps=2)
    without = run("without", "off")

    def never(*_: Any) -> None:
        raise AssertionError("rows were tokenised again")

    monkeypatch.setattr(making, "made", never)
    found = run("found", str(tmp_path / "ids"))
    for other in (without, found):
        assert len(other.metrics) == len(made.metrics) == 5
        for line, expected in zip(other.metrics, made.metrics, strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-7)
        for name in ("notes", "train_pairs", "eval_pairs"):
            assert other.summary[name] == made.summary[name]
    assert any("truncated" in note for note in made.summary["notes"])
    assert any("weights" in note for note in made.summary["notes"])
    (tmp_path / "made" / "summary.json").unlink()
    again = run("made", str(tmp_path / "ids"), save_steps=2, resume="auto")
    assert again.metrics[-1] == pytest.approx(made.metrics[-1], rel=1e-5, abs=1e-7)


def test_a_streamed_run_reads_the_rows_in_their_order_and_is_resumed_at_the_next(
    options: dict[str, Any], tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    whole = loop.losses_of

    def losses_of(run: Any, pairs: Any, *rest: Any) -> Any:
        seen.extend(pair.place for pair in pairs)
        return whole(run, pairs, *rest)

    monkeypatch.setattr(loop, "losses_of", losses_of)
    pairs, _ = tokenize_pairs(read_rows(options["pairs"]), AutoTokenizer.from_pretrained(policy_folder), max_length=14)
    places = [pair.place for pair in pairs]

    def run(name: str, **more: Any) -> Any:
        settings = {**options, "eval_fraction": 0.0, "output_dir": str(tmp_path / name), **more}
        return train(TrainConfig(**settings, streaming=True, max_steps=6, gradient_accumulation_steps=2))

    expected = run("whole")
    assert seen == (places * 2)[:48]
    assert [line["epoch"] for line in expected.metrics] == [(step * 8 - 1) // len(places) for step in range(1, 7)]
    assert expected.summary["train_pairs"] == 48
    seen.clear()
    try:
        stop_at(7)
        assert run("stopped", resume="auto").stopped_at == 3
    finally:
        loop.step_engine = step_engine_of_the_loop
    del seen[24:]  # the step that was not taken
    resumed = run("stopped", resume="auto")
    assert seen == (places * 2)[:48]
    assert [line["loss"] for line in resumed.metrics] == pytest.approx([line["loss"] for line in expected.metrics])
    write_jsonl(Path(options["pairs"]), text_rows(41))
    with pytest.raises(ValueError, match=r"another run: training_data was 'stream of pairs.jsonl \(\d+ bytes\)'"):
        run("stopped", resume="auto")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_steps": None}, "streaming does not know how many rows there are: give max_steps"),
        ({"eval_fraction": 0.1}, "streaming cannot hold out 0.1 of the rows.*give eval_pairs, or eval_fraction 0"),
        ({"group_by_length": True}, "group_by_length sorts all rows, and streaming holds none"),
        ({"reference_store": "s"}, "ref_model fills reference_store with all rows before the first step"),
        ({"data_workers": 0}, "data_workers must be at least 1; got 0"),
    ],
)
def test_what_a_stream_cannot_give_is_refused_before_anything_is_loaded(wrong: dict[str, Any], message: str) -> None:
    config = {"model": "absent", "pairs": "absent", "ref_model": "absent", "streaming": True, "max_steps": 3}
    check_config(TrainConfig(**config, eval_fraction=0))
    with pytest.raises(ValueError, match=message):
        check_config(TrainConfig(**{**config, "eval_fraction": 0, **wrong}))


def test_the_hugging_face_trainer_takes_tables_and_streams(
    options: dict[str, Any], tmp_path: Path, policy_folder: Path, reference_folder: Path
) -> None:
    """The losses of the same pairs in memory, in their order; a stream without a length is refused."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    how = Making(max_length=14)
    table, _ = tokenized_rows(options["pairs"], tokenizer, how, cache=tmp_path / "ids").pairs()
    rows = [json.loads(line) for line in Path(options["pairs"]).read_text().splitlines()]
    raw = IterableDataset.from_generator(lambda: iter(rows))

    def losses(data: Any, **more: Any) -> list[float]:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(policy_folder),
            args=TrainingArguments(
                output_dir=str(tmp_path / "hf"),
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                remove_unused_columns=False,
                train_sampling_strategy="sequential",
                disable_tqdm=True,
                **{"max_steps": 3, **more},
            ),
            train_dataset=data,
            data_collator=PreferenceCollator(tokenizer),
            compute_loss_func=SelectivePreferenceLoss(ref_model=AutoModelForCausalLM.from_pretrained(reference_folder)),
            callbacks=[SelectionCallback()],
        )
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    expected = losses(list(table))
    assert len(expected) == 3
    assert losses(table) == pytest.approx(expected)
    assert losses(streamed_pairs(raw, tokenizer, how)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="max_steps"):
        losses(streamed_pairs(raw, tokenizer, how), max_steps=-1)
    longer, _ = tokenized_rows(
        write_jsonl(tmp_path / "long.jsonl", [{"prompt": "w1 " * 70, "chosen": "w2", "rejected": "w3"}]),
        tokenizer,
        Making(max_length=100),
        cache="off",
    ).pairs()
    with pytest.raises(ValueError, match=r"holds 72 tokens in one row, more than the policy can read \(64\)"):
        losses(longer)


def test_trl_s_command_keeps_the_rows_of_a_file_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from selective_pref_adapters.trl_trainer.command import rows_on_disk
    from selective_pref_adapters.trl_trainer.data import READ_ROW

    file = write_jsonl(tmp_path / "pairs.jsonl", [*text_rows(3), {"prompt": "w1"}])
    (one, notes), (two, again) = (rows_on_disk(str(file), None, True) for _ in range(2))
    assert one.cache_files == two.cache_files != []
    assert notes == again
    assert notes[0] == "pairs.jsonl: TRL standard rows: 3"
    assert notes[1].startswith("1 malformed rows left out, the first: pairs.jsonl:4: no 'chosen'")
    assert [json.loads(text)["place"] for text in one[READ_ROW]] == [f"pairs.jsonl:{n}" for n in (1, 2, 3)]
    with pytest.raises(RowError, match=r"pairs.jsonl:4: no 'chosen'.*--skip-malformed-rows"):
        rows_on_disk(str(file), None, False)
    write_jsonl(file, text_rows(2))
    assert len(rows_on_disk(str(file), None, True)[0]) == 2
    with pytest.raises(ValueError, match=r"pairs.jsonl holds no rows but 1 malformed ones"):
        rows_on_disk(str(write_jsonl(file, [{"prompt": "w1"}])), None, True)
