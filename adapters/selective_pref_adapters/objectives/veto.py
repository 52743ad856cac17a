"""`teacher_veto_loss` as an objective: its numbers, and a warning where the teacher vetoes too much. Experimental.

In: pairs with the teacher's log-probs as reference, and log-probs of the policy's own start. Out: losses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from selective_pref import PreferenceLoss, Response, VetoSides, teacher_veto_loss

logger = logging.getLogger(__name__)

MUCH, ENOUGH = 0.12, 4096
"""The share of vetoed tokens that is warned of, once so many tokens have been seen."""
NO_START = (
    "objective 'teacher_veto' compares the teacher (the reference) with the policy as it was before training: give the "
    "policy's own start as scoring_ref_model, or its log-probs as scoring_reference_store"
)


@dataclass(frozen=True)
class TeacherVeto:
    """The teacher's veto with its numbers bound; see `selective_pref.teacher_veto_loss`.

    Attributes:
        threshold: τ in nats: vetoed is what the teacher finds that much less likely than the start does.
        floor: m in nats: how far below the teacher a vetoed token is pushed.
        sides: "both" or "labelled".
        seen: how many tokens so far, and how many of them were vetoed.
    """

    threshold: float
    floor: float
    sides: VetoSides
    seen: list[int] = field(default_factory=lambda: [0, 0], compare=False, repr=False)

    def __call__(
        self, chosen: Response, rejected: Response, *, start: tuple[Tensor, Tensor] | None = None
    ) -> PreferenceLoss:
        """The losses of a batch of pairs.

        Args:
            chosen, rejected: [B T], with the teacher's log-probs as reference.
            start: log-probs of the same tokens under the policy's own start, chosen and rejected: [B T] each.

        Raises:
            ValueError: there are no log-probs of the start, or a number is out of range.
        """
        if start is None:
            raise ValueError(NO_START)
        numbers = {"threshold": self.threshold, "floor": self.floor}
        out = teacher_veto_loss(chosen, rejected, start_per_token_logps=start, sides=self.sides, **numbers)
        self._watch(out)
        return out

    def _watch(self, out: PreferenceLoss) -> None:
        """Warns once where more than about a tenth of the tokens is vetoed."""
        if self.seen[0] > ENOUGH:
            return
        for side in (out.chosen, out.rejected):
            assert side.scores is not None
            self.seen[0] += int(side.mask.sum())
            self.seen[1] += int(((side.scores <= -self.threshold) & side.mask).sum())
        if self.seen[0] > ENOUGH and self.seen[1] > MUCH * self.seen[0]:
            logger.warning(
                "the teacher vetoes %.0f %% of the first %d tokens: more than about a tenth means that it writes in "
                "another style than the policy, and its veto then teaches that style",
                100 * self.seen[1] / self.seen[0],
                self.seen[0],
            )
