"""Hidden states and heads of policy and reference → the KL divergence of every token, without the logits of either.

In: hidden states [N D] and a head's weight [V D] of the policy, and [N D_ref] and [V D_ref] of the reference. Out: the
divergence of their two next-token distributions at every position [N], over the full vocabulary. What TDPO, TIS-DPO
and SparsePO add to DPO's margin. Both heads are walked together, tile by tile in rows and in the vocabulary, with
running sums, so the largest things ever held are two tiles of logits and a few arrays of their size. Positions off the
mask are never projected, and the backward pass visits only those whose upstream gradient is not zero.

Cost in units of N·V FLOP, k the share of rows with a gradient: 2·(D + D_ref) forward, (6·D + 2·D_ref)·k backward.

It and `fused` are the modules of the core that need torch; import them by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from selective_pref import _tiles
from selective_pref._tiles import Head

_ROWS = 2048  # of one tile


@torch.compiler.disable  # pyright: ignore[reportUnknownMemberType]
def fused_per_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    direction: Literal["forward", "reverse"],
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float | Literal["same"] = "same",
    softcap: float | None = None,
    ref_softcap: float | Literal["same"] | None = "same",
    temperature: float = 1.0,
    vocab_tile: int | None = None,
) -> Tensor:
    """The KL divergence between policy and reference at every position, over the full vocabulary.

    "forward" is KL(π_ref ‖ π_θ) = Σ_v π_ref(v)·[log π_ref(v) − log π_θ(v)] (TDPO, Zeng et al. 2024; SparsePO);
    "reverse" is KL(π_θ ‖ π_ref) (TIS-DPO's η). Logits are those of `fused_per_token_logps`, of each head by itself.
    Nothing is shifted: entry t is the divergence of the distributions that these hidden states predict.

    Args:
        hidden: the policy's last hidden states, real floating [… D].
        weight: the policy's head [V D].
        ref_hidden: the reference's last hidden states at the same positions [… D_ref]. A constant: it gets no gradient,
            nor do the two following.
        ref_weight: the reference's head [V D_ref]; token v must be the same token in both.
        direction: "forward" or "reverse", see above.
        mask: bool [… ], True where the divergence is wanted; None for everywhere.
        bias: of the policy's head [V], or None.
        ref_bias: of the reference's head [V], or None.
        logit_scale, softcap: of the policy's head, as in `fused_per_token_logps`.
        ref_logit_scale, ref_softcap: of the reference's head; "same" for those of the policy.
        temperature: divides the logits of both, above 0.
        vocab_tile: columns of a tile; None chooses.

    Returns:
        [… ] in nats, in float32, or in float64 where an operand is; 0 off the mask. At least 0 but for rounding:
        float32 may give −1e-6 where the two agree. Infinite where a token that is possible to the first distribution is
        impossible (a logit of −∞) to the second. Gradients flow to hidden, weight and bias; rows with zero upstream
        gradient get exactly zero. Low-precision operands are multiplied with float32 results, and all sums are float32
        or wider.

    Raises:
        TypeError: hidden states, weights or biases not floating; a mask that is not bool.
        ValueError: shapes that do not fit, heads of different V, mixed devices, an option out of range.
        RuntimeError: a second derivative is asked for.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(
            f"direction must be 'forward', KL(ref ‖ policy), or 'reverse', KL(policy ‖ ref); got {direction!r}"
        )
    shared: dict[str, Any] = {"temperature": temperature, "vocab_tile": vocab_tile}
    heads = _Heads(
        policy=_tiles.make_head(logit_scale=logit_scale, softcap=softcap, **shared),
        ref=_tiles.make_head(
            logit_scale=logit_scale if ref_logit_scale == "same" else ref_logit_scale,
            softcap=softcap if ref_softcap == "same" else ref_softcap,
            **shared,
        ),
        reverse=direction == "reverse",
    )
    _check(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask)
    places = hidden.shape[:-1]
    if mask is None:
        rows = torch.arange(places.numel(), device=hidden.device)
    else:
        rows = mask.reshape(-1).nonzero().squeeze(-1)
    flat, ref_flat = hidden.reshape(-1, hidden.shape[-1]), ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
    constants = (ref_flat, ref_weight.detach(), None if ref_bias is None else ref_bias.detach())
    result = cast(Tensor, cast(Any, _FusedKL).apply(flat, weight, bias, *constants, rows, heads))
    return result.reshape(places)


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """The two heads, and which of the two distributions the divergence is an expectation under."""

    policy: Head
    ref: Head
    reverse: bool


class _Walk:
    """The logits of both heads, tile by tile: every part of the vocabulary, and for each every part of the rows."""

    def __init__(
        self, heads: _Heads, policy: tuple[Tensor, Tensor, Tensor | None], ref: tuple[Tensor, Tensor, Tensor | None]
    ) -> None:
        self.heads = heads
        self.sides = (policy, ref)
        precisions = [_tiles.precision(hidden, weight) for hidden, weight, _ in self.sides]
        self.wide = torch.promote_types(precisions[0][0], precisions[1][0])
        self.narrow = [narrow if narrow.itemsize < 4 else self.wide for _, narrow in precisions]
        self.height = min(len(policy[0]), _ROWS)

    def tiles(self) -> Iterator[slice]:
        vocabulary = self.sides[0][1].shape[0]
        return self.heads.policy.tiles(self.height, vocabulary, self.sides[0][1].device) if self.height else iter(())

    def columns(self, tile: slice) -> list[Tensor]:
        """The tile's part of both weights, ready to be multiplied."""
        return [weight[tile].to(narrow) for (_, weight, _), narrow in zip(self.sides, self.narrow, strict=True)]

    def biases(self, tile: slice) -> list[Tensor | None]:
        return [None if bias is None else bias[tile] for _, _, bias in self.sides]

    def rows(self) -> Iterator[slice]:
        count = len(self.sides[0][0])
        for start in range(0, count, self.height or 1):
            yield slice(start, min(start + self.height, count))

    def products(self, rows: slice, columns: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for (hidden, _, _), weight, narrow in zip(self.sides, columns, self.narrow, strict=True):
            z = hidden.new_empty(rows.stop - rows.start, len(weight), dtype=self.wide)
            _tiles.product(hidden[rows].to(narrow), weight.t(), z)
            found.append(z)
        return found


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        rows: Tensor,
        heads: _Heads,
    ) -> Tensor:
        """Running sums over the tiles of both heads, for the rows that count."""
        with torch.autocast(hidden.device.type, enabled=False):
            walk = _Walk(heads, (hidden[rows], weight, bias), (ref_hidden[rows], ref_weight, ref_bias))
            low, zero = (torch.full((len(rows),), x, dtype=walk.wide, device=hidden.device) for x in (-torch.inf, 0.0))
            sums = (low, zero, zero.clone(), low.clone(), zero.clone())
            for tile in walk.tiles():
                columns, biases = walk.columns(tile), walk.biases(tile)
                for some in walk.rows():
                    z, ref_z = walk.products(some, columns)
                    fold = _tiles.elementwise(_sums, z)
                    part = fold(heads, z, ref_z, *biases, *(total[some] for total in sums))
                    for total, value in zip(sums, part, strict=True):
                        total[some] = value
            peak, total, weighted, other_peak, other_total = sums
            normaliser, other = peak + total.log(), other_peak + other_total.log()
            kl = weighted / total - normaliser + other
        policy, ref = (normaliser, other) if heads.reverse else (other, normaliser)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, policy, ref, kl)
        ctx.heads = heads
        return kl.new_zeros(len(hidden)).index_copy_(0, rows, kl)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Recomputes the tiles of the rows whose gradient is not zero, and takes d KL / d logits back to the policy."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_per_token_kl has no second derivative: call backward without create_graph=True, or compute the "
                "divergence from logits"
            )
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, *per_row = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            upstream = gradient[rows].to(per_row[0].dtype)
            live = (upstream != 0).nonzero().squeeze(-1)  # NaN is not 0: it is never skipped
            rows, per_row = rows[live], [*(array[live] for array in per_row), upstream[live]]
            walk = _Walk(ctx.heads, (hidden[rows], weight, bias), (ref_hidden[rows], ref_weight, ref_bias))
            narrow, some_hidden = walk.narrow[0], walk.sides[0][0]
            d_some = torch.zeros_like(some_hidden, dtype=walk.wide) if need_hidden else None
            d_weight = torch.zeros_like(weight) if need_weight else None
            d_bias = torch.zeros_like(bias) if need_bias else None
            for tile in walk.tiles():
                columns, biases = walk.columns(tile), walk.biases(tile)
                d_tile = weight.new_zeros(columns[0].shape, dtype=walk.wide) if need_weight else None
                for some in walk.rows():
                    z, ref_z = walk.products(some, columns)
                    fold = _tiles.elementwise(_gradient, z)
                    factor, sums = fold(ctx.heads, z, ref_z, *biases, *(array[some] for array in per_row), narrow)
                    if d_some is not None:
                        _tiles.accumulate(d_some[some], factor, columns[0])
                    if d_tile is not None:
                        _tiles.accumulate(d_tile, factor.t(), some_hidden[some].to(narrow))
                    if d_bias is not None:
                        d_bias[tile] += sums
                if d_weight is not None and d_tile is not None:
                    d_weight[tile] = d_tile
        d_hidden = None
        if d_some is not None:
            d_hidden = torch.zeros_like(hidden)
            d_hidden[rows] = d_some.to(hidden.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


# The elementwise work on one tile of products of both heads, which may be overwritten. On CUDA it is compiled.


def _sums(
    heads: _Heads,
    z: Tensor,
    ref_z: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    peak: Tensor,
    total: Tensor,
    weighted: Tensor,
    other_peak: Tensor,
    other_total: Tensor,
) -> tuple[Tensor, ...]:
    """The sums of each row, brought up to date with a tile; a are the logits under which the divergence averages.

    Peak of a, Σ exp(a − peak), Σ exp(a − peak)·(a − b), peak of b, Σ exp(b − peak).
    """
    z, ref_z = heads.policy.logits_(z, bias), heads.ref.logits_(ref_z, ref_bias)
    a, b = (z, ref_z) if heads.reverse else (ref_z, z)
    difference = a - b
    peak, scale, a = _exponentials_(a, peak)
    other_peak, other_scale, b = _exponentials_(b, other_peak)
    difference = difference.masked_fill_(a == 0, 0.0).mul_(a)  # an impossible token adds nothing, whatever b says
    return (
        peak,
        scale * total + a.sum(1),
        scale * weighted + difference.sum(1),
        other_peak,
        other_scale * other_total + b.sum(1),
    )


def _exponentials_(z: Tensor, peak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the new peak of each row, the factor that takes older sums to it, exp(z − peak) in the place of z)."""
    higher = torch.maximum(peak, z.amax(1))
    offset = torch.where(higher == -torch.inf, 0.0, higher)  # a tile of −inf logits adds nothing
    return higher, (peak - offset).exp(), z.sub_(offset.unsqueeze(1)).exp_()


def _gradient(
    heads: _Heads,
    z: Tensor,
    ref_z: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    normaliser: Tensor,
    ref_normaliser: Tensor,
    kl: Tensor,
    upstream: Tensor,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Upstream · d KL / d z, taken back to the products, as a factor; and its column sums for a bias.

    forward: π_θ − π_ref. reverse: π_θ·(log π_θ − log π_ref − KL).
    """
    z, ref_z = heads.policy.logits_(z, bias), heads.ref.logits_(ref_z, ref_bias)
    logits = z.clone() if heads.policy.softcap is not None else None
    logps, ref_logps = z.sub_(normaliser.unsqueeze(1)), ref_z.sub_(ref_normaliser.unsqueeze(1))
    if heads.reverse:
        probs = logps.exp()
        gradient = (logps - ref_logps).sub_(kl.unsqueeze(1)).masked_fill_(probs == 0, 0.0).mul_(probs)
    else:
        gradient = logps.exp_().sub_(ref_logps.exp_())
    gradient = heads.policy.chain_(gradient.mul_(upstream.unsqueeze(1)), logits)
    return gradient.to(narrow), gradient.sum(0)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    arrays = {"weight": weight, "bias": bias, "ref_weight": ref_weight, "ref_bias": ref_bias}
    _tiles.check_heads(hidden.device, "hidden", hidden=hidden, ref_hidden=ref_hidden, **arrays)
    _tiles.check_product(hidden, weight, bias)
    _tiles.check_product(ref_hidden, ref_weight, ref_bias, prefix="ref_", width="D_ref")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"hidden and ref_hidden must hold the same positions; got {tuple(hidden.shape)} and "
            f"{tuple(ref_hidden.shape)}"
        )
    if weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(
            f"weight and ref_weight must be of one vocabulary; got V = {weight.shape[0]} and {ref_weight.shape[0]}: "
            "where one is padded, cut it to the tokens of the tokenizer (weight[:V])"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {mask.dtype}: compare it first (mask = labels != -100)")
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(f"mask must be {tuple(hidden.shape[:-1])} like hidden without D; got {tuple(mask.shape)}")
    if mask.device != hidden.device:
        raise ValueError(f"mask must be on the device of hidden, {hidden.device}; got {mask.device}")
