"""`selective-pref report`: folders of runs as they are on disks, whole, half-written and of different kinds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from browser import CHROMIUM, opened
from seen import batch_of, byte_tokenizer, loss_of
from selective_pref_adapters.cli import main
from selective_pref_adapters.hf_trainer import PreferenceCollator, SelectionCallback, SelectivePreferenceLoss
from selective_pref_adapters.monitoring import SIGNS
from selective_pref_adapters.pairs import read_rows, tokenize_pairs
from selective_pref_adapters.seeing.pictures import write_selection
from selective_pref_adapters.seeing.report import films, findings, run_figures
from selective_pref_adapters.seeing.runs import differences, read_run, read_runs


def line(step: int, margin: float, accuracy: float = 0.7, prefix: str = "", **more: Any) -> dict[str, Any]:
    values = {
        "loss": 0.9,
        "rewards/margins": margin,
        "rewards/accuracies": accuracy,
        "selection/rewards/margins": -0.5,
        "selection/tied_fraction": 0.0,
    }
    return {"step": step, "epoch": 0.1, **{prefix + name: value for name, value in values.items()}, **more}


def loop_run(folder: Path, lines: list[dict[str, Any]], *, end: str = "", whole: bool = True, **config: Any) -> Path:
    """A folder as `selective-pref train` leaves it."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    if whole:
        options = {"objective": "selective_dpo", "selection_ratio": 0.4, "beta": 0.01, **config}
        (folder / "config.yaml").write_text(yaml.safe_dump(options))
        (folder / "run.json").write_text(json.dumps({"data": "abc", "beta": 0.5}))
        (folder / "summary.json").write_text("{}")
    return folder


def trainer_run(folder: Path, lines: list[Any], step: int = 4, **state: Any) -> Path:
    """A checkpoint as transformers leaves it."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": lines, "global_step": step, **state}))
    return folder


def said(run: Any, kind: str) -> str:
    return " ".join(finding.text for finding in findings(run) if finding.kind == kind)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_run_of_the_loop(tmp_path: Path) -> None:
    lines = [line(0, 0.1, prefix="eval_"), line(1, 0.1), line(2, math.nan), line(2, 0.3, prefix="eval_")]
    run = read_run(loop_run(tmp_path / "one", lines, learning_rate=1e-6))
    assert run.name == "one"
    assert run.notes == []
    steps, margins = run.series("rewards/margins")
    assert steps == [1, 2]
    assert margins[0] == 0.1
    assert math.isnan(margins[1])
    assert run.series("eval_rewards/margins") == ([0, 2], [0.1, 0.3])
    assert run.series("absent") == ([], [])
    assert run.config == {
        "objective": "selective_dpo",
        "selection_ratio": 0.4,
        "beta": 0.01,
        "learning_rate": 1e-6,
        "run.data": "abc",
    }


def test_a_torn_last_line_is_left_out_and_another_is_an_error(tmp_path: Path) -> None:
    run = read_run(loop_run(tmp_path / "torn", [line(1, 0.1)], end='{"step": 2, "lo'))
    assert run.series("rewards/margins") == ([1], [0.1])
    assert run.notes == ["the last line of metrics.jsonl is cut short and was left out"]
    broken = loop_run(tmp_path / "broken", [line(1, 0.1)], end='{"step": \n' + json.dumps(line(2, 0.1)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no JSON"):
        read_run(broken)


def test_a_folder_without_a_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*absent"):
        read_run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected metrics\.jsonl \(selective-pref train\), or a trainer_state\.json"):
        read_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="has not logged anything yet"):
        read_run(loop_run(tmp_path / "young", []))
    with pytest.raises(ValueError, match="has not logged anything yet"):
        read_run(trainer_run(tmp_path / "young too", []))
    with pytest.raises(ValueError, match="each run once"):
        read_runs([str(tmp_path), str(tmp_path / ".")])
    with pytest.raises(ValueError, match="at least one folder"):
        read_runs([])


def test_a_half_written_folder_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = loop_run(tmp_path / "half", [line(1, 0.1)], whole=False)
    (folder / "config.yaml").write_text("beta: [0.")
    (folder / "selection").mkdir()
    (folder / "selection" / "step-000001.json").write_text('{"step": 1, "pairs": [{"cho')
    (folder / "selection" / "step-000002.json").write_text('{"step": 2}')
    run = read_run(folder)
    assert run.notes == [
        "config.yaml is incomplete: its options cannot be compared",
        "no run.json: its options cannot be compared",
        "no summary.json: the run goes on, or was ended before its end",
        "selection/step-000001.json is no whole selection and was left out",
        "selection/step-000002.json is no whole selection and was left out",
    ]
    assert run.visits == []


def test_a_checkpoint_that_is_being_written_gives_way_to_the_one_before(tmp_path: Path) -> None:
    trainer_run(tmp_path / "hf", [line(1, 0.1)], step=4)
    trainer_run(tmp_path / "hf", [line(1, 0.1), line(9, 0.2)], step=12)
    (tmp_path / "hf" / "checkpoint-20").mkdir()
    (tmp_path / "hf" / "checkpoint-20" / "trainer_state.json").write_text('{"log_history": [')
    (tmp_path / "hf" / "checkpoint-best").mkdir()
    run = read_run(tmp_path / "hf")
    assert run.series("rewards/margins") == ([1, 9], [0.1, 0.2])
    assert run.notes == ["checkpoint-20/trainer_state.json is incomplete and was left out"]
    (tmp_path / "bad" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "bad" / "checkpoint-1" / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"checkpoint-1/trainer_state\.json is incomplete"):
        read_run(tmp_path / "bad")


def test_what_differs(tmp_path: Path) -> None:
    runs = read_runs(
        [
            str(loop_run(tmp_path / "a" / "run", [line(1, 0.1)], beta=0.1, seed=1)),
            str(loop_run(tmp_path / "b" / "run", [line(1, 0.1)], beta=0.2)),
            str(trainer_run(tmp_path / "c", [line(1, 0.1, **{"selection/ratio": 0.4, "selection/beta": 0.1})])),
        ]
    )
    assert [run.name for run in runs] == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), "c"]
    rows = {row[0]: row[1:] for row in differences(runs)}
    assert rows["beta"] == ("0.1", "0.2", "0.1")
    assert rows["seed"] == ("1", "–", "–")
    assert "selection_ratio" not in rows


# --- words -----------------------------------------------------------------------------------------------------------


def test_a_good_run_is_called_good(tmp_path: Path) -> None:
    lines = [line(step, step / 10, prefix=prefix) for step in range(5) for prefix in ("", "eval_")]
    run = read_run(loop_run(tmp_path / "good", lines))
    assert "The full margin (eval_rewards/margins) rose from 0 to 0.4, the full accuracy" in said(run, "good")
    assert "The loss ends at 0.9, above log 2. With a selection that is normal" in said(run, "normal")
    assert "below 0 is normal" in said(run, "normal")
    assert said(run, "warning") == ""


def test_warnings_follow_the_rules_of_the_callback(tmp_path: Path) -> None:
    falling = [line(step, -step / 10) for step in range(1, 21)]
    run = read_run(loop_run(tmp_path / "falling", falling))
    assert SIGNS["falling"].format(prefix="")[1:] in said(run, "warning")
    assert not said(run, "good")
    short = read_run(loop_run(tmp_path / "short", falling[:19]))
    assert "is falling" not in said(short, "warning")
    assert "fell from -0.1 to -1.9" in said(short, "normal")
    below = [line(step, step / 10, 0.4, prefix="eval_") for step in range(6)]
    run = read_run(loop_run(tmp_path / "below", below))
    assert SIGNS["below_half"].format(prefix="eval_")[1:] in said(run, "warning")
    tied = [line(1, 0.1, **{"selection/tied_fraction": 0.6})]
    assert SIGNS["ties"].format(prefix="")[1:] in said(read_run(loop_run(tmp_path / "tied", tied)), "warning")
    assert not said(read_run(loop_run(tmp_path / "dpo", tied, selection_ratio=1.0)), "warning")
    same = [line(0, 0.0, prefix="eval_", **{"eval_rewards/chosen": 0.0, "eval_rewards/rejected": 0.0})]
    assert SIGNS["self_reference"][1:] in said(read_run(loop_run(tmp_path / "same", same)), "warning")
    skipped = [line(1, 0.1, **{"selection/skipped_pairs": 0.25})]
    assert SIGNS["non_finite"].format(prefix="")[1:] in said(read_run(loop_run(tmp_path / "nan", skipped)), "warning")
    broken = [line(1, 0.1), line(2, math.nan), line(3, 0.2)]
    assert "1 logged losses or margins are not finite" in said(
        read_run(loop_run(tmp_path / "broken", broken)), "warning"
    )
    given = {
        "args": {"patience": 4},
        "attributes": {"warnings": [{"step": 7, "kind": "falling", "message": "it fell"}]},
    }
    callbacks = {"stateful_callbacks": {"SelectionCallback": given}}
    risen = [line(1, 0.1, prefix="eval_"), line(2, 0.2, prefix="eval_")]
    warned = read_run(trainer_run(tmp_path / "warned", risen, **callbacks))  # while it went on, not at its end
    assert said(warned, "warning") == "step 7: it fell"
    assert "rose from 0.1 to 0.2" in said(warned, "good")
    bare = read_run(loop_run(tmp_path / "bare", [{"step": 1, "loss": 0.5}]))
    assert "nothing can be concluded" in said(bare, "normal")


def test_a_schedule_of_beta_is_no_falling_margin(tmp_path: Path) -> None:
    lines = [line(step, 1 / step, **{"selection/beta": 1 / step}) for step in range(1, 25)]
    assert "is falling" not in said(read_run(loop_run(tmp_path / "schedule", lines)), "warning")


# --- the page --------------------------------------------------------------------------------------------------------


def test_runs_of_different_metrics_share_a_page(tmp_path: Path) -> None:
    one = loop_run(tmp_path / "one", [line(1, 0.1), line(2, 0.2)])
    two = loop_run(tmp_path / "two", [{"step": 1, "loss": 0.6, "learning_rate": 1e-3}, {"step": 2, "loss": 0.5}])
    figures = {figure.name: figure for figure in run_figures(read_runs([str(one), str(two)]))}
    assert set(figures) == {
        "loss",
        "rewards_margins",
        "rewards_accuracies",
        "selection_rewards_margins",
        "selection_tied_fraction",
        "learning_rate",
    }
    assert "Not logged by two." in figures["rewards_margins"].caption
    assert "Not logged by one." in figures["learning_rate"].caption
    assert "Not logged" not in figures["loss"].caption
    axes = figures["loss"].canvas.axes[0]
    assert [list(drawn.get_ydata()) for drawn in axes.lines[:2]] == [[0.9, 0.9], [0.6, 0.5]]
    assert axes.lines[2].get_ydata()[0] == math.log(2)


def test_what_was_left_out_is_drawn_only_where_something_was(tmp_path: Path) -> None:
    none = loop_run(tmp_path / "none", [line(1, 0.1, skipped_batches=0, **{"selection/empty_rows": 0.0})])
    some = loop_run(tmp_path / "some", [line(1, 0.1, skipped_batches=2, **{"selection/empty_rows": 0.1})])
    names = [{figure.name for figure in run_figures([read_run(folder)])} for folder in (none, some)]
    assert names[1] - names[0] == {"skipped_batches", "selection_empty_rows"}


def test_the_film_of_fixed_pairs(tmp_path: Path) -> None:
    folder = loop_run(tmp_path / "run", [line(step, 0.1) for step in range(40)])
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, ["<b>one", "two ☃"])
    for step in range(0, 40, 2):
        write_selection(loss_of(mask, seed=step % 4, ratio=0.5), ids, ["<p>:1"], tokenizer, folder, step)
    run = read_run(folder)
    steps, shares = run.overlaps()
    assert steps == list(range(2, 40, 2))
    assert shares[0] == pytest.approx(shares[1])
    assert 0 < shares[0] < 1
    strips = films(run)
    assert [strip["title"] for strip in strips] == ["run: <p>:1, chosen", "run: <p>:1, rejected"]
    frames = strips[0]["frames"]
    assert len(frames) == 12
    assert [frames[0]["step"], frames[-1]["step"]] == [0, 38]
    first = loss_of(mask, seed=0, ratio=0.5)
    weights = first.chosen_weights[0][mask[0]].tolist()
    for (classes, text), weight, expected in zip(frames[0]["tokens"], weights, [*"<b>one", "</s>"], strict=True):
        assert text == expected
        assert ("k" in classes.split()) == (weight >= 1)
        assert ("f" in classes.split()) == (0 < weight < 1)
    assert "overlap" in {figure.name for figure in run_figures([run])}
    other, elsewhere = batch_of(tokenizer, ["four", "five"])
    write_selection(loss_of(elsewhere), other, ["q"], tokenizer, folder, 50)
    assert films(read_run(folder)) == [], "other pairs cannot be compared"
    assert read_run(folder).overlaps()[0] == steps


def test_the_command_writes_a_page(tmp_path: Path, capsys: Any) -> None:
    lines = [line(step, step / 10, prefix=prefix) for step in range(5) for prefix in ("", "eval_")]
    runs = [loop_run(tmp_path / "<one>", lines, beta=0.1), loop_run(tmp_path / "two", lines, beta=0.2)]
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, ["<script>alert(1)</script>", "مرحبا"])
    for step in (0, 3):
        write_selection(loss_of(mask, seed=step), ids, ["p"], tokenizer, runs[0], step)
    out = tmp_path / "report.html"
    figures = str(tmp_path / "figures")
    assert main(["report", *map(str, runs), "--out", str(out), "--figures", figures]) == 0
    said = capsys.readouterr().err.replace("\n", "")
    assert "<one>: good: The full margin (eval_rewards/margins) rose from 0 to 0.4, the full" in said
    page = out.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;one&gt;" in page
    assert "<td>beta</td><td>0.1</td><td>0.2</td>" in page
    assert "eval_rewards_margins.png" in {path.name for path in (tmp_path / "figures").iterdir()}
    if CHROMIUM is not None:
        seen = opened(out, tmp_path / "profile")
        assert seen.console == []
        assert "<html" in seen.html
    assert main(["report", str(tmp_path / "absent")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["report", str(runs[0]), "--out", "report.pdf"]) == 1
    assert "must end in .html" in capsys.readouterr().err


def test_a_run_of_the_trainer(policy_folder: Path, reference_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    """A real one: its log, its callback's options and warnings, the selection of its fixed pairs."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    pairs = tokenize_pairs(read_rows(pairs_file), tokenizer, max_length=64)[0]
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(policy_folder),
        args=TrainingArguments(
            output_dir=str(tmp_path / "hf"),
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            max_steps=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            learning_rate=1e-2,
        ),
        train_dataset=pairs[:30],
        eval_dataset=pairs[30:],
        data_collator=PreferenceCollator(tokenizer),
        compute_loss_func=SelectivePreferenceLoss(ref_model=AutoModelForCausalLM.from_pretrained(reference_folder)),
        callbacks=[SelectionCallback(picture_pairs=2, patience=4)],
    )
    trainer.train()
    run = read_run(tmp_path / "hf")
    assert run.notes == []
    assert run.patience == 4
    logged = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert run.series("rewards/margins") == ([1, 2, 3, 4], logged)
    assert run.config["callback.picture_pairs"] == 2
    assert [visit.step for visit in run.visits] == [2, 4]
    assert len(films(run)) == 4
    names = {figure.name for figure in run_figures([run])}
    assert {"eval_rewards_margins", "rewards_margins", "learning_rate", "overlap"} <= names
