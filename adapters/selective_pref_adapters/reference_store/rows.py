"""Rows: the two sides of a pair as token ids, each with the key under which a store keeps its log-probs.

In: pairs as token ids. Out: rows, two for each pair, as in the [2B T] arrays of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from selective_pref_adapters.pairs import TokenizedPair, row_key


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
        return int(self.mask[1:].sum())


RowLogps: TypeAlias = list[tuple[Row, np.ndarray]]
"""Rows, each with the float32 log-probs of its completion tokens: what one call of a reference gives."""
LogpSource: TypeAlias = Callable[[Sequence[Row]], Iterable[RowLogps]]
"""A reference as `fill_rows` asks it. It is called once, with all rows that are wanted, the longest first, and yields
the log-probs in portions, in any order."""


def rows_of_pairs(pairs: Iterable[TokenizedPair]) -> list[Row]:
    """Both sides of every pair, chosen then rejected, pair after pair."""
    rows = []
    for pair in pairs:
        for side, ids, mask in pair.sides():
            rows.append(Row(ids=np.asarray(ids, dtype=np.int32), mask=mask, place=f"{pair.place}, {side}"))
    return rows


def different_rows(rows: Iterable[Row]) -> dict[bytes, Row]:
    """Key → row, each row once, without those that have no log-prob to store."""
    return {row.key: row for row in rows if row.values}
