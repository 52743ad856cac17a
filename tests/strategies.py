"""Batches to test with, the array libraries to test in, and the losses that a law may speak about.

Log-probs are dyadic (multiples of 1/8 or whole numbers) unless a test asks for others: sums and differences of them
are then exact in every order, and ties are common. Cells off the mask hold garbage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import array_api_strict
import hypothesis.strategies as st
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import torch

import oracle
from oracle import Batch, Rows, Side
from selective_pref import (
    PreferenceLoss,
    Response,
    dpo_loss,
    excess_loss_scores,
    select,
    selective_dpo_loss,
    sft_loss,
    simpo_loss,
)

jax.config.update("jax_enable_x64", True)
with_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # of JAX before 0.8

GARBAGE = [math.nan, math.inf, -math.inf, 0.0, -7.5, 1e30]


# --- array libraries ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """An array library and a floating dtype of it."""

    library: str
    dtype: str = "float64"

    @property
    def id(self) -> str:
        return f"{self.library}-{self.dtype}"

    @property
    def xp(self) -> Any:
        return {"numpy": np, "torch": torch, "jax": jnp, "strict": array_api_strict}[self.library]

    @property
    def epsilon(self) -> float:
        """Rounding of what comes out: at least float32."""
        return 2.0**-52 if self.dtype == "float64" else 2.0**-23

    def array(self, rows: Any, dtype: str | None = None) -> Any:
        """Nested lists (or a NumPy array) in this library, floating as `dtype`, bool as bool."""
        dtype = dtype or self.dtype
        values = np.array(rows)
        if values.dtype != bool:
            values = values.astype(np.float64)
        elif self.library in ("numpy", "jax", "strict"):
            return self.xp.asarray(values)
        else:
            return torch.tensor(values)
        if self.library == "torch":
            return torch.tensor(values).to(getattr(torch, dtype))
        if self.library == "jax":
            return jnp.asarray(values).astype(dtype)
        return self.xp.asarray(values.astype(dtype))

    def response(self, side: Side, **other: Any) -> Response:
        """A side of a batch as a `Response`; other fields as nested lists."""
        shape = (len(side.mask), len(side.mask[0]))
        arrays = {name: self.array(np.reshape(rows, shape)) for name, rows in other.items()}
        return Response(
            per_token_logps=self.array(np.reshape(side.policy, shape)),
            mask=self.array(np.reshape(np.array(side.mask, dtype=bool), shape)),
            **{"ref_per_token_logps": self.array(np.reshape(side.ref, shape)), **arrays},
        )

    def pair(self, batch: Batch) -> tuple[Response, Response]:
        return self.response(batch.chosen), self.response(batch.rejected)


def numpy_of(array: Any) -> np.ndarray:
    """Any library's array as NumPy's, floats widened to float64."""
    if isinstance(array, torch.Tensor):
        array = array.detach()
        array = array.double() if array.is_floating_point() else array
    values = np.asarray(array)
    return values if values.dtype == bool else values.astype(np.float64)


NUMPY, TORCH = Backend("numpy"), Backend("torch")
STRICT, JAX = Backend("strict"), Backend("jax")
FLOAT64 = [NUMPY, TORCH, STRICT]
EVERY_DTYPE = [
    *FLOAT64,
    Backend("numpy", "float32"),
    Backend("torch", "float32"),
    Backend("torch", "bfloat16"),
    Backend("torch", "float16"),
    Backend("strict", "float32"),
]


# --- batches -----------------------------------------------------------------------------------------------------


@st.composite
def _mask(draw: st.DrawFn, width: int) -> list[bool]:
    kind = draw(st.sampled_from(["full", "right", "left", "holes"]))
    if kind == "full":
        return [True] * width
    if kind == "holes":
        return draw(st.lists(st.booleans(), min_size=width, max_size=width))
    tokens = draw(st.integers(0, width))
    row = [True] * tokens + [False] * (width - tokens)
    return row if kind == "right" else row[::-1]


@st.composite
def _side(draw: st.DrawFn, rows: int, width: int, values: st.SearchStrategy[float], self_referenced: bool) -> Side:
    masks = [draw(_mask(width)) for _ in range(rows)]

    def cells() -> Rows:
        real = [draw(st.lists(values, min_size=width, max_size=width)) for _ in range(rows)]
        hidden = draw(st.lists(st.sampled_from(GARBAGE), min_size=3, max_size=3))
        return [
            [x if here else hidden[(i + j) % 3] for j, (x, here) in enumerate(zip(row, mask, strict=True))]
            for i, (row, mask) in enumerate(zip(real, masks, strict=True))
        ]

    policy = cells()
    return Side(policy, policy if self_referenced else cells(), masks)


WHOLE = st.integers(-3, 0).map(float)  # scores tie all the time
EIGHTHS = st.integers(-64, 0).map(lambda n: n / 8)
REAL = st.floats(-20.0, 0.0, allow_subnormal=False)


@st.composite
def batches(
    draw: st.DrawFn,
    values: st.SearchStrategy[float] | None = None,
    max_pairs: int = 3,
    max_width: int = 6,
    self_referenced: bool = False,
) -> Batch:
    """Ragged pairs: widths of their own per side, empty responses, left and right padding, holes."""
    if values is None:
        values = draw(st.sampled_from([WHOLE, EIGHTHS]))
    rows = draw(st.integers(1, max_pairs))
    width = draw(st.integers(0, max_width))
    other = draw(st.sampled_from([width, draw(st.integers(0, max_width))]))
    return Batch(*(draw(_side(rows, w, values, self_referenced)) for w in (width, other)))


@st.composite
def moved(draw: st.DrawFn, batch: Batch, sides: tuple[int, ...] = (0, 1), direction: int = 0) -> Batch:
    """The batch with another policy: anywhere, or with every log-prob of the named sides raised by 0 or more."""
    after = []
    for number, side in enumerate(batch):
        width = len(side.mask[0])
        policy = side.policy
        if number in sides:
            steps = [
                draw(st.lists(st.integers(0 if direction else -24, 24), min_size=width, max_size=width))
                for _ in side.mask
            ]
            policy = [
                [p + step / 8 if here else p for p, step, here in zip(*row, strict=True)]
                for row in zip(side.policy, steps, side.mask, strict=True)
            ]
        after.append(side._replace(policy=policy))
    return Batch(*after)


def tokens(side: Side) -> list[list[tuple[float, float]]]:
    """(policy, ref) of the tokens that count, row by row."""
    return [
        [(p, q) for p, q, here in zip(*row, strict=True) if here]
        for row in zip(side.policy, side.ref, side.mask, strict=True)
    ]


def rebuilt(side: Side, order: Callable[[list[int]], list[int]]) -> Side:
    """The side with the columns of each row in another order; `order` maps column numbers of a row."""
    columns = [order(list(range(len(row)))) for row in side.mask]
    return Side(*([[row[c] for c in cs] for row, cs in zip(rows, columns, strict=True)] for rows in side))


RATIOS = st.one_of(
    st.sampled_from([0.4, 0.5, 0.07, 0.1, 0.3, 1 / 3, 0.30000000000000004, 1e-05, 0.999, 1.0, 1]),
    st.integers(1, 1000).map(lambda n: n / 1000),
    st.floats(1e-9, 1.0),
)
BETAS = st.sampled_from([0.01, 0.1, 0.5, 1.0, 2.5, 10.0])


# --- losses ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The numbers of a loss."""

    beta: float = 0.5
    ratio: float = 0.4
    gamma: float = 0.3
    label_smoothing: float = 0.1


SETTINGS = st.builds(Settings, beta=BETAS, ratio=RATIOS)


@dataclass(frozen=True)
class Loss:
    """A loss as the library computes it, and what the oracle needs to compute it too."""

    id: str
    family: str  # "dpo", "simpo" or "sft"
    selective: bool = False
    smoothed: bool = False
    pool: str = "response"
    ties: str = "share"
    excess: bool = False  # selected by Rho-1's score

    def __call__(self, chosen: Response, rejected: Response, s: Settings) -> PreferenceLoss:
        if self.selective:
            ratio = {"selection_ratio": s.ratio, "pool": self.pool, "ties": self.ties}
            if self.family == "dpo":
                smoothing = {"label_smoothing": s.label_smoothing} if self.smoothed else {}
                return selective_dpo_loss(chosen, rejected, beta=s.beta, **ratio, **smoothing)
            chosen, rejected = select(chosen, rejected, scores=excess_loss_scores if self.excess else None, **ratio)
        return self.of_weighted(chosen, rejected, s)

    def of_weighted(self, chosen: Response, rejected: Response, s: Settings) -> PreferenceLoss:
        """The loss with whatever weights the responses carry."""
        if self.family == "sft":
            return sft_loss(chosen, rejected)
        smoothing = s.label_smoothing if self.smoothed else 0.0
        if self.family == "simpo":
            return simpo_loss(chosen, rejected, beta=s.beta, gamma=s.gamma, label_smoothing=smoothing)
        return dpo_loss(chosen, rejected, beta=s.beta, label_smoothing=smoothing)

    def weights(self, batch: Batch, s: Settings) -> tuple[Rows, Rows]:
        """The oracle's weights."""
        if not self.selective:
            return oracle.full(batch)
        scores = (oracle.excess_loss_scores if self.excess else oracle.alignment_scores)(batch)
        return oracle.select(batch, s.ratio, self.pool, self.ties, scores)

    def numbers(self, s: Settings) -> dict[str, float]:
        """The oracle's keyword arguments."""
        if self.family == "sft":
            return {}
        return {"beta": s.beta, "gamma": s.gamma, "label_smoothing": s.label_smoothing if self.smoothed else 0.0}

    def plain(self) -> Loss:
        """The same loss without selection."""
        return replace(self, selective=False)

    @property
    def steepness(self) -> Callable[[Settings], float]:
        """How much the loss may change per nat: β, and 1 for supervised training."""
        return (lambda s: 1.0) if self.family == "sft" else (lambda s: s.beta)


LOSSES = [
    Loss("dpo", "dpo"),
    Loss("dpo-smoothed", "dpo", smoothed=True),
    Loss("simpo", "simpo"),
    Loss("simpo-smoothed", "simpo", smoothed=True),
    Loss("sft", "sft"),
    Loss("selective", "dpo", selective=True),
    Loss("selective-smoothed", "dpo", selective=True, smoothed=True),
    Loss("selective-pair", "dpo", selective=True, pool="pair"),
    Loss("selective-batch", "dpo", selective=True, pool="batch"),
    Loss("selective-first", "dpo", selective=True, ties="first"),
    Loss("selective-all", "dpo", selective=True, ties="all"),
    Loss("selective-simpo", "simpo", selective=True),
    Loss("selective-sft", "sft", selective=True, excess=True),
]
BY_NAME = {loss.id: loss for loss in LOSSES}


def named(*names: str) -> list[Loss]:
    return [BY_NAME[name] for name in names]


def except_for(*names: str) -> list[Loss]:
    return [loss for loss in LOSSES if loss.id not in names]


def torch_leaf(batch: Batch, dtype: torch.dtype = torch.float64) -> tuple[Response, Response]:
    """The pair in torch with gradients switched on for the policy."""
    pair = Backend("torch", str(dtype).removeprefix("torch.")).pair(batch)
    chosen, rejected = (replace(side, per_token_logps=side.per_token_logps.requires_grad_()) for side in pair)
    return chosen, rejected


def gradients(loss: Loss, batch: Batch, s: Settings) -> tuple[np.ndarray, np.ndarray]:
    """torch's gradients of the summed losses with respect to the policy's log-probs of both sides."""
    chosen, rejected = torch_leaf(batch)
    loss(chosen, rejected, s).losses.sum().backward()
    both = (chosen.per_token_logps, rejected.per_token_logps)
    return tuple(numpy_of(p.grad if p.grad is not None else torch.zeros_like(p)) for p in both)
