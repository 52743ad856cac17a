"""The metrics of a run over all its processes, numbers that are not finite, and the signs of a run that goes wrong.

In: diagnostics and losses of one process's batches. Out: means over all processes, decisions that are the same on all
of them, errors that name rows, warnings. Without an initialised process group there is one process, and nothing is
sent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import mean, variance

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor

from selective_pref import NonFiniteError, PreferenceLoss, check_finite

SELF_REFERENCE = (
    "the reference equals the initial policy. Every alignment score then starts at 0, a token that moves drops out of "
    "the selection, and Selective-DPO hardly learns. Give a stronger ref_model of the same tokenizer, or set "
    "selection_ratio to 1 (plain DPO)"
)

SIGNS = {
    "self_reference": SELF_REFERENCE,
    "falling": (
        "the full-sequence margin ({prefix}rewards/margins) is falling: the policy moves towards the rejected "
        "responses. Look at the learning rate, at swapped pairs, and at whether the reference prefers the chosen side"
    ),
    "below_half": (
        "the full-sequence accuracy ({prefix}rewards/accuracies) has been below one half for long. Beside a reference "
        "that is stronger than the policy it starts low, and should rise; otherwise look for swapped pairs"
    ),
    "non_finite": "pairs with NaN or infinite reference log-probs were left out ({prefix}selection/skipped_pairs): "
    "find them and compute their log-probs again",
    "ties": (
        "most tokens stand on the selection's threshold together ({prefix}selection/tied_fraction): policy and "
        "reference are (nearly) equal, or log-probs were rounded. Give a stronger reference, or set selection_ratio "
        "to 1"
    ),
}
"""The warnings about a run that looks wrong, by kind."""
MOSTLY_TIED = 0.5
"""A larger share of tokens on the threshold is the sign "ties"."""


def mean_over_pairs(batches: Sequence[Mapping[str, Tensor]], pairs: Sequence[int]) -> dict[str, float]:
    """Means of `diagnostics` over all pairs of all batches of all processes; every process must call it.

    Args:
        batches: metrics of each batch, 0-d, of the same names in every batch and process.
        pairs: how many pairs each batch held: a mean of means over unequal batches would favour small ones.

    Returns:
        Plain numbers, the same on every process; one read-back from the device in all.
    """
    if not batches:
        return {}
    names = list(batches[0])
    values = torch.stack([torch.stack([batch[name].detach().double() for name in names]) for batch in batches])
    weights = torch.tensor(pairs, dtype=values.dtype, device=values.device)
    total = torch.cat([weights @ values, weights.sum().unsqueeze(0)])
    if _distributed():
        dist.all_reduce(total)
    *sums, count = total.tolist()
    return {name: value / count for name, value in zip(names, sums, strict=True)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowMeans:
    """What a window held, over all processes.

    Attributes:
        values: the mean of each metric over the pairs; empty where there were none.
        pairs: how many pairs that was.
        left_out: how many further pairs were left out because their numbers were not finite.
    """

    values: dict[str, float]
    pairs: int
    left_out: int


class MetricWindow:
    """Sums of the metrics of the batches since the last log line; they stay on the device until they are logged."""

    def __init__(self) -> None:
        self.clear()

    def add(self, metrics: Mapping[str, Tensor], *, pairs: int, left_out: int = 0) -> None:
        """Adds one batch.

        Args:
            metrics: its means, 0-d, of the same names in every batch and process.
            pairs: how many pairs they are means of; with 0 the values do not matter.
            left_out: how many pairs of the batch were left out because their numbers were not finite.
        """
        values = torch.stack([value.detach().double() for value in metrics.values()])
        self._names = list(metrics)
        self._sums = torch.zeros_like(values) if self._sums is None else self._sums
        if pairs:
            self._sums = self._sums + values * pairs
        self._pairs += pairs
        self._left_out += left_out

    def means(self) -> WindowMeans:
        """Means over all pairs of all processes; every process must call it. One read-back from the device in all."""
        if self._sums is None:
            return WindowMeans(values={}, pairs=0, left_out=0)
        counts = self._sums.new_tensor([self._pairs, self._left_out])
        total = torch.cat([self._sums, counts])
        if _distributed():
            dist.all_reduce(total)
        *sums, pairs, left_out = total.tolist()
        values = {name: value / pairs for name, value in zip(self._names, sums, strict=True)} if pairs else {}
        return WindowMeans(values=values, pairs=round(pairs), left_out=round(left_out))

    def close(self) -> WindowMeans:
        """`means`; the window is empty afterwards."""
        means = self.means()
        self.clear()
        return means

    def clear(self) -> None:
        """Empties the window."""
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._pairs = self._left_out = 0


def own_pairs(pairs: int) -> int:
    """How many of a batch's `pairs` belong to this process alone, the first ones, during an evaluation of a `Trainer`.

    So that all processes have batches of one size, the last batch of an evaluation is filled up with pairs that were
    seen before. Counted again, they would change the means.
    """
    state = GradientState()
    if not (state.end_of_dataloader and state.remainder > 0):
        return pairs
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return min(max(state.remainder - rank * pairs, 0), pairs)


def evaluation_mean(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean loss [] of a batch's counted pairs; in an evaluation's last batch, of those of all processes.

    The `Trainer` gathers this number from each process, once per row of a batch, and keeps as many of the gathered
    numbers as the last batch has rows of its own. Where all of them are the mean over all processes, its `eval_loss` is
    the mean over the evaluation pairs. Every process must call it.

    Args:
        losses: one per pair [B].
        counted: which pairs count, bool [B]: see `own_pairs`.
    """
    total, count = losses[counted].sum(), counted.sum()
    if not GradientState().end_of_dataloader:
        return total / count.clamp(min=1)
    sums = torch.stack([total.double(), count.double()])
    if _distributed():
        dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).to(losses.dtype)


def finite_everywhere(losses: Tensor) -> bool:
    """Whether every loss of every process is finite: the same answer on all of them, so that all may act alike."""
    return not anywhere((~torch.isfinite(losses.detach())).any(), losses.device)


def anywhere(flag: bool | Tensor, device: torch.device) -> bool:
    """Whether `flag` is set on any process; every process must call it, and gets the same answer.

    Args:
        flag: of this process.
        device: one that the process group can send from.
    """
    flags = torch.as_tensor(flag, dtype=torch.float32, device=device)
    if _distributed():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def non_finite_error(out: PreferenceLoss, where: str, places: Sequence[str] = ()) -> NonFiniteError:
    """The error that names what is not finite in this process's batch, or says that it is in another process's batch.

    Args:
        out: the losses of this process's batch.
        where: what to put in front, as ``"step 3"``.
        places: where each pair of the batch came from (``"pairs.jsonl:17"``), if that is known.
    """
    rows = (
        f". Rows of this batch: {', '.join(f'{row} = {place}' for row, place in enumerate(places))}" if places else ""
    )
    if bool(torch.isfinite(out.losses).all()):
        return NonFiniteError(f"{where}: the loss of another process is not finite; see its message{rows}")
    try:
        check_finite(out.chosen, out.rejected)
    except NonFiniteError as error:
        return NonFiniteError(f"{where}: {error}{rows}")
    return NonFiniteError(f"{where}: the loss is not finite although every log-prob is{rows}")


def wrong_signs(seen: Sequence[Sequence[float]], patience: int) -> list[str]:
    """Kinds of warning that a series of [full margin, full accuracy] gives rise to.

    "falling": of the last 2 · patience margins, the later half lies below the earlier one by more than three standard
    errors of their difference. "below_half": the last 2 · patience accuracies are all below 0.5.
    """
    if len(seen) < 2 * patience:
        return []
    margins, accuracies = zip(*seen[-2 * patience :], strict=True)
    earlier, later = margins[:patience], margins[patience:]
    error = ((variance(earlier) + variance(later)) / patience) ** 0.5
    found = ["falling"] if mean(later) < mean(earlier) - 3 * error else []
    return found + (["below_half"] if max(accuracies) < 0.5 else [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the log of a run shows.

    Attributes:
        moved: a sentence on whether the full margin and accuracy rose or fell, or the loss of supervised training,
            which has neither; empty without two values of them.
        rose: whether the full margin ended above its beginning, or the loss of supervised training below it.
        warnings: kind, as in `SIGNS` → sentence.
    """

    moved: str
    rose: bool
    warnings: dict[str, str]

    @property
    def sentences(self) -> list[str]:
        """What moved, then what looks wrong."""
        return [*filter(None, [self.moved]), *(f"Warning: {warning}." for warning in self.warnings.values())]


def verdict(
    lines: Sequence[Mapping[str, float | None]], *, selection_ratio: float = 1.0, patience: int = 10
) -> Verdict:
    """What the log of a run shows: whether the full margin and accuracy rose or fell, and what looks wrong.

    The full-sequence numbers decide, since the selected ones are biased by the selection. They are those of the
    evaluations, or of the training lines of a run without two evaluations. Margins of a run whose β changes are
    compared at its last β.

    Args:
        lines: of the log, oldest first: metric → value, with `eval_` in front at evaluations; None or NaN where a
            value was not finite.
        selection_ratio: the run's, where its log does not say (`selection/ratio`); 1 where nothing is selected.
        patience: how many training lines are compared with as many before them.
    """
    series = {prefix: _margins_and_accuracies(lines, prefix) for prefix in ("", "eval_")}
    patiences = {"": patience, "eval_": max(3, patience // 3)}
    signs = {kind: name for name, seen in series.items() for kind in wrong_signs(seen, patiences[name])}
    prefix = "eval_" if len(series["eval_"]) > 1 else ""
    moved, rose = "", False
    if len(series[prefix]) > 1:
        (first_margin, first_accuracy), (last_margin, last_accuracy) = series[prefix][0], series[prefix][-1]
        rose = last_margin > first_margin
        moved = (
            f"The full margin ({prefix}rewards/margins) {_moved(first_margin, last_margin)}, the full accuracy "
            f"({prefix}rewards/accuracies) {_moved(first_accuracy, last_accuracy)}."
        )
        if last_margin < first_margin and last_accuracy < first_accuracy:
            signs.setdefault("falling", prefix)
    elif not any(series.values()):
        moved, rose = _supervised(lines)
    for line in lines:
        ratio = line.get("selection/ratio") or selection_ratio
        for name in series:
            for kind in _signs_of_line(line, name, selects=ratio < 1):
                signs.setdefault(kind, name)
    return Verdict(
        moved=moved, rose=rose, warnings={kind: SIGNS[kind].format(prefix=name) for kind, name in signs.items()}
    )


def _signs_of_line(line: Mapping[str, float | None], prefix: str, *, selects: bool) -> list[str]:
    """Kinds of warning that one line of a log gives rise to, by itself."""
    found = ["non_finite"] if (line.get(f"{prefix}selection/skipped_pairs") or 0) > 0 else []
    if selects and (line.get(f"{prefix}selection/tied_fraction") or 0) > MOSTLY_TIED:
        found.append("ties")
    if selects and line.get("step") == 0 and all(line.get(f"{prefix}rewards/{s}") == 0 for s in ("chosen", "rejected")):
        found.append("self_reference")
    return found


def _margins_and_accuracies(lines: Sequence[Mapping[str, float | None]], prefix: str) -> list[list[float]]:
    """[full margin, full accuracy] of each line that has both; margins at the last β."""
    names = (f"{prefix}rewards/margins", f"{prefix}rewards/accuracies")
    found = [[*(line.get(name) for name in names), line.get("selection/beta") or 1.0] for line in lines]
    finite = [
        (margin, accuracy, beta)
        for margin, accuracy, beta in found
        if margin is not None and accuracy is not None and math.isfinite(margin) and math.isfinite(accuracy)
    ]
    return [[margin * (finite[-1][2] / beta), accuracy] for margin, accuracy, beta in finite]


def _supervised(lines: Sequence[Mapping[str, float | None]]) -> tuple[str, bool]:
    """Whether the loss of supervised training fell: the sentence, and the answer. It logs no rejected side."""
    for prefix in ("eval_", ""):
        alone = [line for line in lines if f"{prefix}rewards/chosen" in line and f"{prefix}rewards/margins" not in line]
        seen = [line.get(f"{prefix}loss") for line in alone]
        losses = [loss for loss in seen if loss is not None and math.isfinite(loss)]
        if len(losses) > 1:
            return f"The loss ({prefix}loss) {_moved(losses[0], losses[-1])}.", losses[-1] < losses[0]
    return "", False


def _moved(first: float, last: float) -> str:
    if f"{first:.4g}" == f"{last:.4g}":
        return f"stayed at {last:.4g}"
    return f"{'rose' if last > first else 'fell'} from {first:.4g} to {last:.4g}"


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
