"""Rows of token ids that lie in a file: what is known of them, and pairs that are read when they are asked for.

In: the Arrow tables of a source. Out: `TokenizedRows`, all of them; `PairTable`, a sequence of `TokenizedPair`s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selective_pref_adapters.pairs.collate import KEY_BYTES, TokenizedPair
from selective_pref_adapters.pairs.large.making import ABOUT
from selective_pref_adapters.pairs.large.naming import Making
from selective_pref_adapters.pairs.report import NO_COMPLETION, UNSEEN, TokenizationReport
from selective_pref_adapters.pairs.rows import SKIP, RowError, held_out_prompts

_ROWS_AT_ONCE = 1000
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True, eq=False)
class PairTable(Sequence[TokenizedPair]):
    """Pairs that lie in Arrow: each is made when it is asked for. A slice is a table, too.

    Processes that read the same file share its pages, which the system lets go of where memory is short. It may be
    handed to data-loader workers.

    Attributes:
        data: a `datasets.Dataset` with the fields of `TokenizedPair`.
        about: what is known of every row of `data`: see `making.OF_IDS`.
        rows: which rows of them, in which order: int64 [N].
    """

    data: Any
    about: pa.Table
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairTable: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | PairTable:
        """A pair, or a table of some."""
        if isinstance(index, slice):
            return PairTable(self.data, self.about, self.rows[index])
        return as_pair(self.data[int(self.rows[index])])

    def __getitems__(self, indices: Sequence[int]) -> list[TokenizedPair]:
        """Several pairs at once, as torch's data loader asks for a batch."""
        some = self.data[self.rows[list(indices)].tolist()]
        return [as_pair(dict(zip(some, values, strict=True))) for values in zip(*some.values(), strict=True)]

    def __iter__(self) -> Iterator[TokenizedPair]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.__getitems__(range(start, min(start + _ROWS_AT_ONCE, len(self))))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer side of each pair: int32 [N]."""
        return np.maximum(self._column("chosen_tokens"), self._column("rejected_tokens"))

    @property
    def highest_id(self) -> int:
        """The highest token id; 0 where there is no pair."""
        return int(self._column("highest").max(initial=0))

    @property
    def weights(self) -> list[float | None]:
        """The pairs' weights, None for those without."""
        if self.about["weight"].null_count == len(self.about):
            return [None] * len(self)
        return self.about["weight"].take(pa.array(self.rows)).to_pylist()

    def sides(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the `row_key` of each side, its tokens, those that have log-probs), chosen and rejected of each pair.

        Returns:
            bytes of `KEY_BYTES` [N 2], int32 [N 2], int32 [N 2]; zeros where a pair has no rejected side.
        """
        keys = [self._keys(f"{side}_key") for side in _SIDES]
        tokens, scored = ([self._column(f"{side}_{what}") for side in _SIDES] for what in ("tokens", "scored"))
        return np.stack(keys, axis=1), np.stack(tokens, axis=1), np.stack(scored, axis=1)

    def _keys(self, name: str) -> np.ndarray:
        keys = self.about[name].take(pa.array(self.rows))
        absent = pc.equal(pc.binary_length(keys), 0)
        whole = pc.if_else(absent, pa.scalar(bytes(KEY_BYTES), keys.type), keys).cast(pa.binary(KEY_BYTES))
        raw = b"".join(part.buffers()[1].slice(KEY_BYTES * part.offset, KEY_BYTES * len(part)) for part in whole.chunks)
        return np.frombuffer(raw, dtype=(np.bytes_, KEY_BYTES))

    def keys(self) -> Iterator[tuple[bytes, ...]]:
        """The `row_key` of each side of each pair."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            some = pa.array(self.rows[start : start + _ROWS_AT_ONCE])
            sides = (self.about[name].take(some).to_pylist() for name in ("chosen_key", "rejected_key"))
            yield from (tuple(filter(None, both)) for both in zip(*sides, strict=True))

    def digest(self) -> str:
        """Of ids, masks, weights and order of the pairs: 16 hexadecimal digits."""
        text = hashlib.sha256()
        for keys in self.keys():
            text.update(b"%d" % len(keys) + b"".join(keys))
        weights = self.weights
        if any(weight is not None for weight in weights):
            text.update(repr(weights).encode())
        return text.hexdigest()[:16]

    def _column(self, name: str) -> np.ndarray:
        return self.about[name].to_numpy()[self.rows]


def no_pairs() -> PairTable:
    """A table without pairs."""
    return PairTable([], ABOUT.empty_table(), np.arange(0))


def joined(tables: Sequence[PairTable]) -> PairTable:
    """The pairs of several tables as one, in their order."""
    from datasets import concatenate_datasets

    some = [table for table in tables if len(table)]
    if len(some) < 2:
        return some[0] if some else no_pairs()
    starts = np.cumsum([0, *(len(table.about) for table in some[:-1])])
    return PairTable(
        concatenate_datasets([table.data for table in some]),
        pa.concat_tables([table.about for table in some]),
        np.concatenate([table.rows + start for table, start in zip(some, starts, strict=True)]),
    )


def as_pair(row: Mapping[str, Any]) -> TokenizedPair:
    """A dict with the fields of `TokenizedPair` as one."""
    spans = {
        name: tuple((start, end) for start, end in row[name]) for name in ("chosen_uncounted", "rejected_uncounted")
    }
    return TokenizedPair(**{**row, **spans})


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedRows:
    """All rows of a source, with their ids.

    Attributes:
        data, about: see `PairTable`.
        prompt: which prompt each row has, numbered by the order of their texts: int64 [rows].
        prompt_hashes: of each row's prompt, to compare it with those of other sources: uint64 [rows].
        notes: how the rows were read.
        unread, first_unread: how many rows were no preference pairs, and what is said of the first of them.
        making: how they were cut.
    """

    data: Any
    about: pa.Table
    prompt: np.ndarray
    prompt_hashes: np.ndarray
    making: Making
    notes: list[str] = field(default_factory=list[str])
    unread: int = 0
    first_unread: str = ""

    def __len__(self) -> int:
        return len(self.about)

    def split(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of training rows, of evaluation rows), as `split_by_prompt` splits them: int64 [n] each."""
        counts = np.bincount(self.prompt).tolist()
        held_out = np.zeros(len(counts), dtype=bool)
        held_out[held_out_prompts(counts, fraction, seed)] = True
        evaluated = held_out[self.prompt]
        return np.flatnonzero(~evaluated), np.flatnonzero(evaluated)

    def pairs(
        self, rows: np.ndarray | None = None, *, keep_unteachable: bool = False, skip_malformed: bool = False
    ) -> tuple[PairTable, TokenizationReport]:
        """The pairs of some rows, by default of all, and what became of the others: as `tokenize_pairs` says it.

        Args:
            rows: their numbers, int64.
            keep_unteachable: see `tokenize_pairs`.
            skip_malformed: leave out, and count, rows that the chat template refuses.

        Raises:
            RowError: it refuses one.
            ValueError: no row is left.
        """
        rows = np.arange(len(self), dtype=np.int64) if rows is None else rows
        about = self.about.take(pa.array(rows))
        left = about["left"].to_numpy()
        refused = pc.not_equal(about["refused"], "").to_numpy()
        taught = pc.equal(about["reason"], "").to_numpy()
        if refused.any() and not skip_malformed:
            raise RowError(f"{about['refused'][int(refused.argmax())].as_py()}. {SKIP}", "refused by the chat template")
        kept = left if keep_unteachable else left & taught
        out = about.filter(pa.array(~kept & ~refused))["reason"].to_pylist()
        if keep_unteachable:
            out = [reason if reason == UNSEEN else NO_COMPLETION for reason in out]
        seen = about.filter(pa.array(kept))
        report = TokenizationReport(
            rows=len(rows),
            kept=int(kept.sum()),
            left_out=Counter(out),
            truncated=pc.sum(seen["cut"]).as_py() or 0,
            boundary_merged=pc.sum(seen["merged"]).as_py() or 0,
            tools_unread=pc.sum(seen["tools_unread"]).as_py() or 0,
            unteachable=Counter(reason for reason in seen["reason"].to_pylist() if reason),
            malformed=int(refused.sum()),
            max_length=self.making.max_length,
            truncation_mode=self.making.truncation_mode,
            unit="rows" if self.making.chosen_only else "pairs",
        )
        if not report.kept:
            raise ValueError(
                f"none of {report.rows} {report.unit} can be trained on with max_length {self.making.max_length}, "
                f"{self.making.truncation_mode}: " + "; ".join(report.lines())
            )
        return PairTable(self.data, self.about, rows[kept]), report

    def refused(self, rows: np.ndarray | None = None) -> list[str]:
        """What the chat template says against some of the rows, or any of them, in their order."""
        said = self.about["refused"] if rows is None else self.about["refused"].take(pa.array(rows))
        return said.filter(pc.not_equal(said, "")).to_pylist()


def malformed_note(parts: Sequence[tuple[TokenizedRows, np.ndarray | None]]) -> list[str]:
    """A sentence about rows that are no pairs, or that the chat template refuses, with the first of them; or none.

    Args:
        parts: sources, each with the numbers of the rows that are meant; None for all.
    """
    sources = {id(rows): rows for rows, _ in parts}.values()
    refused = [text for rows, some in parts for text in rows.refused(some)]
    count = sum(rows.unread for rows in sources) + len(refused)
    said = [rows.first_unread for rows in sources if rows.unread] + refused
    return [f"{count} malformed rows left out, the first: {said[0]}"] if said else []
