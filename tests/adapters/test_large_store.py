"""Stores of more rows than memory: rows that are known without being made, filled a window at a time."""

from __future__ import annotations

import json
import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ranks import run_ranks
from selective_pref_adapters.pairs.large import Making, PairTable, joined, no_pairs, tokenized_rows
from selective_pref_adapters.reference_store import (
    MissingRowsError,
    ReferenceStore,
    Row,
    Space,
    fill,
    fill_store,
    local,
    prune,
    reference_space,
    rows,
    rows_of_pairs,
    shards,
)
from selective_pref_adapters.reference_store.rows import as_rows
from selective_pref_adapters.reference_store.spaces import vocabulary_digest
from small_tokenizers import small_tokenizer
from store_ranks import fill_together, table
from test_large_data import ROWS
from tiny import text_rows, write_jsonl

VOCABULARY = {"<pad>": 0}


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    space = Space(identity={"vocabulary": vocabulary_digest(VOCABULARY)}, vocabulary=VOCABULARY, label="teacher")
    return ReferenceStore.create(tmp_path / "store", space)


@pytest.fixture
def pairs(tmp_path: Path) -> PairTable:
    """Conversations whose turns do not all count, rows that are cut, the same row several times, equal sides."""
    file = write_jsonl(tmp_path / "pairs.jsonl", ROWS * 2 + text_rows(30))
    tokenizer = small_tokenizer("byte-level BPE", adds_bos=True, template="marked")
    return cut(file, tokenizer)


def cut(file: Path, tokenizer: Any, max_length: int = 40) -> PairTable:
    making = Making(max_length=max_length, truncation_mode="keep_end")
    return tokenized_rows(file, tokenizer, making, cache=file.parent / "ids").pairs(keep_unteachable=True)[0]


def values_of(row: Row) -> np.ndarray:
    return -np.random.default_rng(int.from_bytes(row.key[:8], "little")).random(row.values, dtype=np.float32)


def write(store: ReferenceStore, some: Any, **options: Any) -> None:
    with store.writer(**options) as writer:
        for row in as_rows(some).different():
            writer.add(row, values_of(row))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_a_table_are_those_of_its_pairs(pairs: PairTable, tmp_path: Path) -> None:
    """Their ids, masks and places, and what is known of them beforehand; of a part, another order, several tables."""
    tokenizer = small_tokenizer("byte-level BPE")
    short = cut(write_jsonl(tmp_path / "short.jsonl", text_rows(9)[3:]), tokenizer, max_length=2)  # without a prompt
    assert any(row.mask[0] for row in rows_of_pairs(short))
    together = joined([pairs[3:9], no_pairs(), short, pairs[:5]])
    assert list(together) == [*pairs[3:9], *short, *pairs[:5]]
    for some in (pairs, pairs[::-2], short, together, pairs[:0]):
        known, held = rows_of_pairs(some), rows_of_pairs(list(some))
        assert known.make is not held.make
        for made, expected in ((list(known), list(held)), (known[1:7], held[1:7]), (known[::-3], held[::-3])):
            assert [(r.key, r.place, r.ids.tolist(), r.mask.tolist()) for r in made] == [
                (r.key, r.place, r.ids.tolist(), r.mask.tolist()) for r in expected
            ]
        for lists in (known, held):
            assert lists.keys.tobytes() == b"".join(row.key for row in held)
            assert lists.tokens.tolist() == [len(row.ids) for row in held]
            assert lists.values.tolist() == [row.values for row in held]
        once = {row.key: row for row in held if row.values}
        assert [row.key for row in known.different()] == list(once)
    assert 0 < len(rows_of_pairs(pairs).different()) < 2 * len(pairs)
    assert any(row.mask[1:].sum() < len(row.mask) - row.mask.argmax() for row in rows_of_pairs(pairs))
    chosen_only = [pair.chosen_only() for pair in pairs]
    assert [row.place for row in rows_of_pairs(chosen_only)] == [f"{pair.place}, chosen" for pair in pairs]


def test_rows_are_asked_for_window_by_window_the_longest_first(
    pairs: PairTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = rows_of_pairs(pairs).different()
    known = known.some(np.argsort(known.tokens))
    for window in (4, len(known), 1000):
        monkeypatch.setattr(fill, "WINDOW", window)
        order = fill._longest_first(known)
        assert sorted(order) == list(range(len(known)))
        assert known.tokens[order[0]] == known.tokens.max()
        whole = [order[at : at + window] for at in range(0, len(order), window) if len(order) - at >= window]
        if len(known) % window == 0 or order[-1] // window == len(known) // window:  # the short window came last
            assert all(len(set(part // window)) == 1 for part in whole)
    by_length = sorted(range(len(known)), key=lambda n: (-known.tokens[n], known[n].key))
    assert order.tolist() == by_length


# --- what a store lacks ----------------------------------------------------------------------------------------------


def test_a_store_that_has_every_row_is_checked_without_making_one(
    pairs: PairTable, store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, rows_of_pairs(pairs), shard_bytes=200)

    def never(*_: Any) -> None:
        raise AssertionError("a row was made")

    monkeypatch.setattr(PairTable, "__getitems__", never)
    monkeypatch.setattr(PairTable, "__getitem__", never)
    reader = ReferenceStore.open(store.folder)
    reader.check(pairs)
    reader.check(joined([pairs, pairs]))
    assert reader.missing(pairs) == []
    report = fill.fill_rows(reader, rows_of_pairs(pairs), never, progress=False)
    assert (report.hits, report.computed, report.forward_passes) == (report.rows, 0, 0)


def test_what_a_table_lacks_is_what_its_pairs_lack(pairs: PairTable, store: ReferenceStore) -> None:
    """The same pairs and the same words; a row without log-probs is never lacking."""
    held = rows_of_pairs(pairs[4:-3])  # the first four stand again further below
    write(store, held, shard_bytes=200)
    reader = ReferenceStore.open(store.folder)
    there = {row.key for row in held}
    lacking = [pair for pair in pairs if any(r.values and r.key not in there for r in rows_of_pairs([pair]))]
    assert 0 < len(lacking) <= 3
    assert reader.missing(pairs) == reader.missing(list(pairs)) == lacking
    said = []
    for some in (pairs, list(pairs), iter(pairs)):
        with pytest.raises(MissingRowsError) as caught:
            reader.check(some)
        said.append(str(caught.value))
    assert said[0] == said[1] == said[2]
    assert said[0].startswith(f"{len(lacking)} of {len(pairs)} pairs are not in the store")
    assert f": {'; '.join(pair.place for pair in lacking)}." in said[0]
    assert (
        f"The longest row that was asked for has {pairs.lengths.max()} tokens" in said[0] or "none has more" in said[0]
    )


def test_many_rows_are_found_where_each_by_itself_is(
    pairs: PairTable, store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged at any place, with and without a copy, cut off, gone; and the files are read in several parts."""
    monkeypatch.setattr(shards, "_READ_BYTES", 64)
    known = rows_of_pairs(pairs).different()
    write(store, known.some(np.arange(0, len(known), 2)), shard_bytes=150)
    write(store, known.some(np.arange(0, len(known), 3)), shard_bytes=250)
    pick, lost = random.Random(0), 0
    files = sorted(store.folder.glob("*.safetensors"))
    for _ in range(60):
        path = pick.choice(files)
        whole = path.read_bytes()
        at = pick.randrange(len(whole))
        damaged = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        path.write_bytes(damaged if pick.random() < 0.8 else whole[:at])
        one, many = ReferenceStore.open(store.folder), ReferenceStore.open(store.folder)
        if pick.random() < 0.2:
            path.unlink()  # after its index was read
        expected = [one.index.values(row.key, row.values) is not None for row in known]
        assert many.index.holds(known.keys, known.values).tolist() == expected
        assert many.index.holds(known.keys, known.values).tolist() == expected  # again, when damage is known
        assert set(many.damaged) == set(one.damaged)
        assert {row.key for row in many.missing_rows(known)} == {
            row.key for row, there in zip(known, expected, strict=True) if not there
        }
        lost += len(known) - sum(expected)
        path.write_bytes(whole)
    assert lost > 60 * (len(known) - len(set(range(0, len(known), 2)) | set(range(0, len(known), 3))))
    assert not many.index.holds(known.keys, known.values + 1).any()


def test_a_key_that_ends_in_zeros_is_a_key_like_any_other(store: ReferenceStore) -> None:
    """NumPy leaves zeros at the end of bytes out where one element is taken."""
    one, two = bytes(range(1, 15)), np.arange(3, dtype=np.float32)
    keys = [one + b"\0\0", one + b"\0\1", bytes(16)]
    with store.writer() as writer:
        for number, key in enumerate(keys[:2]):
            writer.add_values(key, two + number)
    asked = np.array(keys, dtype=shards.KEYS)
    assert store.index.values(keys[0]) is None  # before the folder is read again
    store.index.refresh()
    assert store.index.holds(asked, np.full(3, 3)).tolist() == [True, True, False]
    assert [None if v is None else v[0] for v in map(store.index.values, keys)] == [0, 1, None]
    prune(store)
    again = ReferenceStore.open(store.folder)
    assert [None if v is None else v[0] for v in map(again.index.values, keys)] == [0, 1, None]


# --- filling ---------------------------------------------------------------------------------------------------------


def test_few_rows_are_in_memory_while_many_are_computed(
    tmp_path: Path, reference_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the log-probs are those of a store that is filled with all rows at once."""
    write_jsonl(tmp_path / "pairs.jsonl", text_rows(60))
    pairs = table(tmp_path, str(reference_folder))
    model = AutoModelForCausalLM.from_pretrained(reference_folder).eval()
    space = reference_space(model, AutoTokenizer.from_pretrained(reference_folder), label="teacher")
    whole = ReferenceStore.create(tmp_path / "whole", space)
    expected = fill_store(whole, list(pairs), model, pad_token_id=0, progress=False)

    alive: weakref.WeakValueDictionary[int, Row] = weakref.WeakValueDictionary()
    most, made, sides = [], [], rows._sides

    def watched(pair: Any) -> list[Row]:
        for row in (both := sides(pair)):
            made.append(row.place)
            alive[len(made)] = row
        most.append(len(alive))
        return both

    for module in (fill, local):
        monkeypatch.setattr(module, "WINDOW", 8)
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 8)
    monkeypatch.setattr(rows, "_sides", watched)
    parts = ReferenceStore.create(tmp_path / "parts", space)
    report = fill_store(parts, pairs, model, pad_token_id=0, progress=False)
    assert (report.rows, report.hits, report.computed) == (expected.rows, 0, expected.rows)
    assert report.tokens == expected.tokens
    assert len(made) >= 100
    assert max(most) <= 40  # both sides of the pairs of this window, and of the one before
    monkeypatch.undo()
    for ours, theirs in zip(parts.values_of(held := list(rows_of_pairs(pairs))), whole.values_of(held), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_call_the_model_equally_often_and_end_with_the_same_error(
    tmp_path: Path, reference_folder: Path
) -> None:
    rows_of_text = text_rows(40)
    write_jsonl(tmp_path / "pairs.jsonl", rows_of_text[:25])
    write_jsonl(tmp_path / "others.jsonl", rows_of_text)
    assert run_ranks(fill_together, tmp_path, str(reference_folder)) == [0, 0]
    first, second = (json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2))
    assert first["calls"] == second["calls"] >= 20
    assert first["looked"] == [0, 1]
    assert second["looked"] == []
    assert first["error"] == second["error"]
    assert first["error"].startswith("15 of 40 pairs are not in the store")
    count = len(rows_of_pairs(table(tmp_path, str(reference_folder))).different())
    there = len(range(2, count, 2))
    assert first["report"] == second["report"] == [count, there, count - there]
