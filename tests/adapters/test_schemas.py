"""Rows of every schema → one reading: ten real-looking rows each, beside what a person would read in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selective_pref_adapters.pairs import RowError, parse_columns, preference_row, read_rows, tokenize_pairs
from tiny import WORDS, make_tokenizer, write_jsonl

NUMBERS = range(10)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


Q = [f"How do I boil {n} eggs?" for n in NUMBERS]
GOOD = [f"In boiling water, {n + 5} minutes." for n in NUMBERS]
BAD = [f"No {n}." for n in NUMBERS]
TURNS = [([user(Q[n])], [assistant(GOOD[n])], [assistant(BAD[n])]) for n in NUMBERS]
UNDER_SYSTEM = [([system("You cook."), user(Q[n])], [assistant(GOOD[n])], [assistant(BAD[n])]) for n in NUMBERS]
LATER = [([user("Hi"), assistant("Hello."), user(Q[n])], [assistant(GOOD[n])], [assistant(BAD[n])]) for n in NUMBERS]
EARLIER = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: "
PARTS = [{"type": "text", "text": "You "}, {"type": "text", "text": "cook."}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

SCHEMAS: dict[str, tuple[str, Any, list[tuple[Any, Any, Any]]]] = {
    "standard": (
        "TRL standard",
        lambda n: {"prompt": Q[n] + " ", "chosen": GOOD[n], "rejected": BAD[n]},
        [(Q[n] + " ", GOOD[n], BAD[n]) for n in NUMBERS],
    ),
    "conversational": (
        "TRL conversational",
        lambda n: {"prompt": [user(Q[n])], "chosen": [assistant(GOOD[n])], "rejected": [assistant(BAD[n])]},
        TURNS,
    ),
    "answers as text": (
        "TRL conversational",
        lambda n: {"prompt": [user(Q[n])], "chosen": GOOD[n], "rejected": BAD[n]},
        TURNS,
    ),
    "prompt as text, answers as messages": (
        "TRL conversational",
        lambda n: {"prompt": Q[n], "chosen": [assistant(GOOD[n])], "rejected": [assistant(BAD[n])]},
        TURNS,
    ),
    "system and prompt": (
        "TRL conversational",
        lambda n: {"system": "You cook.", "prompt": Q[n], "chosen": GOOD[n], "rejected": BAD[n]},
        UNDER_SYSTEM,
    ),
    "hh": (
        "TRL standard, implicit prompt",
        lambda n: {
            "chosen": f"{EARLIER}{Q[n]}\n\nAssistant: {GOOD[n]}",
            "rejected": f"{EARLIER}{Q[n]}\n\nAssistant: {BAD[n]}",
        },
        [(f"{EARLIER}{Q[n]}\n\nAssistant:", " " + GOOD[n], " " + BAD[n]) for n in NUMBERS],
    ),
    "skywork": (
        "TRL conversational, implicit prompt",
        lambda n: {
            "chosen": [system("You cook."), user(Q[n]), assistant(GOOD[n])],
            "rejected": [system("You cook."), user(Q[n]), assistant(BAD[n])],
            "source": "magpie",
        },
        UNDER_SYSTEM,
    ),
    "ultrafeedback": (
        "TRL conversational",
        lambda n: {
            "prompt": Q[n],
            "prompt_id": "a",
            "chosen": [user(Q[n]), assistant(GOOD[n])],
            "rejected": [user(Q[n]), assistant(BAD[n])],
            "messages": [user(Q[n]), assistant(GOOD[n])],
            "score_chosen": 8.0,
        },
        TURNS,
    ),
    "a message prompt beside whole conversations": (
        "TRL conversational",
        lambda n: {
            "prompt": [user(Q[n])],
            "chosen": [user(Q[n]), assistant(GOOD[n])],
            "rejected": [user(Q[n]), assistant(BAD[n])],
        },
        TURNS,
    ),
    "a system prompt in the prompt alone": (
        "TRL conversational",
        lambda n: {
            "prompt": [system("You cook."), user(Q[n])],
            "chosen": [user(Q[n]), assistant(GOOD[n])],
            "rejected": [user(Q[n]), assistant(BAD[n])],
        },
        UNDER_SYSTEM,
    ),
    "content in parts, nulls": (
        "TRL conversational",
        lambda n: {
            "prompt": [
                {"role": "system", "content": PARTS, "name": None},
                {"role": "user", "content": [{"type": "text", "text": Q[n]}]},
            ],
            "chosen": [{**assistant(GOOD[n]), "tool_calls": None}],
            "rejected": [{**assistant(BAD[n]), "tool_calls": []}],
        },
        UNDER_SYSTEM,
    ),
    "tool calls without text": (
        "TRL conversational",
        lambda n: {
            "prompt": [user(Q[n])],
            "chosen": [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
                    ],
                }
            ],
            "rejected": [assistant(BAD[n])],
        },
        [([user(Q[n])], [{**assistant(""), "tool_calls": [CALL]}], [assistant(BAD[n])]) for n in NUMBERS],
    ),
    "sharegpt, answers as text": (
        "ShareGPT",
        lambda n: {"conversations": [human(Q[n])], "chosen": GOOD[n], "rejected": BAD[n]},
        TURNS,
    ),
    "sharegpt, answers as messages": (
        "ShareGPT",
        lambda n: {"conversations": [human(Q[n])], "chosen": gpt(GOOD[n]), "rejected": gpt(BAD[n])},
        TURNS,
    ),
    "sharegpt, answers as lists": (
        "ShareGPT",
        lambda n: {
            "conversations": [{"from": "system", "value": "You cook."}, human(Q[n])],
            "chosen": [gpt(GOOD[n])],
            "rejected": [gpt(BAD[n])],
        },
        UNDER_SYSTEM,
    ),
    "llama-factory, sharegpt": (
        "ShareGPT",
        lambda n: {
            "conversations": [human("Hi"), gpt("Hello."), human(Q[n])],
            "chosen": gpt(GOOD[n]),
            "rejected": gpt(BAD[n]),
            "system": "",
        },
        LATER,
    ),
    "llama-factory, alpaca": (
        "Alpaca",
        lambda n: {
            "instruction": Q[n],
            "input": "",
            "chosen": GOOD[n],
            "rejected": BAD[n],
            "system": "You cook.",
        },
        UNDER_SYSTEM,
    ),
    "alpaca with input and history": (
        "Alpaca",
        lambda n: {
            "instruction": "How do I boil",
            "input": f"{n} eggs?",
            "history": [["Hi", "Hello."]],
            "chosen": GOOD[n],
            "rejected": BAD[n],
        },
        [
            (
                [user("Hi"), assistant("Hello."), user(f"How do I boil\n{n} eggs?")],
                [assistant(GOOD[n])],
                [assistant(BAD[n])],
            )
            for n in NUMBERS
        ],
    ),
    "intel orca": (
        "Orca",
        lambda n: {"system": "You cook.", "question": Q[n], "chosen": GOOD[n], "rejected": BAD[n]},
        UNDER_SYSTEM,
    ),
    "argilla orca": (
        "Argilla Orca",
        lambda n: {"system": "", "input": Q[n], "chosen": GOOD[n], "rejected": BAD[n], "order": ["a", "b"]},
        TURNS,
    ),
    "argilla": (
        "Argilla",
        lambda n: {"instruction": Q[n], "chosen_response": GOOD[n], "rejected_response": BAD[n], "chosen_rating": 5},
        TURNS,
    ),
    "argilla, capybara": (
        "TRL conversational, implicit prompt",
        lambda n: {
            "source": "Airoboros",
            "conversation": [{"input": Q[n], "output": GOOD[n]}],
            "chosen": [user("Hi"), assistant("Hello."), user(Q[n]), assistant(GOOD[n])],
            "rejected": [user("Hi"), assistant("Hello."), user(Q[n]), assistant(BAD[n])],
        },
        LATER,
    ),
    "ms-swift": (
        "ms-swift",
        lambda n: {"messages": [system("You cook."), user(Q[n]), assistant(GOOD[n])], "rejected_response": BAD[n]},
        UNDER_SYSTEM,
    ),
    "ms-swift, messages": (
        "ms-swift",
        lambda n: {
            "messages": [user(Q[n]), assistant(GOOD[n])],
            "rejected_messages": [user(Q[n]), assistant(BAD[n])],
        },
        TURNS,
    ),
    "ms-swift, query": (
        "ms-swift",
        lambda n: {"system": "You cook.", "query": Q[n], "response": GOOD[n], "rejected_response": BAD[n]},
        UNDER_SYSTEM,
    ),
    "openai": (
        "OpenAI preference",
        lambda n: {
            "input": {"messages": [user(Q[n])], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant(GOOD[n])],
            "non_preferred_output": [assistant(BAD[n])],
        },
        TURNS,
    ),
    "messages and answers": (
        "messages",
        lambda n: {"messages": [user(Q[n])], "chosen": assistant(GOOD[n]), "rejected": assistant(BAD[n])},
        TURNS,
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_ten_rows_of_a_schema_are_read_as_a_person_reads_them(tmp_path: Path, name: str) -> None:
    """From JSONL, and from Parquet, which fills every row with every column and every key."""
    from datasets import Dataset

    schema, row, expected = SCHEMAS[name]
    rows = [row(n) for n in NUMBERS]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    for file in ("rows.jsonl", "rows.parquet"):
        notes: list[str] = []
        read = read_rows(tmp_path / file, notes=notes)
        assert [(one.prompt, one.chosen, one.rejected) for one in read] == expected, file
        assert notes == [f"{file}: {schema} rows: 10"]


def test_schemas_in_one_file_are_each_counted(tmp_path: Path) -> None:
    rows = [row(0) for _, row, _ in SCHEMAS.values()]
    notes: list[str] = []
    read = read_rows(write_jsonl(tmp_path / "mixed.jsonl", rows), notes=notes)
    assert [(one.prompt, one.chosen, one.rejected) for one in read] == [some[0] for _, _, some in SCHEMAS.values()]
    assert notes[0].startswith("mixed.jsonl: TRL conversational rows: 9, ShareGPT rows: 4, ms-swift rows: 3")


def test_tools_and_template_options_as_objects_or_as_text() -> None:
    row = SCHEMAS["conversational"][1](0)
    options = {"enable_thinking": False}
    for tools, given in (([TOOL], options), (json.dumps([TOOL]), json.dumps(options))):
        read = preference_row({**row, "tools": tools, "chat_template_kwargs": given}, "here")
        assert (read.tools, read.template_options) == ([TOOL], options)
    for empty in (None, [], "", "[]"):
        read = preference_row({**row, "tools": empty, "chat_template_kwargs": None}, "here")
        assert (read.tools, read.template_options) == (None, {})
    openai = SCHEMAS["openai"][1](0)
    openai["input"]["tools"] = [TOOL]
    assert preference_row(openai, "here").tools == [TOOL]
    text = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}
    with pytest.raises(RowError, match="tools beside a prompt that is text"):
        preference_row(text, "here")


def test_turns_of_tools() -> None:
    row = {
        "conversations": [
            human("Rain?"),
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "wet"},
        ],
        "chosen": gpt("Yes."),
        "rejected": gpt("No."),
    }
    read = preference_row(row, "here")
    assert read.prompt == [
        user("Rain?"),
        {**assistant(""), "tool_calls": [CALL]},
        {"role": "tool", "content": "wet"},
    ]


def test_several_turns_of_a_completion() -> None:
    asked, more = [user("a")], [user("why?")]
    explicit = {
        "prompt": asked,
        "chosen": [assistant("b"), *more, assistant("c")],
        "rejected": [assistant("d")],
    }
    whole = {side: asked + explicit[side] for side in ("chosen", "rejected")}
    for row in (explicit, whole, {**whole, "prompt": asked}):
        read = preference_row(row, "here")
        assert (read.prompt, read.chosen, read.rejected) == (asked, explicit["chosen"], explicit["rejected"])
    same_start = {
        side: [*asked, assistant("b"), *more, assistant(end)] for side, end in (("chosen", "c"), ("rejected", "d"))
    }
    assert preference_row(same_start, "here").prompt == [*asked, assistant("b"), *more]
    read = preference_row({**same_start, "prompt": asked}, "here")  # so the first answer belongs to the completion
    assert read.chosen == [assistant("b"), *more, assistant("c")]


def test_columns_say_what_is_meant() -> None:
    row = {"q": "a ", "good": "b", "bad": "c", "system": "s", "instruction": "i"}
    columns = parse_columns("prompt=q, chosen=good ,rejected=bad")
    read = preference_row(row, "here", columns)
    assert (read.prompt, read.chosen, read.rejected) == ("a ", "b", "c")
    with_system = preference_row(row, "here", {**(columns or {}), "system": "system"})
    assert with_system.prompt == [system("s"), user("a ")]
    with pytest.raises(RowError, match=r"here: no column 'good', which --columns names; found \['q'\]"):
        preference_row({"q": "a"}, "here", columns)
    for wrong in ("prompt", "prompt=", "answer=a", "prompt=a,prompt=b", ""):
        with pytest.raises(ValueError, match="columns must be like prompt=question,chosen=answer"):
            parse_columns(wrong)
    assert parse_columns(None) is None


TRL = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            r"no 'chosen'.*found: answer, question\. Nearest schema: Orca .*lacks chosen",
        ),
        (
            {"instruction": "a", "chosen": "b"},
            r"no 'rejected'.*Nearest schema: Alpaca \(instruction, chosen, rejected\)",
        ),
        ({"prompt": "a", "completion": "b", "label": True}, r"no 'chosen'.*Nearest schema: TRL .*--columns prompt="),
        ({"input": {"messages": []}, "preferred_output": []}, r"OpenAI preference .*which lacks non_preferred_output"),
        ({"conversations": [human("a")]}, r"Nearest schema: ShareGPT"),
        ({**TRL, "question": "what else"}, r"column 'question' is not in the prompt.*--columns prompt=question"),
        ({**TRL, "context": "a long text"}, r"column 'context' is not in the prompt"),
        ({**TRL, "history": [["a", "b"]]}, r"column 'history' is not in the prompt"),
        ({**TRL, "images": ["cat.png"]}, r"column 'images' .*only text is trained on"),
        ({**TRL, "prompt": [user("x")], "system": 3}, r"'system' must be text; got int"),
        ({"chosen": "b", "rejected": "c", "system": "s"}, r"it would be lost"),
        (
            {"prompt": [system("x"), user("a")], "chosen": "b", "rejected": "c", "system": "s"},
            r"two different system prompts",
        ),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, r"begins with what is asked"),
        (
            {"messages": [user("a")], "chosen": "b", "rejected": [assistant("c")]},
            r"both text or both messages; got .*Write the text as a message",
        ),
        (
            {"prompt": [user("z")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            r"beside whole conversations, but is not in them: 'z' \(user\)",
        ),
        (
            {"prompt": [user("a")], "chosen": [assistant("b"), user("a")], "rejected": [assistant("c")]},
            r"'chosen' must begin and end with an assistant message after the prompt; got roles",
        ),
        (
            {"conversations": [human("a"), gpt("b")], "chosen": gpt("b"), "rejected": gpt("c")},
            r"the prompt ends with an assistant message, 'b'",
        ),
        ({"prompt": [user("a"), assistant("b")], "chosen": "b", "rejected": "c"}, r"ends with an assistant message"),
        ({"prompt": [], "chosen": [assistant("b")], "rejected": [assistant("c")]}, r"the prompt holds no messages"),
        (
            {"prompt": "x" * 40, "chosen": "x" * 40 + "b", "rejected": "x" * 40 + "c"},
            r"begin with the prompt, which would be read twice",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "b", "rejected": "c"},
            r"type 'image'",
        ),
        ({"prompt": "[{'role': 'user', 'content': 'a'}]", "chosen": "b", "rejected": "c"}, r"not JSON.*json\.dumps"),
        ({**TRL, "tools": "{"}, r"'tools' must be JSON"),
        ({**TRL, "chosen": "half \ud83d of a smile"}, r"'chosen' holds half of a character, '\\ud83d' at 5 of 17"),
        ({"prompt": [user("\udc00")], "chosen": "b", "rejected": "c"}, r"'prompt' holds half of a character"),
        ({"messages": [user("a")], "rejected_response": "b"}, r"'messages' must end with the chosen answer"),
        (
            {"conversations": [{"from": "function_call", "value": "no"}], "chosen": "b", "rejected": "c"},
            r"must be JSON",
        ),
        ({"instruction": 3, "chosen": "b", "rejected": "c"}, r"the question must be text; got int"),
        ({"instruction": "a", "history": ["b"], "chosen": "b", "rejected": "c"}, r"\[question, answer\] pairs"),
        (
            {"input": "a", "preferred_output": [], "non_preferred_output": []},
            r"'input' must be an object with 'messages'",
        ),
    ],
)
def test_what_might_lose_a_prompt_is_an_error(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [TRL, row, TRL])
    with pytest.raises(RowError, match=message) as error:
        read_rows(path)
    assert str(error.value).startswith("rows.jsonl:2: ")
    assert str(error.value).endswith("--skip-malformed-rows leaves such rows out and counts them")
    malformed: list[str] = []
    assert len(read_rows(path, malformed)) == 2
    assert len(malformed) == 1


def test_prompts_that_are_said_elsewhere_are_not_lost() -> None:
    for more in ({"question": "a"}, {"input": ""}, {"history": []}, {"images": None}, {"system_prompt": None}):
        assert preference_row({**TRL, **more}, "here").prompt == "a"


def test_schemas_meet_tokens_where_a_template_is_at_hand() -> None:
    """Rows whose columns are turns need a chat template, and say so."""
    tokenizer = make_tokenizer(["user", "assistant", *WORDS])
    row = preference_row({"question": "w1", "chosen": "w2", "rejected": "w3"}, "here")
    (pair,), _ = tokenize_pairs([row], tokenizer, max_length=64)
    assert pair.chosen_ids == tokenizer.convert_tokens_to_ids(["user", "w1", "assistant", "w2", "</s>"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"here is a conversation, but the tokenizer has no chat template \(Orca rows"):
        tokenize_pairs([row], tokenizer, max_length=64)
