"""`selective-pref inspect` on real files and models: what is shown is what the loss of these pairs read."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref import Response, select, selective_dpo_loss
from selective_pref_adapters.batch import responses
from selective_pref_adapters.cli import main
from selective_pref_adapters.heads import frozen_per_token_logps
from selective_pref_adapters.pairs import collate, read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import MissingRowsError, ReferenceStore, fill_store, reference_space
from selective_pref_adapters.seeing.inspect_command import inspect, row_numbers
from selective_pref_adapters.seeing.options import InspectConfig
from selective_pref_adapters.seeing.shown import ShownPair, ShownResponse
from selective_pref_adapters.seeing.statistics import RATIOS, data_tables, statistics_of, token_class
from tiny import make_model, text_rows, write_jsonl


@pytest.fixture
def options(policy_folder: Path, reference_folder: Path, pairs_file: Path) -> dict[str, Any]:
    return {"model": str(policy_folder), "ref_model": str(reference_folder), "pairs": str(pairs_file)}


def test_rows_are_numbers_and_ranges() -> None:
    assert row_numbers("3", 9) == [3]
    assert row_numbers("5-7, 1,6", 9) == [1, 5, 6, 7]
    assert row_numbers("8-", 9) == [8, 9]
    assert row_numbers("1-20", 9) == list(range(1, 10))
    for text, message in (
        ("0", "rows 1 to 9"),
        ("10", "rows 1 to 9"),
        ("5-3", "rows 1 to 9"),
        ("a", "must be numbers and ranges"),
        ("", "must be numbers and ranges"),
        ("1-2-3", "must be numbers and ranges"),
    ):
        with pytest.raises(ValueError, match=message):
            row_numbers(text, 9)


def test_json_holds_what_the_loss_read(options: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    out = tmp_path / "deep" / "pairs.json"
    more = ["--rows", "2,5-6", "--out", str(out), "--beta", "0.1", "--selection-ratio", "0.3"]
    assert main(["inspect", *flags, *more]) == 0
    assert f"3 pairs: {out}" in capsys.readouterr().err.replace("\n", "")
    shown = json.loads(out.read_text())["pairs"]
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    rows = read_rows(options["pairs"])
    pairs, _ = tokenize_pairs([rows[1], rows[4], rows[5]], tokenizer, max_length=64, keep_unteachable=True)
    assert [pair["place"] for pair in shown] == [pair.place for pair in pairs]
    batch = collate(pairs, tokenizer.pad_token_id)
    logps = [
        frozen_per_token_logps(AutoModelForCausalLM.from_pretrained(options[name]).eval(), batch)
        for name in ("model", "ref_model")
    ]
    loss = selective_dpo_loss(*responses(batch, *logps), beta=0.1, selection_ratio=0.3)
    for number, pair in enumerate(shown):
        assert pair["loss"] == pytest.approx(loss.losses[number].item(), rel=1e-5)
        for name, response in (("chosen", loss.chosen), ("rejected", loss.rejected)):
            mask = response.mask[number]
            assert pair[name]["weights"] == pytest.approx(response.token_weights[number][mask].tolist())
            assert pair[name]["per_token_logps"] == pytest.approx(
                response.per_token_logps[number][mask].tolist(), rel=1e-4
            )


@pytest.mark.parametrize(
    ("flags", "rule", "said"),
    [
        (
            ["--selection-ratio", "0.4,0.1"],
            {"selection_ratio": (0.4, 0.1)},
            "Share 0.4 of chosen and 0.1 of rejected, β 0.01.",
        ),
        (
            ["--selection-ratio", "1", "--min-score", "0.02"],
            {"selection_ratio": 1, "min_score": 0.02},
            "Share 1, scores above 0.02 nats, β 0.01.",
        ),
    ],
    ids=["a share for each side", "a threshold"],
)
def test_rules_beyond_one_share_are_the_cores(
    options: dict[str, Any], tmp_path: Path, flags: list[str], rule: dict[str, Any], said: str
) -> None:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    for suffix in (".json", ".html"):
        assert main(["inspect", *words, "--rows", "1-4", "--out", str(tmp_path / f"pairs{suffix}"), *flags]) == 0
    assert said in (tmp_path / "pairs.html").read_text(encoding="utf-8")
    kept = 0
    for pair in json.loads((tmp_path / "pairs.json").read_text())["pairs"]:
        sides = [pair["chosen"], pair["rejected"]]
        widest = max(len(side["scores"]) for side in sides)
        columns = [np.pad(np.array(side["scores"]), (0, widest - len(side["scores"]))) for side in sides]
        masks = [np.arange(widest) < len(side["scores"]) for side in sides]
        responses = [
            Response(per_token_logps=np.zeros((1, widest)), mask=mask[None], ref_per_token_logps=np.zeros((1, widest)))
            for mask in masks
        ]
        scores = (columns[0][None], columns[1][None])
        for side, selected, mask in zip(sides, select(*responses, scores=scores, **rule), masks, strict=True):
            assert side["weights"] == pytest.approx(selected.token_weights[0][mask].tolist())
            kept += sum(side["weights"])
    assert kept > 0


def test_every_kind_of_file_and_the_terminal(options: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    for suffix, start in ((".html", "<!doctype html>"), (".svg", "<svg "), (".txt", "pairs.jsonl:1  margin")):
        path = tmp_path / f"pairs{suffix}"
        assert len(inspect(InspectConfig(**options, rows="1-2", out=str(path)))) == 2
        assert path.read_text(encoding="utf-8").startswith(start)
    inspect(InspectConfig(**options, rows="7"))
    assert capsys.readouterr().out.startswith("pairs.jsonl:7  margin")


def test_a_store_serves_as_well_as_the_model_it_holds(options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    reference = AutoModelForCausalLM.from_pretrained(options["ref_model"])
    rows = read_rows(options["pairs"])
    pairs, _ = tokenize_pairs(rows[:5], tokenizer, max_length=64, keep_unteachable=True)
    store = ReferenceStore.create(tmp_path / "store", reference_space(reference, tokenizer))
    fill_store(store, pairs, reference, pad_token_id=tokenizer.pad_token_id, progress=False)
    running = inspect(InspectConfig(**options, rows="1-5"))
    stored = inspect(InspectConfig(**{**options, "ref_model": None}, store=str(tmp_path / "store"), rows="1-5"))
    for ours, theirs in zip(running, stored, strict=True):
        assert ours.place == theirs.place
        for (_, one), (_, other) in zip(ours.sides, theirs.sides, strict=True):
            assert one.texts == other.texts
            assert one.ref_logps == pytest.approx(other.ref_logps, rel=1e-5)  # computed in another batch
            assert one.weights == other.weights
    with pytest.raises(MissingRowsError, match=r"1 of 2 pairs are not in the store .*pairs\.jsonl:6"):
        inspect(InspectConfig(**{**options, "ref_model": None}, store=str(tmp_path / "store"), rows="5-6"))


def test_a_conversation_needs_a_chat_template(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "plain", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    rows = [
        {
            "prompt": [{"role": "user", "content": "w1"}],
            "chosen": [{"role": "assistant", "content": "w2"}],
            "rejected": [{"role": "assistant", "content": "w3"}],
        }
    ]
    given = {**options, "model": str(folder), "pairs": str(write_jsonl(tmp_path / "chat.jsonl", rows))}
    with pytest.raises(ValueError, match=r"chat\.jsonl:1 is a conversation, but the tokenizer has no chat template"):
        inspect(InspectConfig(**given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_model": None}, "--ref-model .* or --store"),
        ({"store": "s"}, "--ref-model .* or --store"),
        ({"space": "s"}, "--space names a reference of a store"),
        ({"out": "page.pdf"}, r"must end in \.html, \.svg, \.json, \.txt; got 'page.pdf'"),
        ({"statistics": -1}, "at least 0; got -1"),
        ({"figures": "f"}, "--figures is for statistics"),
        ({"other_ref_models": ("x",)}, "--other-ref-models is for statistics"),
        ({"selection_ratio": 40}, "40 % is 0.4"),
        ({"selection_ratio": "0.4,0"}, "the share of tokens that is kept; got 0.0"),
        ({"selection_ratio": "0.4,0.1,0.2"}, r"as 0\.4,0\.1; got '0\.4,0\.1,0\.2'"),
        ({"selection_ratio": "some"}, "--selection-ratio must be one share"),
        ({"min_score": math.inf}, "min_score must be a finite number"),
        ({"beta": 0}, "beta must be a finite number above 0"),
        ({"max_length": 65}, "longer than the policy can read"),
        ({"model": "absent"}, "no such folder"),
        ({"pairs": "absent.jsonl"}, "no preference pairs at"),
        ({"rows": "41"}, "rows 1 to 40"),
        ({"rows": "1", "max_length": 2}, "none of 1 pairs"),
    ],
)
def test_options_that_make_no_sense_write_nothing(
    options: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "page.html")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        inspect(InspectConfig(**{"out": out, **options, **change}))
    assert not (tmp_path / "page.html").exists()


def test_rows_that_are_left_out_are_named(options: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    long = {"prompt": "w1 " * 20, "chosen": "w2", "rejected": "w3"}
    given = {**options, "pairs": str(write_jsonl(tmp_path / "p.jsonl", [*text_rows(2), long]))}
    shown = inspect(InspectConfig(**given, max_length=15, rows="2-3"))
    assert [pair.place for pair in shown] == ["p.jsonl:2"]
    assert "left out: p.jsonl:3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing of them is left to show"):
        inspect(InspectConfig(**given, max_length=15, rows="3", statistics=2))


def test_malformed_rows_may_be_skipped(options: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    rows = [*text_rows(2), {"prompt": "w1", "chosen": "w2"}]
    given = {**options, "pairs": str(write_jsonl(tmp_path / "p.jsonl", rows))}
    with pytest.raises(ValueError, match=r"p\.jsonl:3: no 'rejected'.*--skip-malformed-rows leaves such rows out"):
        inspect(InspectConfig(**given))
    assert len(inspect(InspectConfig(**given, skip_malformed_rows=True))) == 2
    assert "1 malformed rows left out, the first: p.jsonl:3: no 'rejected'" in capsys.readouterr().err


def test_padding_and_ids_that_a_model_does_not_have_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "grown", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="padding token has the id 30, outside the policy's vocabulary of 30"):
        inspect(InspectConfig(**{**options, "model": str(folder)}))
    smaller = make_model(tmp_path / "smaller", seed=1, vocab_size=20)
    with pytest.raises(ValueError, match="is outside the reference's vocabulary of 20"):
        inspect(InspectConfig(**{**options, "ref_model": str(smaller)}))


def test_help_is_quick() -> None:
    code = (
        "import sys\n"
        "from selective_pref_adapters.cli import main\n"
        "for command in ('inspect', 'report'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--other-ref-models" in done.stdout
    assert not {"torch", "numpy", "transformers", "matplotlib", "datasets"} & set(done.stdout.splitlines()[-1].split())


# --- statistics ------------------------------------------------------------------------------------------------------


def side_of(scores: list[float], weights: list[float], texts: list[str]) -> ShownResponse:
    count = len(scores)
    return ShownResponse(
        texts=tuple(texts),
        ids=tuple(range(count)),
        special=(False,) * (count - 1) + (True,),
        counts=(True,) * count,
        logps=(0.0,) * count,
        ref_logps=(0.0,) * count,
        scores=tuple(scores),
        weights=tuple(weights),
        reward=0.0,
        selected_reward=0.0,
    )


def pair_of(*sides: ShownResponse) -> ShownPair:
    return ShownPair(place="p", prompt="", chosen=sides[0], rejected=sides[1], loss=0.7)


def test_statistics_by_hand() -> None:
    chosen = side_of([4.0, 3.0, 2.0, 1.0], [1, 1, 0.5, 0], [" a", "1", " ?", "</s>"])
    rejected = side_of([-1.0, 0.0, 1.0, 2.0], [0, 0, 0, 1], ["\n", "", " a", "</s>"])
    found = statistics_of([pair_of(chosen, rejected)] * 10)
    assert found.pairs == 10
    one, other = found.sides["chosen"], found.sides["rejected"]
    assert (one.tokens, one.kept) == (40, 0.625)
    assert (other.tokens, other.kept) == (40, 0.25)
    assert one.by_class == {"words": (10, 1.0), "digits": (10, 1.0), "punctuation": (10, 0.5), "special": (10, 0.0)}
    assert other.by_class == {
        "whitespace": (10, 0.0),
        "part of a character": (10, 0.0),
        "words": (10, 0.0),
        "special": (10, 1.0),
    }
    assert [one.by_position[at] for at in (0, 5, 10, 15)] == [1.0, 1.0, 0.5, 0.0]
    assert one.by_position[1] is None
    assert one.score_quantiles[2] == 2.5
    assert sum(one.histogram) == pytest.approx(1)
    names = [name for name, *_ in found.most_kept]
    assert names == ["1", "</s>", "␣a", "␣?", "⏎"]
    assert found.most_kept[1] == ("</s>", 20, 0.5, 1.5)
    assert data_tables(found)[0].rows[0][:3] == ("chosen", "40", "62.5 %")
    with pytest.raises(ValueError, match="no token of these pairs has a finite score"):
        statistics_of([pair_of(*[side_of([math.nan] * 2, [0, 0], ["a", "b"])] * 2)])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" 12", "digits"),
        ("½", "words"),
        ("...", "punctuation"),
        ("€", "punctuation"),
        (" \n", "whitespace"),
        ("é", "words"),
    ],
)
def test_classes_of_tokens(text: str, kind: str) -> None:
    assert token_class(text, special=False) == kind
    assert token_class(text, special=True) == "special"


def test_overlap_with_another_selection() -> None:
    side = side_of([5.0, 4.0, 3.0, 2.0, 1.0], [1, 1, 0, 0, 0], list("abcde"))
    turned = side_of([1.0, 2.0, 3.0, 4.0, 5.0], [0, 0, 0, 1, 1], list("abcde"))
    found = statistics_of([pair_of(side, side)], {"same": [pair_of(side, side)], "half": [pair_of(side, turned)]})
    assert found.overlaps["same"] == [1.0] * len(RATIOS)
    assert found.overlaps["half"] == pytest.approx([0.5, 0.5, (1 + 1 / 3) / 2, (1 + 3 / 4) / 2])
    other = side_of([1.0], [1], ["a"])
    with pytest.raises(ValueError, match="x: the pairs to compare with hold other tokens"):
        statistics_of([pair_of(side, side)], {"x": [pair_of(other, side)]})


def test_figures_of_a_data_set(options: dict[str, Any], tmp_path: Path) -> None:
    config = InspectConfig(
        **options,
        rows="1",
        out=str(tmp_path / "page.html"),
        statistics=30,
        figures=str(tmp_path / "figures"),
        other_models=(options["model"],),
        other_ref_models=(options["model"],),
        other_dtypes=("bfloat16",),
    )
    inspect(config)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    figures = ("scores", "positions", "classes", "overlap")
    assert names == {*(f"{name}.{kind}" for name in figures for kind in ("svg", "png")), "statistics.json"}
    found = json.loads((tmp_path / "figures" / "statistics.json").read_text())
    assert found["pairs"] == 30
    assert found["overlaps"][f"policy {options['model']}"] == [1.0] * 4
    itself = found["overlaps"][f"reference {options['model']}"]
    assert itself[0] < 0.9, "beside itself every score is 0"
    assert 0.9 < np.mean(found["overlaps"]["in bfloat16"]) <= 1
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 4
    assert "<?xml" not in page
    assert "Tokens kept by both" in page
    drawn = re.findall(r'<(?:path|clipPath|pattern) id="(\w+)"', page)
    assert len(drawn) > 8
    assert len(drawn) == len(set(drawn)), "identifiers of several figures on one page must differ"


def test_real_pairs_of_a_real_model(shared: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260k")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(shared / "models" / "stories260k").save_pretrained(tmp_path / "teacher")
    pairs = shared / "data" / "chat_pairs_en.jsonl"
    shown = inspect(
        InspectConfig(
            model=str(shared / "models" / "stories260k"),
            ref_model=str(tmp_path / "teacher"),
            pairs=str(pairs),
            rows="1,6-9",
            out=str(tmp_path / "page.html"),
        )
    )
    rows = {f"{pairs.name}:{n}": json.loads(line) for n, line in enumerate(pairs.read_text().splitlines(), start=1)}
    assert len(shown) >= 3
    for pair in shown:
        text = rows[pair.place]["chosen"][-1]["content"].strip()
        seen = "".join(pair.chosen.texts).strip()
        assert text.startswith(seen[:200]) or seen.startswith(text[:200])
        assert pair.chosen.kept == pytest.approx(math.ceil(0.4 * pair.chosen.tokens))
