"""What is selected over a data set: by side, position, class of token and token, and how much two selections share.

In: `ShownPair`s, and the same pairs under another policy, reference or precision. Out: numbers, which `figures` draws.
"""

from __future__ import annotations

import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selective_pref import top_fraction_weights
from selective_pref_adapters.seeing.shown import ShownPair, ShownResponse, overlap
from selective_pref_adapters.seeing.tokens import printable

RATIOS = (0.2, 0.4, 0.6, 0.8)
"""Shares at which two selections are compared."""
POSITIONS = 20
"""Parts that a response is cut into, from its first token to its last."""
SCORE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_NAMED = 12  # tokens that a table names
_RARE = 10  # tokens that occur less often are not named
_BINS = 60


@dataclass(frozen=True, kw_only=True)
class SideStatistics:
    """One side of all pairs.

    Attributes:
        tokens: how many tokens count.
        kept: their summed weights over their number.
        score_quantiles: nats, at `SCORE_QUANTILES`.
        histogram: share of the tokens in each bin of `Statistics.score_edges`.
        by_position: kept share in each of the `POSITIONS` parts of a response; None where no token stands.
        by_class: class of token → (how many, kept share).
    """

    tokens: int
    kept: float
    score_quantiles: list[float]
    histogram: list[float]
    by_position: list[float | None]
    by_class: dict[str, tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A data set under one policy and one reference.

    Attributes:
        pairs: how many.
        sides: "chosen" and "rejected".
        score_edges: edges of the bins of the scores, nats; what lies beyond counts in the outer bins.
        most_kept, least_kept: (token, how many, kept share, mean score), both sides together, tokens that are not rare.
        overlaps: what the pairs were compared with → the shared part of the two selections at each of `RATIOS`.
    """

    pairs: int
    sides: dict[str, SideStatistics]
    score_edges: list[float]
    most_kept: list[tuple[str, int, float, float]]
    least_kept: list[tuple[str, int, float, float]]
    overlaps: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a page shows as a table: a caption, names of the columns, rows of text."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: bool = True
    """Whether all columns but the first hold numbers."""


def statistics_of(pairs: Sequence[ShownPair], others: Mapping[str, Sequence[ShownPair]] | None = None) -> Statistics:
    """Counts what is kept.

    Args:
        pairs: with scores.
        others: name → the same pairs in the same order, scored otherwise.

    Raises:
        ValueError: no token has a finite score; or the others are other pairs.
    """
    sides = {name: _flat([dict(pair.sides)[name] for pair in pairs]) for name in ("chosen", "rejected")}
    scores = np.concatenate([side["score"] for side in sides.values()])
    if not np.isfinite(scores).any():
        raise ValueError("no token of these pairs has a finite score: statistics need a reference")
    low, high = np.quantile(scores[np.isfinite(scores)], [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    ranked = _by_token(pairs)
    named = sorted((row for row in ranked if row[1] >= _RARE), key=lambda row: (-row[2], -row[1], row[0]))
    return Statistics(
        pairs=len(pairs),
        sides={name: _side_statistics(side, edges) for name, side in sides.items()},
        score_edges=[float(edge) for edge in edges],
        most_kept=named[:_NAMED],
        least_kept=named[::-1][: min(_NAMED, max(0, len(named) - _NAMED))],
        overlaps={name: _overlaps(pairs, theirs, name) for name, theirs in (others or {}).items()},
    )


def token_class(text: str, special: bool) -> str:
    """ "special", "part of a character", "whitespace", "digits", "punctuation" or "words"."""
    if special:
        return "special"
    if text == "":
        return "part of a character"
    inner = text.strip()
    if not inner:
        return "whitespace"
    if all(c.isdigit() for c in inner):
        return "digits"
    if all(unicodedata.category(c)[0] in "PS" for c in inner):
        return "punctuation"
    return "words"


def data_tables(found: Statistics) -> list[Table]:
    """The numbers that are read rather than looked at."""
    tables = [
        Table(
            caption=f"Scores in nats, {found.pairs} pairs",
            head=("side", "tokens", "kept", *(f"{100 * q:g} %" for q in SCORE_QUANTILES)),
            rows=[
                (name, f"{side.tokens:,}", f"{100 * side.kept:.1f} %", *(f"{q:+.3f}" for q in side.score_quantiles))
                for name, side in found.sides.items()
            ],
        )
    ]
    for caption, rows in (("Tokens that are kept most", found.most_kept), ("and least", found.least_kept)):
        if rows:
            tables.append(
                Table(
                    caption=f"{caption} (of those that occur at least {_RARE} times)",
                    head=("token", "occurs", "kept", "mean score"),
                    rows=[(text, f"{n:,}", f"{100 * kept:.1f} %", f"{score:+.3f}") for text, n, kept, score in rows],
                )
            )
    if found.overlaps:
        rows = [(name, *(f"{100 * share:.1f} %" for share in shares)) for name, shares in found.overlaps.items()]
        by_chance = ("by chance", *(f"{100 * ratio:.0f} %" for ratio in RATIOS))
        tables.append(
            Table(
                caption="The same tokens kept under another policy, reference or precision, by the share that is kept",
                head=("compared with", *(f"{100 * ratio:.0f} %" for ratio in RATIOS)),
                rows=[*rows, by_chance],
            )
        )
    return tables


def _flat(sides: Sequence[ShownResponse]) -> dict[str, np.ndarray]:
    """Columns over all tokens that count."""
    columns: dict[str, list[Any]] = {"score": [], "weight": [], "part": [], "class": []}
    for side in sides:
        for number, (text, special, score, weight) in enumerate(_counting(side)):
            columns["score"].append(score)
            columns["weight"].append(weight)
            columns["part"].append(number * POSITIONS // side.tokens)
            columns["class"].append(token_class(text, special))
    return {name: np.array(values) for name, values in columns.items()}


def _counting(side: ShownResponse) -> Iterator[tuple[str, bool, float, float]]:
    scores = side.scores if side.scores is not None else (math.nan,) * len(side.ids)
    columns = zip(side.texts, side.special, scores, side.weights, side.counts, strict=True)
    return ((text, special, score, weight) for text, special, score, weight, counts in columns if counts)


def _side_statistics(side: dict[str, np.ndarray], edges: np.ndarray) -> SideStatistics:
    score, weight = side["score"], side["weight"]
    finite = score[np.isfinite(score)]
    counts, _ = np.histogram(np.clip(finite, edges[0], edges[-1]), bins=edges)

    def kept(where: np.ndarray) -> float | None:
        return float(weight[where].mean()) if where.any() else None

    classes = sorted(set(side["class"].tolist()), key=lambda name: -(side["class"] == name).sum())
    return SideStatistics(
        tokens=len(score),
        kept=float(weight.mean()) if len(weight) else 0.0,
        score_quantiles=[float(q) for q in np.quantile(finite, SCORE_QUANTILES)] if len(finite) else [],
        histogram=(counts / max(1, counts.sum())).tolist(),
        by_position=[kept(side["part"] == part) for part in range(POSITIONS)],
        by_class={name: (int((side["class"] == name).sum()), kept(side["class"] == name) or 0.0) for name in classes},
    )


def _by_token(pairs: Sequence[ShownPair]) -> list[tuple[str, int, float, float]]:
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for pair in pairs:
        for _, side in pair.sides:
            for text, _, score, weight in _counting(side):
                total = sums[text]
                total[0] += 1
                total[1] += weight
                total[2] += score
    return [(_quoted(t), int(n), kept / n, score / n) for t, (n, kept, score) in sums.items() if t != ""]


def _quoted(text: str) -> str:
    """A token of which leading and trailing spaces show."""
    return printable(text).replace("\n", "").replace("\t", "").replace(" ", "␣")


def _overlaps(pairs: Sequence[ShownPair], others: Sequence[ShownPair], name: str) -> list[float]:
    """The mean over all responses at each ratio."""
    ours, theirs = ([side for pair in some for _, side in pair.sides] for some in (pairs, others))
    if [side.ids for side in ours] != [side.ids for side in theirs]:
        raise ValueError(f"{name}: the pairs to compare with hold other tokens")
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.tokens]
    return [
        float(np.mean([overlap(_weights(one, ratio), _weights(other, ratio)) for one, other in both]))
        for ratio in RATIOS
    ]


def _weights(side: ShownResponse, ratio: float) -> list[float]:
    if side.scores is None:
        raise ValueError("a selection needs scores, and scores a reference")
    return top_fraction_weights(np.array([side.scores]), np.array([side.counts]), ratio)[0].tolist()
