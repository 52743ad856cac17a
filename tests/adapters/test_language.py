"""The made-up language of the replication, and its judgement of tokens and answers, by hand-worked cases."""

from __future__ import annotations

import random

import pytest

from selective_pref_adapters.pairs import PreferenceRow, collate, tokenize_pairs
from selective_pref_adapters.replication.miniature import judging, language


@pytest.fixture(scope="module")
def facts() -> language.Language:
    return language.make_language(0)


def test_held_out_keys_never_stand_together_in_training() -> None:
    prompts = language.split_prompts(3, 0.2)
    sets = [{frozenset(language.keys_of(prompt)) for prompt in part} for part in (prompts.train, prompts.held_out)]
    assert not sets[0] & sets[1]
    assert len(sets[0]) + len(sets[1]) == 16 * 15 * 14 * 13 // (4 * 3 * 2)
    language.check_disjoint(prompts.train, prompts.held_out)
    with pytest.raises(AssertionError, match="held out"):
        language.check_disjoint(["owl fox elk hen :"], ["hen elk fox owl :"])


def test_an_answer_is_right_when_all_its_digits_are_the_tables(facts: language.Language) -> None:
    prompt = "owl fox elk hen :"
    right = [facts.table[key] for key in language.keys_of(prompt)]
    pick = random.Random(0)
    assert language.is_right(facts, prompt, language.answer_text(right, pick))
    for place in range(4):
        wrong = list(right)
        wrong[place] = language.wrong_digit(facts, language.keys_of(prompt)[place], pick)
        assert wrong[place] != right[place]
        assert not language.is_right(facts, prompt, language.answer_text(wrong, pick))
    assert not language.is_right(facts, prompt, " ".join(right[:3]))
    assert not language.is_right(facts, prompt, " ".join([*right, "0"]))


def test_supervised_answers_err_on_doubtful_keys_alone(facts: language.Language) -> None:
    prompts = language.split_prompts(0, 0.2).train[:400]
    texts = language.supervised_texts(facts, prompts, random.Random(0), error_rate=0.5)
    wrong: dict[bool, list[bool]] = {True: [], False: []}
    for prompt, answer in texts:
        for key, digit in zip(language.keys_of(prompt), language.digits_of(answer.split()), strict=True):
            wrong[key in facts.doubtful].append(digit != facts.table[key])
    assert not any(wrong[False])
    assert sum(wrong[True]) / len(wrong[True]) == pytest.approx(0.5, abs=0.06)
    clean = language.supervised_texts(facts, prompts, random.Random(0), error_rate=0.0)
    assert all(language.is_right(facts, *text) for text in clean)


def test_rows_have_one_right_side_and_the_stated_share_is_swapped(facts: language.Language) -> None:
    prompts = language.split_prompts(0, 0.2).train[:1000]
    rows = language.preference_rows(facts, prompts, random.Random(0), swapped=0.2)
    swapped = 0
    for row in rows:
        verdicts = [language.is_right(facts, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        assert sum(verdicts) == 1
        swapped += verdicts[1]
    assert swapped / len(rows) == pytest.approx(0.2, abs=0.04)


def test_prompt_and_answer_part_cleanly_and_the_decisive_tokens_are_the_differing_digits() -> None:
    tokenizer = language.make_tokenizer()
    row = PreferenceRow(
        prompt="owl fox elk hen :",
        chosen=" first so 7 second er 3 third hm 1 fourth oh 2",
        rejected=" first hm oh 7 second er 5 third hm 1 fourth now 9",
        place="x",
    )
    pairs, report = tokenize_pairs([row], tokenizer, max_length=64)
    assert report.boundary_merged == 0
    assert tokenizer.convert_ids_to_tokens(pairs[0].chosen_ids[: pairs[0].chosen_prompt_length]) == [
        "<s>",
        *row.prompt.split(),
    ]
    assert tokenizer.convert_ids_to_tokens(pairs[0].rejected_ids)[-1] == "</s>"
    ids = collate(pairs, 0)["input_ids"][:, 1:]
    masks = judging.decisive_mask(pairs, tokenizer, ids.shape[1])
    found = [tokenizer.convert_ids_to_tokens(ids[side][masks[side][0]].tolist()) for side in (0, 1)]
    assert found == [["3", "2"], ["5", "9"]]
