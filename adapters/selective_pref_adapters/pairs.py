"""Preference rows → token ids: files, prompts, the boundary between prompt and completion, truncation, batches.

In: rows in TRL's formats (`prompt`/`chosen`/`rejected` as strings or as message lists; the prompt may also be
implicit) from JSONL, JSON, Parquet or a `datasets` folder. Out: `TokenizedPair`s with the ids TRL would make, a report
of what was left out and why, and a collator. Malformed rows are errors that name the file and the row; rows that
cannot teach anything (no completion left, both sides equal) are left out and counted, never silently.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm

from selective_pref_adapters.options import Truncation

Tokenizer: TypeAlias = Any  # a transformers.PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""The label of tokens that are not trained: prompt and padding."""

_SUFFIXES = (".jsonl", ".json", ".parquet")
_TURN = "\n\nAssistant:"  # hh-rlhf: one string per side, "\n\nHuman: … \n\nAssistant: …"
_NO_COMPLETION = "no completion left after truncation"
_EMPTY = "empty completion"
_EQUAL = "chosen and rejected are equal"


class RowError(ValueError):
    """A row that is no preference pair. The message names the file, the row, what was expected and what was got."""


@dataclass(frozen=True, kw_only=True)
class PreferenceRow:
    """One pair as text or messages, with the place it came from (`file.jsonl:17`) for error messages."""

    prompt: str | list[dict[str, Any]]
    chosen: str | list[dict[str, Any]]
    rejected: str | list[dict[str, Any]]
    place: str

    @property
    def prompt_key(self) -> str:
        """What two rows with the same prompt share: rows are split for evaluation by it."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class TokenizedPair:
    """Token ids of one pair, truncated. `*_length` counts the prompt tokens that stand before each completion.

    `place` is where the row came from (`file.jsonl:17`), for error messages.
    """

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_prompt_length: int
    rejected_prompt_length: int
    place: str = "?"


@dataclass
class TokenizationReport:
    """What became of the rows: counts by reason of those left out, and of those changed."""

    rows: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter[str])
    truncated: int = 0
    boundary_merged: int = 0
    unteachable: int = 0
    """Kept pairs with an empty completion or two equal sides (`keep_unteachable`)."""

    def lines(self) -> list[str]:
        """One sentence for each thing worth knowing; empty where every row was kept whole."""
        counts = [f"{count} of {self.rows} pairs left out: {reason}" for reason, count in self.left_out.most_common()]
        if self.truncated:
            counts.append(f"{self.truncated} of {self.kept} kept pairs truncated")
        if self.boundary_merged:
            counts.append(
                f"{self.boundary_merged} of {self.kept} kept pairs have a prompt whose last tokens change when a "
                "completion follows: their completion starts where the ids diverge"
            )
        if self.unteachable:
            counts.append(
                f"{self.unteachable} of {self.kept} kept pairs have an empty completion or two equal sides: TRL trains "
                f"on them, selective-pref train on the other {self.kept - self.unteachable} alone"
            )
        return counts


def read_rows(path: str | Path, malformed: list[str] | None = None) -> list[PreferenceRow]:
    """The preference rows of a `.jsonl`/`.json`/`.parquet` file, or of a folder.

    Args:
        path: the file; a folder written by `Dataset.save_to_disk`; or one that holds such files, read in the order of
            their names.
        malformed: None to raise at the first malformed row; or a list that collects the messages of such rows, which
            are then left out.

    Raises:
        FileNotFoundError: nothing is at `path`.
        RowError: a row is not a preference pair, or a line is not JSON; the message says which.
        ValueError: the kind of file is not known, it cannot be read, or it holds no (well-formed) row.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no preference pairs at {path}: expected a .jsonl, .json or .parquet file or a folder")
    rows: list[PreferenceRow] = []
    for place, read in _raw_rows(path):
        try:
            rows.append(preference_row(read(), place))
        except RowError as error:
            if malformed is None:
                raise
            malformed.append(str(error))
    if not rows:
        raise ValueError(f"{path} holds no rows" + (f" but {len(malformed)} malformed ones" if malformed else ""))
    return rows


def preference_row(row: Any, place: str) -> PreferenceRow:
    """A checked row with its prompt made explicit.

    Args:
        row: what a file or a dataset holds: a dict with `chosen`, `rejected` and mostly `prompt`.
        place: where it came from, for error messages.

    Raises:
        RowError: it is no preference pair.
    """
    if not isinstance(row, dict):
        raise RowError(f"{place}: expected an object with 'prompt', 'chosen' and 'rejected'; got {type(row).__name__}")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowError(f"{place}: no {name!r}; a preference row needs 'chosen' and 'rejected' (got {sorted(row)})")
    sides = {name: row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None}
    kinds = {name: _kind(value, f"{place}: {name!r}") for name, value in sides.items()}
    if kinds == {"prompt": "text", "chosen": "messages", "rejected": "messages"}:
        return _row_of_conversations(sides, place)
    if len(set(kinds.values())) > 1:
        raise RowError(f"{place}: prompt, chosen and rejected must be all text or all message lists; got {kinds}")
    if "prompt" in sides:
        return PreferenceRow(**sides, place=place)
    extract = _prompt_of_text if kinds["chosen"] == "text" else _prompt_of_messages
    prompt, chosen, rejected = extract(sides["chosen"], sides["rejected"], place)
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, place=place)


def split_by_prompt(
    rows: Sequence[PreferenceRow], fraction: float, seed: int
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """(training rows, evaluation rows): whole prompts are held out until `fraction` of the rows is reached.

    Pairs that share a prompt stay on one side, so no prompt of the evaluation was seen in training.

    Raises:
        ValueError: `fraction` is outside [0, 1), or the rows have a single prompt, so that nothing can be held out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"eval_fraction must be in [0, 1); got {fraction!r}")
    if fraction == 0:
        return list(rows), []
    per_prompt = Counter(row.prompt_key for row in rows)
    if len(per_prompt) < 2:
        raise ValueError(
            f"cannot hold pairs out: all {len(rows)} rows have the same prompt. Set eval_fraction to 0, or give "
            "eval_pairs"
        )
    prompts = sorted(per_prompt)
    random.Random(seed).shuffle(prompts)
    held_out: set[str] = set()
    taken = 0
    for prompt in prompts[:-1]:
        if taken >= fraction * len(rows):
            break
        held_out.add(prompt)
        taken += per_prompt[prompt]
    train = [row for row in rows if row.prompt_key not in held_out]
    return train, [row for row in rows if row.prompt_key in held_out]


def tokenize_pairs(
    rows: Sequence[PreferenceRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    keep_unteachable: bool = False,
    progress: bool = False,
) -> tuple[list[TokenizedPair], TokenizationReport]:
    """Token ids of every row that has something to teach, and a report of the others.

    Prompt and completion are tokenised together, as the model sees them; the completion starts where the ids of
    prompt + completion leave those of the prompt alone (for either side, so that both share one prompt). Text
    completions end with the EOS token; message lists end as the chat template has it. The ids equal TRL's.

    Args:
        rows: as `read_rows` gives them.
        tokenizer: a Hugging Face tokenizer; with a chat template where rows are message lists.
        max_length: tokens of prompt + completion to keep, at least 2.
        truncation_mode: "keep_start" cuts the end of what is too long (and leaves out rows whose prompt alone fills
            `max_length`); "keep_end" cuts the start.
        keep_unteachable: keep pairs with two equal sides, or with an empty one that is its EOS alone, as long as
            completion tokens are left. TRL trains on them, so whoever scores for TRL must have them.

    Raises:
        RowError: the chat template rejects a row.
        ValueError: no row is left, `max_length` or `truncation_mode` is invalid, the tokenizer has no EOS token, or no
            chat template although the rows are message lists.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens; got {max_length}")
    if truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end'; got {truncation_mode!r}")
    report = TokenizationReport(rows=len(rows))
    pairs: list[TokenizedPair] = []
    for row in tqdm(rows, desc="tokenizing", unit="pair", disable=not progress, leave=False):
        pair = _tokenize(row, tokenizer, max_length, truncation_mode, keep_unteachable, report)
        if pair is not None:
            pairs.append(pair)
    report.kept = len(pairs)
    if not pairs:
        raise ValueError(
            f"none of {len(rows)} pairs can be trained on with max_length {max_length}, {truncation_mode}: "
            + "; ".join(report.lines())
            + ". A larger max_length or truncation_mode 'keep_end' may help"
        )
    return pairs, report


def collate(pairs: Sequence[TokenizedPair], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One batch in the trainers' layout: [2B T] with the chosen rows first, padded on the right.

    Returns:
        input_ids int64 [2B T]; attention_mask int64 [2B T], 1 on tokens; completion_mask int64 [2B T], 1 on the tokens
        of the completions.
    """
    sides = [(pair.chosen_ids, pair.chosen_prompt_length) for pair in pairs]
    sides += [(pair.rejected_ids, pair.rejected_prompt_length) for pair in pairs]
    shape = (len(sides), max(len(ids) for ids, _ in sides))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (ids, prompt_length) in enumerate(sides):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        completion_mask[row, prompt_length : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def check_same_tokenizer(policy: Tokenizer, reference: Tokenizer) -> None:
    """Raises unless both tokenizers give every token string the same id; names the first that differs.

    Vocabularies are compared token by token, not by size: a padded or larger vocabulary of the reference is fine.

    Raises:
        ValueError: an id of the policy's vocabulary means something else to the reference.
    """
    difference = differing_token(policy.get_vocab(), reference.get_vocab())
    if difference is not None:
        raise ValueError(
            f"policy and reference tokenize differently: {difference}. Per-token log-probs of different tokens cannot "
            "be compared: choose a reference that shares the policy's tokenizer"
        )


def differing_token(policy: dict[str, int], reference: dict[str, int]) -> str | None:
    """The first token, in order of the policy's ids, that has another id in the reference's vocabulary; None if none.

    Args:
        policy, reference: token → id. What only the reference has does not matter.
    """
    by_id = {token_id: token for token, token_id in reference.items()}
    for token, token_id in sorted(policy.items(), key=lambda item: item[1]):
        if reference.get(token) != token_id:
            other = by_id.get(token_id)
            said = "no token" if other is None else repr(other)
            return f"id {token_id} is {token!r} for the policy and {said} for the reference"
    return None


def _raw_rows(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(place, function that reads the row) of everything in a file or folder; reading may raise RowError."""
    if path.is_dir() and not _is_saved_dataset(path):
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ValueError(
                f"{path} is neither a folder written by Dataset.save_to_disk nor one of {', '.join(_SUFFIXES)} files"
            )
        for file in files:
            yield from _raw_rows(file)
        return
    if path.suffix == ".jsonl" or (path.suffix == ".json" and _holds_lines(path)):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path.name}:{number}"
                    yield place, partial(_json, line, place)
        return
    if path.suffix == ".json":
        rows = _json(path.read_bytes(), path.name)
        if not isinstance(rows, list):
            raise RowError(f"{path.name}: expected a list of rows; got {type(rows).__name__} (one row a line? .jsonl)")
    elif path.suffix == ".parquet" or path.is_dir():
        rows = _dataset(path)
    else:
        raise ValueError(f"cannot read {path}: expected .jsonl, .json, .parquet or a folder written by save_to_disk")
    for number, row in enumerate(rows):
        yield f"{path.name}, row {number}", lambda row=row: row


def _holds_lines(path: Path) -> bool:
    """Whether a `.json` file holds a row a line, as `Dataset.to_json` writes it, and not one list."""
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json", "dataset_info.json"))


def _json(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RowError(f"{place}: not valid JSON: {error}") from error


def _dataset(path: Path) -> Any:
    from datasets import DatasetDict, load_from_disk
    from pyarrow import ArrowException, parquet

    if path.is_file():
        try:
            return parquet.read_table(path).to_pylist()
        except ArrowException as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a folder written by Dataset.save_to_disk") from error
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise ValueError(f"{path} holds the splits {sorted(dataset)}: name one of their folders")
        return dataset["train"]
    return dataset


def _kind(value: Any, place: str) -> str:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        raise RowError(f"{place} must be text or a list of messages; got {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RowError(f"{place} must hold messages with 'role' and 'content'; got {message!r:.80}")
        if not isinstance(message["content"], str):
            raise RowError(f"{place} must hold text content; got {type(message['content']).__name__}")
    return "messages"


def _prompt_of_text(chosen: str, rejected: str, place: str) -> tuple[str, str, str]:
    """hh-rlhf strings: the prompt reaches to the end of the last assistant marker."""
    cuts = [side.rfind(_TURN) + len(_TURN) for side in (chosen, rejected)]
    if min(cuts) < len(_TURN):
        raise RowError(f"{place}: no 'prompt', and the texts hold no {_TURN!r} turn that would end an implicit one")
    if chosen[: cuts[0]] != rejected[: cuts[1]]:
        raise RowError(_different_prompts(place, chosen[: cuts[0]], rejected[: cuts[1]]))
    return chosen[: cuts[0]], chosen[cuts[0] :], rejected[cuts[1] :]


def _prompt_of_messages(
    chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], place: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Whole conversations: the prompt is what stands before the last message, which the assistant must speak."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) < 2 or side[-1]["role"] != "assistant":
            raise RowError(
                f"{place}: no 'prompt', so {name!r} must be a conversation that ends with an assistant message; got "
                f"roles {[message['role'] for message in side]}"
            )
    if chosen[:-1] != rejected[:-1]:
        raise RowError(_different_prompts(place, chosen[:-1], rejected[:-1]))
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _row_of_conversations(sides: dict[str, Any], place: str) -> PreferenceRow:
    """Whole conversations beside a text that repeats what the user asked (UltraFeedback): the text must be in them."""
    prompt, chosen, rejected = _prompt_of_messages(sides["chosen"], sides["rejected"], place)
    if sides["prompt"] not in [message["content"] for message in prompt]:
        raise RowError(
            f"{place}: 'prompt' is a text beside whole conversations, but no message before the last says it: "
            f"{sides['prompt'][:60]!r}. Leave 'prompt' out, or make it the list of messages before the answer"
        )
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, place=place)


def _different_prompts(place: str, chosen: Sequence[Any], rejected: Sequence[Any]) -> str:
    at = _common_prefix(chosen, rejected)
    return (
        f"{place}: the prompt differs between chosen and rejected, first at {at}: {str(chosen[at:])[:60]!r} against "
        f"{str(rejected[at:])[:60]!r}. A pair needs one prompt: repair or remove the row"
    )


def _tokenize(
    row: PreferenceRow,
    tokenizer: Tokenizer,
    max_length: int,
    mode: Truncation,
    keep_unteachable: bool,
    report: TokenizationReport,
) -> TokenizedPair | None:
    """The pair's ids, or None after counting why it was left out."""
    unteachable = _EQUAL if row.chosen == row.rejected else None
    unteachable = _EMPTY if _is_empty(row.chosen) or _is_empty(row.rejected) else unteachable
    if unteachable and not keep_unteachable:
        return _leave_out(report, unteachable)
    prompt = _ids(row, tokenizer, row.prompt, None)
    full = [_ids(row, tokenizer, row.prompt, side) for side in (row.chosen, row.rejected)]
    boundary = min(_common_prefix(prompt, ids) for ids in full)
    cut = [_truncate(ids, boundary, max_length, mode) for ids in full]
    if any(len(ids) <= prompt_length or len(ids) < 2 for ids, prompt_length in cut):
        return _leave_out(report, _NO_COMPLETION)
    if not keep_unteachable and cut[0] == cut[1]:
        return _leave_out(report, f"{_EQUAL} after truncation")
    report.unteachable += bool(unteachable) or cut[0] == cut[1]
    report.truncated += any(len(ids) > max_length for ids in full)
    report.boundary_merged += boundary < len(prompt)
    (chosen_ids, chosen_prompt_length), (rejected_ids, rejected_prompt_length) = cut
    return TokenizedPair(
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        chosen_prompt_length=chosen_prompt_length,
        rejected_prompt_length=rejected_prompt_length,
        place=row.place,
    )


def _leave_out(report: TokenizationReport, reason: str) -> None:
    report.left_out[reason] += 1


def _is_empty(side: str | list[dict[str, Any]]) -> bool:
    return not side if isinstance(side, str) else not any(message["content"] for message in side)


def _ids(row: PreferenceRow, tokenizer: Tokenizer, prompt: Any, completion: Any) -> list[int]:
    """Ids of the prompt alone (`completion` None) or of prompt and completion, as text or through the chat template."""
    if isinstance(prompt, str):
        if completion is None:
            return list(tokenizer(prompt, verbose=False)["input_ids"])
        ids = list(tokenizer(prompt + _with_eos(completion, tokenizer), verbose=False)["input_ids"])
        while ids[-2:] == [tokenizer.eos_token_id] * 2:  # a tokenizer that adds one by itself
            ids.pop()
        return ids
    if not tokenizer.chat_template:
        raise ValueError(
            f"{row.place} is a conversation, but the tokenizer has no chat template: set one, or use text rows"
        )
    try:
        return list(
            tokenizer.apply_chat_template(
                prompt + (completion or []),
                add_generation_prompt=completion is None,
                return_dict=True,
                tokenizer_kwargs={"verbose": False},
            )["input_ids"]
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise RowError(f"{row.place}: the chat template rejects this conversation: {error}") from error


def _with_eos(completion: str, tokenizer: Tokenizer) -> str:
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no EOS token, so completions would have no end: set tokenizer.eos_token")
    return completion if completion.endswith(tokenizer.eos_token) else completion + tokenizer.eos_token


def _truncate(ids: list[int], prompt_length: int, max_length: int, mode: Truncation) -> tuple[list[int], int]:
    """(ids, number of prompt tokens left)."""
    if len(ids) <= max_length:
        return ids, prompt_length
    if mode == "keep_start":
        return ids[:max_length], min(prompt_length, max_length)
    return ids[-max_length:], max(0, prompt_length - (len(ids) - max_length))


def _common_prefix(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many leading items both share."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return min(len(ours), len(theirs))
