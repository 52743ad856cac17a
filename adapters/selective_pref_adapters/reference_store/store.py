"""Reference log-probs that are computed once: a store on disk that finds them by the content of a row.

In: rows (token ids, completion mask) with the float32 log-probs that a reference gave to their completion tokens. Out:
the same numbers for any batch that holds those rows, however it is ordered, padded or split.

    STORE/                      a folder; one sub-folder, a *space*, for each reference
      3f0c…/                    named by the digest of the reference's identity (`Space`); made with its first row
        manifest.json           that identity, for people
        vocabulary.json.gz      its tokenizer's tokens
        fillings.json           how long the rows might be when the space was filled, for error messages
        9a41….safetensors       shards: keys, offsets, checksums and values of rows

A row's key is the digest of its attended token ids and its completion mask. β, ratio, seed, batch size, order, output
folder and learning rate are in no name, so changing them finds every row; other ids, masks, weights, adapters, dtypes
or versions of the code that computes log-probs find none.

Everything that is read is checked. A shard is named by the digest of its header and index, and every row carries a
checksum of its values that is compared each time they are read. Damage loses exactly the rows it touches: they count as
missing, and filling the store again computes and writes them anew.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike

from selective_pref_adapters.batch import Batch
from selective_pref_adapters.models import differing_token, own_vocabulary
from selective_pref_adapters.pairs import TokenizedPair, Tokenizer
from selective_pref_adapters.reference_store.index import ShardIndex
from selective_pref_adapters.reference_store.rows import Row, Rows, as_rows, rows_of_pairs
from selective_pref_adapters.reference_store.shards import StoreError, check_writable
from selective_pref_adapters.reference_store.spaces import (
    FILL,
    MANIFEST,
    Space,
    holds_rows,
    read_fillings,
    read_spaces,
    read_vocabulary,
    write_identity,
)
from selective_pref_adapters.reference_store.writer import StoreWriter


class MissingRowsError(StoreError):
    """Rows that were asked for and are not stored. The message counts and names them."""


@dataclass
class StoreStat:
    """What a space holds and how it was used.

    Attributes:
        rows: rows that can be looked up.
        values: log-probs in them.
        shards: files whose index could be read.
        bytes: their size.
        damaged: name → reason of shards that are, or hold rows that are, damaged or of another format.
        hits, misses: rows that `lookup` of this process found and did not find.
    """

    rows: int
    values: int
    bytes: int
    shards: int
    damaged: dict[str, str]
    hits: int
    misses: int


class ReferenceStore:
    """The rows of one reference, one space of a store. `open` reads it; `create` also makes it, with its first row.

    Reading needs no right to write, and works in forked and spawned data-loader workers. A row that another process
    writes later is found: the folder is read again before a row counts as missing.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        self.folder = folder
        self.space = space
        self.hits = 0
        self.misses = 0
        self.index = ShardIndex(folder, space.name)
        self.index.refresh()

    @classmethod
    def open(cls, path: str | Path, space: str | None = None) -> ReferenceStore:
        """The space of that name (a unique beginning of it, or a unique label) in the store at `path`.

        A space without rows, as a run leaves it that was interrupted before its first, counts as none.

        Args:
            path: the store's folder.
            space: None where the store holds exactly one.

        Raises:
            StoreError: there is no such store or space, more than one fits, its manifest is gone, damaged or of
                another version.
        """
        path = Path(path)
        if space is None and (path / MANIFEST).is_file():  # the folder of a space itself
            path, space = path.parent, path.resolve().name
        found, unusable = read_spaces(path)
        fits = [s for s in found if space is None or s.name.startswith(space) or s.label == space]
        if len(fits) == 1 and not (space is None and unusable):
            return cls(path / fits[0].name, fits[0])
        listed = "".join(f"\n  {s.name} ({s.label})" for s in found)
        listed += "".join(f"\n  {name}: {reason}" for name, reason in unusable.items())
        if not listed:
            raise StoreError(f"the reference store {path} is empty.{FILL}")
        wanted = "Name one of them (" if space is None else f"None of them alone fits {space!r} ("
        wanted += "space=, --reference-space; of `selective-pref score` --space)"
        if differ := _differences(fits):
            wanted += f" (they differ in {differ})"
        raise StoreError(f"the reference store {path} holds{listed}\n{wanted}")

    @classmethod
    def create(cls, path: str | Path, space: Space) -> ReferenceStore:
        """The space in the store at `path`. If it is absent it is made with its first row, and until then there is
        nothing of it on the disk; a manifest that is damaged is written again.

        Raises:
            StoreWriteError: the folder cannot be written to.
        """
        folder = Path(path) / space.name
        if holds_rows(folder):
            write_identity(folder, space)
        else:
            check_writable(folder)
        return cls(folder, space)

    def lookup(self, batch: Batch) -> torch.Tensor:
        """The stored log-probs of a batch, [2B T] float32 on its device, 0 where no completion token stands.

        Entry t belongs to the token at t + 1, as in `model_per_token_logps`.

        Args:
            batch: `input_ids`, `attention_mask`, `completion_mask`, each [2B T+1]; padding may stand on either side.

        Raises:
            MissingRowsError: rows are not stored; the message counts and names them.
        """
        ids, attended, completion = (
            batch[name].detach().to("cpu").numpy() for name in ("input_ids", "attention_mask", "completion_mask")
        )
        positions = [np.flatnonzero(row) for row in attended]
        rows = [Row(ids=i[at], mask=c[at] != 0) for i, c, at in zip(ids, completion, positions, strict=True)]
        found = self.values_of(rows)
        lacking = [number for number, values in enumerate(found) if values is None]
        if lacking:
            names = [f"row {n} ({_shown(rows[n])})" for n in lacking]
            raise MissingRowsError(self._lacking(len(lacking), len(rows), [len(row.ids) for row in rows], names))
        out = np.zeros((ids.shape[0], max(ids.shape[1] - 1, 0)), dtype=np.float32)
        for number, (row, values) in enumerate(zip(rows, found, strict=True)):
            out[number, positions[number][1:][row.mask[1:]] - 1] = values
        return torch.from_numpy(out).to(batch["input_ids"].device)

    def values_of(self, rows: Sequence[Row]) -> list[np.ndarray | None]:
        """The float32 log-probs of each row's completion tokens, in order; None for a row that is not stored."""
        found = self.index.find([(row.key, row.values) for row in rows])
        missed = sum(values is None for values in found)
        self.misses += missed
        self.hits += len(found) - missed
        return found

    def missing_rows(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that are not stored, or not intact, each once."""
        different = as_rows(rows).different()
        return list(different.some(~self.held(different)))

    def missing(self, pairs: Iterable[TokenizedPair]) -> list[TokenizedPair]:
        """The pairs of which a side is not stored, or not intact."""
        pairs = pairs if isinstance(pairs, Sequence) else list(pairs)
        return [pairs[number] for number in self._missing(pairs)[0].tolist()]

    def held(self, rows: Rows) -> np.ndarray:
        """Which of the rows are stored and intact: bool [N]. Reads the values of all of them, file after file."""
        self.index.refresh()
        return self.index.holds(rows.keys, rows.values)

    def known(self, rows: Rows) -> np.ndarray:
        """Which of the rows are stored, as far as can be known without reading their values: bool [N]."""
        self.index.refresh()
        return self.index.knows(rows.keys) | (rows.values == 0)

    def check(self, pairs: Iterable[TokenizedPair], *, together: bool = False) -> None:
        """Raises unless both sides of every pair are stored and intact: ask before the first step.

        Args:
            pairs: token ids; of a `PairTable` no pair is made unless it is lacking.
            together: every process of the group calls this with the same pairs. The first one of each machine looks,
                and all of them raise the same error.

        Raises:
            MissingRowsError: rows are lacking; the message counts and names the pairs.
            StoreError: the folder cannot be read.
        """
        if not (together and dist.is_available() and dist.is_initialized()):
            self._check(pairs)
            return
        machines: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(machines, socket.gethostname())
        found: StoreError | None = None
        if machines.index(machines[dist.get_rank()]) == dist.get_rank():
            try:
                self._check(pairs)
            except StoreError as error:
                found = error
        errors: list[StoreError | None] = [None] * len(machines)
        dist.all_gather_object(errors, found)
        for error in filter(None, errors):
            raise error

    def _check(self, pairs: Iterable[TokenizedPair]) -> None:
        pairs = pairs if isinstance(pairs, Sequence) else list(pairs)
        lacking, rows = self._missing(pairs)
        if len(lacking):
            names = [pairs[number].place for number in lacking[:3].tolist()]
            raise MissingRowsError(self._lacking(len(lacking), len(pairs), rows.tokens, names, "pairs"))

    def _missing(self, pairs: Sequence[TokenizedPair]) -> tuple[np.ndarray, Rows]:
        """(the numbers of the pairs of which a side is lacking, int64; the rows of all)."""
        rows = rows_of_pairs(pairs)
        return np.unique(rows.numbers[~self.held(rows)] // 2), rows

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises unless every token of `tokenizer` has the same id in the reference's vocabulary.

        A larger or padded vocabulary of the reference is fine, and so is a pad token behind all others.

        Raises:
            StoreError: names the first token that differs.
        """
        difference = differing_token(own_vocabulary(tokenizer), self.vocabulary)
        if difference is not None:
            raise StoreError(
                f"the stored reference {self.space.label!r} tokenizes differently: {difference}. Per-token log-probs "
                "of different tokens cannot be compared: use a reference that shares the tokenizer"
            )

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token → id of the reference's tokenizer."""
        if self.space.vocabulary is not None:
            return self.space.vocabulary
        return read_vocabulary(self.folder, self.space)

    def writer(self, **options: Any) -> StoreWriter:
        """A `StoreWriter` of new rows to this space. Any number of them may write at once, in any processes."""
        return StoreWriter(self.folder, self.space, **options)

    @property
    def damaged(self) -> dict[str, str]:
        """Name → reason of shards that are, or hold rows that are, damaged or of another format."""
        return self.index.damaged

    def stat(self) -> StoreStat:
        """Counts of what the space holds and of what was asked of it; reads and checks every row."""
        self.index.refresh()
        keys, lengths = self.index.stored()
        intact = self.index.holds(keys, lengths)
        sizes = self.index.sizes()
        return StoreStat(
            rows=int(intact.sum()),
            values=int(lengths[intact].sum()),
            bytes=sum(sizes.values()),
            shards=len(sizes),
            damaged=dict(self.damaged),
            hits=self.hits,
            misses=self.misses,
        )

    def close(self) -> None:
        """Closes the shards' files; a later lookup opens them again."""
        self.index.close()

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lacking(self, count: int, total: int, lengths: ArrayLike, names: list[str], kind: str = "rows") -> str:
        shown = "; ".join(names[:3]) + (f"; and {count - 3} more" if count > 3 else "")
        damage = f" Damaged shards: {', '.join(self.damaged)}." if self.damaged else ""
        return (
            f"{count} of {total} {kind} are not in the store {self.folder} (reference {self.space.label!r}): {shown}."
            f"{damage} {self.lengths(lengths)} A row is found by its exact token ids and completion mask: max_length, "
            f"truncation, template and tokenizer must be those that the store was filled with.{FILL} --max-length N "
            "--truncation-mode MODE, as in training"
        )

    def lengths(self, lengths: ArrayLike) -> str:
        """Two sentences that let a reader see whether rows are lacking because they were cut at other lengths."""
        lengths = np.asarray(lengths)
        longest = lengths.max(initial=0)
        alike = int((lengths == longest).sum())
        said = f"The longest row that was asked for has {longest} tokens."
        if alike > 1:
            said = f"{alike} rows that were asked for have {longest} tokens and none has more: is max_length {longest}?"
        fillings = [f"max_length {n['max_length']} ({n['truncation_mode']})" for n in read_fillings(self.folder)]
        return f"{said} The store was filled with {' and '.join(fillings)}." if fillings else said


def _differences(found: Sequence[Space]) -> str:
    """The names in the identities of spaces whose values are not the same in all of them."""
    names = sorted({name for space in found for name in space.identity})
    return ", ".join(n for n in names if any(s.identity.get(n) != found[0].identity.get(n) for s in found))


def _shown(row: Row) -> str:
    return f"{len(row.ids)} tokens, {int(row.mask.sum())} of the completion, ids {row.ids[:4].tolist()}…"
