"""The store of reference log-probs: it gives what was put in, or says that it lacks it. Never other numbers."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selective_pref_adapters.batch import REF_LOGPS, from_bits, to_bits
from selective_pref_adapters.pairs import TokenizedPair, collate
from selective_pref_adapters.reference_store import (
    DamagedStoreError,
    MissingRowsError,
    ReferenceStore,
    Row,
    Space,
    StoreError,
    StoreWriteError,
    index,
    prune,
    row_key,
    rows_of_pairs,
    shards,
    spaces,
)
from tiny import make_tokenizer

VOCABULARY = {"<pad>": 0, "a": 1, "b": 2, "é": 3}


def make_space(label: str = "teacher", **identity: Any) -> Space:
    vocabulary = spaces.vocabulary_digest(VOCABULARY)
    return Space(identity={"weights": "1", **identity, "vocabulary": vocabulary}, vocabulary=VOCABULARY, label=label)


def make_pairs(count: int, seed: int = 0, longest: int = 9) -> list[TokenizedPair]:
    pick = random.Random(seed)

    def ids(prompt: list[int]) -> list[int]:
        return prompt + [pick.randrange(1, 1000) for _ in range(pick.randint(1, longest))]

    pairs = []
    for number in range(count):
        prompt = [pick.randrange(1, 1000) for _ in range(pick.randint(1, 5))]
        sides = {"chosen_ids": ids(prompt), "rejected_ids": ids(prompt)}
        lengths = {"chosen_prompt_length": len(prompt), "rejected_prompt_length": len(prompt)}
        pairs.append(TokenizedPair(**sides, **lengths, place=f"pairs.jsonl:{number + 1}"))
    return pairs


def truth(row: Row) -> np.ndarray:
    """Values that any reader can tell to be the row's own."""
    seed = int.from_bytes(row.key[:8], "little")
    return -np.random.default_rng(seed).exponential(size=row.values).astype(np.float32)


def write(store: ReferenceStore, pairs: list[TokenizedPair], **options: Any) -> None:
    with store.writer(**options) as writer:
        for row in rows_of_pairs(pairs):
            writer.add(row, truth(row))


def stored(store: ReferenceStore, pairs: list[TokenizedPair]) -> set[bytes]:
    """Keys of the rows that the store gives; fails if it gives a wrong number for any."""
    rows = rows_of_pairs(pairs)
    found = set()
    for row, values in zip(rows, store.values_of(rows), strict=True):
        if values is not None:
            assert values.tobytes() == truth(row).tobytes(), row.place
            found.add(row.key)
    return found


def keys(pairs: list[TokenizedPair]) -> set[bytes]:
    return {row.key for row in rows_of_pairs(pairs)}


def shard_files(store: ReferenceStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore.create(tmp_path / "store", make_space())


# --- what comes out --------------------------------------------------------------------------------------------------


def test_lookup_gives_each_token_its_value_wherever_the_row_stands(store: ReferenceStore) -> None:
    pairs = make_pairs(6)
    write(store, pairs)
    wide = collate(pairs, pad_token_id=0)
    expected = store.lookup(wide)
    assert expected.dtype == torch.float32
    assert expected.shape == (12, wide["input_ids"].shape[1] - 1)
    assert bool((expected[wide["completion_mask"][:, 1:] == 0] == 0).all())
    for line, row in enumerate([*rows_of_pairs(pairs)[0::2], *rows_of_pairs(pairs)[1::2]]):
        at = wide["completion_mask"][line, 1:] != 0
        assert expected[line, at].tolist() == truth(row).tolist()

    backwards = store.lookup(collate(pairs[::-1], pad_token_id=7))
    assert torch.equal(backwards, torch.cat([expected[:6].flip(0), expected[6:].flip(0)]))
    alone = store.lookup(collate(pairs[2:3], pad_token_id=0))
    assert torch.equal(alone[0], expected[2, : alone.shape[1]])
    left = {name: left_padded(tensor, wide["attention_mask"], 4) for name, tensor in wide.items()}
    moved = store.lookup(left)
    mask = left["completion_mask"][:, 1:] != 0
    assert torch.equal(moved[mask], expected[wide["completion_mask"][:, 1:] != 0])
    assert bool((moved[~mask] == 0).all())
    garbage = {**wide, "input_ids": wide["input_ids"].masked_fill(wide["attention_mask"] == 0, 999)}
    assert torch.equal(store.lookup(garbage), expected)
    booleans = {**wide, "attention_mask": wide["attention_mask"].bool(), "completion_mask": wide["completion_mask"] > 0}
    assert torch.equal(store.lookup(booleans), expected)


def left_padded(tensor: torch.Tensor, attention: torch.Tensor, more: int) -> torch.Tensor:
    out = torch.zeros(len(tensor), tensor.shape[1] + more, dtype=tensor.dtype)
    for line, (row, attended) in enumerate(zip(tensor, attention, strict=True)):
        count = int(attended.sum())
        out[line, out.shape[1] - count :] = row[:count]
    return out


def test_values_survive_a_trainer_that_casts_floats(store: ReferenceStore) -> None:
    pairs = make_pairs(3)
    write(store, pairs)
    logps = store.lookup(collate(pairs, 0))
    batch = {REF_LOGPS: to_bits(logps)}
    cast = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in batch.items()}
    assert torch.equal(from_bits(cast[REF_LOGPS]), logps)


def test_other_ids_or_another_mask_miss(store: ReferenceStore) -> None:
    pairs = make_pairs(4)
    write(store, pairs)
    for change in (
        {"chosen_ids": [*pairs[1].chosen_ids[:-1], 1001]},
        {"chosen_ids": [1001, *pairs[1].chosen_ids[1:]]},
        {"chosen_ids": pairs[1].chosen_ids[:-1] if len(pairs[1].chosen_ids) > 3 else [*pairs[1].chosen_ids, 5]},
        {"chosen_prompt_length": pairs[1].chosen_prompt_length - 1},
        {"chosen_prompt_length": 0},
    ):
        other = TokenizedPair(**{**vars(pairs[1]), **change, "place": "other.jsonl:9"})
        assert store.missing([pairs[0], other, pairs[2]]) == [other], change
        with pytest.raises(MissingRowsError, match=r"1 of 6 rows .*'teacher'.*row 1 .*selective-pref score"):
            store.lookup(collate([pairs[0], other, pairs[2]], 0))
        with pytest.raises(MissingRowsError, match=r"1 of 3 pairs .*other\.jsonl:9.*truncation, template"):
            store.check([pairs[0], other, pairs[2]])
    store.check(pairs)
    assert (store.hits, store.misses) == (5 * 5, 5)


def test_keys_frame_what_they_digest() -> None:
    """Neither the border between ids and mask nor that between rows can be moved without a change of the key."""
    some = [
        ([1, 2, 3], [0, 1, 1]),
        ([1, 2, 3], [0, 0, 1]),
        ([1, 2, 3], [1, 1, 1]),
        ([1, 2], [0, 1]),
        ([1, 2, 3, 0], [0, 1, 1, 0]),
        ([3, 2, 1], [0, 1, 1]),
        ([], []),
        ([0], [0]),
        ([0], [1]),
        ([256], [0]),
        ([0, 0], [0, 0]),
    ]
    digests = {row_key(np.array(ids), np.array(mask, dtype=bool)) for ids, mask in some}
    assert len(digests) == len(some)
    ids = np.array([1, 70000, 3])
    assert row_key(ids, np.array([0, 1, 1]) != 0) == row_key(ids.astype(np.int32), np.array([False, True, True]))


@pytest.mark.parametrize("name", ["weights", "adapter", "dtype", "attention", "scoring_version", "architecture"])
def test_another_identity_is_another_space_and_another_label_is_not(tmp_path: Path, name: str) -> None:
    pairs = make_pairs(2)
    write(ReferenceStore.create(tmp_path, make_space(**{name: "one"})), pairs)
    assert ReferenceStore.create(tmp_path, make_space(**{name: "two"})).missing(pairs) == pairs
    assert ReferenceStore.create(tmp_path, make_space("renamed", **{name: "one"})).missing(pairs) == []


def test_a_row_without_a_completion_token_needs_nothing_stored(store: ReferenceStore) -> None:
    pair = TokenizedPair(chosen_ids=[4], rejected_ids=[4, 5], chosen_prompt_length=0, rejected_prompt_length=2)
    assert store.missing([pair]) == []
    batch = collate([pair], 0)
    assert torch.equal(store.lookup(batch), torch.zeros(2, 1))
    batch["attention_mask"][0] = 0
    assert torch.equal(store.lookup(batch), torch.zeros(2, 1))


def test_an_open_store_finds_what_others_write_and_travels_to_workers(store: ReferenceStore) -> None:
    pairs = make_pairs(6)
    write(store, pairs[:3])
    reader = ReferenceStore.open(store.folder.parent)
    assert stored(reader, pairs[:3]) == keys(pairs[:3])
    write(store, pairs[3:])
    assert torch.equal(reader.lookup(collate(pairs, 0)), store.lookup(collate(pairs, 0)))
    worker = pickle.loads(pickle.dumps(reader))
    assert stored(worker, pairs) == keys(pairs)
    with reader:
        assert stored(reader, pairs) == keys(pairs)
    assert stored(reader, pairs) == keys(pairs)  # closed files are opened again


def test_more_shards_than_open_files(store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_OPEN_FILES", 3)
    pairs = make_pairs(10)
    write(store, pairs, shard_bytes=1)
    assert len(shard_files(store)) == len(keys(pairs))
    assert stored(store, pairs) == keys(pairs)
    assert len(store.index._files) == 3


def test_a_writer_writes_when_rows_have_waited(store: ReferenceStore) -> None:
    pairs = make_pairs(2)
    writer = store.writer(flush_seconds=0.0)
    rows = rows_of_pairs(pairs)
    writer.add(rows[0], truth(rows[0]))
    assert stored(ReferenceStore.open(store.folder), pairs) == {rows[0].key}
    waits = store.writer(flush_seconds=1e9)
    waits.add(rows[1], truth(rows[1]))
    assert len(shard_files(store)) == 1
    waits.flush()
    assert len(shard_files(store)) == 2


def test_a_writer_refuses_what_is_no_row(store: ReferenceStore) -> None:
    row = rows_of_pairs(make_pairs(1))[0]
    good = truth(row)
    with store.writer() as writer:
        for values, message in (
            (good.astype(np.float64), "expected .* float32 log-probs; got float64"),
            (good[:-1], "got float32 of shape"),
            (np.full_like(good, np.nan), "not finite"),
            (np.full_like(good, -np.inf), "not finite"),
        ):
            with pytest.raises(ValueError, match=r"pairs\.jsonl:1, chosen.*" + message):
                writer.add(row, values)
    assert shard_files(store) == []


# --- which space -----------------------------------------------------------------------------------------------------


def test_spaces_are_found_by_name_and_label(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no reference store at .*absent.*selective-pref score"):
        ReferenceStore.open(tmp_path / "absent")
    with pytest.raises(StoreError, match="is empty"):
        ReferenceStore.open(tmp_path)
    one = ReferenceStore.create(tmp_path, make_space("one", weights="1"))
    write(one, make_pairs(1))
    assert ReferenceStore.open(str(tmp_path)).space.name == one.space.name
    two = ReferenceStore.create(tmp_path, make_space("two", weights="2"))
    write(two, make_pairs(1))
    for name in (two.space.name, two.space.name[:9], "two"):
        assert ReferenceStore.open(tmp_path, name).space == Space(identity=two.space.identity, label="two")
    assert ReferenceStore.open(two.folder).space.label == "two"
    for name, wanted in (
        (
            None,
            "Name one of them (space=, --reference-space; of `selective-pref score` --space) (they differ in weights)",
        ),
        ("three", "None of them alone fits 'three'"),
    ):
        with pytest.raises(StoreError) as caught:
            ReferenceStore.open(tmp_path, name)
        for part in (wanted, one.space.name, "(one)", two.space.name, "(two)"):
            assert part in str(caught.value)


def test_a_space_is_made_with_its_first_row(tmp_path: Path) -> None:
    """What is mistyped or interrupted before its first row leaves nothing that `open` would have to choose from."""
    path = tmp_path / "new" / "store"
    mistyped = ReferenceStore.create(path, make_space("mistyped", weights="1"))
    with pytest.raises(KeyboardInterrupt), mistyped.writer():
        raise KeyboardInterrupt
    assert mistyped.missing_rows(rows_of_pairs(make_pairs(1)))
    assert mistyped.stat().rows == 0
    assert list(tmp_path.iterdir()) == []
    good = ReferenceStore.create(path, make_space("good", weights="2"))
    write(good, make_pairs(1))
    assert [folder.name for folder in path.iterdir()] == [good.space.name]
    assert stored(ReferenceStore.open(path), make_pairs(1)) == keys(make_pairs(1))
    write(mistyped, make_pairs(2))
    assert {folder.name for folder in path.iterdir()} == {good.space.name, mistyped.space.name}
    assert ReferenceStore.open(path, "mistyped").vocabulary == VOCABULARY


def test_spaces_without_rows_are_passed_over_and_removed(tmp_path: Path) -> None:
    """As earlier versions and killed writers left them."""
    good, old, young = (ReferenceStore.create(tmp_path, make_space(weights=name)) for name in ("1", "2", "3"))
    write(good, make_pairs(1))
    for empty in (old, young):
        spaces.write_identity(empty.folder, empty.space)
        (empty.folder / ".half.tmp").write_bytes(b"half")
    os.utime(old.folder / ".half.tmp", (0, 0))
    spaces.note_filling(old.folder, 64, "keep_end")
    (tmp_path / ("0" * 32)).mkdir()
    (tmp_path / ("0" * 32) / "mine.txt").write_text("keep me")
    assert ReferenceStore.open(tmp_path).space.name == good.space.name
    with pytest.raises(StoreError, match="None of them alone fits"):
        ReferenceStore.open(tmp_path, old.space.name)
    assert spaces.remove_empty_spaces(tmp_path, only=[good.space.name, young.space.name]) == []
    assert spaces.remove_empty_spaces(tmp_path) == [old.space.name]
    assert {f.name for f in tmp_path.iterdir()} == {good.space.name, young.space.name, "0" * 32}
    assert stored(ReferenceStore.open(tmp_path), make_pairs(1)) == keys(make_pairs(1))


def test_an_error_about_lacking_rows_names_the_lengths_in_force(store: ReferenceStore) -> None:
    pairs = make_pairs(4)
    write(store, pairs)
    long = [6] * 20
    cut = TokenizedPair(chosen_ids=long, rejected_ids=[7] * 20, chosen_prompt_length=2, rejected_prompt_length=2)
    with pytest.raises(MissingRowsError) as caught:
        store.check([*pairs, cut])
    said = str(caught.value)
    assert "1 of 5 pairs are not in the store" in said
    assert "2 rows that were asked for have 20 tokens and none has more: is max_length 20?" in said
    assert "The store was filled with" not in said
    spaces.note_filling(store.folder, 4096, "keep_start")
    spaces.note_filling(store.folder, 4096, "keep_start")
    spaces.note_filling(store.folder, 64, "keep_end")
    with pytest.raises(MissingRowsError) as caught:
        ReferenceStore.open(store.folder).lookup(collate([cut], 0))
    said = str(caught.value)
    assert "The store was filled with max_length 4096 (keep_start) and max_length 64 (keep_end)." in said
    assert "selective-pref score --ref-model MODEL --pairs PAIRS --store STORE --max-length N" in said
    for damage in ("", "{", "[1]", '[{"max_length": "x"}]'):
        (store.folder / spaces.FILLINGS).write_text(damage)
        with pytest.raises(MissingRowsError, match=r"is max_length 20\? A row is found by"):
            store.check([cut])


def test_the_manifest_is_for_people(store: ReferenceStore) -> None:
    write(store, make_pairs(1))
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest == {"format": 1, "label": "teacher", "identity": store.space.identity}
    assert store.folder.name == store.space.name
    assert ReferenceStore.open(store.folder).vocabulary == VOCABULARY


def test_check_tokenizer_names_the_first_token_that_differs(tmp_path: Path) -> None:
    words = ["red", "green", "blue"]
    teacher = make_tokenizer(words).get_vocab()
    identity = {"vocabulary": spaces.vocabulary_digest(teacher)}
    store = ReferenceStore.create(tmp_path, Space(identity=identity, vocabulary=teacher, label="big"))
    write(store, make_pairs(1))
    for reader in (store, ReferenceStore.open(tmp_path)):
        reader.check_tokenizer(make_tokenizer(words))
        reader.check_tokenizer(make_tokenizer(words[:2]))  # the teacher's vocabulary is a superset
        with pytest.raises(StoreError, match=r"'big' tokenizes differently: id 5 is 'blue'.*'green'"):
            reader.check_tokenizer(make_tokenizer(["red", "blue", "green"]))
        with pytest.raises(StoreError, match=r"id 7 is 'more'.*no token"):
            reader.check_tokenizer(make_tokenizer([*words, "more"]))


# --- damage ----------------------------------------------------------------------------------------------------------


def two_shards(store: ReferenceStore) -> tuple[list[TokenizedPair], list[TokenizedPair], Path]:
    """(pairs of an intact shard, pairs of the shard to be damaged, that shard)."""
    kept, lost = make_pairs(2, seed=1), make_pairs(3, seed=2)
    write(store, kept)
    before = set(shard_files(store))
    write(store, lost)
    return kept, lost, next(path for path in shard_files(store) if path not in before)


def rebuilt(store: ReferenceStore, pairs: list[TokenizedPair]) -> int:
    """Writes what the store lacks, as filling it again does; returns how many rows that were."""
    again = ReferenceStore.create(store.folder.parent, store.space)
    lacking = again.missing_rows(rows_of_pairs(pairs))
    with again.writer() as writer:
        for row in lacking:
            writer.add(row, truth(row))
    for reader in (again, ReferenceStore.open(store.folder)):
        assert stored(reader, pairs) == keys(pairs)
        assert reader.missing(pairs) == []
    return len(lacking)


def test_a_shard_truncated_at_any_byte(store: ReferenceStore, caplog: pytest.LogCaptureFixture) -> None:
    kept, lost, path = two_shards(store)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        caplog.clear()
        reader = ReferenceStore.open(store.folder)
        assert stored(reader, kept + lost) == keys(kept), length
        assert list(reader.damaged) == [path.name]
        assert "truncated" in caplog.text
        assert reader.missing(kept + lost) == lost
    assert rebuilt(store, kept + lost) == len(keys(lost))


def test_one_byte_flipped_anywhere(store: ReferenceStore, caplog: pytest.LogCaptureFixture) -> None:
    """In the values it costs one row, elsewhere the shard's rows; it never goes unnoticed and never gives a number."""
    kept, lost, path = two_shards(store)
    whole = path.read_bytes()
    costs = []
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        caplog.clear()
        reader = ReferenceStore.open(store.folder)
        found = stored(reader, kept + lost)
        assert found >= keys(kept)
        costs.append(len(keys(lost) - found & keys(lost)))
        assert list(reader.damaged) == [path.name], at
        assert f"shard {path.name}" in caplog.text
    values = sum(row.values for row in rows_of_pairs(lost))
    assert costs.count(1) == 4 * values
    assert costs.count(len(keys(lost))) == len(whole) - 4 * values
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert rebuilt(store, kept + lost) >= 1


@pytest.mark.parametrize("fault", ["zero length", "missing", "longer", "renamed", "not a shard"])
def test_shards_that_are_none(store: ReferenceStore, fault: str) -> None:
    kept, lost, path = two_shards(store)
    whole = path.read_bytes()
    path.unlink()
    if fault == "zero length":
        path.touch()
    elif fault == "longer":
        path.write_bytes(whole + b"\0")
    elif fault == "renamed":
        path.with_name("0" * 32 + ".safetensors").write_bytes(whole)
    elif fault == "not a shard":
        path.write_bytes(whole.replace(b'"offsets"', b'"offsetz"'))
    reader = ReferenceStore.open(store.folder)
    assert stored(reader, kept + lost) == keys(kept)
    assert len(reader.damaged) == (fault != "missing")
    with pytest.raises(MissingRowsError, match="Damaged shards" if reader.damaged else "not in the store"):
        reader.lookup(collate(kept + lost, 0))
    assert rebuilt(store, kept + lost) == len(keys(lost))


def test_a_shard_of_another_version_or_reference_is_not_read(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, lost, path = two_shards(store)
    path.unlink()
    monkeypatch.setattr(shards, "FORMAT", 2)
    write(store, lost)
    monkeypatch.undo()
    reader = ReferenceStore.open(store.folder)
    assert stored(reader, kept + lost) == keys(kept)
    assert list(reader.damaged.values()) == ["written in format 2; this version reads 1"]
    newer = store.folder / next(iter(reader.damaged))
    prune(reader)
    assert newer.exists()  # whole, and somebody else's
    newer.unlink()

    other = ReferenceStore.create(store.folder.parent, make_space(weights="2"))
    write(other, lost)
    (foreign,) = shard_files(other)
    foreign.rename(store.folder / foreign.name)
    reader = ReferenceStore.open(store.folder)
    assert stored(reader, kept + lost) == keys(kept)
    assert "belongs to another reference" in reader.damaged[foreign.name]


def test_values_that_change_or_vanish_under_an_open_reader(store: ReferenceStore) -> None:
    kept, lost, path = two_shards(store)
    reader = ReferenceStore.open(store.folder)
    assert stored(reader, kept + lost) == keys(kept + lost)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    assert keys(kept) <= stored(reader, kept + lost) < keys(kept + lost)
    os.truncate(path, 0)
    assert stored(reader, kept + lost) == keys(kept)
    gone = ReferenceStore.open(store.folder)
    for other in shard_files(store):
        other.unlink()
    assert stored(gone, kept + lost) == set()
    assert rebuilt(store, kept + lost) == len(keys(kept + lost))


def flip_first_value(path: Path) -> None:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[8 + length + json.loads(content[8 : 8 + length])["values"]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def test_a_damaged_copy_is_passed_over_for_an_intact_one(store: ReferenceStore) -> None:
    """Whichever of the two copies is the one that was taken in first."""
    pairs = make_pairs(3)
    write(store, pairs, shard_bytes=1)
    small = shard_files(store)
    write(store, pairs)
    for path in small:
        flip_first_value(path)
    reader = ReferenceStore.open(store.folder)
    assert stored(reader, pairs) == keys(pairs)
    assert reader.missing(pairs) == []
    assert 0 < len(reader.damaged) <= len(small)


@pytest.mark.parametrize("name", ["manifest.json", "vocabulary.json.gz"])
def test_a_manifest_that_is_gone_or_damaged_is_written_again(store: ReferenceStore, name: str) -> None:
    pairs = make_pairs(2)
    write(store, pairs)
    path = store.folder / name
    whole = path.read_bytes()
    contents = [None, *(whole[:at] for at in range(0, len(whole), 7))]
    contents += [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(len(whole))]
    errors = []
    for content in contents:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        try:
            reader = ReferenceStore.open(store.folder.parent)
            assert reader.vocabulary == VOCABULARY
            assert reader.space.identity == store.space.identity
        except StoreError as error:
            errors.append(str(error))
        again = ReferenceStore.create(store.folder.parent, store.space)
        assert stored(again, pairs) == keys(pairs)
        assert ReferenceStore.open(store.folder.parent).vocabulary == VOCABULARY
    harmless = len("teacher") + whole.count(b" ") + whole.count(b"\n") if name == "manifest.json" else 20
    assert len(errors) >= len(contents) - harmless
    assert all("`selective-pref score` with the same reference writes it again" in error for error in errors)
    path.unlink()
    with pytest.raises(DamagedStoreError):
        ReferenceStore.create(store.folder.parent, Space(identity=store.space.identity))  # knows no vocabulary


def test_a_space_of_another_version_is_said_to_be_one_and_left_alone(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(2)
    write(store, pairs[:1])
    with monkeypatch.context() as later:
        for module in (shards, spaces):
            later.setattr(module, "FORMAT", 2)
        newer = ReferenceStore.create(store.folder.parent, make_space("newer"))
        write(newer, pairs)
    assert newer.folder != store.folder
    with pytest.raises(StoreError, match=r"is of format 2; this version of selective-pref reads 1"):
        ReferenceStore.open(store.folder.parent, newer.space.name)
    assert ReferenceStore.open(store.folder.parent, "teacher").missing(pairs) == pairs[1:]


# --- disks and writers -----------------------------------------------------------------------------------------------


@pytest.fixture
def mounted() -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of some KiB; skips where that is not allowed. Away from pytest's folders, which it cleans up."""
    points: list[Path] = []

    def mount(kib: int) -> Path:
        if shutil.which("mount") is None:
            pytest.skip("no mount command")
        point = Path(tempfile.mkdtemp())
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(point)], capture_output=True, text=True
        )
        if done.returncode:
            point.rmdir()
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "--lazy", str(point)], check=True, timeout=30)  # files may be open still
        point.rmdir()


def nothing_half_written(store: ReferenceStore) -> bool:
    return not [path for path in store.folder.iterdir() if path.suffix == ".tmp"]


def test_a_full_disk(mounted: Callable[..., Path]) -> None:
    disk = mounted(64)
    store = ReferenceStore.create(disk, make_space())
    pairs = make_pairs(400, longest=30)
    with pytest.raises(StoreWriteError, match=r"cannot write to the reference store .*: No space left") as caught:
        write(store, pairs, shard_bytes=4096)
    assert caught.value.errno == errno.ENOSPC
    assert nothing_half_written(store)
    kept = stored(ReferenceStore.open(disk), pairs)
    assert 0 < len(kept) < len(keys(pairs))
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert rebuilt(store, pairs) == len(keys(pairs)) - len(kept)


def test_a_file_that_cannot_grow(store: ReferenceStore) -> None:
    """The same without a mount: a limit on file sizes stands in for the full disk."""
    pairs = make_pairs(200)
    write(store, pairs[:20])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(StoreWriteError, match="What was stored before is intact"):
            write(store, pairs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert nothing_half_written(store)
    assert stored(ReferenceStore.open(store.folder), pairs) == keys(pairs[:20])


def test_a_read_only_folder_is_read_and_not_written(mounted: Callable[..., Path]) -> None:
    disk = mounted(1024)
    pairs = make_pairs(3)
    write(ReferenceStore.create(disk, make_space()), pairs)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    reader = ReferenceStore.create(disk, make_space())
    assert stored(reader, pairs) == keys(pairs)
    assert ReferenceStore.open(disk).stat().rows == len(keys(pairs))
    with pytest.raises(StoreWriteError, match="Read-only file system"):
        reader.writer()
    with pytest.raises(StoreWriteError, match="Read-only file system"):
        ReferenceStore.create(disk, make_space(weights="2"))
    with pytest.raises(StoreWriteError, match="Read-only file system"):
        prune(reader)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(StoreWriteError, match="Not a directory"):
        ReferenceStore.create(tmp_path / "file" / "store", make_space())
    with pytest.raises(StoreError, match="expected a folder"):
        ReferenceStore.open(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "keep me"


def in_fork(work: Callable[[], Any]) -> int:
    """Runs `work` in a forked process; returns its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def test_writers_killed_at_random_moments_leave_whole_rows_only(store: ReferenceStore) -> None:
    """Two at once, on overlapping rows; one is killed each time. Afterwards what is lacking is written, no more."""
    pairs = make_pairs(300)
    pick = random.Random(0)
    sizes = [0]
    for _ in range(12):
        shuffled = [pick.sample(pairs, len(pairs)) for _ in range(2)]
        doomed, other = (
            in_fork(lambda some=some: write(ReferenceStore(store.folder, store.space), some, shard_bytes=200))
            for some in (shuffled[0], shuffled[1][:20])
        )
        time.sleep(pick.uniform(0.0, 0.05))
        os.kill(doomed, signal.SIGKILL)
        os.waitpid(doomed, 0)
        assert os.waitpid(other, 0)[1] == 0
        reader = ReferenceStore.open(store.folder)
        assert reader.damaged == {}
        found = stored(reader, pairs)
        assert found >= keys(shuffled[1][:20])
        sizes.append(len(found))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 0
    assert rebuilt(store, pairs) == len(keys(pairs)) - sizes[-1]


def test_a_name_that_leads_nowhere_is_passed_over(store: ReferenceStore) -> None:
    pairs = make_pairs(3)
    write(store, pairs)
    (store.folder / f"{'0' * 32}.safetensors").symlink_to("nowhere")
    assert stored(ReferenceStore.open(store.folder), pairs) == keys(pairs)


def test_pruning_while_others_read_and_write(store: ReferenceStore) -> None:
    """A reader that opened before finds every row in the new shards; a writer's shards stay."""
    pairs = make_pairs(60)
    write(store, pairs[:40], shard_bytes=100)
    reader = ReferenceStore.open(store.folder)
    assert stored(reader, pairs[:5]) == keys(pairs[:5])
    writer = in_fork(lambda: write(ReferenceStore.open(store.folder), pairs[40:], shard_bytes=100))
    prune(ReferenceStore.open(store.folder))
    assert os.waitpid(writer, 0)[1] == 0
    assert stored(reader, pairs) == keys(pairs)
    assert reader.damaged == {}
    assert stored(ReferenceStore.open(store.folder), pairs) == keys(pairs)


# --- tidying up ------------------------------------------------------------------------------------------------------


def test_prune_keeps_every_intact_row_once(store: ReferenceStore) -> None:
    pairs = make_pairs(20)
    write(store, pairs, shard_bytes=100)
    write(store, pairs[:10])
    (store.folder / ".old.tmp").write_bytes(b"half")
    os.utime(store.folder / ".old.tmp", (0, 0))
    (store.folder / ".young.tmp").write_bytes(b"half")
    kept, lost, path = two_shards(store)
    path.write_bytes(path.read_bytes()[:-1])
    earlier, now = prune(ReferenceStore.open(store.folder))
    assert earlier.rows == now.rows == len(keys(pairs + kept))
    assert earlier.shards > now.shards == len(shard_files(store)) == 1
    assert now.bytes < earlier.bytes
    assert {p.name for p in store.folder.glob(".*.tmp")} == {".young.tmp"}
    reader = ReferenceStore.open(store.folder)
    assert (stored(reader, pairs + kept + lost), reader.damaged) == (keys(pairs + kept), {})
    before = shard_files(store)
    prune(reader)
    assert shard_files(store) == before

    only = prune(reader, rows_of_pairs(pairs[:3]))
    assert (only.before.rows, only.after.rows) == (len(keys(pairs + kept)), len(keys(pairs[:3])))
    assert stored(ReferenceStore.open(store.folder), pairs) == keys(pairs[:3])


def test_prune_writes_what_is_kept_before_it_removes_anything(store: ReferenceStore) -> None:
    """The new shard cannot be written (a limit on file sizes stands in for a full disk): every row is there still."""
    pairs = make_pairs(60)
    write(store, pairs, shard_bytes=100)
    before = shard_files(store)
    assert max(path.stat().st_size for path in before) < 2000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(StoreWriteError, match="What was stored before is intact"):
            prune(ReferenceStore.open(store.folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert shard_files(store) == before
    assert stored(ReferenceStore.open(store.folder), pairs) == keys(pairs)


def test_stat_counts(store: ReferenceStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    kept, lost, path = two_shards(store)
    reader = ReferenceStore.open(store.folder)
    stored(reader, kept)
    stored(reader, make_pairs(1, seed=9))
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    stat = reader.stat()
    rows = {row.key: row for row in rows_of_pairs(kept + lost)}
    assert (stat.hits, stat.misses) == (len(keys(kept)), 2)
    assert stat.shards == 2
    assert stat.bytes == sum(path.stat().st_size for path in shard_files(store))
    assert stat.rows <= len(rows)
    assert len(stat.damaged) == 1
