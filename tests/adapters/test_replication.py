"""The replication's worlds, methods and runs, in small."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from selective_pref_adapters.replication.miniature import worlds
from selective_pref_adapters.replication.miniature.judging import auc
from selective_pref_adapters.replication.miniature.language import (
    OTHER_STYLE,
    is_well_formed,
    make_language,
    supervised_texts,
    write_rows,
)
from selective_pref_adapters.replication.miniature.methods import METHODS, Seen
from selective_pref_adapters.replication.miniature.trials import Run, measure_given, train
from selective_pref_adapters.replication.miniature.worlds import World, answers_of, dense_logps, of_the_tokens, take

QUICK = Run(rate=1e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return worlds.prepare(tmp_path_factory.mktemp("world"), 3, worlds.TINY)


def seen_by(world: World, name: str = "student", **given: Any) -> Seen:
    """What the first pairs look like to a policy, which is one of the world's models."""
    texts, pairs = world.train, torch.arange(8)
    rows = texts.rows(pairs, 0.0)
    batch = take(texts.batch, rows)
    all_logps = dense_logps(world.model(name), batch)
    with torch.no_grad():
        teacher = dense_logps(world.model("teacher"), batch)
    logps = of_the_tokens(all_logps, batch)
    values: dict[str, Any] = {
        "logps": logps,
        "mask": answers_of(batch),
        "given": {name: some[rows] for name, some in texts.logps.items()},
        "decisive": texts.decisive[rows],
        "all_logps": all_logps,
        "teacher_logps": teacher,
        "noise": torch.rand(logps.shape, generator=torch.Generator().manual_seed(0)),
    }
    return Seen(**{**values, **given})


def gradient(name: str, seen: Seen) -> torch.Tensor:
    (found,) = torch.autograd.grad(METHODS[name].losses(seen).mean(), seen.logps, retain_graph=True, allow_unused=True)
    return found


def test_a_world_is_made_once(world: World) -> None:
    files = sorted(world.folder.rglob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    again = worlds.prepare(world.folder, 3, worlds.TINY)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert not list(world.folder.glob("*.unfinished"))
    for name, logps in world.train.logps.items():
        assert torch.equal(again.train.logps[name], logps)
        with torch.no_grad():
            own = of_the_tokens(dense_logps(world.model(name), world.train.batch), world.train.batch)
        torch.testing.assert_close(logps, own, rtol=1e-4, atol=1e-4)


def test_no_prompt_is_both_trained_on_and_asked(world: World) -> None:
    def prompts(name: str) -> set[frozenset[str]]:
        lines = (world.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return {frozenset(json.loads(line)["prompt"].split()) for line in lines}

    trained = prompts("pairs")
    assert not trained & prompts("held_out")
    assert not trained & {frozenset(prompt.split()) for prompt in world.prompts}


def test_models_that_a_world_is_given_are_measured(world: World) -> None:
    found = measure_given(world)
    assert set(found) == set(worlds.MODELS)
    assert found["student"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["student"]["vetoed"] == 0
    sides = world.held_out.logps
    inside = answers_of(world.held_out.batch)
    for name in ("weak", "teacher", "stranger"):
        far = [a - b <= -1 for a, b in zip(sides[name][inside], sides["student"][inside], strict=True)]
        assert found[name]["vetoed"] == pytest.approx(sum(map(float, far)) / len(far))


def test_a_world_has_the_models_that_are_asked_for(tmp_path: Path) -> None:
    some = worlds.prepare(tmp_path, 3, worlds.TINY, ("student", "teacher"))
    assert set(some.train.logps) == {"student", "teacher"}
    assert not (tmp_path / "stranger").exists()
    assert not (tmp_path / "weak").exists()


def test_who_reads_rows_while_they_are_written_again_reads_all_of_them(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 2000, "chosen": "b", "rejected": "c"}] * 2000
    path = tmp_path / "pairs.jsonl"
    write_rows(path, rows)
    size = path.stat().st_size
    writer = Thread(target=lambda: [write_rows(path, rows) for _ in range(5)])
    writer.start()
    while writer.is_alive():
        assert path.stat().st_size == size
    writer.join()


def test_labels_are_swapped_where_luck_has_it(world: World) -> None:
    texts, pairs = world.train, torch.arange(len(world.train))
    straight, swapped = texts.rows(pairs, 0.0), texts.rows(pairs, 1.0)
    assert torch.equal(straight, torch.arange(2 * len(texts)))
    assert torch.equal(swapped, straight.roll(len(texts)))
    some = texts.rows(pairs, 0.5)[: len(texts)] >= len(texts)
    assert torch.equal(some, texts.luck < 0.5)


def test_form_and_style() -> None:
    language = make_language(0)
    prompts = ["owl fox elk hen :"] * 40
    for style in (worlds.PLAIN, OTHER_STYLE):
        texts = supervised_texts(language, prompts, random.Random(0), error_rate=0.0, style=style)
        assert all(is_well_formed(answer) for _, answer in texts)
    assert {word for _, answer in texts for word in answer.split()} & {"hm", "er", "oh"} == set()
    right = "first so 7 second er 3 third hm oh 0 fourth yes 2"
    for wrong in (right + " 2", right.replace("er ", ""), right.replace("third", "second"), right[:-2], ""):
        assert not is_well_formed(wrong)


def test_auc_counts_pairs() -> None:
    positive, negative = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([2.0, 0.0, 2.5])
    pairs = [(p > n) + (p == n) / 2 for p in positive.tolist() for n in negative.tolist()]
    assert auc(positive, negative) == pytest.approx(sum(pairs) / 12)


def test_methods_that_are_others_by_another_name(world: World) -> None:
    seen = seen_by(world, "weak")
    torch.testing.assert_close(gradient("ratio_100", seen), gradient("distilled_dpo", seen))
    # as β → 0 every pair weighs one half, whatever the reference
    torch.testing.assert_close(gradient("dpo", seen), gradient("distilled_dpo", seen), rtol=0.05, atol=1e-6)


def test_which_tokens_move(world: World) -> None:
    seen = seen_by(world, "weak")
    assert torch.equal(gradient("oracle", seen) != 0, seen.decisive)
    moved = {name: gradient(name, seen) != 0 for name in ("random", "wrong_way", "selective_strong", "above_0")}
    tokens = int(seen.mask.sum())
    assert not (moved["wrong_way"] & moved["selective_strong"]).sum() > 0.05 * tokens
    assert 0.35 * tokens < moved["random"].sum() < 0.5 * tokens
    better = seen.given["teacher"] > seen.logps
    better[len(better) // 2 :] = (seen.given["teacher"] < seen.logps)[len(better) // 2 :]
    assert torch.equal(moved["above_0"], better & seen.mask)


def test_distillation_ends_at_the_teacher(world: World) -> None:
    seen = seen_by(world, "teacher")
    assert METHODS["distillation"].losses(seen).abs().max() < 1e-5
    other = seen_by(world)
    assert (METHODS["distillation"].losses(other) > 0).all()
    assert (METHODS["distillation_sharp"].losses(seen) > 0).all()
    with pytest.raises(ValueError, match="reads the distributions of the strong reference"):
        METHODS["distillation"].losses(replace(seen, teacher_logps=None))


def test_a_run_is_the_same_again_and_is_measured_on_its_way(world: World) -> None:
    run = replace(QUICK, times=(1, 2))
    first, again = (train(world, METHODS["selective_strong"], run) for _ in range(2))
    assert first == again
    assert [record["times"] for record in first["measured"]] == [0, 1, 2]
    assert not first["diverged"]
    start = first["measured"][0]
    assert start["kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["measured"][2]["kl"] > first["measured"][1]["kl"] > 0
    for record in first["measured"]:
        assert 0 <= record["precision/chosen"] <= 1
        assert 0 < record["base/chosen"] < 1
    short = train(world, METHODS["selective_strong"], QUICK)
    assert short["measured"] == first["measured"][:2]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(world: World, name: str) -> None:
    result = train(world, METHODS[name], QUICK, start={"success": 0.0})
    assert result["measured"][-1]["kl"] >= 0


def test_a_run_that_diverges_is_marked(world: World) -> None:
    result = train(world, METHODS["sft"], replace(QUICK, rate=1e30))
    assert result["diverged"]
    assert len(result["measured"]) == 1


def test_few_pairs_are_all_that_is_read(world: World, tmp_path: Path) -> None:
    few = replace(world, train=replace(world.train, batch={k: v.clone() for k, v in world.train.batch.items()}))
    few.train.batch["input_ids"][32:64] = -1  # an id that no model has: reading one is an error
    train(few, METHODS["sft"], replace(QUICK, pairs=32))
    with pytest.raises(IndexError):
        train(few, METHODS["sft"], QUICK)
