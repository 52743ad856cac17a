"""Preference rows → token ids: the one tokenisation that every trainer, the store and the commands share.

In: `PreferenceRow`s and a tokenizer. Out: `TokenizedPair`s, cut to a length, and a report of what was left out and why.

Prompt and completion are tokenised together, as the model sees them, in batches. The completion starts where the ids of
prompt + completion leave those of the prompt alone (for either side, so that both share one prompt). BOS and EOS stand
once: an EOS is added to text that has none, and one that a text, a template or the tokenizer repeats is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from tqdm.auto import tqdm

from selective_pref_adapters.options import Truncation
from selective_pref_adapters.pairs.collate import Spans, TokenizedPair
from selective_pref_adapters.pairs.messages import has_more_than_text
from selective_pref_adapters.pairs.rendering import Rendering, Tokenizer
from selective_pref_adapters.pairs.report import (
    EMPTY,
    EQUAL,
    EQUAL_AFTER,
    NO_COMPLETION,
    SAME_TOKENS,
    UNSEEN,
    UNWRITTEN,
    WHITE_SPACE,
    TokenizationReport,
)
from selective_pref_adapters.pairs.rows import SKIP, PreferenceRow, Prose, RowError
from selective_pref_adapters.pairs.split import common_prefix
from selective_pref_adapters.pairs.turns import has_other_turns

_ROWS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row with its ids, nothing cut off.

    Attributes:
        row: the row.
        pair: its ids; both sides have the same prompt length. None where the chat template refuses the row.
        error: why it refuses.
        reason: why nothing can be learnt from it, however long it may be; None where something can.
        merged: whether the prompt ends in other tokens once a completion follows.
        tools_unread: whether it has tools that the chat template does not write.
    """

    row: PreferenceRow
    pair: TokenizedPair | None
    error: RowError | None = None
    reason: str | None = None
    merged: bool = False
    tools_unread: bool = False

    def fit(self, max_length: int, mode: Truncation) -> tuple[TokenizedPair | None, str | None]:
        """(the pair cut to a length, None) or, where nothing can be learnt from what is left, with the reason.

        The pair is None where no token of a completion is left.
        """
        if self.pair is None:
            return None, None
        cut = truncate(self.pair, max_length, mode)
        for _, ids, mask in cut.sides():
            if not mask.any() or len(ids) < 2:
                return None, self.reason or NO_COMPLETION
        if self.reason is None and _same(cut):
            return cut, EQUAL_AFTER
        return cut, self.reason


def tokenize_pairs(
    rows: Sequence[PreferenceRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    keep_unteachable: bool = False,
    malformed: list[str] | None = None,
    progress: bool = False,
) -> tuple[list[TokenizedPair], TokenizationReport]:
    """Token ids of every row that has something to teach, and a report of the others.

    Text completions end with the EOS token; message lists end as the chat template has it.

    Args:
        rows: as `read_rows` gives them.
        tokenizer: a Hugging Face tokenizer; with a chat template where rows are message lists.
        max_length: tokens of prompt + completion to keep, at least 2.
        truncation_mode: "keep_start" cuts the end of what is too long (and leaves out rows whose prompt alone fills
            `max_length`); "keep_end" cuts the start.
        keep_unteachable: keep pairs with two equal sides, or with an empty one that is its EOS alone, as long as
            completion tokens are left. TRL's own tokenisation keeps them, so a store for it must hold them.
        malformed: None to raise where the chat template refuses a row; or a list that collects the messages of such
            rows, which are then left out.
        progress: show a bar.

    Raises:
        RowError: the chat template rejects a row.
        ValueError: no row is left, `max_length` or `truncation_mode` is invalid, the tokenizer has no EOS token, or no
            chat template although the rows are message lists.
    """
    check_truncation(max_length, truncation_mode)
    unit = "rows" if rows and rows[0].rejected is None else "pairs"
    report = TokenizationReport(rows=len(rows), max_length=max_length, truncation_mode=truncation_mode, unit=unit)
    pairs: list[TokenizedPair] = []
    for encoded in encode_rows(rows, tokenizer, progress=progress):
        if encoded.error is not None:
            if malformed is None:
                raise RowError(f"{encoded.error}. {SKIP}", encoded.error.kind) from encoded.error
            malformed.append(str(encoded.error))
            report.malformed += 1
            continue
        pair, reason = encoded.fit(max_length, truncation_mode)
        if pair is None or (reason is not None and not keep_unteachable):
            report.left_out[NO_COMPLETION if keep_unteachable and reason != UNSEEN else str(reason)] += 1
            continue
        pairs.append(pair)
        report.unteachable.update([] if reason is None else [reason])
        report.truncated += pair is not encoded.pair
        report.boundary_merged += encoded.merged
        report.tools_unread += encoded.tools_unread
    report.kept = len(pairs)
    if not pairs:
        raise ValueError(
            f"none of {len(rows)} {unit} can be trained on with max_length {max_length}, {truncation_mode}: "
            + "; ".join(report.lines())
        )
    return pairs, report


def check_truncation(max_length: int, mode: str) -> None:
    """Raises ValueError where a length or a mode makes no sense."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens; got {max_length}")
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end'; got {mode!r}")


def encode_rows(
    rows: Iterable[PreferenceRow], tokenizer: Tokenizer, *, progress: bool = False, total: int | None = None
) -> Iterator[EncodedRow]:
    """Each row with its ids, in order; a chat template's refusal is in `EncodedRow.error`.

    Raises:
        ValueError: the tokenizer has no EOS token although rows are text, or no chat template although rows are
            message lists.
    """
    how = Rendering(tokenizer)
    total = len(rows) if total is None and isinstance(rows, Sequence) else total
    todo = iter(rows)
    with tqdm(total=total, desc="tokenizing", unit="pair", disable=not progress, leave=False) as bar:
        while some := list(islice(todo, _ROWS_AT_ONCE)):
            yield from _encode(some, how)
            bar.update(len(some))


def truncate(pair: TokenizedPair, max_length: int, mode: Truncation) -> TokenizedPair:
    """The pair with each side cut to a length; the pair itself where both are short enough."""
    if max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length:
        return pair
    chosen_ids, chosen_prompt, chosen_uncounted = _cut(
        pair.chosen_ids, pair.chosen_prompt_length, pair.chosen_uncounted, max_length, mode
    )
    rejected_ids, rejected_prompt, rejected_uncounted = _cut(
        pair.rejected_ids, pair.rejected_prompt_length, pair.rejected_uncounted, max_length, mode
    )
    return replace(
        pair,
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        chosen_prompt_length=chosen_prompt,
        rejected_prompt_length=rejected_prompt,
        chosen_uncounted=chosen_uncounted,
        rejected_uncounted=rejected_uncounted,
    )


def _cut(
    ids: list[int], prompt_length: int, uncounted: Spans, max_length: int, mode: Truncation
) -> tuple[list[int], int, Spans]:
    if len(ids) <= max_length:
        return ids, prompt_length, uncounted
    first = 0 if mode == "keep_start" else len(ids) - max_length
    last = first + max_length
    spans = tuple((max(s, first) - first, min(e, last) - first) for s, e in uncounted if s < last and e > first)
    return ids[first:last], min(max(prompt_length - first, 0), max_length), spans


def _same(pair: TokenizedPair) -> bool:
    return pair.chosen_ids == pair.rejected_ids and pair.chosen_prompt_length == pair.rejected_prompt_length


# --- a few hundred rows at once --------------------------------------------------------------------------------------


def _encode(rows: Sequence[PreferenceRow], how: Rendering) -> Iterator[EncodedRow]:
    texts: list[tuple[str, ...] | RowError] = [how.texts(row) for row in rows]
    ids: dict[bool, dict[str, list[int]]] = {}
    for chat in (False, True):
        some = dict.fromkeys(
            text
            for row, parts in zip(rows, texts, strict=True)
            if not isinstance(parts, RowError) and chat != isinstance(row.prompt, str)
            for text in parts
        )
        ids[chat] = how.ids(list(some), chat) if some else {}
    for row, parts in zip(rows, texts, strict=True):
        if isinstance(parts, RowError):
            yield EncodedRow(row=row, pair=None, error=parts)
        else:
            of = ids[not isinstance(row.prompt, str)]
            yield _encoded(row, parts, of, how)


def _encoded(row: PreferenceRow, texts: tuple[str, ...], ids: dict[str, list[int]], how: Rendering) -> EncodedRow:
    prompt, *sides = (ids[text] for text in texts)
    if isinstance(row.prompt, str):
        sides = [how.one_end(side) for side in sides]
        prompt = how.without_end(prompt)
    boundary = min(_shared(prompt, side) for side in sides)
    uncounted: list[Spans] = []
    seen = True
    for answer, text, side in zip(row.answers, texts[1:], sides, strict=True):
        spans = how.uncounted(row, answer, text, side, boundary) if has_other_turns(answer) else ()
        seen = seen and spans is not None
        uncounted.append(((boundary, len(side)),) if spans is None else spans)
    pair = TokenizedPair(
        chosen_ids=sides[0],
        rejected_ids=sides[-1],
        chosen_prompt_length=boundary,
        rejected_prompt_length=boundary,
        chosen_uncounted=uncounted[0],
        rejected_uncounted=uncounted[-1],
        place=row.place,
        weight=row.weight,
    )
    pair = pair.chosen_only() if row.rejected is None else pair
    template = "" if isinstance(row.prompt, str) else how.template(row.tools)
    reason = _nothing_in(row, how) or (None if seen else UNSEEN)
    if reason is None and "tool_calls" not in template and _calls(*row.answers):
        reason = UNWRITTEN
    if reason is None and _same(pair):
        reason = SAME_TOKENS
    return EncodedRow(
        row=row,
        pair=pair,
        reason=reason,
        merged=boundary < len(prompt),
        tools_unread=bool(row.tools) and "tools" not in template,
    )


def _calls(*sides: Prose) -> bool:
    """Whether the assistant calls a tool in an answer."""
    return any(not isinstance(side, str) and any(message.get("tool_calls") for message in side) for side in sides)


def _shared(prompt: list[int], ids: list[int]) -> int:
    return len(prompt) if ids[: len(prompt)] == prompt else common_prefix(prompt, ids)


def _nothing_in(row: PreferenceRow, how: Rendering) -> str | None:
    """Why the sides as they stand teach nothing."""
    for side in row.answers:
        if isinstance(side, str):
            texts = [side]
        else:
            answers = [message for message in side if message["role"] == "assistant"]
            if any(has_more_than_text(message) for message in answers):
                continue
            texts = [message["content"] for message in answers]
        if not any(how.without_eos(text) for text in texts):
            return WHITE_SPACE if any(text.isspace() for text in texts) else EMPTY
    return EQUAL if row.chosen == row.rejected else None
