"""`selective-pref demo`: the training job on a language in which it is known which tokens decide.

In: a seed. Out: a folder with the data, the models, `results.json` and a page of what the loss read; two tables and, in
plain sentences, what they show.

    facts → supervised student (half of its facts doubtful) and teacher (clean) → preference runs → sampled answers

The preference runs are `deepspeed_loop.train`, the library's own job; only data, supervised start and judging are here.
Every sentence is made from the numbers of this run, and says so when they do not show what one would expect.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from selective_pref import select
from selective_pref_adapters.batch import responses
from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import TokenizedPair, collate, read_rows, tokenize_pairs
from selective_pref_adapters.replication.language import (
    Language,
    check_disjoint,
    make_language,
    make_tokenizer,
    preference_rows,
    split_prompts,
    supervised_texts,
    write_rows,
)
from selective_pref_adapters.replication.measures import Rate, decisive_mask, difference, sample_answers, success_rate
from selective_pref_adapters.replication.pictures import show_selection
from selective_pref_adapters.replication.supervised import (
    SUPERVISED_BATCH,
    load,
    make_model,
    save,
    train_supervised,
)

BETA = 0.01
RATIO = 0.4
SWAPPED_LABELS = 0.2
SUPERVISED_ERRORS = 0.5
HELD_OUT_PROMPTS = 0.2
BATCH = 32

# Found beforehand on other seeds, a handful of rates for each; the controls show both methods at both.
RATE_ALL_TOKENS = 1e-4
RATE_SELECTED = 1e-3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    student_steps: int
    finished_steps: int
    teacher_steps: int
    preference_steps: int
    eval_pairs: int
    samples: int


FULL = Scale(
    student_steps=250, finished_steps=500, teacher_steps=300, preference_steps=150, eval_pairs=256, samples=1000
)
QUICK = Scale(student_steps=10, finished_steps=10, teacher_steps=10, preference_steps=3, eval_pairs=32, samples=64)


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """A model trained on answers alone: a start, or the strong reference."""

    key: str
    title: str
    size: int
    steps: int
    error_rate: float


def supervised_models(scale: Scale) -> tuple[Supervised, ...]:
    """The student, the same with more steps, and the teacher."""
    return (
        Supervised(
            key="student",
            title="SFT, stopped early: the start",
            size=64,
            steps=scale.student_steps,
            error_rate=SUPERVISED_ERRORS,
        ),
        Supervised(
            key="finished",
            title="SFT, finished: the start",
            size=64,
            steps=scale.finished_steps,
            error_rate=SUPERVISED_ERRORS,
        ),
        Supervised(
            key="teacher", title="the strong reference itself", size=96, steps=scale.teacher_steps, error_rate=0.0
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """One preference run: a row of the table. `ref_model` "teacher" is the strong reference, `start` the own start."""

    key: str
    title: str
    start: str = "student"
    ref_model: str
    learning_rate: float
    selective: bool

    def named(self) -> str:
        """Title, start, reference and learning rate on one line."""
        finished = " from the finished start" if self.start == "finished" else ""
        return f"{self.title}{finished}, reference {self.reference}, learning rate {short(self.learning_rate)}"

    @property
    def reference(self) -> str:
        """The reference in words."""
        return "strong" if self.ref_model == "teacher" else "own start"


def dpo(key: str, learning_rate: float, *, title: str = "DPO", start: str = "student", ref_model: str = "") -> Method:
    """A run that moves every token; without `ref_model` its own start is the reference."""
    ref_model = ref_model or start
    return Method(key=key, title=title, start=start, ref_model=ref_model, learning_rate=learning_rate, selective=False)


def selective(key: str, learning_rate: float, *, start: str = "student", ref_model: str = "teacher") -> Method:
    """A run that moves the selected tokens."""
    return Method(
        key=key, title="Selective-DPO", start=start, ref_model=ref_model, learning_rate=learning_rate, selective=True
    )


MAIN = (
    dpo("dpo", RATE_ALL_TOKENS),
    dpo("distilled_dpo", RATE_ALL_TOKENS, title="distilled DPO", ref_model="teacher"),
    selective("selective_strong", RATE_SELECTED),
    selective("selective_self", RATE_SELECTED, ref_model="student"),
)
OTHER_RATE = (dpo("dpo_other_rate", RATE_SELECTED), selective("selective_other_rate", RATE_ALL_TOKENS))
FINISHED = (
    dpo("dpo_finished", RATE_ALL_TOKENS, start="finished"),
    selective("selective_finished", RATE_SELECTED, start="finished"),
)
METHODS = (*MAIN, *OTHER_RATE, *FINISHED)

SHOWN: dict[str, Any] = {"policy": "student", "reference": "teacher", "selection_ratio": RATIO, "beta": BETA}
"""What the page shows: the run with the strong reference, at its first step."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Share of decisive tokens, in [0, 1]: among the selected ones, and among all tokens of the responses."""

    chosen: float
    rejected: float
    chosen_base: float
    rejected_base: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What one seed showed; the sentences are made from it."""

    success: dict[str, Rate]
    shares: dict[str, Share]
    evaluations: dict[str, dict[str, dict[str, float]]]
    seconds: dict[str, float]


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    options = parser().parse_args(argv)
    scale = QUICK if options.quick else FULL
    output_dir = free_folder(Path(options.output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    disable_progress_bar()  # of loading and saving models; ours are those of training
    seeds = range(options.seed, options.seed + options.seeds)
    start = time.monotonic()
    runs: dict[int, Findings] = {}
    with one_thread():
        for seed in seeds:
            console.print(opening(seed, scale), soft_wrap=True)
            runs[seed] = run(output_dir / f"seed-{seed}", seed, scale)
            show(console, runs[seed], seed)
            write_results(output_dir / "results.json", runs, scale)  # after every seed: none is lost
    if len(runs) > 1:
        console.print(spread_table(runs))
    console.print(f"{time.monotonic() - start:.0f} s; data, models and results.json: {output_dir}", soft_wrap=True)
    for seed in seeds:
        console.print(show_selection(output_dir / f"seed-{seed}", **SHOWN), soft_wrap=True)
    return 0


def run(folder: Path, seed: int, scale: Scale) -> Findings:
    """Everything for one seed, in order; writes data and models into `folder`."""
    language = make_language(seed)
    tokenizer = make_tokenizer()
    held_out = write_data(folder, language, seed, scale)
    seconds = {}

    for supervised in supervised_models(scale):
        with clock(seconds, supervised.key):
            prompts = training_prompts(seed, supervised.key, supervised.steps * SUPERVISED_BATCH)
            rng = random.Random(f"supervised answers {supervised.key} {seed}")
            texts = supervised_texts(language, prompts, rng, error_rate=supervised.error_rate)
            model = make_model(tokenizer, supervised.size, seed)
            train_supervised(model, tokenizer, texts, supervised.key)
            save(model, tokenizer, folder / supervised.key)

    evaluations = {}
    with (folder / "training.log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        for number, method in enumerate(METHODS, start=1):
            tqdm.write(f"run {number} of {len(METHODS)}: {method.named()}", file=sys.stderr)
            with clock(seconds, method.key):
                result = train(preference_config(method, folder, seed, scale))
            evaluations[method.key] = {"before": result.summary["before"], "after": result.summary["after"]}

    success = {}
    with clock(seconds, "answers"):
        for name in ("student", "finished", "teacher", *(method.key for method in METHODS)):
            answers = sample_answers(load(folder / name), tokenizer, held_out, seed)
            success[name] = success_rate(language, held_out, answers)
    shares = {}
    with clock(seconds, "selection"):
        pairs, _ = tokenize_pairs(read_rows(folder / "eval_pairs.jsonl"), tokenizer, max_length=64)
        for method in MAIN:
            if method.selective:
                reference = load(folder / method.ref_model)
                for when, policy in (("before", method.start), ("after", method.key)):
                    shares[f"{method.key} {when}"] = decisive_share(load(folder / policy), reference, pairs, tokenizer)
    return Findings(success=success, shares=shares, evaluations=evaluations, seconds=seconds)


# --- data ------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, language: Language, seed: int, scale: Scale) -> list[str]:
    """Writes the facts and both files of preference rows; returns the held-out prompts that answers are sampled for."""
    folder.mkdir(parents=True)
    prompts = split_prompts(seed, HELD_OUT_PROMPTS)
    check_disjoint(prompts.train, prompts.held_out)
    facts = {"table": language.table, "doubtful": sorted(language.doubtful)}
    (folder / "language.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    rng = random.Random(f"pairs {seed}")
    train_prompts = training_prompts(seed, "pairs", scale.preference_steps * BATCH)
    write_rows(folder / "pairs.jsonl", preference_rows(language, train_prompts, rng, swapped=SWAPPED_LABELS))
    asked, paired = prompts.held_out[: scale.samples], prompts.held_out[-scale.eval_pairs :]
    write_rows(folder / "eval_pairs.jsonl", preference_rows(language, paired, rng, swapped=SWAPPED_LABELS))
    return asked


def training_prompts(seed: int, use: str, count: int) -> list[str]:
    """`count` prompts drawn from those that are not held out; the only source of prompts for any training."""
    return random.Random(f"training prompts {use} {seed}").choices(split_prompts(seed, HELD_OUT_PROMPTS).train, k=count)


# --- preference runs -------------------------------------------------------------------------------------------------


def preference_config(method: Method, folder: Path, seed: int, scale: Scale) -> TrainConfig:
    """The run as `selective-pref train` would be told to do it."""
    return TrainConfig(
        model=str(folder / method.start),
        ref_model=str(folder / method.ref_model),
        pairs=str(folder / "pairs.jsonl"),
        eval_pairs=str(folder / "eval_pairs.jsonl"),
        output_dir=str(folder / method.key),
        objective="selective_dpo" if method.selective else "dpo",
        beta=BETA,
        learning_rate=method.learning_rate,
        max_steps=scale.preference_steps,
        batch_size=BATCH,
        seed=seed,
        **({"selection_ratio": RATIO} if method.selective else {}),
    )


# --- judging ---------------------------------------------------------------------------------------------------------


def decisive_share(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    tokenizer: PreTrainedTokenizerFast,
) -> Share:
    """How much of the selected weight lies on decisive tokens: Σ weight·decisive / Σ weight, over all pairs.

    The base rate is the same with weight 1 on every token of the responses.
    """
    batch = collate(pairs, tokenizer.pad_token_id)
    with torch.no_grad():
        logps, ref_logps = model_per_token_logps(policy, batch), model_per_token_logps(reference, batch)
    sides = select(*responses(batch, logps, ref_logps), selection_ratio=RATIO)
    decisive = decisive_mask(pairs, tokenizer, logps.shape[1])
    selected = [
        float((s.token_weights * d).sum() / s.token_weights.sum()) for s, d in zip(sides, decisive, strict=True)
    ]
    base = [float(d.sum() / s.mask.sum()) for s, d in zip(sides, decisive, strict=True)]
    return Share(chosen=selected[0], rejected=selected[1], chosen_base=base[0], rejected_base=base[1])


# --- what the reader sees --------------------------------------------------------------------------------------------


def opening(seed: int, scale: Scale) -> str:
    """What is about to happen."""
    text = (
        f"seed {seed}: supervised training of a student (half of its facts wrong half of the time; once stopped early, "
        f"once to the end) and of a larger teacher (clean); then {len(METHODS)} preference runs, "
        f"{scale.preference_steps} steps of {BATCH} pairs each, {100 * SWAPPED_LABELS:.0f} % of the labels swapped. "
        "(What the training job prints goes to training.log.)"
    )
    return text if scale is FULL else f"{text} Too few steps to learn anything: this only shows that it runs."


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


def compared(one: Rate, other: Rate) -> str:
    """`difference` in words."""
    return {1: "clearly more", 0: "no clear difference", -1: "clearly less"}[difference(one, other)]


def short(learning_rate: float) -> str:
    """0.001 → 1e-3."""
    return f"{learning_rate:.0e}".replace("e-0", "e-")


def percent(share: float) -> str:
    """0.123 → 12.3 %."""
    return f"{100 * share:.1f} %"


# --- around it -------------------------------------------------------------------------------------------------------


def write_results(path: Path, runs: Mapping[int, Findings], scale: Scale) -> None:
    """Everything that was shown, as JSON."""
    results = {
        "settings": {
            "scale": dataclasses.asdict(scale),
            "methods": [dataclasses.asdict(method) for method in METHODS],
            "beta": BETA,
            "selection_ratio": RATIO,
            "batch_size": BATCH,
            "swapped_labels": SWAPPED_LABELS,
            "supervised_errors": SUPERVISED_ERRORS,
        },
        "runs": [
            {
                "seed": seed,
                "success": {key: rate.record() for key, rate in findings.success.items()},
                "decisive_shares": {key: dataclasses.asdict(share) for key, share in findings.shares.items()},
                "held_out_pairs": findings.evaluations,
                "sentences": sentences(findings),
                "seconds": findings.seconds,
            }
            for seed, findings in runs.items()
        ],
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def free_folder(path: Path) -> Path:
    """`path` if it is absent or empty, else the first of `path`-2, `path`-3, … that is."""

    def free(folder: Path) -> bool:
        return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))

    number = 1
    while not free(folder := path if number == 1 else path.with_name(f"{path.name}-{number}")):
        number += 1
    return folder


@contextlib.contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes how long the block took."""
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 2)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are faster on one thread, and the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="selective-pref demo",
        description=(
            "A small language in which it is known which tokens decide, the library's own training job on it, and what "
            "DPO and Selective-DPO make of it. No network, one CPU thread, under five minutes."
        ),
    )
    flags.add_argument("--seed", type=int, default=0, help="of the language, the data and the models (default: 0)")
    flags.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="repeat with N seeds, from --seed up (default: 1)"
    )
    flags.add_argument(
        "--output-dir",
        default="runs/demo",
        metavar="DIR",
        help="data, models and results.json; if it holds anything, DIR-2, DIR-3, … is taken (default: runs/demo)",
    )
    flags.add_argument(
        "--quick", action="store_true", help="a few steps of everything: shows that it runs, not what it learns"
    )
    return flags


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number
