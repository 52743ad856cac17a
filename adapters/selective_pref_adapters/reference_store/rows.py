"""Rows: the two sides of a pair as token ids, each with the key under which a store keeps its log-probs.

In: pairs as token ids. Out: rows, two for each pair, as in the [2B T] arrays of a batch. Those of a `PairTable` are
made when they are asked for: what is known of them beforehand stands in arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeAlias, overload

import numpy as np

from selective_pref_adapters.pairs import TokenizedPair, row_key
from selective_pref_adapters.pairs.collate import scored_tokens
from selective_pref_adapters.pairs.large import PairTable
from selective_pref_adapters.reference_store.shards import KEYS

WINDOW = 1 << 13
"""How many rows are in memory while log-probs of many are computed."""
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side of a pair: a prompt and its chosen or rejected completion, as one sequence of token ids.

    Attributes:
        ids: its attended token ids, int32 [L].
        mask: True on completion tokens, bool [L].
        place: where it came from (`file.jsonl:17, chosen`), for error messages.
    """

    ids: np.ndarray
    mask: np.ndarray
    place: str = "?"

    @cached_property
    def key(self) -> bytes:
        """The digest of ids and mask, 16 bytes."""
        return row_key(self.ids, self.mask)

    @property
    def values(self) -> int:
        """How many log-probs it has: one per completion token, but none for the row's first (nothing precedes it)."""
        return scored_tokens(self.mask)


RowLogps: TypeAlias = list[tuple[Row, np.ndarray]]
"""Rows, each with the float32 log-probs of its completion tokens: what one call of a reference gives."""
LogpSource: TypeAlias = Callable[[Sequence[Row]], Iterable[RowLogps]]
"""A reference as `fill_rows` asks it. It is called once, with all rows that are wanted, the longest first, and yields
the log-probs in portions, in any order. The rows may be `Rows`: many are then read part by part."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows(Sequence[Row]):
    """Rows that are made when they are asked for, and what is known of all of them. A slice makes a list of some.

    Attributes:
        keys: the rows' keys, `KEYS` [N].
        tokens: their lengths, int [N].
        values: how many log-probs each has, int [N].
        numbers: which rows of `make` they are, int64 [N].
        make: some rows, by their numbers.
    """

    keys: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    numbers: np.ndarray
    make: Callable[[np.ndarray], list[Row]]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """A row, or a list of some."""
        if isinstance(index, slice):
            return self.make(self.numbers[index])
        return self.make(self.numbers[[index]])[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self[start : start + _ROWS_AT_ONCE]

    def some(self, which: np.ndarray) -> Rows:
        """Those of the rows, by number or as a mask."""
        return Rows(
            keys=self.keys[which],
            tokens=self.tokens[which],
            values=self.values[which],
            numbers=self.numbers[which],
            make=self.make,
        )

    def different(self) -> Rows:
        """Each row once, in their order, without those that have no log-prob to store."""
        scored = self.some(self.values > 0)
        _, first = np.unique(scored.keys, return_index=True)
        return scored.some(np.sort(first))


def as_rows(rows: Iterable[Row]) -> Rows:
    """Rows with what is known of them."""
    if isinstance(rows, Rows):
        return rows
    held = list(rows)
    return Rows(
        keys=np.array([row.key for row in held], dtype=KEYS),
        tokens=np.array([len(row.ids) for row in held], dtype=np.int64),
        values=np.array([row.values for row in held], dtype=np.int64),
        numbers=np.arange(len(held)),
        make=lambda numbers: [held[number] for number in numbers.tolist()],
    )


def rows_of_pairs(pairs: Iterable[TokenizedPair]) -> Rows:
    """Both sides of every pair, chosen then rejected, pair after pair; those of pair n have the numbers 2n and 2n + 1.

    Those of a `PairTable` are not held in memory.
    """
    if isinstance(pairs, PairTable):
        keys, tokens, values = (known.reshape(-1) for known in pairs.sides())
        make = partial(_read, pairs)
        rows = Rows(keys=keys, tokens=tokens, values=values, numbers=np.arange(len(keys)), make=make)
        return rows.some(tokens > 0)
    held = {2 * n + side: row for n, pair in enumerate(pairs) for side, row in enumerate(_sides(pair))}
    return replace(
        as_rows(held.values()),
        numbers=np.fromiter(held, dtype=np.int64, count=len(held)),
        make=lambda numbers: [held[number] for number in numbers.tolist()],
    )


def _read(pairs: PairTable, numbers: np.ndarray) -> list[Row]:
    """Some sides of pairs."""
    which, at = np.unique(numbers // 2, return_inverse=True)
    parts = (which[start : start + _ROWS_AT_ONCE].tolist() for start in range(0, len(which), _ROWS_AT_ONCE))
    sides = [_sides(pair) for part in parts for pair in pairs.__getitems__(part)]
    return [sides[pair][side] for pair, side in zip(at.tolist(), (numbers % 2).tolist(), strict=True)]


def _sides(pair: TokenizedPair) -> list[Row]:
    return [
        Row(ids=np.asarray(ids, dtype=np.int32), mask=mask, place=f"{pair.place}, {side}")
        for side, ids, mask in pair.sides()
    ]
