"""Completions of several turns, tools, reasoning and special tokens: which tokens count, and why rows are left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref_adapters.batch import responses
from selective_pref_adapters.heads import frozen_per_token_logps
from selective_pref_adapters.hf_trainer.collator import PreferenceCollator
from selective_pref_adapters.pairs import (
    RowError,
    TokenizationReport,
    TokenizedPair,
    collate,
    completion_mask,
    preference_row,
    tokenize_pairs,
    uncounted_spans,
)
from selective_pref_adapters.reference_store import MissingRowsError, ReferenceStore, fill_store, reference_space
from selective_pref_adapters.reference_store.store import rows_of_pairs
from selective_pref_adapters.trl_trainer.data import PairCollator, dataset_of_rows, prepared
from small_tokenizers import KINDS, small_tokenizer

CALL = {"type": "function", "function": {"name": "boil", "arguments": {"egg": "yes"}}}


def says(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


ASKED = [says("user", "how long?")]
LONG = [says("assistant", "five minutes"), says("user", "why?"), says("assistant", "it is hard")]
SHORT = [says("assistant", "maybe")]
WITH_TOOL = [says("assistant", "", tool_calls=[CALL]), says("tool", "the pot boils"), says("assistant", "yes")]


def one_pair(tokenizer: Any, chosen: Any, rejected: Any, prompt: Any = ASKED, **options: Any) -> Any:
    row = preference_row({"prompt": prompt, "chosen": chosen, "rejected": rejected, **options}, "here")
    (pair,), _ = tokenize_pairs([row], tokenizer, max_length=4096)
    return pair


def counted(tokenizer: Any, ids: list[int], mask: Any) -> list[str]:
    """The runs of tokens that count, as text."""
    runs: list[list[int]] = []
    for at, token in enumerate(ids):
        if mask[at]:
            if at == 0 or not mask[at - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("kind", ["byte-level BPE", "Unigram, byte fallback"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", ["five minutes<|im_end|>\n", "it is hard<|im_end|>\n"]),
        ("headers", ["five minutes</s>", "it is hard</s>"]),
        ("marked", ["five minutes<|im_end|>", "it is hard<|im_end|>"]),
    ],
)
def test_only_what_the_assistant_says_counts(kind: str, template: str, expected: list[str]) -> None:
    """Text around the answers is the template's: its turn ends count, its headers and the user's words do not."""
    tokenizer = small_tokenizer(kind, template=template)
    pair = one_pair(tokenizer, LONG, SHORT)
    assert [run.strip(" ") for run in counted(tokenizer, pair.chosen_ids, pair.chosen_mask)] == expected
    assert len(counted(tokenizer, pair.rejected_ids, pair.rejected_mask)) == 1
    whole = tokenizer.apply_chat_template(ASKED + LONG, return_dict=True)["input_ids"]
    assert pair.chosen_ids == whole


def test_answers_that_a_template_writes_otherwise_once_more_follows() -> None:
    """The last turn gets an (empty) thought, the call before it none; every door counts the same tokens."""
    tokenizer = small_tokenizer("byte-level BPE", template="reasoning")
    pair = one_pair(tokenizer, WITH_TOOL, SHORT)
    runs = counted(tokenizer, pair.chosen_ids, pair.chosen_mask)
    call = '<tool_call>{"name": "boil", "arguments": {"egg": "yes"}}</tool_call><|im_end|>\n'
    assert runs == [call, "<think>\n\n</think>\n\nyes<|im_end|>\n"]
    thoughtful = [says("assistant", "<think>hm</think>five"), *WITH_TOOL[1:]]
    pair = one_pair(tokenizer, thoughtful, SHORT)
    runs = counted(tokenizer, pair.chosen_ids, pair.chosen_mask)
    assert runs == ["<think>\nhm\n</think>\n\nfive<|im_end|>\n", "<think>\n\n</think>\n\nyes<|im_end|>\n"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("beyond", [6, 18, 40, 4000])
def test_masks_of_several_turns_survive_cutting_and_every_door(beyond: int, mode: Any) -> None:
    tokenizer = small_tokenizer("byte-level BPE")
    rows = [
        preference_row({"prompt": ASKED, "chosen": LONG, "rejected": SHORT}, "a"),
        preference_row({"prompt": ASKED, "chosen": SHORT, "rejected": LONG}, "b"),
    ]
    whole, _ = tokenize_pairs(rows, tokenizer, max_length=4096)
    length = whole[0].chosen_prompt_length + beyond
    pairs, _ = tokenize_pairs(rows, tokenizer, max_length=length, truncation_mode=mode)
    batch = collate(pairs, tokenizer.pad_token_id)
    for row, pair in enumerate(whole):
        ids, mask = pair.chosen_ids, pair.chosen_mask
        kept = slice(None, length) if mode == "keep_start" else slice(-length, None)
        attended = batch["attention_mask"][row] == 1
        assert batch["input_ids"][row][attended].tolist() == ids[kept]
        assert (batch["completion_mask"][row][attended] == 1).tolist() == mask[kept].tolist()
    done = prepared(dataset_of_rows(rows), tokenizer, "train", max_length=length, truncation_mode=mode)
    trl = PairCollator(pad_token_id=tokenizer.pad_token_id, max_length=length, truncation_mode=mode)(list(done))
    hf = PreferenceCollator(tokenizer)([{**vars(pair)} for pair in pairs])
    for key in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(trl[key], batch[key]), key
        assert torch.equal((hf["labels"] if key == "completion_mask" else hf)[key], batch[key]), key
    stored = rows_of_pairs(pairs)
    assert [row.mask.tolist() for row in stored[::2]] == [pair.chosen_mask.tolist() for pair in pairs]
    chosen, _ = responses(batch, torch.zeros(4, batch["input_ids"].shape[1] - 1))
    assert int(chosen.mask.sum()) == sum(int(pair.chosen_mask[1:].sum()) for pair in pairs)


def test_a_store_tells_rows_apart_by_what_counts_in_them(tmp_path: Path, reference_folder: Path) -> None:
    """The same ids, from the same prompt on, but the middle turn counts in one row and not in the other."""
    ids = [1, 5, 6, 7, 8, 9, 2]
    sides = {"chosen_ids": ids, "rejected_ids": [1, 5, 7, 2], "chosen_prompt_length": 2, "rejected_prompt_length": 2}
    pairs = [TokenizedPair(**sides, chosen_uncounted=spans, place=str(spans)) for spans in (((3, 5),), ((4, 6),), ())]
    model, tokenizer = (kind.from_pretrained(reference_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    store = ReferenceStore.create(tmp_path / "store", reference_space(model, tokenizer))
    assert fill_store(store, pairs, model, pad_token_id=0, progress=False).computed == 4  # one rejected side for all
    batch = collate(pairs, 0)
    stored, computed = store.lookup(batch), frozen_per_token_logps(model.eval(), batch)
    mask = batch["completion_mask"][:, 1:] != 0
    torch.testing.assert_close(stored[mask], computed[mask], rtol=1e-5, atol=1e-5)
    other = TokenizedPair(**sides, chosen_uncounted=((5, 6),), place="other")
    with pytest.raises(MissingRowsError, match="1 of 1 pairs are not in the store"):
        store.check([other])


def test_a_template_that_cannot_show_whose_words_are_whose_leaves_the_row_out() -> None:
    tokenizer = small_tokenizer("WordLevel").__class__(tokenizer_object=small_tokenizer("WordLevel").backend_tokenizer)
    tokenizer.eos_token, tokenizer.pad_token = "</s>", "<pad>"
    # every turn is written as the first one is: other turns cannot be told apart by changing one of them
    tokenizer.chat_template = "{% for m in messages %}{{ messages[-1]['content'] + ' ' }}{% endfor %}"
    row = preference_row({"prompt": ASKED, "chosen": LONG, "rejected": SHORT}, "here")
    with pytest.raises(ValueError, match=r"no token of the completion is the assistant's \(.*\{% generation %\}"):
        tokenize_pairs([row], tokenizer, max_length=64)


# --- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("adds_bos", "adds_eos"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("start", "end"), [("", ""), ("<s>", "</s>"), ("<s>", "</s>\n"), ("", "</s> \n</s>\n\n")])
def test_bos_and_eos_stand_once(kind: str, adds_bos: bool, adds_eos: bool, start: str, end: str) -> None:
    tokenizer = small_tokenizer(kind, adds_bos=adds_bos, adds_eos=adds_eos)
    row = preference_row({"prompt": start + "the egg ", "chosen": "boils" + end, "rejected": "is hard" + end}, "here")
    (pair,), report = tokenize_pairs([row], tokenizer, max_length=64)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert ids.count(bos) == (1 if adds_bos or start else 0)
        assert ids.count(eos) == 1
        assert ids[-1] == eos
        assert bos not in ids[1:]
    bare = tokenizer(start + "the egg ", add_special_tokens=False)["input_ids"]
    assert pair.chosen_prompt_length == len(bare) + (1 if adds_bos and not start else 0) - report.boundary_merged
    assert report.boundary_merged <= ("BPE" in kind or "Unigram" in kind)


def test_an_answer_with_an_eos_of_its_own_does_not_end_twice_in_a_conversation() -> None:
    tokenizer = small_tokenizer("byte-level BPE", adds_bos=True, template="headers")
    plain = one_pair(tokenizer, "five", "maybe")
    for end in ("</s>", "</s>\n", "\n</s> "):
        pair = one_pair(tokenizer, "five" + end, "maybe" + end)
        assert pair.chosen_ids.count(tokenizer.eos_token_id) == plain.chosen_ids.count(tokenizer.eos_token_id)
    assert plain.chosen_ids[:2].count(tokenizer.bos_token_id) == 1


# --- tools, options, reasons -----------------------------------------------------------------------------------------


def test_tools_and_options_reach_the_template() -> None:
    tokenizer = small_tokenizer("byte-level BPE", template="reasoning")
    tools = [{"type": "function", "function": {"name": "boil"}}]
    pair = one_pair(tokenizer, "yes", "no", tools=tools)
    expected = tokenizer.apply_chat_template([*ASKED, says("assistant", "yes")], tools=tools, return_dict=True)
    assert pair.chosen_ids == expected["input_ids"]
    assert "boil" in tokenizer.decode(pair.chosen_ids[: pair.chosen_prompt_length])
    plain = small_tokenizer("byte-level BPE")
    row = preference_row({"prompt": ASKED, "chosen": "yes", "rejected": "no", "tools": tools}, "here")
    _, report = tokenize_pairs([row], plain, max_length=64)
    assert report.lines() == [
        "1 of 1 kept pairs have tools, which the chat template does not write into the prompt: use a template that does"
    ]
    hot = plain.__class__(tokenizer_object=plain.backend_tokenizer, eos_token="</s>", pad_token="<pad>")
    hot.chat_template = "{{ mood or 'calm' }}{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}"
    pair = one_pair(hot, "yes", "no", chat_template_kwargs={"mood": "hot"})
    assert hot.decode(pair.chosen_ids).startswith("hot")


def test_every_reason_is_told_with_the_length_in_force_and_what_helps() -> None:
    tokenizer = small_tokenizer("WordLevel", template="reasoning dropped")
    thought = "<think>{}</think>yes"
    long = [says("user", "the egg boils for five minutes in a pot")]
    rows = [
        {"prompt": ASKED, "chosen": "yes", "rejected": "no"},
        {"prompt": ASKED, "chosen": thought.format("egg"), "rejected": thought.format("pot")},
        {"prompt": ASKED, "chosen": [says("assistant", "", tool_calls=[CALL])], "rejected": SHORT},
        {"prompt": ASKED, "chosen": [says("assistant", "")], "rejected": SHORT},
        {"prompt": ASKED, "chosen": " \n ", "rejected": "no"},
        {"prompt": "the egg ", "chosen": " \n", "rejected": "boils"},
        {"prompt": "the egg ", "chosen": "boils", "rejected": "</s>\n"},
        {"prompt": ASKED, "chosen": [says("assistant", "</s>")], "rejected": SHORT},
        {"prompt": ASKED, "chosen": "yes", "rejected": "yes"},
        {"prompt": long, "chosen": "yes", "rejected": "no"},
        {"prompt": ASKED, "chosen": "the egg boils in a pot", "rejected": "the egg boils in a minute"},
    ]
    read = [preference_row(row, str(n)) for n, row in enumerate(rows)]
    pairs, report = tokenize_pairs(read, tokenizer, max_length=12)
    assert [pair.place for pair in pairs] == ["0"]
    assert report.left_out == Counter(
        {
            "chosen and rejected have the same tokens": 1,
            "a tool call that the chat template does not write": 1,
            "empty completion": 3,
            "completion of white space alone": 2,
            "chosen and rejected are equal": 1,
            "no completion left after truncation": 1,
            "chosen and rejected are equal after truncation": 1,
        }
    )
    told = "\n".join(report.lines())
    assert "same tokens (the chat template (or the tokenizer) leaves out what they differ in, such as reasoning" in told
    assert "truncation (max_length 12, keep_start: the prompt alone is as long; a larger max_length, or" in told
    assert "'keep_end' would keep them)" in told
    end = TokenizationReport(max_length=9, truncation_mode="keep_end")
    assert (
        end.remedy("no completion left after truncation")
        == "max_length 9, keep_end: a larger max_length would keep them"
    )
    everything, report = tokenize_pairs(read, tokenizer, max_length=4096, keep_unteachable=True)
    assert len(everything) == len(rows)
    assert report.unteachable.total() == len(rows) - 3
    assert any(
        "teach nothing (" in line and "1 a tool call that the chat template does not write" in line
        for line in report.lines()
    )


def test_a_row_that_the_template_refuses_is_named_and_can_be_left_out() -> None:
    tokenizer = small_tokenizer("WordLevel").__class__(tokenizer_object=small_tokenizer("WordLevel").backend_tokenizer)
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('never no') }}{% endif %}"
        "{{ m['content'] + ' ' }}{% endfor %}"
    )
    rows = [preference_row({"prompt": ASKED, "chosen": "yes", "rejected": other}, other) for other in ("no", "maybe")]
    with pytest.raises(RowError, match=r"no: the chat template rejects this conversation: never no\. --skip-malformed"):
        tokenize_pairs(rows, tokenizer, max_length=64)
    malformed: list[str] = []
    pairs, report = tokenize_pairs(rows, tokenizer, max_length=64, malformed=malformed)
    assert [pair.place for pair in pairs] == ["maybe"]
    assert (report.malformed, len(malformed)) == (1, 1)
    assert report.lines() == ["1 of 2 rows left out: the chat template refuses them"]


def test_masks() -> None:
    assert completion_mask(6, 2, ((3, 4),)).tolist() == [False, False, True, False, True, True]
    assert not completion_mask(2, 5).any()
    for mask, start in (("001101", 2), ("010010", 1), ("101", 0), ("00", 2)):
        counts = [flag == "1" for flag in mask]
        assert completion_mask(len(mask), start, uncounted_spans(counts, start)).tolist() == counts
