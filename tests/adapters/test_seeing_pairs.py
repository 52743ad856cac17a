"""What a pair shows: the text of every token, and the numbers that the loss read beside it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seen import HOSTILE, PROMPT, SCRIPTS, batch_of, byte_tokenizer, loss_of
from selective_pref import Response, dpo_loss, selective_dpo_loss, simpo_loss
from selective_pref_adapters.seeing.shown import implied_beta, overlap, shown_pairs
from selective_pref_adapters.seeing.tokens import TokenTexts, printable, score_scale, tint
from tiny import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


BYTES = byte_tokenizer()


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --- text ------------------------------------------------------------------------------------------------------------


@given(text=st.text(max_size=40), start=st.integers(0, 5))
def test_the_texts_of_the_tokens_are_the_text(text: str, start: int) -> None:
    ids = BYTES(PROMPT + text + "</s>")["input_ids"]
    start = min(start, len(PROMPT))
    texts = TokenTexts(BYTES).texts(ids, start)
    assert len(texts) == len(ids) - start
    assert "".join(texts) == decoded(BYTES, ids)[start:]


@given(ids=st.lists(st.integers(0, 257), max_size=30))
def test_so_are_those_of_bytes_that_are_no_text(ids: list[int]) -> None:
    """Broken bytes become replacement characters; how many, decoders decide by what follows."""
    texts = TokenTexts(BYTES).texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts).replace("\ufffd", "") == decoded(BYTES, ids).replace("\ufffd", "")


def test_a_character_stands_at_the_token_that_completes_it(tokenizer: Any) -> None:
    ids = tokenizer("a☃é")["input_ids"]
    assert TokenTexts(tokenizer).texts(ids) == ["a", "", "", "☃", "", "é"]


def test_a_space_belongs_to_the_token_behind_it() -> None:
    words = make_tokenizer(["w1", "w2"])
    ids = words.convert_tokens_to_ids(["w1", "w2", "w1"])
    assert TokenTexts(words).texts(ids) == ["w1", " w2", " w1"]
    assert TokenTexts(words).texts(ids, 1) == [" w2", " w1"]


def test_bytes_that_a_vocabulary_falls_back_to(shared: Path) -> None:
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    for text in (HOSTILE, SCRIPTS, "Once upon a time"):
        ids = real(text)["input_ids"]
        assert "".join(TokenTexts(real).texts(ids)) == decoded(real, ids)


def test_what_cannot_be_seen_is_shown() -> None:
    assert printable("a\nb\tc\r") == "a⏎\nb⇥\tc␍"
    assert printable("\x00\x1b\x7f\u202e\u2028") == "␀␛␡‹U+202E›‹U+2028›"
    assert printable("👩\u200d👧 e\u0301 中") == "👩\u200d👧 e\u0301 中"


def test_colours_are_steps_of_the_score() -> None:
    assert score_scale([]) is None
    assert score_scale([math.nan, math.inf]) is None
    assert score_scale([0.0, 0.0]) == 1.0
    assert score_scale([*[1.0] * 99, -50.0]) == 1.0
    steps = [tint(score, 4.0) for score in (-9.0, -4.0, -1.0, -0.01, 0.0, 0.01, 1.0, 4.0, 9.0)]
    assert steps == [-4, -4, -2, 0, 0, 0, 2, 4, 4]
    assert tint(math.nan, 4.0) == 0


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_every_number_stands_at_its_token(tokenizer: Any, left: bool) -> None:
    texts = [HOSTILE, SCRIPTS, "short", ""]
    ids, mask = batch_of(tokenizer, texts, left=left)
    out = loss_of(mask)
    pairs = shown_pairs(out, ids, tokenizer, places=["f:1", "f:2"])
    for number, pair in enumerate(pairs):
        assert pair.place == f"f:{number + 1}"
        assert pair.prompt == PROMPT
        assert pair.loss == out.losses[number].item()
        for (name, side), response, text in zip(
            pair.sides, (out.chosen, out.rejected), (texts[number], texts[2 + number]), strict=True
        ):
            where = response.mask[number]
            assert "".join(side.texts) == text + "</s>"
            assert side.special == (False,) * (len(side.ids) - 1) + (True,)
            assert all(side.counts)
            assert list(side.weights) == response.token_weights[number][where].tolist()
            assert list(side.logps) == response.per_token_logps[number][where].tolist()
            assert list(side.ref_logps) == response.ref_per_token_logps[number][where].tolist()
            assert list(side.scores) == response.scores[number][where].tolist()
            assert side.reward == getattr(out, f"{name}_rewards")[number].item()
            assert side.selected_reward == getattr(out, f"{name}_selected_rewards")[number].item()
            assert side.kept == pytest.approx(math.ceil(0.4 * side.tokens))


def test_ranks_share_the_better_place() -> None:
    mask = torch.tensor([[True, True, False, True, True]] * 2)
    out = loss_of(mask)
    scores = torch.tensor([[1.0, 3.0, 9.0, 3.0, math.nan]])
    out = replace(out, chosen=replace(out.chosen, scores=scores))
    side = shown_pairs(out, torch.full((2, 6), 70), BYTES)[0].chosen
    assert side.ranks == (3, 1, None, 1, None)
    assert side.counts == (True, True, False, True, True)


def test_lists_without_padding_will_do(tokenizer: Any) -> None:
    ids, mask = batch_of(tokenizer, ["one", "three", "two", "f"])
    out = loss_of(mask)
    rows = [[token for token in row if token != tokenizer.pad_token_id] for row in ids.tolist()]
    assert shown_pairs(out, rows, tokenizer) == shown_pairs(out, ids, tokenizer)


def test_arrays_of_any_library_show_the_same(tokenizer: Any) -> None:
    ids, mask = batch_of(tokenizer, ["one ☃", "two"])
    out = loss_of(mask)
    sides = [
        Response(
            per_token_logps=side.per_token_logps.numpy(),
            mask=side.mask.numpy(),
            ref_per_token_logps=side.ref_per_token_logps.numpy(),
        )
        for side in (out.chosen, out.rejected)
    ]
    other = shown_pairs(selective_dpo_loss(*sides, beta=0.1, selection_ratio=0.4), ids.numpy(), tokenizer)[0]
    ours = shown_pairs(out, ids, tokenizer)[0]
    for (_, one), (_, two) in zip(ours.sides, other.sides, strict=True):
        assert (one.texts, one.ids, one.weights, one.scores) == (two.texts, two.ids, two.weights, two.scores)


def test_a_loss_that_selects_nothing_is_shown_with_its_alignment_scores(tokenizer: Any) -> None:
    ids, mask = batch_of(tokenizer, ["one", "two"])
    selected = loss_of(mask)
    plain = shown_pairs(dpo_loss(selected.chosen, selected.rejected, beta=0.1), ids, tokenizer)[0]
    sides = [replace(side, weights=None, scores=None) for side in (selected.chosen, selected.rejected)]
    pair = shown_pairs(dpo_loss(*sides, beta=0.1), ids, tokenizer)[0]
    assert pair.chosen.scores == plain.chosen.scores
    assert set(pair.chosen.weights) == {1.0}
    free = [replace(side, ref_per_token_logps=None) for side in sides]
    pair = shown_pairs(simpo_loss(*free, beta=2, gamma=0.5), ids, tokenizer)[0]
    assert pair.chosen.scores is None
    assert pair.chosen.ref_logps is None
    assert pair.chosen.ranks == (None,) * 4


def test_the_beta_of_the_rewards_is_found_where_there_is_one(tokenizer: Any) -> None:
    ids, mask = batch_of(tokenizer, ["one", "three", "two", "four"])
    out = loss_of(mask)
    assert implied_beta(shown_pairs(out, ids, tokenizer)) == 0.1
    assert implied_beta(shown_pairs(simpo_loss(out.chosen, out.rejected, beta=2, gamma=0), ids, tokenizer)) is None
    assert implied_beta([]) is None


def test_a_response_without_tokens_and_a_broken_one(tokenizer: Any) -> None:
    ids, mask = batch_of(tokenizer, ["one", "two"])
    mask[1] = False
    out = loss_of(mask)
    pair = shown_pairs(out, ids, tokenizer)[0]
    assert pair.rejected.texts == ()
    assert (pair.rejected.tokens, pair.rejected.kept, pair.rejected.reward) == (0, 0.0, 0.0)
    mask[1] = mask[0]
    policy = -torch.rand(mask.shape)
    policy[0, 5] = math.nan
    sides = Response.from_stacked(per_token_logps=policy, mask=mask, ref_per_token_logps=-torch.rand(mask.shape))
    pair = shown_pairs(selective_dpo_loss(*sides, beta=1, selection_ratio=0.5), ids, tokenizer)[0]
    record = json.loads(json.dumps(pair.record(), allow_nan=False))
    assert record["loss"] is None
    assert record["chosen"]["per_token_logps"].count(None) == 1
    assert record["rejected"]["texts"] == list(pair.rejected.texts)
    assert set(record["chosen"]) >= {"ids", "scores", "weights", "ranks", "ref_per_token_logps", "special", "reward"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:1], "2B = 2 rows"),
        (lambda ids: ids[0].tolist(), "a row of token ids for each side; got int"),
        (lambda ids: ids[0], "2B = 2 rows"),
        (lambda ids: ids[:, :-1], r"T \+ 1 = 8\); pair 1 has 7 ids and a token that counts at 7"),
    ],
)
def test_ids_of_another_batch_are_refused(tokenizer: Any, change: Any, message: str) -> None:
    ids, mask = batch_of(tokenizer, ["one", "two"])
    with pytest.raises(ValueError, match=message):
        shown_pairs(loss_of(mask), change(ids), tokenizer)


def test_places_of_another_batch_are_refused(tokenizer: Any) -> None:
    ids, mask = batch_of(tokenizer, ["one", "two"])
    with pytest.raises(ValueError, match="each of the 1 pairs; got 2"):
        shown_pairs(loss_of(mask), ids, tokenizer, places=["a", "b"])


def test_overlap_of_two_selections() -> None:
    assert overlap([1, 1, 0, 0], [0, 1, 1, 0]) == 0.5
    assert overlap([0.5, 0.5], [1, 0]) == 0.5
    assert overlap([1, 0, 0, 0], [1, 1, 0, 0]) == 0.5
    assert overlap([0.0], [0.0]) == 1.0
    assert overlap(np.ones(3).tolist(), [1, 1, 1]) == 1.0
