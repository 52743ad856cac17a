"""What one seed of the demo showed, as tables and plain sentences.

In: `Findings`. Out: text. Every sentence is made from the numbers, and says so when they do not show what one would
expect.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from selective_pref_adapters.replication.judging import Rate, Share
from selective_pref_adapters.replication.runs import (
    FINISHED,
    FULL,
    MAIN,
    METHODS,
    OTHER_RATE,
    RATE_ALL_TOKENS,
    RATE_SELECTED,
    RATIO,
    SWAPPED_LABELS,
    short,
    supervised_models,
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What one seed showed; the sentences are made from it."""

    success: dict[str, Rate]
    shares: dict[str, Share]
    evaluations: dict[str, dict[str, dict[str, float]]]
    seconds: dict[str, float]


def show(console: Console, findings: Findings, seed: int) -> None:
    """Tables and sentences of one seed."""
    console.print(success_table(findings, seed))
    console.print(share_table(findings))
    for sentence in sentences(findings):
        console.print(f"• {sentence}")
    console.print()


def success_table(findings: Findings, seed: int) -> Table:
    """A row a model, with standard errors; the start stands above the runs that began there."""
    samples = findings.success["student"].samples
    table = Table(title=f"seed {seed}: all four digits right, in {samples} answers to unseen prompts")
    table.add_column("model")
    table.add_column("reference")
    for column in ("learning rate", "right ± s.e."):
        table.add_column(column, justify="right")
    titles = {model.key: model.title for model in supervised_models(FULL)}

    def add(title: str, key: str, reference: str = "", rate: str = "") -> None:
        success = findings.success[key]
        table.add_row(title, reference, rate, f"{100 * success.value:.1f} ± {100 * success.error:.1f} %")

    add(titles["student"], "student")
    for group, suffix in ((MAIN, ""), (OTHER_RATE, ", other rate")):
        for method in group:
            add(f"  {method.title}{suffix}", method.key, method.reference, short(method.learning_rate))
    table.add_section()
    add(titles["finished"], "finished")
    for method in FINISHED:
        add(f"  {method.title}", method.key, method.reference, short(method.learning_rate))
    table.add_section()
    add(titles["teacher"], "teacher")
    return table


def share_table(findings: Findings) -> Table:
    """How much of what is selected decides, before and after."""
    table = Table(title=f"tokens that decide, among the selected {100 * RATIO:.0f} %", min_width=52)
    table.add_column("reference")
    for column in ("chosen", "rejected"):
        table.add_column(column, justify="right")
    first = findings.shares["selective_strong before"]
    table.add_row("(base rate: of all tokens)", percent(first.chosen_base), percent(first.rejected_base))
    for key, title in (("selective_strong", "strong"), ("selective_self", "own start")):
        for when, moment in (("before", "step 0"), ("after", "after training")):
            share = findings.shares[f"{key} {when}"]
            table.add_row(f"{title}, {moment}", percent(share.chosen), percent(share.rejected))
    return table


def spread_table(runs: Mapping[int, Findings]) -> Table:
    """Mean, standard deviation and range over the seeds."""
    table = Table(title=f"{len(runs)} seeds: all four digits right, %")
    table.add_column("model")
    for column in ("mean", "s.d.", "min", "max"):
        table.add_column(column, justify="right")
    titles = {model.key: model.title for model in supervised_models(FULL)}
    titles |= {method.key: method.named() for method in METHODS}
    for key, title in titles.items():
        values = [100 * findings.success[key].value for findings in runs.values()]
        numbers = statistics.mean(values), statistics.stdev(values), min(values), max(values)
        table.add_row(title, *(f"{number:.1f}" for number in numbers))
    return table


def sentences(findings: Findings) -> list[str]:
    """What the numbers show, one plain sentence or two for each thing worth knowing."""
    return [
        against_dpo(findings.success),
        against_distilled(findings.success),
        at_each_others_rate(findings.success),
        from_the_finished_start(findings.success),
        self_referenced(findings),
        selected_tokens(findings.shares["selective_strong before"], findings.shares["selective_strong after"]),
        margins(findings.evaluations["selective_strong"]),
    ]


def against_dpo(success: Mapping[str, Rate]) -> str:
    """The headline."""
    start, dpo, strong, teacher = (success[key] for key in ("student", "dpo", "selective_strong", "teacher"))
    return (
        f"Selective-DPO with the strong reference answers {strong} right, DPO {dpo}: {compared(strong, dpo)}. "
        f"Both began at {start}; the strong model itself answers {teacher}."
    )


def against_distilled(success: Mapping[str, Rate]) -> str:
    """Is it the strong reference, or the selection?"""
    dpo, distilled, strong = (success[key] for key in ("dpo", "distilled_dpo", "selective_strong"))
    seen = f"Distilled DPO has the same strong reference but moves every token: {distilled}, "
    if difference(strong, distilled) <= 0:
        return (
            f"{seen}{compared(distilled, strong)} as against Selective-DPO: here the selection itself gained nothing."
        )
    seen += f"{compared(distilled, dpo)} as against DPO and less than Selective-DPO. "
    if difference(distilled, dpo) <= 0:
        return (
            f"{seen}At ratio 1 a reference only weighs the pairs, and that gained nothing; "
            "under selection it decides which tokens move."
        )
    return f"{seen}Part of the gain comes with the reference alone, the rest with letting it decide which tokens move."


def at_each_others_rate(success: Mapping[str, Rate]) -> str:
    """How much of the difference is the learning rate."""
    strong, dpo, strong_low, dpo_high = (
        success[key] for key in ("selective_strong", "dpo", "selective_other_rate", "dpo_other_rate")
    )
    high, low = difference(strong, dpo_high), difference(strong_low, dpo)
    seen = (
        "The two differ in learning rate too, so here is each at the other's. "
        f"At {short(RATE_SELECTED)}: Selective-DPO {strong}, DPO {dpo_high} ({compared(strong, dpo_high)}). "
        f"At {short(RATE_ALL_TOKENS)}: Selective-DPO {strong_low}, DPO {dpo} ({compared(strong_low, dpo)})."
    )
    if difference(strong, dpo) <= 0:
        return seen
    if high > 0 and low > 0:
        return f"{seen} Selective-DPO was ahead at both."
    if high > 0:
        return f"{seen} Its lead comes with standing the higher rate."
    return f"{seen} Its lead does not hold at equal rates."


def from_the_finished_start(success: Mapping[str, Rate]) -> str:
    """How much of the difference is the unfinished start."""
    dpo, strong, start, dpo_late, strong_late = (
        success[key] for key in ("dpo", "selective_strong", "finished", "dpo_finished", "selective_finished")
    )
    early, late = 100 * (strong.value - dpo.value), 100 * (strong_late.value - dpo_late.value)
    seen = (
        f"From a start that has finished its supervised training ({start}) Selective-DPO answers {strong_late}, DPO "
        f"{dpo_late}: {compared(strong_late, dpo_late)}, {late:+.1f} points where it was {early:+.1f}."
    )
    if difference(strong, dpo) > 0 and late < early / 2:
        return f"{seen} Most of the lead above belongs to the unfinished start."
    return seen


def self_referenced(findings: Findings) -> str:
    """The policy's own start as reference."""
    start, own, strong = (findings.success[key] for key in ("student", "selective_self", "selective_strong"))
    tied = findings.evaluations["selective_self"]["before"]["eval_selection/tied_fraction"]
    seen = (
        f"With its own start as reference Selective-DPO goes from {start} to {own}: {compared(own, start)}. "
        f"Every score starts at 0 ({percent(tied)} of the tokens are tied at step 0)"
    )
    if difference(own, start) < 0:
        return f"{seen}, and what moved did harm. Choose a reference that knows more than the policy."
    if own.value - start.value < 0.25 * max(strong.value - start.value, 0) or difference(own, start) == 0:
        return (
            f"{seen}, and a token that moves the right way drops out of the selection: "
            "choose a reference that knows more than the policy."
        )
    return f"{seen}, so that is more than one would expect."


def selected_tokens(before: Share, after: Share) -> str:
    """Does the score find what decides?"""
    chosen, rejected = before.chosen / before.chosen_base, before.rejected / before.rejected_base
    found = "finds tokens that decide" if min(chosen, rejected) > 1 else "does not find what decides on both sides"
    fell = after.chosen < before.chosen and after.rejected < before.rejected
    changed = "it falls, as tokens that reach the reference drop out" if fell else "it does not fall on both sides here"
    return (
        f"At step 0 the score of the strong run {found}: {percent(before.chosen)} of the selected chosen tokens and "
        f"{percent(before.rejected)} of the rejected ones do, {chosen:.1f} and {rejected:.1f} times the base rate. "
        f"After training it is {percent(after.chosen)} and {percent(after.rejected)}: {changed}."
    )


def margins(evaluation: Mapping[str, Mapping[str, float]]) -> str:
    """Selected against full margin."""

    def values(name: str) -> tuple[float, float]:
        return evaluation["before"][f"eval_{name}"], evaluation["after"][f"eval_{name}"]

    selected, full = values("selection/rewards/margins"), values("rewards/margins")
    accuracy, loss = values("rewards/accuracies"), values("loss")
    seen = (
        f"On held-out pairs the margin of the selected tokens goes from {selected[0]:.3f} to {selected[1]:.3f} and the "
        f"loss from {loss[0]:.3f} to {loss[1]:.3f} (log 2 is {math.log(2):.3f}); the margin of the whole answers goes "
        f"from {full[0]:.3f} to {full[1]:.3f} and their accuracy from {accuracy[0]:.2f} to {accuracy[1]:.2f} "
        f"({100 * SWAPPED_LABELS:.0f} % of these labels are swapped too)."
    )
    if selected[0] >= 0:
        return f"{seen} The selected margin did not begin below 0, which is unusual."
    if full[1] > full[0]:
        return (
            f"{seen} Selection takes the tokens that look worst, so the first begins below 0: judge by whether the "
            "second rises."
        )
    return f"{seen} The selected margin begins below 0, as selection makes it; but the full margin did not rise either."


def difference(one: Rate, other: Rate) -> int:
    """1 if `one` is above `other` by more than two standard errors, −1 if below, 0 if neither."""
    error = math.hypot(one.error, other.error)
    gap = one.value - other.value
    return 0 if abs(gap) <= 2 * error else (1 if gap > 0 else -1)


def compared(one: Rate, other: Rate) -> str:
    """`difference` in words."""
    return {1: "clearly more", 0: "no clear difference", -1: "clearly less"}[difference(one, other)]


def percent(share: float) -> str:
    """0.123 → 12.3 %."""
    return f"{100 * share:.1f} %"
