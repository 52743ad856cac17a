"""What a run says of itself, over all its processes: metrics, broken numbers, a reference that teaches nothing.

In: diagnostics and losses of one process's batches. Out: means over all processes, one decision on all of them, errors
that name rows. Without an initialised process group there is one process, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, variance

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
    "find them and score them again",
    "ties": (
        "most tokens stand on the selection's threshold together ({prefix}selection/tied_fraction): policy and "
        "reference are (nearly) equal, or log-probs were rounded. Give a stronger reference, or set selection_ratio "
        "to 1"
    ),
}
"""What a run that looks wrong is told, by kind."""
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


def finite_everywhere(losses: Tensor) -> bool:
    """Whether every loss of every process is finite: the same answer on all of them, so that all may act alike."""
    return not anywhere((~torch.isfinite(losses.detach())).any(), losses.device)


def anywhere(flag: bool | Tensor, device: torch.device) -> bool:
    """Whether `flag` is set on any process; every process must ask, and gets the same answer.

    Args:
        flag: of this process.
        device: one that the process group can send from.
    """
    flags = torch.as_tensor(flag, dtype=torch.float32, device=device)
    if _distributed():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def non_finite_error(out: PreferenceLoss, where: str, places: Sequence[str] = ()) -> NonFiniteError:
    """The error that says what is broken: in this process's batch if it is there, else that another's is.

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


def same_weights(policy: nn.Module, reference: nn.Module | None) -> bool:
    """Whether the reference is, weight for weight, the policy."""
    if reference is None:
        return False
    ours, theirs = _weights(policy), _weights(reference)
    return ours.keys() == theirs.keys() and all(_equal(ours[name], theirs[name]) for name in ours)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name; of one that ZeRO-3 has sharded, this process's part."""
    return {name: getattr(parameter, "ds_tensor", parameter).detach() for name, parameter in model.named_parameters()}


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs.to(ours.device))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
