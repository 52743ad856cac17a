"""Rows that are read as they are needed: nothing but a few hundred of them is in memory, and nothing is written.

In: a `datasets.IterableDataset` of raw rows, or a source of files or of the hub. Out: their token ids, in the order of
the rows; what nothing can be learnt from is left out, and counted.

    rows → this process's share (`split_dataset_by_node`) → token ids

A stream knows where it stands, so that a resumed run goes on with the next row. What has to see every row beforehand
cannot be had: an order other than the rows' own, pairs of like length together, rows held out by prompt.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from selective_pref_adapters.pairs.collate import TokenizedPair
from selective_pref_adapters.pairs.files import (
    files_of,
    hub_dataset,
    is_saved_dataset,
    located,
    raw_rows,
    rows_of_file,
)
from selective_pref_adapters.pairs.large.naming import Making
from selective_pref_adapters.pairs.large.table import as_pair
from selective_pref_adapters.pairs.rendering import Tokenizer
from selective_pref_adapters.pairs.report import TokenizationReport
from selective_pref_adapters.pairs.rows import SKIP, RowError
from selective_pref_adapters.pairs.schemas import preference_row
from selective_pref_adapters.pairs.tokenize import check_truncation, encode_rows

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 128
_PLACE, _ROW = "place", "raw row"
_FIELDS = tuple(field.name for field in dataclasses.fields(TokenizedPair))


def streamed_pairs(
    rows: Any,
    tokenizer: Tokenizer,
    making: Making,
    *,
    name: str = "stream",
    skip_malformed: bool = False,
    report: TokenizationReport | None = None,
) -> Any:
    """A stream of raw rows as a stream of token ids: each a dict with the fields of `TokenizedPair`.

    Args:
        rows: a `datasets.IterableDataset` of rows of any schema, or of `stream_of`.
        tokenizer: a Hugging Face tokenizer.
        making: how rows are read and cut.
        name: what the stream is called in error messages: ``stream, row 17``.
        skip_malformed: leave out, and count, rows that are no preference pairs, instead of raising at the first.
        report: counts what is left out, in this process; None for one of its own. The totals are logged at the first,
            second, fourth, eighth, … such row.

    Raises:
        TypeError: `rows` is no `IterableDataset`.
        RowError: when it is iterated: a row is no preference pair, or the chat template refuses it.
    """
    from datasets import IterableDataset

    check_truncation(making.max_length, making.truncation_mode)
    if not isinstance(rows, IterableDataset):
        raise TypeError(
            f"a stream must be a datasets.IterableDataset; got {type(rows).__name__}. Rows that have a length are read "
            "by tokenized_rows; a datasets.Dataset becomes a stream with its to_iterable_dataset()"
        )
    how = {
        "tokenizer": tokenizer,
        "making": making,
        "name": name,
        "skip": skip_malformed,
        "report": report or TokenizationReport(max_length=making.max_length, truncation_mode=making.truncation_mode),
    }
    columns = rows.column_names or list(next(iter(rows), {}))
    return rows.map(
        _ids, batched=True, batch_size=_ROWS_AT_ONCE, with_indices=True, remove_columns=columns, fn_kwargs=how
    )


def _ids(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: Tokenizer,
    making: Making,
    name: str,
    skip: bool,
    report: TokenizationReport,
) -> dict[str, list[Any]]:
    """A batch of rows as `IterableDataset.map` hands it over, with their ids."""

    def refused(error: RowError) -> None:
        if not skip:
            raise RowError(f"{error}. {SKIP}", error.kind) from error
        report.malformed += 1
        _tell(report, name, str(error))

    read = []
    for number, index in enumerate(indices):
        raw = {column: values[number] for column, values in batch.items()}
        place, value = (raw[_PLACE], raw[_ROW]) if _ROW in raw else (f"{name}, row {index}", raw)
        report.rows += 1
        try:
            if isinstance(value, RowError):
                raise value
            read.append(preference_row(value, place, making.columns, chosen_only=making.chosen_only))
        except RowError as error:
            refused(error)
    out: dict[str, list[Any]] = {column: [] for column in _FIELDS}
    for encoded in encode_rows(read, tokenizer):
        if encoded.error is not None:
            refused(encoded.error)
            continue
        pair, reason = encoded.fit(making.max_length, making.truncation_mode)
        if pair is None or reason is not None:
            report.left_out[str(reason)] += 1
            _tell(report, name)
            continue
        report.kept += 1
        report.truncated += pair is not encoded.pair
        report.boundary_merged += encoded.merged
        report.tools_unread += encoded.tools_unread
        for column, values in out.items():
            values.append(getattr(pair, column))
    return out


def _tell(report: TokenizationReport, name: str, malformed: str = "") -> None:
    """Logs the totals at the 1st, 2nd, 4th, 8th, … row that is left out."""
    count = report.malformed + report.left_out.total()
    if count & (count - 1) == 0:
        told = [f"{n} {why} ({report.remedy(why)})" for why, n in report.left_out.most_common()]
        told += [f"{report.malformed} malformed"] if report.malformed else []
        last = f"; the last: {malformed}" if malformed else ""
        logger.warning("%s: %d streamed rows left out so far: %s%s", name, count, "; ".join(told), last)


# --- a source as a stream --------------------------------------------------------------------------------------------


def stream_of(source: str | Path) -> Any:
    """The raw rows of a file, a folder or a data set of the hub as a `datasets.IterableDataset`, unread as yet.

    Raises:
        FileNotFoundError, ValueError: nothing that can be read is there; as `read_rows`.
    """
    from datasets import IterableDataset

    path, split = located(source)
    if not path.exists():
        rows = hub_dataset(str(source), streaming=True)
        place = partial(_with_place, name=str(source))
        return rows.map(place, with_indices=True, remove_columns=rows.column_names)
    if path.is_dir() and not is_saved_dataset(path):
        files = [(str(file), str(file.relative_to(path))) for file in files_of(path, split, [])]
    else:
        with closing(raw_rows(source, [])) as rows:
            next(rows, None)  # what is wrong with it is said now
        files = [(str(source), "")]
    return IterableDataset.from_generator(_places_and_rows, gen_kwargs={"files": files})


def _with_place(row: dict[str, Any], index: int, *, name: str) -> dict[str, Any]:
    return {_PLACE: f"{name}, row {index}", _ROW: row}


def _places_and_rows(files: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for file, name in files:
        rows = rows_of_file(Path(file), name) if name else raw_rows(file, [])
        for place, row in rows:
            yield {_PLACE: place, _ROW: row}


class PairStream:
    """This process's pairs of a stream, as many as are asked for; at its end the stream begins anew.

    Args:
        make: gives the stream from its beginning: dicts with the fields of `TokenizedPair`.
        name: what it is called in error messages.

    Attributes:
        passes: how often it has ended.
    """

    def __init__(self, make: Callable[[], Any], name: str) -> None:
        self._make, self._name = make, name
        self.passes = 0
        self._begin()

    def _begin(self, state: dict[str, Any] | None = None) -> None:
        self._data = self._make()
        if state is not None:
            self._data.load_state_dict(state)
        self._pairs: Iterator[dict[str, Any]] = iter(self._data)

    def take(self, count: int) -> list[TokenizedPair]:
        """The next pairs.

        Raises:
            RowError: a row is no preference pair.
            ValueError: there is none from which anything can be learnt.
        """
        taken: list[TokenizedPair] = []
        ended = False  # since the last pair
        while len(taken) < count:
            if (row := next(self._pairs, None)) is not None:
                taken.append(as_pair(row))
                ended = False
                continue
            if ended:
                raise ValueError(
                    f"{self._name} holds no pair for this process that can be trained on: look at it with "
                    "`selective-pref rows`, give more rows, or fewer processes"
                )
            ended = True
            self.passes += 1
            self._begin()
        return taken

    def batches(self, count: int, size: int) -> list[list[TokenizedPair]]:
        """The next pairs, at most `size` in a batch. Raises as `take` does."""
        pairs = self.take(count)
        return [pairs[start : start + size] for start in range(0, count, size)]

    def state(self) -> dict[str, Any]:
        """Where it stands: what `load` takes."""
        return {"passes": self.passes, "stream": self._data.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on where `state` stands."""
        self.passes = state["passes"]
        self._begin(state["stream"])

    def known_by(self) -> str:
        """What a resumed run is compared with: names and sizes of the files, as nothing has been read."""
        path, split = located(self._name)
        if not path.exists():
            return f"stream of {self._name}"
        folder = sorted(path.rglob("*.arrow")) if is_saved_dataset(path) else None
        files = [path] if path.is_file() else folder or files_of(path, split, [])
        return "stream of " + ", ".join(f"{file.name} ({file.stat().st_size} bytes)" for file in files)

    def close(self) -> None:
        """Closes the files."""
        self._pairs = iter(())
