"""Raw rows → blocks of Arrow: the ids of each row, and beside them what is known of it. On one process or several.

In: raw rows, a tokenizer. Out: blocks in the order of the rows, whatever the number of processes.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from selective_pref_adapters.pairs.collate import TokenizedPair, row_key, scored_tokens
from selective_pref_adapters.pairs.files import RawRow
from selective_pref_adapters.pairs.large.naming import Making
from selective_pref_adapters.pairs.rendering import Tokenizer
from selective_pref_adapters.pairs.rows import PreferenceRow, RowError
from selective_pref_adapters.pairs.schemas import preference_row
from selective_pref_adapters.pairs.tokenize import EncodedRow, encode_rows

ROWS_AT_ONCE = 4096
"""Of one block: what a process is given at once, and a record batch of the files."""

_IDS, _SPANS = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))
PAIRS = pa.schema(
    {
        "chosen_ids": _IDS,
        "rejected_ids": _IDS,
        "chosen_prompt_length": pa.int32(),
        "rejected_prompt_length": pa.int32(),
        "chosen_uncounted": _SPANS,
        "rejected_uncounted": _SPANS,
        "place": pa.string(),
        "weight": pa.float64(),
    }
)
"""The fields of `TokenizedPair`; all ids are empty in a row of which nothing is left."""
OF_IDS = pa.schema(
    {
        "highest": pa.int32(),  # token id
        "chosen_key": pa.binary(),  # of `row_key`; empty where there is no such side
        "rejected_key": pa.binary(),
        "chosen_tokens": pa.int32(),
        "rejected_tokens": pa.int32(),
        "chosen_scored": pa.int32(),  # tokens to which a reference gives log-probs
        "rejected_scored": pa.int32(),
    }
)
"""What is known of a row by its ids alone."""
ABOUT = pa.schema(
    [
        pa.field("left", pa.bool_()),  # whether a token of a completion is left
        pa.field("reason", pa.string()),  # why nothing can be learnt from it; "" where something can
        pa.field("refused", pa.string()),  # what the chat template says against it; "" where nothing
        pa.field("cut", pa.bool_()),
        pa.field("merged", pa.bool_()),
        pa.field("tools_unread", pa.bool_()),
        pa.field("weight", pa.float64()),
        *OF_IDS,
    ]
)
"""What is known of a row, without its ids."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some rows, one after the other.

    Attributes:
        pairs, about: a line for each row, of `PAIRS` and `ABOUT`.
        prompts: the rows' prompts as UTF-8, by which they are split.
        schemas: name → how many rows were read by it.
        unread: the rows that are no preference pairs; they are not among the others.
    """

    pairs: pa.Table
    about: pa.Table
    prompts: pa.Array
    schemas: Counter[str]
    unread: list[RowError]

    def refused(self) -> RowError | None:
        """The first row that the chat template refuses."""
        text = next((text for text in self.about["refused"].to_pylist() if text), None)
        return None if text is None else RowError(text, "refused by the chat template")


def blocks(rows: Iterable[RawRow], tokenizer: Tokenizer, making: Making, workers: int) -> Iterator[Block]:
    """The rows' blocks, in order. Raises as `encode_rows` does."""
    todo = iter(rows)
    parts = iter(lambda: list(islice(todo, ROWS_AT_ONCE)), [])
    if workers == 1:
        for part in parts:
            yield made(part, tokenizer, making)
        return
    start = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and what a GPU holds
    with ProcessPoolExecutor(workers, mp_context=start, initializer=_begin, initargs=(tokenizer, making)) as pool:
        waiting: deque[Future[Block]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(_made, part))
                if len(waiting) > 2 * workers:  # no more than this is in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                f"one of {workers} data workers has ended before its rows were tokenised, as it does where memory is "
                "short, or where a program that starts workers lacks `if __name__ == '__main__':`"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _begin(tokenizer: Tokenizer, making: Making) -> None:
    _worker.update(tokenizer=tokenizer, making=making)


def _made(rows: Sequence[RawRow]) -> Block:
    return made(rows, **_worker)


def made(rows: Sequence[RawRow], tokenizer: Tokenizer, making: Making) -> Block:
    """One block."""
    read: list[PreferenceRow] = []
    unread: list[RowError] = []
    for place, value in rows:
        try:
            if isinstance(value, RowError):
                raise value
            read.append(preference_row(value, place, making.columns, chosen_only=making.chosen_only))
        except RowError as error:
            unread.append(RowError(str(error), error.kind))
    pairs: dict[str, list[Any]] = {name: [] for name in PAIRS.names}
    about: dict[str, list[Any]] = {name: [] for name in ABOUT.names}
    for encoded in encode_rows(read, tokenizer):
        pair, known = _known(encoded, making)
        for name, values in pairs.items():
            values.append(getattr(pair, name))
        for name, values in about.items():
            values.append(known[name])
    prompts = [row.prompt_key.encode("utf-8", "surrogatepass") for row in read]
    return Block(
        pairs=pa.table(pairs, schema=PAIRS),
        about=pa.table(about, schema=ABOUT),
        prompts=pa.array(prompts, pa.large_binary()),
        schemas=Counter(row.schema for row in read),
        unread=unread,
    )


def _known(encoded: EncodedRow, making: Making) -> tuple[TokenizedPair, dict[str, Any]]:
    """A row's pair, without ids where nothing of it is left, and what is known of it."""
    cut, reason = encoded.fit(making.max_length, making.truncation_mode)
    row = encoded.row
    nothing = TokenizedPair(
        chosen_ids=[],
        rejected_ids=[],
        chosen_prompt_length=0,
        rejected_prompt_length=0,
        place=row.place,
        weight=row.weight,
    )
    pair = cut or nothing
    return pair, {
        "left": cut is not None,
        "reason": reason or "",
        "refused": "" if encoded.error is None else str(encoded.error),
        "cut": cut is not None and cut is not encoded.pair,
        "merged": encoded.merged,
        "tools_unread": encoded.tools_unread,
        "weight": row.weight,
        **known_of_ids(pair),
    }


def known_of_ids(pair: TokenizedPair) -> dict[str, Any]:
    """The columns of `OF_IDS`."""
    known: dict[str, Any] = {"highest": max(pair.chosen_ids + pair.rejected_ids, default=0)}
    for side in ("chosen", "rejected"):
        known |= {f"{side}_key": b"", f"{side}_tokens": 0, f"{side}_scored": 0}
    for side, ids, mask in pair.sides():
        if ids:
            key = row_key(np.asarray(ids, dtype=np.int32), mask)
            known |= {f"{side}_key": key, f"{side}_tokens": len(ids), f"{side}_scored": scored_tokens(mask)}
    return known
