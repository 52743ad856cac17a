"""Rows that are not in memory: the cache of token ids and its name, tables of pairs, streams. Without a model."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_dataset
from datasets.arrow_writer import ArrowWriter
from datasets.distributed import split_dataset_by_node

from selective_pref_adapters.pairs import RowError, read_rows, row_key, split_by_prompt, tokenize_pairs
from selective_pref_adapters.pairs.large import Making, PairStream, making, stream_of, streamed_pairs, writing
from selective_pref_adapters.pairs.large import tokenized_rows as rows_of
from selective_pref_adapters.pairs.large.naming import name_of
from small_tokenizers import small_tokenizer
from tiny import write_jsonl

CUT = Making(max_length=40)


def say(*turns: str) -> list[dict[str, str]]:
    return [{"role": "user" if turn[0] == "?" else "assistant", "content": turn[1:]} for turn in turns]


ROWS: list[Any] = [
    {"prompt": "the egg ", "chosen": "boils", "rejected": "cooks", "weight": 2.0},
    {"prompt": say("?boils"), "chosen": say("!five", "?why", "!hard"), "rejected": say("!no"), "weight": 0.5},
    {"prompt": "the egg ", "chosen": "", "rejected": "cooks", "weight": 1},
    {"prompt": "the egg " * 9, "chosen": "boils for five minutes", "rejected": "in a pot", "weight": 1},
    {"prompt": "the egg " * 30, "chosen": "boils", "rejected": "cooks", "weight": 1},
    {"prompt": "why", "chosen": "same", "rejected": "same", "weight": 1},
    {"conversations": [{"from": "human", "value": "why"}], "chosen": "hard", "rejected": "yes", "weight": 1},
    {"prompt": "a pot ", "chosen": "é 火", "rejected": "then", "weight": 1},
]
MALFORMED: list[Any] = ["not JSON", {"prompt": "why", "chosen": "no"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer("byte-level BPE", adds_bos=True, template="marked")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", ROWS * 3)


# --- what is read back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kept", [False, True], ids=["teachable", "all"])
def test_rows_of_the_cache_are_the_rows_made_directly(
    file: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, mode: Any, kept: bool
) -> None:
    """Ids, masks, weights, places, what is left out and why, the split: without a cache, made for it, found in it."""
    monkeypatch.setattr(making, "ROWS_AT_ONCE", 5)  # several blocks
    rows = read_rows(file, notes=(notes := []))
    how = {"max_length": 40, "truncation_mode": mode, "keep_unteachable": kept}
    for options in ({}, {"chosen_only": True}):
        rows = read_rows(file, **options)
        expected, report = tokenize_pairs(rows, tokenizer, **how)
        for cache in ("off", tmp_path / "cache", tmp_path / "cache"):
            found = rows_of(file, tokenizer, Making(max_length=40, truncation_mode=mode, **options), cache=cache)
            pairs, seen = found.pairs(keep_unteachable=kept)
            assert list(pairs) == expected, cache
            assert seen == report
            assert options or found.notes == notes
            sides = [tuple(row_key(np.array(ids), mask) for _, ids, mask in pair.sides()) for pair in expected]
            assert list(pairs.keys()) == sides
            train, held_out = found.split(0.3, seed=1)
            assert ([rows[n] for n in train], [rows[n] for n in held_out]) == split_by_prompt(rows, 0.3, 1)
            part, seen = found.pairs(train, keep_unteachable=kept)
            assert (list(part), seen) == tokenize_pairs([rows[n] for n in train], tokenizer, **how)
    assert report.left_out or kept
    assert report.truncated
    assert any(pair.chosen_uncounted for pair in expected)


def test_a_table_is_a_sequence_of_pairs(file: Path, tmp_path: Path, tokenizer: Any) -> None:
    table, _ = rows_of(file, tokenizer, CUT, cache=tmp_path / "cache").pairs()
    pairs = list(table)
    assert len(table) == len(pairs) == 15
    assert [table[0], table[-1]] == [pairs[0], pairs[-1]]
    assert list(table[3:9:2]) == pairs[3:9:2]
    assert table[2:].__getitems__([5, 0]) == [pairs[7], pairs[2]]
    assert list(pickle.loads(pickle.dumps(table[4:]))) == pairs[4:]
    assert table.lengths.tolist() == [max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    assert table.highest_id == max(max(p.chosen_ids + p.rejected_ids) for p in pairs)
    assert table.weights == [p.weight for p in pairs]
    with pytest.raises(IndexError):
        table[15]
    digests = {some.digest() for some in (table, table[1:], table[::-1])}
    assert len(digests) == 3
    other = [{**row, "weight": 3} if number == 0 else row for number, row in enumerate(ROWS * 3)]
    again, _ = rows_of(write_jsonl(tmp_path / "pairs.jsonl", other), tokenizer, CUT, cache="off").pairs()
    assert again.digest() not in digests


def test_malformed_rows_are_an_error_or_counted_from_the_cache_as_the_first_time(
    tmp_path: Path, tokenizer: Any
) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [ROWS[0], *MALFORMED, ROWS[1]])
    for cache in ("off", tmp_path / "cache"):
        with pytest.raises(RowError, match=r"^pairs.jsonl:2: not valid JSON.*--skip-malformed-rows"):
            rows_of(file, tokenizer, CUT, cache=cache)
    for _ in range(2):
        found = rows_of(file, tokenizer, CUT, cache=tmp_path / "cache", skip_malformed=True)
        assert (len(found), found.unread, found.first_unread[:15]) == (2, 2, "pairs.jsonl:2: ")
        with pytest.raises(RowError, match=r"^pairs.jsonl:2: not valid JSON.*--skip-malformed-rows"):
            rows_of(file, tokenizer, CUT, cache=tmp_path / "cache")
    none = write_jsonl(tmp_path / "none.jsonl", MALFORMED)
    with pytest.raises(ValueError, match=r"holds no rows but 2 malformed ones: none.jsonl:1"):
        rows_of(none, tokenizer, CUT, cache=tmp_path / "cache", skip_malformed=True)
    refusing = small_tokenizer("byte-level BPE")
    refusing.chat_template = "{% if messages | length > 2 %}{{ raise_exception('short') }}{% endif %}..."
    file = write_jsonl(tmp_path / "pairs.jsonl", ROWS[:2])
    for cache in ("off", tmp_path / "cache"):
        with pytest.raises(RowError, match="the chat template rejects"):
            rows_of(file, refusing, CUT, cache=cache)
        found = rows_of(file, refusing, CUT, cache=cache, skip_malformed=True)
        assert [text[:15] for text in found.refused(np.arange(2))] == ["pairs.jsonl:2: "]
        assert found.pairs(skip_malformed=True)[1].malformed == 1
        with pytest.raises(RowError, match="the chat template rejects"):
            found.pairs()
    small_tokenizer.cache_clear()


# --- the name --------------------------------------------------------------------------------------------------------


def test_the_name_changes_with_whatever_decides_the_ids(file: Path, tmp_path: Path) -> None:
    def named(tokenizer: Any = None, source: Path = file, **options: Any) -> str:
        tokenizer = tokenizer or small_tokenizer("WordLevel")
        return name_of(source, tokenizer, Making(**{"max_length": 40, **options}))[0]

    before = named()
    used = small_tokenizer("WordLevel")
    used(["the egg", "boils for five"], padding=True, truncation=True, max_length=3)
    used.padding_side = used.truncation_side = "left"
    used.name_or_path = "elsewhere"
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(file, tmp_path / "moved" / "pairs.jsonl")
    assert before == named(used) == named(source=Path(moved))

    names = [
        before,
        *(named(**o) for o in ({"max_length": 41}, {"truncation_mode": "keep_end"}, {"chosen_only": True})),
    ]
    names += [named(columns={"prompt": "a", "chosen": "b", "rejected": "c"})]
    names += [named(source=Path(shutil.copy(file, tmp_path / "called.jsonl")))]  # places name the file
    for change in (
        lambda t: setattr(t, "chat_template", "{{ messages }}"),
        lambda t: setattr(t, "eos_token", "<pad>"),
        lambda t: t.add_tokens(["boils for"]),
        lambda t: setattr(t, "split_special_tokens", True),
    ):
        small_tokenizer.cache_clear()
        other = small_tokenizer("WordLevel")
        change(other)
        names.append(named(other))
    small_tokenizer.cache_clear()
    names.append(named(small_tokenizer("WordLevel", adds_bos=True)))
    stamp = file.stat()
    file.write_bytes(file.read_bytes().replace(b"five", b"nine"))  # the same size, and below the same time
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    names.append(named())
    assert len(set(names)) == len(names) == 12


def test_a_template_that_writes_the_date_is_of_its_day(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_tokenizer("WordLevel")
    dated = {True: "{{ strftime_now('%d') }}", False: "{{ messages }}"}
    seen = []
    for with_date, template in dated.items():
        tokenizer.chat_template = template
        _, identity = name_of(file, tokenizer, CUT)
        seen.append(("date" in identity) == with_date)
    small_tokenizer.cache_clear()
    assert all(seen)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_the_ids_are_made_once_by_one_of_those_who_ask_at_the_same_time(
    file: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = making.made
    monkeypatch.setattr(making, "made", lambda rows, *rest: calls.append(len(rows)) or whole(rows, *rest))
    found: list[list[Any]] = []
    ask = partial(rows_of, file, tokenizer, CUT, cache=tmp_path / "cache")
    threads = [threading.Thread(target=lambda: found.append(list(ask().pairs()[0]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [24]
    assert found[0] == found[1] == found[2]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]) == 1


def test_two_that_make_the_same_entry_without_locks_both_end_well(
    file: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on two machines whose shared folder has no locks: the second finds the first one's entry at its end."""

    def no_locks(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    with monkeypatch.context() as patch:
        patch.setattr("filelock.FileLock.acquire", no_locks)
        assert len(rows_of(file, tokenizer, CUT, cache=tmp_path / "alone")) == 24
    assert "is on a file system without locks" in caplog.text
    name, identity = name_of(file, tokenizer, CUT)
    (tmp_path / "cache").mkdir()
    for _ in range(2):
        writing.Maker(file, tokenizer, CUT, 1, False, False).on_disk(tmp_path / "cache", name, identity)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [name]
    assert len(rows_of(file, tokenizer, CUT, cache=tmp_path / "cache")) == 24


def test_what_a_killed_or_hindered_writer_leaves_is_never_read(
    file: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    ask = partial(rows_of, file, tokenizer, CUT, cache=cache)
    expected = list(ask().pairs()[0])
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    for name in ("pairs.arrow", "about.arrow", "entry.json"):  # cut off, as by a power cut
        (entry / name).write_bytes((entry / name).read_bytes()[:-100])
        assert list(ask().pairs()[0]) == expected, name
    shutil.rmtree(entry)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_whole", killed)
        patch.setattr(writing.shutil, "rmtree", lambda *_, **__: None)  # kill -9 tidies nothing up
        with pytest.raises(KeyboardInterrupt):
            ask()
    (left,) = (path for path in cache.iterdir() if path.is_dir())
    left.rename(left.with_name(f"{left.name.removesuffix(f'.{os.getpid()}.tmp')}.999999999.tmp"))
    theirs = cache / f".{entry.name}.elsewhere.1.tmp"  # a writer of another machine, which is left alone
    theirs.mkdir()
    assert list(ask().pairs()[0]) == expected
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {entry.name, theirs.name}

    shutil.rmtree(entry)
    theirs.rmdir()
    whole, calls = ArrowWriter.write_table, []

    def full(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ArrowWriter, "write_table", full)
        with pytest.raises(OSError, match=r"cache could not be written: .*No space left.*--data-cache off"):
            ask()
    assert not [path for path in cache.iterdir() if path.is_dir()]
    (tmp_path / "a file").write_text("")
    with pytest.raises(OSError, match=r"data cache .*a file cannot be written to.*--data-cache FOLDER"):
        rows_of(file, tokenizer, CUT, cache=tmp_path / "a file")


def test_a_file_that_changes_while_it_is_read_is_an_error(
    file: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = making.made

    def growing(*arguments: Any) -> Any:
        with file.open("a") as opened:
            opened.write(json.dumps(ROWS[0]) + "\n")
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(making, "made", growing)
        with pytest.raises(ValueError, match="has changed while it was read"):
            rows_of(file, tokenizer, CUT, cache=tmp_path / "cache")
    assert len(rows_of(file, tokenizer, CUT, cache=tmp_path / "cache")) == 25


@pytest.mark.slow
def test_several_workers_make_what_one_makes(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "ROWS_AT_ONCE", 5)
    file = write_jsonl(tmp_path / "pairs.jsonl", [*ROWS * 3, MALFORMED[1]])
    one, two = (
        rows_of(file, tokenizer, CUT, cache=tmp_path / f"cache {workers}", workers=workers, skip_malformed=True)
        for workers in (1, 2)
    )
    assert list(one.pairs()[0]) == list(two.pairs()[0])
    assert one.about.equals(two.about)
    assert (one.notes, one.unread, one.first_unread) == (two.notes, two.unread, two.first_unread)
    with pytest.raises(ValueError, match=r"data_workers.* must be at least 1; got 0"):
        rows_of(file, tokenizer, CUT, cache="off", workers=0)


# --- streams ---------------------------------------------------------------------------------------------------------


def streams(source: Any, tokenizer: Any, world: int = 1, **options: Any) -> list[PairStream]:
    def make(rank: int) -> Any:
        rows = split_dataset_by_node(stream_of(source), rank, world)
        return streamed_pairs(rows, tokenizer, CUT, name="rows", **options)

    return [PairStream(partial(make, rank), str(source)) for rank in range(world)]


def test_a_stream_gives_the_rows_in_their_order_and_goes_on_where_it_stopped(
    file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    expected, _ = tokenize_pairs(read_rows(file), tokenizer, max_length=40)
    folder_of_two = tmp_path / "two"
    folder_of_two.mkdir()
    for number in range(2):
        write_jsonl(folder_of_two / f"{number}.jsonl", (ROWS * 3)[number * 12 : (number + 1) * 12])
    for source in (file, folder_of_two):
        for before in (0, 4, 14, 15, 16):
            (stream,), (resumed,) = streams(source, tokenizer), streams(source, tokenizer)
            first = stream.take(before)
            resumed.load(json.loads(json.dumps(stream.state())))
            rest, again = stream.take(17), resumed.take(17)
            assert rest == again
            together = [pair.chosen_ids for pair in first + rest]
            assert together == [pair.chosen_ids for pair in (expected * 3)[: before + 17]]
            assert stream.passes == resumed.passes == (before + 16) // 15
            stream.close(), resumed.close()


def test_processes_share_a_stream_by_its_files_or_row_by_row(file: Path, tmp_path: Path, tokenizer: Any) -> None:
    places = [[pair.place for pair in stream.take(7)] for stream in streams(file, tokenizer, world=2)]
    assert not set(places[0]) & set(places[1])
    assert len({*places[0], *places[1]}) == 14
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(2):
        Dataset.from_list(ROWS[6:7] * 600).to_parquet(str(parts / f"part{number}.parquet"))
    for number, stream in enumerate(streams(parts, tokenizer, world=2)):
        assert {pair.place.split(",")[0] for pair in stream.take(600)} == {f"part{number}.parquet"}
        assert stream.passes == 0


def test_a_stream_reads_no_more_than_it_gives(tmp_path: Path, tokenizer: Any) -> None:
    read = []

    def rows() -> Any:
        for _ in range(10_000):
            read.append(1)
            yield {"prompt": "why ", "chosen": "yes", "rejected": "no"}

    pairs = streamed_pairs(IterableDataset.from_generator(rows), tokenizer, CUT)
    assert len(list(pairs.take(3))) == 3
    assert len(read) < 1000


def test_what_a_stream_leaves_out_is_counted_and_a_stream_of_nothing_is_an_error(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [ROWS[0], *MALFORMED, ROWS[2], ROWS[5]])
    (stream,) = streams(file, tokenizer)
    with pytest.raises(RowError, match=r"^pairs.jsonl:2: not valid JSON.*--skip-malformed-rows"):
        stream.take(2)
    (stream,) = streams(file, tokenizer, skip_malformed=True)
    assert [pair.place for pair in stream.take(2)] == ["pairs.jsonl:1"] * 2
    assert "rows: 4 streamed rows left out so far: 1 empty completion" in caplog.text
    assert "2 malformed" in caplog.text
    (stream,) = streams(write_jsonl(tmp_path / "none.jsonl", [ROWS[2]]), tokenizer)
    with pytest.raises(ValueError, match=r"none.jsonl holds no pair for this process that can be trained on"):
        stream.take(1)
    with pytest.raises(TypeError, match=r"must be a datasets.IterableDataset; got list"):
        streamed_pairs(ROWS, tokenizer, CUT)
    with pytest.raises(FileNotFoundError, match="no preference pairs at"):
        stream_of(tmp_path / "absent.jsonl")


def test_rows_of_a_data_set_that_is_streamed_are_named_by_their_number(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "why ", "chosen": "yes", "rejected": "no"}] * 2)
    rows = load_dataset("json", data_files=str(file), split="train", streaming=True)
    assert [row["place"] for row in streamed_pairs(rows, tokenizer, CUT, name="train")] == [
        "train, row 0",
        "train, row 1",
    ]
