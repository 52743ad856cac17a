"""`selective-pref rows`: how each row of a file is read, and what training would make of it.

In: a `RowsConfig`. Out: a few rows with their tokens, and a summary over all rows, as text or JSON. The reader and the
tokenisation are those of training, so what is shown is what is trained on.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from selective_pref_adapters.models import load_config, load_tokenizer, usable_length
from selective_pref_adapters.options import RowsConfig
from selective_pref_adapters.pairs import (
    EncodedRow,
    PreferenceRow,
    RowError,
    TokenizationReport,
    encode_rows,
    parse_columns,
    scan_rows,
)

_SHOWN_TOKENS = 48
"""Tokens of one side of a row that are written out as text; of more, the middle is left out."""


@dataclass
class Findings:
    """What is seen of the rows, one after the other.

    Attributes:
        shown: number of the row → what is said of it.
        report: counts of rows kept, changed and left out.
        first: reason or kind of malformed row → place of the first such row.
        malformed: kind → how many rows.
        schemas: name → how many rows.
        lengths: "prompt", "chosen", "rejected" → tokens of each row, before anything is cut.
    """

    shown: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    report: TokenizationReport = field(default_factory=TokenizationReport)
    first: dict[str, str] = field(default_factory=dict[str, str])
    malformed: Counter[str] = field(default_factory=Counter[str])
    schemas: Counter[str] = field(default_factory=Counter[str])
    duplicates: int = 0
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"prompt": [], "chosen": [], "rejected": []})


def show_rows(config: RowsConfig) -> int:
    """Prints what the configuration asks for; returns the exit status: 1 where nothing can be trained on.

    Raises:
        ValueError, OSError: an option, a file or a tokenizer that does not work.
    """
    if config.rows < 0:
        raise ValueError(f"rows must be at least 0; got {config.rows}")
    if config.max_length is not None and config.max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens; got {config.max_length}")
    tokenizer = load_tokenizer(config.tokenizer)
    model = load_config(config.tokenizer)
    length = config.max_length or usable_length(None, {} if model is None else {"policy": model})
    notes: list[str] = []
    found = look_at_rows(config, tokenizer, length, notes)
    everything = {
        "pairs": config.pairs,
        "tokenizer": config.tokenizer,
        "objective": config.objective,
        "max_length": length,
        "truncation_mode": config.truncation_mode,
        "notes": notes,
        "rows": [found.shown[number] for number in sorted(found.shown)],
        "summary": summary_of(found),
    }
    print(json.dumps(everything) if config.json else "\n".join(as_text(everything)))
    return 0 if found.report.kept else 1


def look_at_rows(config: RowsConfig, tokenizer: Any, length: int, notes: list[str]) -> Findings:
    """Reads and tokenises every row, and keeps what is to be said."""
    found = Findings(report=TokenizationReport(max_length=length, truncation_mode=config.truncation_mode))
    numbers: deque[int] = deque()
    seen: set[int] = set()

    def well_formed() -> Iterator[PreferenceRow]:
        columns = parse_columns(config.columns)
        chosen_only = config.objective == "sft"
        for number, row in enumerate(scan_rows(config.pairs, columns=columns, notes=notes, chosen_only=chosen_only)):
            found.report.rows += 1
            if isinstance(row, RowError):
                malformed(number, row)
                continue
            numbers.append(number)
            yield row

    def malformed(number: int, error: RowError) -> None:
        found.malformed[error.kind] += 1
        found.first.setdefault(error.kind, str(error))
        if number < config.rows:
            found.shown[number] = {"malformed": str(error)}

    for encoded in encode_rows(well_formed(), tokenizer, progress=not config.json and sys.stderr.isatty()):
        number, row = numbers.popleft(), encoded.row
        key = hash((row.prompt_key, json.dumps([row.chosen, row.rejected])))
        found.duplicates += key in seen
        seen.add(key)
        found.schemas[row.schema] += 1
        if encoded.error is not None:
            malformed(number, encoded.error)
            continue
        judge(found, encoded, length, config)
        if number < config.rows:
            found.shown[number] = shown_row(encoded, tokenizer, length, config)
    return found


def judge(found: Findings, encoded: EncodedRow, length: int, config: RowsConfig) -> None:
    """Counts a row."""
    cut, reason = encoded.fit(length, config.truncation_mode)
    pair = encoded.pair
    if pair is None:
        return
    found.lengths["prompt"].append(pair.chosen_prompt_length)
    for name, ids, _ in pair.sides():
        found.lengths[name].append(len(ids) - pair.chosen_prompt_length)
    if reason is not None:
        found.report.left_out[reason] += 1
        found.first.setdefault(reason, encoded.row.place)
        return
    found.report.kept += 1
    found.report.truncated += cut is not pair
    found.report.boundary_merged += encoded.merged
    found.report.tools_unread += encoded.tools_unread


def summary_of(found: Findings) -> dict[str, Any]:
    """Counts and lengths over the whole file."""
    report = found.report
    return {
        "rows": report.rows,
        "trained_on": report.kept,
        "schemas": dict(found.schemas),
        "malformed": {kind: {"rows": n, "first": found.first[kind]} for kind, n in found.malformed.most_common()},
        "left_out": {
            reason: {"rows": n, "first": found.first[reason], "remedy": report.remedy(reason)}
            for reason, n in report.left_out.most_common()
        },
        "truncated": report.truncated,
        "duplicates": found.duplicates,
        "equal_sides": sum(n for reason, n in report.left_out.items() if reason.startswith("chosen and rejected")),
        "prompts_that_differ": found.malformed["prompts that differ"],
        "prompt_end_changes": report.boundary_merged,
        "tools_unread": report.tools_unread,
        "tokens": {name: _spread(lengths) for name, lengths in found.lengths.items()},
    }


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    """Median, 95 % and the largest of some lengths."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    most = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"median": statistics.median(ordered), "95 %": most, "largest": ordered[-1]}


# --- one row ---------------------------------------------------------------------------------------------------------


def shown_row(encoded: EncodedRow, tokenizer: Any, length: int, config: RowsConfig) -> dict[str, Any]:
    """A row as it is trained on: tokens of both sides with the boundary, and what was done to it."""
    cut, reason = encoded.fit(length, config.truncation_mode)
    pair = cut or encoded.pair
    sides = {}
    if pair is not None and encoded.pair is not None:
        whole = {name: len(ids) for name, ids, _ in encoded.pair.sides()}
        starts = {"chosen": pair.chosen_prompt_length, "rejected": pair.rejected_prompt_length}
        for name, ids, mask in pair.sides():
            sides[name] = {
                "tokens": tokenizer.convert_ids_to_tokens(ids),
                "ids": ids,
                "prompt_length": starts[name],
                "counts": [bool(flag) for flag in mask],
                "special": special_tokens(ids, tokenizer),
                "cut_off": whole[name] - len(ids),
            }
    report = TokenizationReport(max_length=length, truncation_mode=config.truncation_mode)
    return {
        "place": encoded.row.place,
        "schema": encoded.row.schema,
        "tools": len(encoded.row.tools or []),
        **sides,
        "left_out": reason,
        "remedy": None if reason is None else report.remedy(reason),
    }


def special_tokens(ids: Sequence[int], tokenizer: Any) -> dict[str, int]:
    """Special token → how often it stands in a row."""
    special = set(tokenizer.all_special_ids)
    return dict(Counter(tokenizer.convert_ids_to_tokens(token) for token in ids if token in special))


def as_text(everything: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    yield from everything["notes"]
    for row in everything["rows"]:
        yield ""
        yield from _row_lines(row)
    summary = everything["summary"]
    yield ""
    yield (
        f"{summary['trained_on']} of {summary['rows']} rows can be trained on (max_length {everything['max_length']}, "
        f"{everything['truncation_mode']})"
    )
    schemas = ", ".join(f"{schema} rows: {count}" for schema, count in summary["schemas"].items())
    yield f"  schemas: {schemas or 'none'}"
    for name, spread in summary["tokens"].items():
        if spread:
            yield f"  {name} tokens: " + ", ".join(f"{what} {count:g}" for what, count in spread.items())
    of_pairs = () if everything["objective"] == "sft" else ("equal_sides", "prompts_that_differ")
    for name in ("truncated", "duplicates", *of_pairs, "prompt_end_changes", "tools_unread"):
        yield f"  {name.replace('_', ' ')}: {summary[name]}"
    for reason, what in summary["left_out"].items():
        yield f"  left out: {what['rows']}, {reason} (first: {what['first']}): {what['remedy']}"
    for kind, what in summary["malformed"].items():
        yield f"  malformed: {what['rows']}, {kind}, the first: {what['first']}"


def _row_lines(row: dict[str, Any]) -> Iterator[str]:
    if "malformed" in row:
        yield f"malformed: {row['malformed']}"
        return
    yield f"{row['place']}: {row['schema']}" + (f", {row['tools']} tools" if row["tools"] else "")
    for name in ("chosen", "rejected"):
        if (side := row.get(name)) is None:
            continue
        start, total = side["prompt_length"], len(side["ids"])
        special = ", ".join(f"{token} {count}" for token, count in side["special"].items()) or "none"
        cut = f"; {side['cut_off']} tokens cut off" if side["cut_off"] else ""
        yield (
            f"  {name}: {start} prompt tokens, {sum(side['counts'])} of {total - start} completion tokens count; "
            f"special tokens: {special}{cut}"
        )
        yield f"    {_tokens_line(side)}"
    if row["left_out"]:
        yield f"  left out: {row['left_out']}: {row['remedy']}"


def _tokens_line(side: dict[str, Any]) -> str:
    """Prompt ┃ completion; what does not count of the completion stands in ( )."""
    start = side["prompt_length"]
    prompt, completion = side["tokens"][:start], side["tokens"][start:]
    counts = side["counts"][start:]
    marked = [token if count else f"({token})" for token, count in zip(completion, counts, strict=True)]
    return " ".join([*_ends(prompt), "┃", *_ends(marked)])


def _ends(tokens: list[str]) -> list[str]:
    if len(tokens) <= _SHOWN_TOKENS:
        return tokens
    half = _SHOWN_TOKENS // 2
    return [*tokens[:half], f"… {len(tokens) - 2 * half} more …", *tokens[-half:]]
