"""Rows → the data set that TRL's trainer takes, with the ids of this library's reader; and the collator for it.

In: rows as `read_rows` gives them, or a raw data set of any schema that the reader knows. Out: a data set in the layout
of `DPOTrainer` (`prompt_ids`, and the completions as `chosen_ids`, `rejected_ids`), not yet cut to a length: the
collator does that, with the same result as `tokenize_pairs`. What TRL's own preparation does otherwise, and why this
one stands in its place, is told in `docs/data.md`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from datasets import Sequence as ListOf
from trl.trainer.dpo_trainer import DataCollatorForPreference

from selective_pref_adapters import pairs
from selective_pref_adapters.options import Truncation
from selective_pref_adapters.pairs import (
    PreferenceRow,
    RowError,
    TokenizationReport,
    encode_rows,
    preference_row,
)
from selective_pref_adapters.trl_trainer.weights import WEIGHT_COLUMN

logger = logging.getLogger(__name__)

READ_ROW = "preference_row"
"""The column of a data set that holds rows which are read already."""

_MALFORMED = "malformed: "
_SKIP = "skip_malformed_rows leaves such rows out and counts them; stock_tokenization lets TRL read them"
_SPANS = ListOf(ListOf(Value("int32")))
_FEATURES = Features(
    {
        "prompt_ids": ListOf(Value("int32")),
        "chosen_ids": ListOf(Value("int32")),
        "rejected_ids": ListOf(Value("int32")),
        "chosen_uncounted": _SPANS,
        "rejected_uncounted": _SPANS,
        "place": Value("string"),
        WEIGHT_COLUMN: Value("float64"),
        "left_out": Value("string"),
        "truncated": Value("bool"),
        "merged": Value("bool"),
        "tools_unread": Value("bool"),
    }
)
TRAINED_COLUMNS = ("chosen_uncounted", "rejected_uncounted")
"""What the collator reads beside TRL's own columns."""


def dataset_of_rows(rows: Sequence[PreferenceRow]) -> Dataset:
    """Rows that are read already as a data set that a trainer can be given."""
    features = Features({READ_ROW: Value("large_string")})  # more than 2 GB of text in one column
    return Dataset.from_dict({READ_ROW: [json.dumps(asdict(row)) for row in rows]}, features=features)


def as_datasets(data: Any) -> Any:
    """One data set, or several by name, as TRL takes them: a list of rows, as `read_rows` gives it, becomes one."""
    if isinstance(data, Mapping) and not isinstance(data, DatasetDict):
        return {name: as_datasets(one) for name, one in data.items()}
    rows = isinstance(data, list) and bool(data) and isinstance(data[0], PreferenceRow)
    return dataset_of_rows(data) if rows else data


def all_sets(datasets: Any) -> list[Any]:
    """One data set, several by name, or None, as a list."""
    return [] if datasets is None else list(datasets.values()) if isinstance(datasets, Mapping) else [datasets]


def prepared(
    dataset: Any,
    tokenizer: Any,
    name: str,
    *,
    max_length: int | None,
    truncation_mode: Truncation,
    columns: Mapping[str, str] | None = None,
    skip_malformed_rows: bool = False,
    num_proc: int | None = None,
) -> Any:
    """The data set with every row's ids, without the rows that nothing can be learnt from.

    Args:
        dataset: a `Dataset` or `IterableDataset`: raw rows, or those of `dataset_of_rows`. One that has `prompt_ids`
            is returned as it is.
        tokenizer: the policy's.
        name: what the data set is called in error messages: ``train, row 17``.
        max_length: tokens that the collator will keep; None for all.
        truncation_mode: how it cuts.
        columns: see `preference_row`.
        skip_malformed_rows: leave out rows that are no pairs, and count them, instead of raising.
        num_proc: processes.

    Raises:
        RowError: a row is no preference pair, or the chat template refuses it.
        ValueError: no row is left.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"the {name} data set holds no rows")
    if "prompt_ids" in first:
        return dataset
    streams = isinstance(dataset, IterableDataset)
    limit = max_length or 2**31 - 1
    how = {
        "tokenizer": tokenizer,
        "name": name,
        "max_length": limit,
        "mode": truncation_mode,
        "columns": columns,
        "skip": skip_malformed_rows,
        "streamed": TokenizationReport(max_length=limit, truncation_mode=truncation_mode) if streams else None,
        "code": _code_digest(),
    }
    options: dict[str, Any] = {"batched": True, "batch_size": 512, "with_indices": True, "fn_kwargs": how}
    if streams:
        read = dataset.map(_tokenized, remove_columns=list(first), features=_FEATURES, **options)
        weighted = (columns or {}).get(WEIGHT_COLUMN, WEIGHT_COLUMN) in first
        return read if weighted else read.remove_columns(WEIGHT_COLUMN)
    done = dataset.map(
        _tokenized,
        remove_columns=dataset.column_names,
        features=_FEATURES,
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
        **options,
    )
    report, malformed = _report(done, limit, truncation_mode)
    for line in [*report.lines(), *malformed]:
        logger.warning("%s: %s", name, line)
    if not report.kept:
        raise ValueError(
            f"none of {report.rows} pairs of the {name} data set can be trained on: {'; '.join(report.lines())}"
        )
    kept = pc.equal(done.data["left_out"], "")
    no_weights = [WEIGHT_COLUMN] if done.data[WEIGHT_COLUMN].filter(kept).null_count == report.kept else []
    if report.kept < report.rows:
        done = done.select(np.flatnonzero(kept.to_numpy()))
    return done.remove_columns(["left_out", "truncated", "merged", "tools_unread", *no_weights])


def _report(done: Dataset, max_length: int, mode: Truncation) -> tuple[TokenizationReport, list[str]]:
    """What became of the rows, and a line about malformed ones where there are any."""
    table = done.data
    reasons = table["left_out"]
    kept = pc.equal(reasons, "")
    broken = pc.starts_with(reasons, _MALFORMED)
    malformed = reasons.filter(broken)

    def count(column: str) -> int:
        return pc.sum(pc.and_(table[column], kept)).as_py() or 0

    report = TokenizationReport(
        rows=len(reasons),
        kept=pc.sum(kept).as_py() or 0,
        left_out=Counter(
            {
                one["values"].as_py(): one["counts"].as_py()
                for one in pc.value_counts(reasons.filter(pc.invert(pc.or_(kept, broken))))
            }
        ),
        truncated=count("truncated"),
        boundary_merged=count("merged"),
        tools_unread=count("tools_unread"),
        max_length=max_length,
        truncation_mode=mode,
    )
    if not len(malformed):
        return report, []
    first = malformed[0].as_py().removeprefix(_MALFORMED)
    return report, [f"{len(malformed)} malformed rows left out, the first: {first}"]


def _code_digest() -> str:
    """Of the reader's own code: prepared data that another version of it left in the cache are not taken."""
    digest = hashlib.sha256()
    for file in sorted(Path(pairs.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _tokenized(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: Any,
    name: str,
    max_length: int,
    mode: Truncation,
    columns: Mapping[str, str] | None,
    skip: bool,
    streamed: TokenizationReport | None,
    code: str,
) -> dict[str, list[Any]]:
    """A batch of rows as `Dataset.map` hands it over, with their ids.

    Rows of a stream that are left out are dropped and counted in `streamed`; others are marked. `code` only makes the
    cache's key.
    """
    read: list[PreferenceRow | RowError] = []
    for number, index in enumerate(indices):
        raw = {column: values[number] for column, values in batch.items()}
        try:
            read.append(_row(raw, f"{name}, row {index}", columns))
        except RowError as error:
            if not skip:
                raise RowError(f"{error}. {_SKIP}", error.kind) from error
            read.append(error)
    encoded = encode_rows([row for row in read if isinstance(row, PreferenceRow)], tokenizer)
    out: dict[str, list[Any]] = {column: [] for column in _FEATURES}
    for row in read:
        one = _malformed(row) if isinstance(row, RowError) else _fitted(next(encoded), max_length, mode, skip)
        if streamed is not None and one["left_out"]:
            _count(one["left_out"], streamed, name)
            continue
        for column, values in out.items():
            values.append(one[column])
    if streamed is not None:
        streamed.rows += len(read)
    return out


def _count(reason: str, seen: TokenizationReport, name: str) -> None:
    """Counts a row of a stream that is left out, and tells the totals at the 1st, 2nd, 4th, 8th, …"""
    if malformed := reason.startswith(_MALFORMED):
        reason = reason.removeprefix(_MALFORMED)
        seen.malformed += 1
    else:
        seen.left_out[reason] += 1
    count = seen.malformed + sum(seen.left_out.values())
    if count & (count - 1) == 0:
        told = [f"{n} {why} ({seen.remedy(why)})" for why, n in seen.left_out.most_common()]
        told += [f"{seen.malformed} malformed"] if seen.malformed else []
        last = f"; the last: {reason}" if malformed else ""
        logger.warning("%s: %d streamed rows left out so far: %s%s", name, count, "; ".join(told), last)


def _row(raw: dict[str, Any], place: str, columns: Mapping[str, str] | None) -> PreferenceRow:
    if READ_ROW in raw:
        return PreferenceRow(**json.loads(raw[READ_ROW]))
    return preference_row(raw, place, columns)


def _malformed(error: RowError) -> dict[str, Any]:
    empty: dict[str, Any] = {column: [] for column in _FEATURES if column.endswith(("ids", "uncounted"))}
    flags = {"truncated": False, "merged": False, "tools_unread": False, WEIGHT_COLUMN: None}
    return {**empty, **flags, "place": "", "left_out": f"{_MALFORMED}{error}"}


def _fitted(encoded: Any, max_length: int, mode: Truncation, skip: bool) -> dict[str, Any]:
    if encoded.error is not None:
        if not skip:
            raise RowError(f"{encoded.error}. {_SKIP}", encoded.error.kind) from encoded.error
        return _malformed(encoded.error)
    cut, reason = encoded.fit(max_length, mode)
    pair = encoded.pair
    start = pair.chosen_prompt_length
    return {
        "prompt_ids": pair.chosen_ids[:start],
        "chosen_ids": pair.chosen_ids[start:],
        "rejected_ids": pair.rejected_ids[start:],
        "chosen_uncounted": [list(span) for span in pair.chosen_uncounted],
        "rejected_uncounted": [list(span) for span in pair.rejected_uncounted],
        "place": pair.place,
        WEIGHT_COLUMN: pair.weight,
        "left_out": reason or "",
        "truncated": cut is not pair,
        "merged": encoded.merged,
        "tools_unread": encoded.tools_unread,
    }


class PairCollator(DataCollatorForPreference):
    """TRL's collator, in whose `completion_mask` only what the assistant says counts."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """As in TRL; the spans of `chosen_uncounted` and `rejected_uncounted` do not count."""
        batch = super().torch_call(examples)
        for number, example in enumerate(examples):
            for side, row in (("chosen", number), ("rejected", number + len(examples))):
                length = len(example["prompt_ids"]) + len(example[f"{side}_ids"])
                cut = self.max_length is not None and self.truncation_mode == "keep_end"
                gone = max(length - self.max_length, 0) if cut else 0
                for start, end in example.get(f"{side}_uncounted") or ():
                    batch["completion_mask"][row, max(start - gone, 0) : max(end - gone, 0)] = 0
        return batch


def own_collator(collator: Any) -> Any:
    """TRL's own collator as a `PairCollator`; any other as it is."""
    return PairCollator(**vars(collator)) if type(collator) is DataCollatorForPreference else collator


def check_collator(collator: Any, dataset: Any, name: str) -> None:
    """Raises ValueError where a collator of one's own would train on what users and tools say."""
    if isinstance(collator, PairCollator) or not isinstance(dataset, Dataset):
        return
    if set(TRAINED_COLUMNS) <= set(dataset.column_names) and any(
        spans for column in TRAINED_COLUMNS for spans in dataset[column]
    ):
        raise ValueError(
            f"completions of the {name} data set hold turns of users or tools, which do not count: derive "
            "data_collator from selective_pref_adapters.trl_trainer.data.PairCollator, which reads "
            "chosen_uncounted and rejected_uncounted"
        )
