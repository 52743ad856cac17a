"""Preference rows → token ids: files, schemas, prompts, the boundary between prompt and completion, batches.

    files → schemas → rows → tokenize → collate

In: rows of any schema that `schemas` knows, in any file that `files` reads. Out: `TokenizedPair`s, a report of what was
left out and why, and batches. Every trainer, `score` and the commands read rows through here, so their ids are the
same. Malformed rows are errors that name the file and the row; rows that cannot teach anything (no completion left,
both sides equal) are left out and counted, never silently.
"""

from selective_pref_adapters.models import check_same_tokenizer, differing_token
from selective_pref_adapters.pairs.collate import (
    IGNORE_INDEX,
    Spans,
    TokenizedPair,
    collate,
    completion_mask,
    pair_weights,
    row_key,
    uncounted_spans,
)
from selective_pref_adapters.pairs.reading import read_rows, scan_rows
from selective_pref_adapters.pairs.report import TokenizationReport
from selective_pref_adapters.pairs.rows import SKIP, PreferenceRow, RowError, checked_weight, split_by_prompt
from selective_pref_adapters.pairs.schemas import Columns, parse_columns, preference_row
from selective_pref_adapters.pairs.tokenize import EncodedRow, Tokenizer, encode_rows, tokenize_pairs

__all__ = [
    "IGNORE_INDEX",
    "SKIP",
    "Columns",
    "EncodedRow",
    "PreferenceRow",
    "RowError",
    "Spans",
    "TokenizationReport",
    "TokenizedPair",
    "Tokenizer",
    "check_same_tokenizer",
    "checked_weight",
    "collate",
    "completion_mask",
    "differing_token",
    "encode_rows",
    "pair_weights",
    "parse_columns",
    "preference_row",
    "read_rows",
    "row_key",
    "scan_rows",
    "split_by_prompt",
    "tokenize_pairs",
    "uncounted_spans",
]
