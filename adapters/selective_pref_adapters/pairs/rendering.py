"""Rows → text → ids, as one tokenizer does it: chat templates, and special tokens exactly once.

In: a row. Out: the text of its prompt and of prompt + completion, and the ids of texts.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, TypeAlias

from selective_pref_adapters.pairs.collate import Spans
from selective_pref_adapters.pairs.rows import Messages, PreferenceRow, Prose, RowError
from selective_pref_adapters.pairs.turns import TEMPLATE_ERRORS, other_turns

Tokenizer: TypeAlias = Any  # a transformers.PreTrainedTokenizerBase


class Rendering:
    """How one tokenizer turns rows into text, and text into ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos: str | None = tokenizer.eos_token
        self.bos: str | None = tokenizer.bos_token
        end = re.escape(self.eos or "")
        self._repeated = re.compile(rf"(?:{end}\s*)+({end}\s*)\Z") if end else None

    def texts(self, row: PreferenceRow) -> tuple[str, ...] | RowError:
        """Prompt, prompt + chosen and prompt + rejected (if there is one); or why the chat template refuses them."""
        if isinstance(row.prompt, str):
            return row.prompt, *(row.prompt + self._ended(answer) for answer in row.answers)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{row.place} is a conversation, but the tokenizer has no chat template ({row.schema or 'these'} rows "
                "are read as messages): set one, or give rows that are text, read on without a break (--columns "
                "prompt=…)"
            )
        try:
            prompt = self.render(row, row.prompt, add_generation_prompt=True)
            return prompt, *(self._whole(row, answer) for answer in row.answers)
        except TEMPLATE_ERRORS as error:
            return RowError(
                f"{row.place}: the chat template rejects this conversation: {error}", "refused by the chat template"
            )

    def render(self, row: PreferenceRow, messages: Messages, **options: Any) -> Any:
        """A conversation through the chat template, by default as text."""
        return self.tokenizer.apply_chat_template(
            messages, tools=row.tools, **{**row.template_options, "tokenize": False, **options}
        )

    def template(self, tools: Any) -> str:
        """The chat template in force for rows with or without tools."""
        return self.tokenizer.get_chat_template(None, tools)

    def ids(self, texts: list[str], chat: bool) -> dict[str, list[int]]:
        """Text → ids; a chat template has written BOS and EOS already."""
        encoded = self._batch(texts, add_special_tokens=not chat)
        bos = self.tokenizer.bos_token_id
        for number, text in enumerate(texts):
            if self.bos and text.startswith(self.bos):
                while encoded[number][:2] == [bos, bos]:
                    encoded[number] = encoded[number][1:]
        return dict(zip(texts, encoded, strict=True))

    def _batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """The ids of many texts, as `tokenizer(texts)` gives them."""
        options = {"add_special_tokens": add_special_tokens, "padding": False, "truncation": False, "verbose": False}
        if not _is_plain(self.tokenizer):
            return [list(ids) for ids in self.tokenizer(texts, **options)["input_ids"]]
        self.tokenizer(texts[:1], **options)  # sets padding and truncation of the tokenizer within
        # The same without the offsets of tokens in the text, which take half of the time and are not needed.
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def without_end(self, prompt: list[int]) -> list[int]:
        """The ids of a prompt without the EOS that the tokenizer adds to every text."""
        end = self._added_end
        return prompt[: -len(end)] if end and prompt[-len(end) :] == end else prompt

    def one_end(self, ids: list[int]) -> list[int]:
        """The ids of prompt + completion without what the tokenizer adds after their own EOS."""
        end = self._added_end
        bare = ids[: -len(end)] if end else ids
        return bare if bare[-1:] == [self.tokenizer.eos_token_id] else ids

    def without_eos(self, text: str) -> str:
        """A text without white space around it, and without an EOS that it brings along at its end."""
        bare = text.strip()
        while self.eos and bare.endswith(self.eos):
            bare = bare[: -len(self.eos)].rstrip()
        return bare

    def uncounted(self, row: PreferenceRow, side: Prose, text: str, ids: list[int], boundary: int) -> Spans | None:
        """The tokens of other speakers in a completion: see `other_turns`."""
        messages, first = [*row.prompt, *side], len(row.prompt)

        def render(some: Messages, **options: Any) -> Any:
            return self.render(row, some, **options)

        return other_turns(self.tokenizer, self.template(row.tools), render, messages, first, text, ids, boundary)

    @cached_property
    def _added_end(self) -> list[int]:
        """The ids that the tokenizer puts after every text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        ids = self.tokenizer("a")["input_ids"]
        start = next((n for n in range(len(ids)) if bare and ids[n : n + len(bare)] == bare), len(ids))
        return ids[start + len(bare) :]

    def _ended(self, completion: Prose) -> str:
        """A text completion that ends with one EOS."""
        if self.eos is None or self._repeated is None:
            raise ValueError(
                "the tokenizer has no EOS token, so completions would have no end: set tokenizer.eos_token"
            )
        if not completion.rstrip().endswith(self.eos):
            return completion + self.eos
        return self._repeated.sub(r"\1", completion).rstrip()

    def _whole(self, row: PreferenceRow, completion: Prose) -> str:
        text = self.render(row, [*row.prompt, *completion])
        return text if self._repeated is None else self._repeated.sub(r"\1", text)


def _is_plain(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer adds nothing of its own to the one of the `tokenizers` library that it wraps."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    plain = PreTrainedTokenizerFast
    return isinstance(tokenizer, plain) and all(
        getattr(kind, name) is getattr(plain, name) for name in ("__call__", "_encode_plus")
    )
