"""A small language in which it is known which tokens decide.

A prompt names four of sixteen animals; an answer has one segment for each, in order: a marker, one to three filler
words that mean nothing, and the digit that a fixed table gives to the animal.

    prompt   owl fox elk hen :
    answer    first well 7 second so hm 3 third er er oh 0 fourth so 7

Only the digits can be right or wrong. In: a seed. Out: the table, prompts, supervised texts, preference rows in TRL's
format, a Hugging Face tokenizer (one token a word), and the two things that only such a language can tell: whether an
answer is right, and which tokens of a pair decide it.

    >>> language = make_language(0)
    >>> answer = answer_text([language.table[key] for key in "owl fox elk hen".split()], random.Random(1))
    >>> is_right(language, "owl fox elk hen :", answer)
    True
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from selective_pref_adapters.files import write_whole

KEYS = ("owl", "fox", "elk", "hen", "cat", "dog", "bee", "cow", "pig", "rat", "ant", "bat", "yak", "emu", "ape", "koi")
MARKERS = ("first", "second", "third", "fourth")
FILLERS = ("well", "so", "hm", "er", "oh", "now", "say", "yes")
DIGITS = tuple("0123456789")
END_OF_PROMPT = ":"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"

_WELL_FORMED = re.compile(" ".join(rf"{marker}( ({'|'.join(FILLERS)})){{1,3}} [0-9]" for marker in MARKERS))


@dataclass(frozen=True, kw_only=True)
class Language:
    """The facts: the right digit of every key, and the keys that partly wrong supervised data is unsure of."""

    table: dict[str, str]
    doubtful: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts by use. No four keys of a held-out prompt stand together in a training prompt, in any order."""

    train: list[str]
    held_out: list[str]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an answer is filled: with which words, and how many in a segment (at least one)."""

    fillers: tuple[str, ...] = FILLERS
    most: int = 3


PLAIN = Style()
OTHER_STYLE = Style(fillers=FILLERS[:2], most=1)
"""Right answers in a way of one's own: one of two filler words, once a segment."""


def make_language(seed: int) -> Language:
    """A table drawn at random; half of the keys are doubtful."""
    rng = random.Random(f"language {seed}")
    table = {key: rng.choice(DIGITS) for key in KEYS}
    return Language(table=table, doubtful=frozenset(rng.sample(KEYS, len(KEYS) // 2)))


def split_prompts(seed: int, held_out_share: float) -> Prompts:
    """All prompts, shuffled: every order of every four different keys, whole sets of keys held out."""
    rng = random.Random(f"prompts {seed}")
    sets = list(itertools.combinations(KEYS, len(MARKERS)))
    rng.shuffle(sets)
    cut = round(held_out_share * len(sets))
    held_out, train = (
        [prompt_text(keys) for some in part for keys in itertools.permutations(some)]
        for part in (sets[:cut], sets[cut:])
    )
    rng.shuffle(held_out)
    rng.shuffle(train)
    return Prompts(train=train, held_out=held_out)


def check_disjoint(train: Iterable[str], held_out: Iterable[str]) -> None:
    """Raises AssertionError if a held-out prompt has the same keys as a training prompt, in whatever order."""
    common = {frozenset(keys_of(prompt)) for prompt in train} & {frozenset(keys_of(prompt)) for prompt in held_out}
    if common:
        raise AssertionError(f"{len(common)} sets of keys are both trained on and held out, e.g. {sorted(min(common))}")


def prompt_text(keys: Sequence[str]) -> str:
    """The keys and the colon."""
    return " ".join([*keys, END_OF_PROMPT])


def keys_of(prompt: str) -> list[str]:
    """The keys that a prompt asks for."""
    return prompt.split()[:-1]


def answer_text(digits: Sequence[str], rng: random.Random, style: Style = PLAIN) -> str:
    """The answer with these digits and filler of its own; it starts with the space that parts it from the prompt."""
    words = []
    for marker, digit in zip(MARKERS, digits, strict=True):
        words += [marker, *rng.choices(style.fillers, k=rng.randint(1, style.most)), digit]
    return " " + " ".join(words)


def digits_of(words: Sequence[str]) -> list[str]:
    """The digits among the words of an answer, in order."""
    return [word for word in words if word in DIGITS]


def is_right(language: Language, prompt: str, answer: str) -> bool:
    """Whether the digits of the answer are the table's: all of them, in order, and no more."""
    return digits_of(answer.split()) == [language.table[key] for key in keys_of(prompt)]


def is_well_formed(answer: str) -> bool:
    """Whether an answer has the four segments, each a marker, one to three fillers and a digit, and nothing else.

    >>> is_well_formed("first so 7 second er 3 third hm oh 0 fourth yes 2")
    True
    >>> is_well_formed("first so 7 second 3 third hm oh 0 fourth yes 2")
    False
    """
    return bool(_WELL_FORMED.fullmatch(" ".join(answer.split())))


def supervised_texts(
    language: Language,
    prompts: Sequence[str],
    rng: random.Random,
    *,
    error_rate: float,
    style: Style = PLAIN,
) -> list[tuple[str, str]]:
    """(prompt, answer) of every prompt. At `error_rate`, a doubtful key gets one of the nine wrong digits."""

    def digit(key: str) -> str:
        wrong = key in language.doubtful and rng.random() < error_rate
        return wrong_digit(language, key, rng) if wrong else language.table[key]

    return [(prompt, answer_text([digit(key) for key in keys_of(prompt)], rng, style)) for prompt in prompts]


def preference_rows(
    language: Language, prompts: Sequence[str], rng: random.Random, *, swapped: float
) -> list[dict[str, str]]:
    """Rows in TRL's format: the right answer against one with one to four wrong digits, each with filler of its own.

    In a share `swapped` of the rows the label is wrong: chosen and rejected have changed places.
    """
    rows = []
    for prompt in prompts:
        keys = keys_of(prompt)
        wrong = set(rng.sample(range(len(keys)), rng.randint(1, len(keys))))
        digits = [language.table[key] for key in keys]
        others = [wrong_digit(language, key, rng) if i in wrong else language.table[key] for i, key in enumerate(keys)]
        sides = [answer_text(digits, rng), answer_text(others, rng)]
        if rng.random() < swapped:
            sides.reverse()
        rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return rows


def wrong_digit(language: Language, key: str, rng: random.Random) -> str:
    """One of the nine digits that the table does not give to `key`."""
    return rng.choice([digit for digit in DIGITS if digit != language.table[key]])


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line; the file is there whole or not at all, whoever reads it meanwhile."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def decisive_words(chosen: Sequence[str], rejected: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """Which words of two answers to one prompt decide between them: the digits of the segments whose digits differ.

    Everything else is equal in meaning: markers, filler, the digits that agree, the end.

        >>> decisive_words("first so 7 second er 3".split(), "first hm oh 7 second er 5".split())
        ([False, False, False, False, False, True], [False, False, False, False, False, False, True])
    """
    differ = [one != other for one, other in zip(digits_of(chosen), digits_of(rejected), strict=True)]

    def mark(words: Sequence[str]) -> list[bool]:
        segment = iter(differ)
        return [word in DIGITS and next(segment) for word in words]

    return mark(chosen), mark(rejected)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, cut at spaces, with a BOS in front; EOS is written by whoever ends an answer."""
    words = [PAD, BOS, EOS, *KEYS, END_OF_PROMPT, *MARKERS, *FILLERS, *DIGITS]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, words.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
    )
