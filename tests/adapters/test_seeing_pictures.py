"""The same pairs in a terminal, as SVG and as JSON, and the files that a run keeps of its fixed pairs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.text import Text

from seen import HOSTILE, SCRIPTS, batch_of, byte_tokenizer, loss_of
from selective_pref import PreferenceLoss
from selective_pref_adapters.seeing import selection_svg, selection_text
from selective_pref_adapters.seeing.figures import selection_figure
from selective_pref_adapters.seeing.pictures import pairs_json, write_selection
from selective_pref_adapters.seeing.shown import shown_pairs
from selective_pref_adapters.seeing.tokens import LIGHT, printable
from selective_pref_adapters.seeing.trackers import track_selection

TEXTS = [HOSTILE, "a tie, a tie, a tie", SCRIPTS, "x" * 300]


@pytest.fixture(scope="module")
def given() -> tuple[PreferenceLoss, Any, Any]:
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, TEXTS)
    return loss_of(mask, ratio=0.3), ids, tokenizer


def test_the_svg_shows_every_token_and_underlines_what_is_kept(given: tuple[PreferenceLoss, Any, Any]) -> None:
    out, ids, tokenizer = given
    pairs = shown_pairs(out, ids, tokenizer, places=["<a & b>", "c"])
    root = ElementTree.fromstring(selection_svg(out, ids, tokenizer, places=["<a & b>", "c"], title="t <"))
    titles = [text.text for text in root.findall(".//{*}text") if text.get("class") == "title"]
    sides = [side for pair in pairs for _, side in pair.sides]
    assert titles == [
        f"{pair.place}, {name}: {side.kept:g} of {side.tokens} tokens" for pair in pairs for name, side in pair.sides
    ]
    tokens = root.findall(".//{*}g")
    assert len(tokens) == sum(side.tokens for side in sides)
    weights = [weight for side in sides for weight in side.weights]
    texts = [text for side in sides for text in side.texts]
    for token, weight, text in zip(tokens, weights, texts, strict=True):
        line = token.find("{*}path")
        assert (0 if line is None else float(line.get("data-weight", 0))) == pytest.approx(weight, abs=1e-6)
        assert (line is not None) == (weight > 0)
        if line is not None:
            assert (line.get("stroke-dasharray") is None) == (weight >= 1)
        shown = token.find("{*}text")
        expected = printable(text).translate({10: None, 9: None, 32: "\u00a0"})
        assert ("" if shown is None else shown.text) == expected
        assert token.find("{*}rect").get("fill") in LIGHT
        assert f"weight {weight:.3g}, policy" in token.get("aria-label")
    wide = max(float(part.get("x")) + float(part.get("width")) for part in root.findall(".//{*}g/{*}rect"))
    assert wide <= float(root.get("width"))


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_terminal_without_colours_gets_brackets(given: tuple[PreferenceLoss, Any, Any]) -> None:
    out, ids, tokenizer = given
    text = selection_text(out, ids, tokenizer, colour=False, width=400)
    assert plain(text) == text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    side = shown_pairs(out, ids, tokenizer)[1].chosen
    expected = ""
    for token, weight in zip(side.texts, side.weights, strict=True):
        expected += f"⟦{printable(token)}⟧" if weight > 0 else printable(token)
    assert expected.replace("⟧⟦", "") in text
    assert f"chosen: kept {side.kept:g} of {side.tokens}, reward {side.reward:+.4g}" in text


def test_a_terminal_with_colours_underlines(given: tuple[PreferenceLoss, Any, Any]) -> None:
    out, ids, tokenizer = given
    text = selection_text(out, ids, tokenizer, colour=True, width=4000)
    assert not re.search(r"[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f\u202e]", text)
    pair = shown_pairs(out, ids, tokenizer)[1]
    line = next(line for line in text.splitlines() if plain(line).startswith("a tie"))
    parsed = Text.from_ansi(line)
    console = Console(file=io.StringIO())
    underlined = [bool(parsed.get_style_at_offset(console, at).underline) for at in range(len(parsed))]
    chosen = pair.chosen
    expected = [weight > 0 for text, weight in zip(chosen.texts, chosen.weights, strict=True) for _ in printable(text)]
    assert underlined == expected


def test_json_holds_everything(given: tuple[PreferenceLoss, Any, Any]) -> None:
    out, ids, tokenizer = given
    read = json.loads(pairs_json(shown_pairs(out, ids, tokenizer), step=3))
    assert read["step"] == 3
    chosen = read["pairs"][0]["chosen"]
    assert "".join(chosen["texts"]) == HOSTILE + "</s>"
    assert chosen["weights"] == out.chosen_weights[0][out.chosen.mask[0]].tolist()


def test_a_run_keeps_its_fixed_pairs_at_each_visit(given: tuple[PreferenceLoss, Any, Any], tmp_path: Path) -> None:
    out, ids, tokenizer = given
    for step in (0, 20):
        pairs = write_selection(out, ids, ["a", "b"], tokenizer, tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "selection").iterdir())
    assert names == ["step-000000.json", "step-000000.svg", "step-000020.json", "step-000020.svg"]
    assert json.loads((tmp_path / "selection" / names[2]).read_text()) == {
        "step": 20,
        "pairs": [pair.record() for pair in pairs],
    }


def test_the_image_for_trackers(given: tuple[PreferenceLoss, Any, Any]) -> None:
    out, ids, tokenizer = given
    pairs = shown_pairs(out, ids, tokenizer)
    steps = [axes.patches[0].get_data() for axes in selection_figure(pairs, title="t").axes]
    for (heights, edges, _), side in zip(steps, [side for pair in pairs for _, side in pair.sides], strict=True):
        assert heights[1::2] == pytest.approx([-0.45 * weight for weight in side.weights])
        assert not any(heights[::2])  # between the bars
        assert [int(edge) for edge in edges[1::2]] == list(range(len(side.weights)))


def test_tensorboard_keeps_the_images_of_all_steps(given: tuple[PreferenceLoss, Any, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    out, ids, tokenizer = given
    pairs = shown_pairs(out, ids, tokenizer)
    with SummaryWriter(str(tmp_path)) as board:
        for step in (0, 20):
            track_selection(pairs, step, board=board)
    events = EventAccumulator(str(tmp_path), size_guidance={IMAGES: 0}).Reload().Images("selection/pairs")
    assert [event.step for event in events] == [0, 20]
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in events)


def test_trackio_keeps_the_images_of_all_steps(
    given: tuple[PreferenceLoss, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    out, ids, tokenizer = given
    trackio.init(project="selection", name="run", embed=False, auto_log_cpu=False)
    for step in (0, 20):
        track_selection(shown_pairs(out, ids, tokenizer), step, tracker=trackio)
    trackio.finish()
    assert {path.parent.name for path in tmp_path.rglob("*.png")} == {"0", "20"}
