"""Hidden states and a head → per-token log-probs, without the logits: the torch side flow into the first arrow.

In: hidden states [N D], head weight [V D], labels [N]. Out: log-probs [N] in at least float32. The vocabulary is walked
in tiles with a running log-sum-exp, so the largest thing ever held is one tile of logits. Rows labelled `ignore_index`
are never projected, and the backward pass visits only rows whose upstream gradient is not zero: after a selection that
is the selected ones, without the loss and the head knowing of each other.

Cost in units of N·V·D FLOP, k the share of rows with a gradient: 2 forward, 6·k backward (4·k with kept logits),
against 6 for materialised logits and 8 for heads that recompute every row.

It and `fused_kl` are the modules of the core that need torch; import them by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from selective_pref import _tiles
from selective_pref._tiles import Head


@torch.compiler.disable  # pyright: ignore[reportUnknownMemberType]
def fused_per_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_tile: int | None = None,
    keep_logits: bool = False,
) -> Tensor:
    """log softmax(logits)[label] of every row, exactly, with logits that are never held as a whole.

    logits = cap(logit_scale · (hidden · weightᵀ + bias)) / temperature, with cap(z) = softcap · tanh(z / softcap).
    Nothing is shifted: `labels` are the tokens that the hidden states predict.

    Args:
        hidden: real floating [… D].
        weight: real floating [V D]; may be tied, frozen, sharded by a hook that gathers it again for backward.
        labels: int64 [… ] in [0, V), or `ignore_index` for rows that do not count.
        bias: [V] or None.
        logit_scale: factor on the logits, finite and not 0 (Cohere's; 1 / logits_scaling of Granite).
        softcap: Gemma's soft cap, above 0, or None.
        temperature: divides the logits last, above 0.
        ignore_index: the label of rows that are left out: result 0, no gradient, no work.
        vocab_tile: columns of a tile; None chooses by the number of rows.
        keep_logits: keep the logits of the forward pass for backward, which then costs 4·k instead of 6·k. Takes
            [N V] memory.

    Returns:
        [… ] in float32, or float64 where hidden is; 0 where the label is `ignore_index`. Low-precision operands are
        multiplied with float32 results, statistics and sums are float32 or wider. NaN in a counted row's hidden state
        gives NaN; in a row that does not count it changes nothing. Rows with zero upstream gradient get exactly zero
        gradient. The result is attached to the graph even where no row counts.

    Raises:
        TypeError: hidden, weight or bias not floating; labels not int64.
        ValueError: shapes that do not fit, mixed devices, a label outside the vocabulary, an option out of
            range.
        RuntimeError: a second derivative is asked for.
    """
    head = _tiles.make_head(
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        vocab_tile=vocab_tile,
        keep_logits=keep_logits,
    )
    (logps,) = _run(hidden, weight, labels, bias, ignore_index, head)
    return logps


@dataclass(frozen=True, kw_only=True)
class LogitStatistics:
    """What a training log says of the logits that nobody held. Detached; 0 (False) where the label does not count.

    Attributes:
        entropy: of the next-token distribution, in nats: [… ].
        mean_logits: mean over the vocabulary: [… ].
        is_top1: bool [… ], whether no token had a higher logit than the label.
        log_sum_sq_probs: log Σ_v p(v)², at most 0: how sure the distribution is of its next token (WPO, Zhou et al.
            2024, Eq. 2, compares a log-prob with it): [… ].
    """

    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor


@torch.compiler.disable  # pyright: ignore[reportUnknownMemberType]
def fused_logps_and_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_tile: int | None = None,
) -> tuple[Tensor, LogitStatistics]:
    """`fused_per_token_logps`, and statistics of the same logits from the same walk over the vocabulary.

    Costs no further matrix product; one more tile and four more passes over each.

    Args, Raises: as `fused_per_token_logps`.

    Returns:
        (log-probs, statistics), all [… ].
    """
    head = _tiles.make_head(
        logit_scale=logit_scale, softcap=softcap, temperature=temperature, vocab_tile=vocab_tile, statistics=True
    )
    logps, entropy, mean_logits, is_top1, squares = _run(hidden, weight, labels, bias, ignore_index, head)
    return logps, LogitStatistics(entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, log_sum_sq_probs=squares)


def _run(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, head: Head
) -> tuple[Tensor, ...]:
    """What the head was asked for, each in the shape of the labels."""
    _check(hidden, weight, labels, bias)
    rows = _counted_rows(labels.reshape(-1), ignore_index, weight.shape[0])
    counted = labels.reshape(-1)[rows]
    flat = hidden.reshape(-1, hidden.shape[-1])
    results = cast("tuple[Tensor, ...]", cast(Any, _Fused).apply(flat, weight, bias, rows, counted, head))
    return tuple(result.reshape(labels.shape) for result in results)


def _counted_rows(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """Where the labels count [N]: int64, ascending.

    A device is waited for once: the number of places that `nonzero` finds also says whether a label is out of range,
    since then there are more of them than there are labels.
    """
    counts = labels != ignore_index
    strange = counts & ((labels < 0) | (labels >= vocabulary))
    found = torch.cat([counts, strange.any().expand(len(labels) + 1)]).nonzero().squeeze(-1)
    if len(found) > len(labels):
        wrong = int(labels[strange][0])
        raise ValueError(f"labels must be in [0, {vocabulary}) or {ignore_index}; got {wrong}")
    return found


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor, head: Head
    ) -> tuple[Tensor, ...]:
        """Running log-sum-exp over the tiles, for the rows that count; and statistics, if the head is to have them."""
        wide, narrow = _tiles.precision(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            some = hidden[rows].to(narrow)
            vocabulary = weight.shape[0]
            kept = some.new_empty(len(rows), vocabulary, dtype=wide) if head.keep_logits else None
            peak = torch.full((len(rows),), -torch.inf, dtype=wide, device=hidden.device)
            total, picked = torch.zeros_like(peak), torch.zeros_like(peak)
            moments = tuple(torch.zeros_like(peak) for _ in range(3)) if head.statistics else None
            buffer: Tensor | None = None
            spare: Tensor | None = None
            for tile in head.tiles(len(rows), vocabulary, some.device) if len(rows) else ():
                if kept is None and buffer is None:
                    buffer = some.new_empty(len(rows), tile.stop - tile.start, dtype=wide)
                    spare = torch.empty_like(buffer) if head.statistics else None
                z = _tiles.columns(buffer, tile) if kept is None else kept[:, tile]
                _tiles.product(some, weight[tile].to(narrow).t(), z)
                tile_bias = None if bias is None else bias[tile]
                if kept is not None:
                    head.logits_(z, tile_bias)
                    z = z.clone()
                place = labels - tile.start
                if moments is None:
                    fold = _tiles.elementwise(_statistics, z)
                    peak, total, picked = fold(head, z, tile_bias, place, peak, total, picked)
                else:
                    fold = _tiles.elementwise(_more_statistics, z)
                    peak, total, picked, *moments = fold(
                        head, z, _tiles.columns(spare, tile), tile_bias, place, peak, total, picked, *moments
                    )
            log_total = total.log()
            normaliser = peak + log_total
        ctx.save_for_backward(hidden, weight, bias, rows, labels, normaliser, kept)
        ctx.head, ctx.narrow = head, narrow
        results = [picked - normaliser]
        if moments is not None:
            weighted, summed, squared = moments
            results += [log_total - weighted / total, summed / vocabulary, picked >= peak]
            results += [squared.log() - 2 * log_total]
        spread = [result.new_zeros(len(hidden)).index_copy_(0, rows, result) for result in results]
        ctx.mark_non_differentiable(*spread[1:])
        return tuple(spread)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Recomputes the tiles of the rows whose gradient is not zero; (onehot − softmax)·gradient goes back."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_per_token_logps has no second derivative: call backward without create_graph=True, or compute "
                "the log-probs from logits (selective_pref.per_token_logps)"
            )
        hidden, weight, bias, rows, labels, normaliser, kept = ctx.saved_tensors
        head, narrow = ctx.head, ctx.narrow
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            wide = normaliser.dtype
            upstream = gradient[rows].to(wide)
            live = (upstream != 0).nonzero().squeeze(-1)  # NaN is not 0: it is never skipped
            upstream, labels, normaliser, rows = upstream[live], labels[live], normaliser[live], rows[live]
            some = hidden[rows].to(narrow)
            d_some = torch.zeros_like(some, dtype=wide) if need_hidden else None
            d_weight = (torch.empty_like if len(rows) else torch.zeros_like)(weight) if need_weight else None
            d_bias = torch.zeros_like(bias) if need_bias else None
            buffer: Tensor | None = None
            for tile in head.tiles(len(rows), weight.shape[0], some.device) if len(rows) else ():
                if buffer is None:
                    buffer = some.new_empty(len(rows), tile.stop - tile.start, dtype=wide)
                z = _tiles.columns(buffer, tile)
                columns = weight[tile].to(narrow)
                if kept is None:
                    _tiles.product(some, columns.t(), z)
                else:
                    torch.index_select(kept[:, tile], 0, live, out=z)
                tile_bias = None if bias is None else bias[tile]
                fold = _tiles.elementwise(_gradient, z)
                factor, column_sums = fold(head, z, tile_bias, labels - tile.start, normaliser, upstream, narrow)
                if d_some is not None:
                    _tiles.accumulate(d_some, factor, columns)
                if d_weight is not None:
                    if d_weight.dtype == narrow:
                        torch.mm(factor.t(), some, out=d_weight[tile])
                    else:
                        d_weight[tile] = factor.t() @ some
                if d_bias is not None and column_sums is not None:
                    d_bias[tile] = column_sums
        d_hidden = None
        if d_some is not None:
            d_hidden = torch.zeros_like(hidden)
            d_hidden[rows] = d_some.to(hidden.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


# The elementwise work on one tile, [rows, columns] of products. On a CPU it happens in the tile's own buffer; on CUDA
# the same lines are compiled into one pass that reads the tile and leaves it alone.


def _statistics(
    head: Head, z: Tensor, bias: Tensor | None, place: Tensor, peak: Tensor, total: Tensor, picked: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Peak, sum of exponentials and label logit of each row, brought up to date with a tile.

    `place` is where the row's label stands, counted from the first column of the tile; it may lie outside.
    """
    if torch.compiler.is_compiling():
        z = z.clone()
    if not head.keep_logits:
        z = head.logits_(z, bias)
    inside, index = _inside(place, z)
    picked = torch.where(inside, z.gather(1, index.unsqueeze(1)).squeeze(1), picked)
    higher = torch.maximum(peak, z.amax(1))
    offset = torch.where(higher == -torch.inf, 0.0, higher)  # a tile of −inf logits adds nothing
    total = total * (peak - offset).exp() + z.sub_(offset.unsqueeze(1)).exp_().sum(1)
    return higher, total, picked


def _more_statistics(
    head: Head,
    z: Tensor,
    spare: Tensor,
    bias: Tensor | None,
    place: Tensor,
    peak: Tensor,
    total: Tensor,
    picked: Tensor,
    weighted: Tensor,
    summed: Tensor,
    squared: Tensor,
) -> tuple[Tensor, ...]:
    """As `_statistics`, and also Σ exp(z − peak)·(z − peak), which gives the entropy, Σ z, and Σ exp(z − peak)²."""
    if torch.compiler.is_compiling():
        z, spare = z.clone(), spare.clone()
    z = head.logits_(z, bias)
    inside, index = _inside(place, z)
    picked = torch.where(inside, z.gather(1, index.unsqueeze(1)).squeeze(1), picked)
    summed = summed + z.sum(1)
    higher = torch.maximum(peak, z.amax(1))
    offset = torch.where(higher == -torch.inf, 0.0, higher)
    shift = torch.where(peak == -torch.inf, 0.0, peak - offset)  # nothing was added up before the first finite logit
    z.sub_(offset.unsqueeze(1))
    torch.exp(z, out=spare)
    z.clamp_(min=-1e4)  # exp of it is 0 as well, and 0 · −inf would be NaN
    weighted = shift.exp() * (weighted + shift * total) + z.mul_(spare).sum(1)
    total = shift.exp() * total + spare.sum(1)
    squared = (2 * shift).exp() * squared + spare.square_().sum(1)
    return higher, total, picked, weighted, summed, squared


def _gradient(
    head: Head,
    z: Tensor,
    bias: Tensor | None,
    place: Tensor,
    normaliser: Tensor,
    upstream: Tensor,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """(onehot − softmax) · upstream, taken back to the products, as a factor; and its column sums for a bias."""
    if torch.compiler.is_compiling():
        z = z.clone()
    if not head.keep_logits:
        z = head.logits_(z, bias)
    logits = z.clone() if head.softcap is not None else None
    z.sub_(normaliser.unsqueeze(1)).exp_().mul_(-upstream.unsqueeze(1))
    inside, index = _inside(place, z)
    z.scatter_add_(1, index.unsqueeze(1), torch.where(inside, upstream, 0.0).unsqueeze(1))
    head.chain_(z, logits)
    return z.to(narrow), None if bias is None else z.sum(0)


def _inside(place: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a label stands in this tile, and an index that is legal in any case."""
    return (place >= 0) & (place < z.shape[1]), place.clamp(0, z.shape[1] - 1)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    _tiles.check_heads(labels.device, "labels", hidden=hidden, weight=weight, bias=bias)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 token ids; got {labels.dtype}")
    _tiles.check_product(hidden, weight, bias)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must be {tuple(hidden.shape[:-1])} like hidden without D; got {tuple(labels.shape)}")
