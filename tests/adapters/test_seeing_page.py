"""The page underlines what the core weighs, whatever the text says: in a real browser, where there is one."""

from __future__ import annotations

import array
import base64
import html
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import CHROMIUM, Opened, opened
from seen import HOSTILE, SCRIPTS, batch_of, byte_tokenizer, loss_of
from selective_pref import PreferenceLoss, Response, dpo_loss, selective_dpo_loss, simpo_loss, top_fraction_weights
from selective_pref_adapters.seeing import SelectionPage, selection_page
from selective_pref_adapters.seeing.page import RULES, page_of_pairs
from selective_pref_adapters.seeing.shown import ShownPair, ShownResponse, shown_pairs
from selective_pref_adapters.seeing.tokens import DARK, LIGHT, printable

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

TEXTS = [HOSTILE, "a tie, a tie, a tie", SCRIPTS, "no"]
RULE_WORDS = ["20", "40", "60", "80", "100", "threshold", "sides"]


@pytest.fixture(scope="module")
def shown() -> tuple[PreferenceLoss, list[ShownPair], SelectionPage]:
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, TEXTS)
    out = loss_of(mask, ratio=0.3)
    places = ["</script><script>alert(1)</script>", 'x" onload="alert(1)']
    page = selection_page(out, ids, tokenizer, places=places, title="A </title> & more")
    return out, shown_pairs(out, ids, tokenizer), page


def payload_of(page: SelectionPage) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def column(text: str, kind: str) -> list[float]:
    return array.array(kind, base64.b64decode(text)).tolist()


def expected_weights(out: PreferenceLoss, rule: str) -> list[list[float]]:
    """The core's weights of each response in the order of the page: pair after pair, chosen first."""
    found: list[list[float]] = []
    for number in range(len(out.losses)):
        for name, side in (("chosen", out.chosen), ("rejected", out.rejected)):
            row, mask = side.scores[number : number + 1], side.mask[number : number + 1]
            if rule == "threshold":
                weights = ((row > 0.5) & mask).float()
            else:
                percent = {"chosen": 50, "rejected": 7}[name] if rule == "sides" else int(rule)
                weights = top_fraction_weights(row, mask, percent / 100)
            found.append(weights[mask].tolist())
    return found


# --- without a browser -----------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_holds_the_weights_and_scores_of_the_core(
    shown: tuple[PreferenceLoss, list[ShownPair], SelectionPage],
) -> None:
    out, pairs, page = shown
    data = payload_of(page)
    assert data["beta"] == 0.1
    for number, (pair, given) in enumerate(zip(pairs, data["pairs"], strict=True)):
        for (name, side), key in zip(pair.sides, "cr", strict=True):
            response = getattr(out, name)
            where = response.mask[number]
            assert column(given[key]["w"], "f") == response.token_weights[number][where].tolist()
            assert column(given[key]["s"], "d") == response.scores[number][where].tolist()
            assert column(given[key]["i"], "i") == list(side.ids)
            assert given[key]["t"] == [printable(text) for text in side.texts]
            assert given[key]["m"] is None


def test_no_text_becomes_markup(shown: tuple[PreferenceLoss, list[ShownPair], SelectionPage]) -> None:
    page = shown[2].html
    elements = Elements(page)
    assert elements.tags.count("script") == 2
    assert "textarea" not in elements.tags
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in elements.attributes)
    assert "alert(1)" not in re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert "<title>A &lt;/title&gt; &amp; more</title>" in page
    assert "\u2028" not in page
    policy = page.index("Content-Security-Policy")
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in page
    assert policy < page.index("<style>") < page.index("<script")


def test_a_long_word_and_control_characters(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, ["x" * 100_000, "".join(map(chr, range(32)))])
    page = selection_page(loss_of(mask), ids, tokenizer)
    assert len(payload_of(page)["pairs"][0]["c"]["t"]) == 100_001
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.html)
    assert page.write(tmp_path / "new" / "page.html").read_text(encoding="utf-8") == page.html


def test_a_notebook_shows_the_page_in_a_frame(shown: tuple[PreferenceLoss, list[ShownPair], SelectionPage]) -> None:
    frame = Elements(shown[2]._repr_html_())
    assert frame.tags == ["iframe"]
    attributes = dict(frame.attributes)
    assert attributes["srcdoc"] == shown[2].html
    assert attributes["sandbox"] == "allow-scripts"


def test_a_loss_without_a_reference_has_a_page(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, ["one", "two"])
    sides = Response.from_stacked(per_token_logps=-torch.rand(mask.shape), mask=mask)
    page = selection_page(simpo_loss(*sides, beta=2, gamma=1), ids, tokenizer)
    data = payload_of(page)
    assert data["scale"] is None
    assert data["pairs"][0]["c"]["s"] is None
    disabled = re.findall(r'<input type="radio" name="rule" value="(\w+)" disabled', page.html)
    assert disabled == [value for value, _ in RULES[1:]]


def test_values_that_are_not_finite_are_no_json_numbers() -> None:
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, ["one", "two"])
    policy = -torch.rand(mask.shape)
    policy[0, -2] = float("nan")
    sides = Response.from_stacked(per_token_logps=policy, mask=mask, ref_per_token_logps=-torch.rand(mask.shape))
    data = payload_of(selection_page(selective_dpo_loss(*sides, beta=1, selection_ratio=0.5), ids, tokenizer))
    assert data["pairs"][0]["loss"] is None


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_every_text_can_be_read_on_every_ground(shown: tuple[PreferenceLoss, list[ShownPair], SelectionPage]) -> None:
    """At least 4.5 to 1, as WCAG 2 AA asks of text: on paper, on screens of both kinds, on every step of the scale."""
    themes = re.findall(r":root \{(.*?)\}", shown[2].html, re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme))
        grounds = [colours[name] for name in ("paper", "card", "wash", "h1", "h2", "h3", "h4", "l1", "l2", "l3", "l4")]
        assert min(contrast(colours["ink"], ground) for ground in grounds) >= 4.5
        assert min(contrast(colours["soft"], colours[name]) for name in ("paper", "card", "wash")) >= 4.5
        assert contrast(colours["accent"], colours["on-accent"]) >= 4.5
        assert contrast(colours["mark"], colours["card"]) >= 3


def test_both_ends_of_the_scale_differ_in_more_than_red_and_green() -> None:
    """Blue against orange: the blue part of the colours, which every common colour blindness sees, goes apart."""
    for scale in (LIGHT, DARK):
        blue = [int(colour[5:7], 16) - int(colour[1:3], 16) for colour in scale]
        assert blue == sorted(blue, reverse=True)
        assert blue[0] > 60
        assert blue[-1] < -60


def many_pairs(count: int, tokens: int) -> list[ShownPair]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, generator=generator)
    weights = top_fraction_weights(scores[None], torch.ones(1, tokens, dtype=torch.bool), 0.4)[0]
    side = ShownResponse(
        texts=tuple(f" word{number % 97}" for number in range(tokens)),
        ids=tuple(range(tokens)),
        special=(False,) * tokens,
        counts=(True,) * tokens,
        logps=tuple((-scores.abs()).tolist()),
        ref_logps=tuple((scores - scores.abs()).tolist()),
        scores=tuple(scores.tolist()),
        weights=tuple(weights.tolist()),
        reward=0.1,
        selected_reward=-0.1,
    )
    return [
        ShownPair(place=f"pairs.jsonl:{n}", prompt="Why? " * 40, chosen=side, rejected=side, loss=0.7)
        for n in range(count)
    ]


# --- in a browser ----------------------------------------------------------------------------------------------------


def weights_of(page: Opened) -> list[list[float]]:
    return [[token.weight for token in response] for response in page.tokens()]


def check_lines(page: Opened) -> None:
    """A full line under what is kept, dots under what is kept in part, none elsewhere."""
    for response in page.tokens():
        for token in response:
            kind = "k" if token.weight >= 1 else "f" if token.weight > 0 else None
            assert token.classes & {"k", "f"} == ({kind} if kind else set())


@in_a_browser
def test_what_is_underlined_is_what_the_loss_read(
    shown: tuple[PreferenceLoss, list[ShownPair], SelectionPage], tmp_path: Path
) -> None:
    _, pairs, page = shown
    seen = opened(page.write(tmp_path / "page.html"), tmp_path / "profile", script=DRAW_ALL)
    assert seen.console == []
    sides = [side for pair in pairs for _, side in pair.sides]
    assert weights_of(seen) == [pytest.approx(list(side.weights), abs=1e-6) for side in sides]
    assert [["".join(token.text) for token in response] for response in seen.tokens()] == [
        [printable(text) for text in side.texts] for side in sides
    ]
    check_lines(seen)
    assert any(token.classes & {"f"} for response in seen.tokens() for token in response), "nothing is tied"


# Pairs are drawn when a frame shows them, and a browser on a busy machine may end before its first frame.
DRAW_ALL = 'addEventListener("load", () => dispatchEvent(new Event("beforeprint")));'

READ_RULES = """
addEventListener("load", () => setTimeout(() => {
  const pick = (value) => document.querySelector(`input[name=rule][value="${value}"]`).click();
  const type = (id, value) => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event("input", { bubbles: true }));
  };
  const read = () => [...document.querySelectorAll("[role=listbox]")].map((box) =>
    [...box.querySelectorAll(".token")].map((token) => [Number(token.dataset.w), token.className]));
  dispatchEvent(new Event("beforeprint")); // draws every pair, also those that are not in sight yet
  const found = { first: read(), resources: performance.getEntriesByType("resource").length };
  for (const rule of %s) {
    pick(rule);
    if (rule === "threshold") type("threshold", "0.5");
    if (rule === "sides") { type("percent-chosen", "50"); type("percent-rejected", "7"); }
    found[rule] = read();
    found[`${rule} text`] = document.querySelector("article header p").textContent;
  }
  pick("read");
  found.again = read();
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
}, 500));
"""


def result_of(page: Opened) -> Any:
    found = re.search(r'<pre id="result">(.*?)</pre>', page.html, re.DOTALL)
    assert found is not None, page.console
    return json.loads(html.unescape(found[1]))


@in_a_browser
def test_rules_changed_in_the_page_are_the_cores(
    shown: tuple[PreferenceLoss, list[ShownPair], SelectionPage], tmp_path: Path
) -> None:
    out, _, page = shown
    script = READ_RULES % json.dumps(RULE_WORDS)
    seen = opened(page.write(tmp_path / "page.html"), tmp_path / "profile", rule="40", script=script)
    assert seen.console == []
    found = result_of(seen)
    assert found["resources"] == 0
    for rule in RULE_WORDS:
        weights = [[weight for weight, _ in response] for response in found[rule]]
        assert weights == [pytest.approx(row, abs=1e-6) for row in expected_weights(out, rule)], rule
        marked = [[bool({"k", "f"} & set(name.split())) for _, name in response] for response in found[rule]]
        assert marked == [[weight > 0 for weight in row] for row in weights], rule
    assert found["first"] == found["40"], "the address says 40"
    again = [[weight for weight, _ in response] for response in found["again"]]
    assert again == [pytest.approx(row, abs=1e-6) for row in expected_weights(out, "30")]
    sides = [
        Response(**{n: getattr(s, n) for n in ("per_token_logps", "mask", "ref_per_token_logps")})
        for s in (out.chosen, out.rejected)
    ]
    margins = selective_dpo_loss(*sides, beta=0.1, selection_ratio=0.2)
    margin = (margins.chosen_selected_rewards - margins.rejected_selected_rewards)[0].item()
    assert f"of kept tokens {margin:+.3f}".replace("-", "−") in found["20 text"]


KEYS = """
addEventListener("load", () => setTimeout(() => {
  dispatchEvent(new Event("beforeprint")); // draws every pair, also those that are not in sight yet
  const box = document.querySelector("[role=listbox]"), found = [];
  const tokens = [...box.querySelectorAll(".token")];
  const now = () => Number(document.activeElement.dataset.i);
  const press = (key) => {
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    found.push([key, now()]);
  };
  tokens[0].focus();
  const keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home", "n", "n", "p", "q"];
  for (const key of keys) press(key);
  found.push(["stops", box.querySelectorAll('[tabindex="0"]').length]);
  found.push(["panel", document.getElementById("panel").textContent]);
  press("Escape");
  found.push(["hidden", document.getElementById("panel").className]);
  found.push(["down", (press("Home"), press("ArrowDown"), document.activeElement.getBoundingClientRect().top
    > tokens[0].getBoundingClientRect().top)]);
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
}, 500));
"""


@in_a_browser
def test_the_keyboard_reaches_every_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, ["a few words that fill more than one line, " * 6, "no"])
    out = loss_of(mask, tied=False)
    page = selection_page(out, ids, tokenizer).write(tmp_path / "page.html")
    found = result_of(opened(page, tmp_path / "profile", script=KEYS))
    weights = out.chosen_weights[0][out.chosen.mask[0]].tolist()
    kept = [number for number, weight in enumerate(weights) if weight > 0]
    last = len(weights) - 1
    after = [number for number in kept if number > 0][:2]
    assert found[:10] == [
        ["ArrowRight", 1],
        ["ArrowRight", 2],
        ["ArrowLeft", 1],
        ["End", last],
        ["ArrowRight", last],
        ["Home", 0],
        ["n", after[0]],
        ["n", after[1]],
        ["p", after[0]],
        ["q", after[0]],
    ]
    said = dict(found[10:13])
    assert said["stops"] == 1
    rank = f"of {len(weights)}"
    for words in (
        "policy log-prob",
        "reference log-prob",
        "score",
        rank,
        "weight1",
        f"id{ids[0, 4 + after[0]].item()}",
    ):
        assert words in said["panel"], words
    assert ["hidden", ""] in found
    assert ["down", True] in found


PHONE = """<!doctype html><body><iframe id="phone" style="width:390px;height:3000px"></iframe>
<script type="text/plain" id="page">%s</script><script>
const frame = document.getElementById("phone");
frame.srcdoc = atob(document.getElementById("page").textContent);
frame.addEventListener("load", () => setTimeout(() => {
  const page = frame.contentDocument, found = { width: page.documentElement.scrollWidth };
  found.side = page.querySelector(".side").getBoundingClientRect().width;
  dispatchEvent.call(frame.contentWindow, new Event("beforeprint"));
  found.printed = page.querySelectorAll(".token").length;
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
}, 500));
</script>"""


@in_a_browser
def test_a_phone_and_a_printer(tmp_path: Path) -> None:
    """No sideways scrolling at the width of a phone; before printing, what was not in sight yet is drawn."""
    page = page_of_pairs(many_pairs(40, 60), title="Many " + "x" * 300)
    wrapper = tmp_path / "phone.html"
    wrapper.write_text(PHONE % base64.b64encode(page.html.encode("latin-1", "xmlcharrefreplace")).decode())
    found = result_of(opened(wrapper, tmp_path / "profile"))
    assert found["width"] <= 390
    assert 300 < found["side"] <= 390
    assert found["printed"] == 40 * 2 * 60


@in_a_browser
def test_a_page_of_two_hundred_thousand_tokens_opens(tmp_path: Path) -> None:
    page = page_of_pairs(many_pairs(200, 500), title="Many").write(tmp_path / "page.html")
    assert page.stat().st_size < 15e6
    for attempt in range(5):  # a browser on a busy machine may end before its first frame, which draws what is in sight
        seen = opened(page, tmp_path / f"profile{attempt}")
        drawn = [response for response in seen.tokens() if response]
        if drawn:
            break
    assert seen.console == []
    assert 0 < len(drawn) < 400, "what is out of sight is drawn when it is reached"
    assert len(seen.tokens()) == 400


def test_dpo_keeps_everything(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids, mask = batch_of(tokenizer, ["one", "two"])
    selected: Sequence[Response] = (loss_of(mask).chosen, loss_of(mask).rejected)
    sides = [
        Response(per_token_logps=s.per_token_logps, mask=s.mask, ref_per_token_logps=s.ref_per_token_logps)
        for s in selected
    ]
    data = payload_of(selection_page(dpo_loss(*sides, beta=0.1), ids, tokenizer))
    assert set(column(data["pairs"][0]["c"]["w"], "f")) == {1.0}
    assert data["pairs"][0]["c"]["s"] is not None
