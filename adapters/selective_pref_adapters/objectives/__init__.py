"""The names and numbers of a configuration → the loss of a batch.

objective      a name → a function (chosen, rejected) → PreferenceLoss; what it gives for a batch; schedules
named_losses   the pair losses by TRL's names, and the options that each of them reads
veto           the teacher's veto
"""

from __future__ import annotations

from selective_pref_adapters.objectives.objective import (
    CHOSEN_ONLY,
    Schedule,
    Selective,
    WithSft,
    as_names,
    check_objective,
    logged_numbers,
    loss_of_batch,
    make_objective,
    needs_reference,
    pair_loss,
    policy_weights,
    selective_objective,
    selects,
    unread,
    without_rounding,
)
from selective_pref_adapters.objectives.veto import TeacherVeto

__all__ = [
    "CHOSEN_ONLY",
    "Schedule",
    "Selective",
    "TeacherVeto",
    "WithSft",
    "as_names",
    "check_objective",
    "logged_numbers",
    "loss_of_batch",
    "make_objective",
    "needs_reference",
    "pair_loss",
    "policy_weights",
    "selective_objective",
    "selects",
    "unread",
    "without_rounding",
]
