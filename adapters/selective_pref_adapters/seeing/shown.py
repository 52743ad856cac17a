"""What a preference pair shows: the numbers of a `PreferenceLoss` beside the tokens that they belong to.

In: a `PreferenceLoss`, the ids that it was computed from, a tokenizer. Out: `ShownPair`s, plain Python values that
every picture of the package (page, terminal, SVG, JSON, statistics) is drawn from. Works for torch, NumPy and JAX.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selective_pref import PreferenceLoss, Response, alignment_scores
from selective_pref_adapters.seeing.tokens import TokenTexts


@dataclass(frozen=True, kw_only=True)
class ShownResponse:
    """One side of a pair: from its first token that counts to its last, one entry for each token.

    Attributes:
        texts: what each token adds to the text; empty where it ends inside a character.
        ids: token ids.
        special: True for tokens such as end-of-sequence.
        counts: True where the loss's mask is set. Between two turns of an assistant there are tokens that do not
            count: their numbers are 0 and mean nothing.
        logps: log π_θ of each token, nats.
        ref_logps: log π_ref, or None without a reference.
        scores: what the weights were chosen by, nats; the alignment score (Eq. 6) where the loss chose nothing; None
            without a reference.
        weights: what each token counted for.
        reward, selected_reward: of the full response and of its weighted tokens, β included.
    """

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    special: tuple[bool, ...]
    counts: tuple[bool, ...]
    logps: tuple[float, ...]
    ref_logps: tuple[float, ...] | None
    scores: tuple[float, ...] | None
    weights: tuple[float, ...]
    reward: float
    selected_reward: float

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(self.counts)

    @property
    def kept(self) -> float:
        """The sum of the weights."""
        return math.fsum(self.weights)

    @cached_property
    def ranks(self) -> tuple[int | None, ...]:
        """1 for the highest score of the response; equal scores share the better rank. None where nothing counts."""
        if self.scores is None:
            return (None,) * len(self.ids)
        ordered = sorted(-s for s, counts in zip(self.scores, self.counts, strict=True) if counts and s == s)
        return tuple(
            bisect_left(ordered, -s) + 1 if counts and s == s else None
            for s, counts in zip(self.scores, self.counts, strict=True)
        )

    def record(self) -> dict[str, Any]:
        """Everything as JSON takes it; a number that is not finite is None."""
        columns = {
            "texts": self.texts,
            "ids": self.ids,
            "special": self.special,
            "counts": self.counts,
            "per_token_logps": self.logps,
            "ref_per_token_logps": self.ref_logps,
            "scores": self.scores,
            "ranks": self.ranks,
            "weights": self.weights,
        }
        lists = {name: None if c is None else [finite(value) for value in c] for name, c in columns.items()}
        return {"reward": finite(self.reward), "selected_reward": finite(self.selected_reward), **lists}


@dataclass(frozen=True, kw_only=True)
class ShownPair:
    """A preference pair.

    Attributes:
        place: where it came from, as "pairs.jsonl:17".
        prompt: text of the tokens before the response.
        chosen, rejected: its two sides; `rejected` is None in supervised training, which reads the chosen one alone.
        loss: this pair's.
    """

    place: str
    prompt: str
    chosen: ShownResponse
    rejected: ShownResponse | None
    loss: float

    @property
    def sides(self) -> tuple[tuple[str, ShownResponse], ...]:
        """("chosen", …), ("rejected", …); without a rejected side the first alone."""
        chosen = ("chosen", self.chosen)
        return (chosen,) if self.rejected is None else (chosen, ("rejected", self.rejected))

    def record(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        sides = {name: side.record() for name, side in self.sides}
        return {"place": self.place, "prompt": self.prompt, "loss": finite(self.loss), **sides}


def shown_pairs(
    out: PreferenceLoss, ids: Sequence[Sequence[int]], tokenizer: Any, *, places: Sequence[str] | None = None
) -> list[ShownPair]:
    """The pairs of a batch with what the loss read of them.

    Args:
        out: of B pairs.
        ids: token ids [2B T+1], chosen rows first: the batch's `input_ids`. An array, or lists; padding may be left
            out at their ends, for a batch that is padded on the right. [B T+1] for pairs without a rejected side.
        tokenizer: a transformers tokenizer; it turns ids into text.
        places: where each pair came from; default "pair 1", "pair 2", …

    Raises:
        ValueError: ids or places that do not belong to `out`.
    """
    texts = TokenTexts(tokenizer)
    pad = getattr(tokenizer, "pad_token_id", None)
    sides = (out.chosen, out.rejected)
    if all(side.scores is None and side.ref_per_token_logps is not None for side in sides):
        scores: Sequence[Any] = alignment_scores(*sides)
    else:
        scores = [side.scores for side in sides]
    columns = [_columns(side, given) for side, given in zip(sides, scores, strict=True)]
    losses: list[float] = out.losses.tolist()
    rows = _rows_of_ids(ids, len(losses), may_lack_rejected=out.rejected.mask.shape[1] == 0)
    places = [f"pair {n + 1}" for n in range(len(losses))] if places is None else list(places)
    if len(places) != len(losses):
        raise ValueError(f"places must name each of the {len(losses)} pairs; got {len(places)}")
    rewards = [
        (full.tolist(), kept.tolist())
        for full, kept in (
            (out.chosen_rewards, out.chosen_selected_rewards),
            (out.rejected_rewards, out.rejected_selected_rewards),
        )
    ]

    def response(number: int, side: int) -> tuple[ShownResponse, int]:
        row, start, cells = rows[side * len(losses) + number], *_span(columns[side], number)
        if cells and start + 1 + len(cells) > len(row):
            raise ValueError(
                f"ids must be [2B T+1] like the batch that the loss was computed from (2B = {len(rows)}, T + 1 = "
                f"{len(columns[side]['mask'][number]) + 1}); {places[number]} has {len(row)} ids and a token that "
                f"counts at {start + len(cells)}"
            )
        own = row[: start + 1 + len(cells)]
        tokens = own[start + 1 :]
        values = {
            name: None if column is None else tuple(column[number][start : start + len(cells)])
            for name, column in columns[side].items()
            if name != "mask"
        }
        shown = ShownResponse(
            texts=tuple(texts.texts(own, start + 1)),
            ids=tuple(tokens),
            special=tuple(token in texts.special_ids for token in tokens),
            counts=tuple(cells),
            reward=rewards[side][0][number],
            selected_reward=rewards[side][1][number],
            **values,
        )
        return shown, start + 1

    def pair(number: int) -> ShownPair:
        chosen, start = response(number, 0)
        rejected = response(number, 1)[0] if len(rows) > len(losses) else None
        prompt = _without_padding(rows[number][:start], pad)
        return ShownPair(
            place=places[number],
            prompt=texts.text(prompt) if prompt else "",
            chosen=chosen,
            rejected=rejected,
            loss=losses[number],
        )

    return [pair(number) for number in range(len(losses))]


def scores_of(pairs: Iterable[ShownPair]) -> Iterator[float]:
    """Every score of a token that counts."""
    for pair in pairs:
        for _, side in pair.sides:
            if side.scores is not None:
                yield from (score for score, counts in zip(side.scores, side.counts, strict=True) if counts)


def implied_beta(pairs: Sequence[ShownPair]) -> float | None:
    """β, where every reward is β times the summed log-ratio (DPO and its relatives); None for other rewards.

    Where it is known, the rewards of another selection of the same tokens are known, too.
    """
    sums = [(side.reward, _summed_log_ratio(side)) for pair in pairs for _, side in pair.sides]
    known = [(r, t) for r, t in sums if t is not None and math.isfinite(r) and math.isfinite(t)]
    reward, total = max(known, key=lambda both: abs(both[1]), default=(0.0, 0.0))
    if total == 0 or reward / total <= 0:
        return None
    beta = reward / total
    close = all(math.isclose(r, beta * t, rel_tol=1e-3, abs_tol=1e-4 * abs(reward)) for r, t in known)
    return float(f"{beta:.6g}") if close else None


def overlap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The share of one selection that is also in another of the same tokens: Σ min / Σ of the larger one; 1 if both
    are empty."""
    larger = max(math.fsum(ours), math.fsum(theirs))
    return math.fsum(map(min, ours, theirs)) / larger if larger else 1.0


def finite(value: Any) -> Any:
    """`value`, or None for a float that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summed_log_ratio(side: ShownResponse) -> float | None:
    if side.ref_logps is None:
        return None
    return sum(p - q for p, q, counts in zip(side.logps, side.ref_logps, side.counts, strict=True) if counts)


def _columns(side: Response, scores: Any) -> dict[str, Any]:
    """The arrays of one side as lists."""
    arrays = {
        "mask": side.mask,
        "logps": side.per_token_logps,
        "ref_logps": side.ref_per_token_logps,
        "scores": scores,
        "weights": side.token_weights,
    }
    return {name: None if array is None else array.tolist() for name, array in arrays.items()}


def _span(columns: dict[str, Any], number: int) -> tuple[int, list[bool]]:
    """(position of the first token that counts, the mask from there to the last one that does)."""
    mask: list[bool] = columns["mask"][number]
    if True not in mask:
        return len(mask) - 1, []
    first, last = mask.index(True), len(mask) - mask[::-1].index(True)
    return first, mask[first:last]


def _rows_of_ids(ids: Any, pairs: int, *, may_lack_rejected: bool) -> list[list[int]]:
    rows = ids.tolist() if hasattr(ids, "tolist") else [list(row) for row in _checked_rows(ids)]
    fits = len(rows) == 2 * pairs or (may_lack_rejected and len(rows) == pairs)
    if not fits or not all(isinstance(row, list) for row in rows):
        raise ValueError(
            f"ids must be [2B T+1], chosen rows first, with 2B = {2 * pairs} rows (input_ids of the batch); got "
            f"{len(rows)} rows"
        )
    return rows


def _checked_rows(ids: Any) -> Iterator[Sequence[int]]:
    for row in ids:
        if not hasattr(row, "__iter__"):
            raise ValueError(f"ids must be [2B T+1], a row of token ids for each side; got {type(row).__name__} in it")
        yield row.tolist() if hasattr(row, "tolist") else row


def _without_padding(ids: Sequence[int], pad: int | None) -> Sequence[int]:
    """`ids` without padding on the left."""
    start = next((index for index, token in enumerate(ids) if token != pad), len(ids))
    return ids[start:]
