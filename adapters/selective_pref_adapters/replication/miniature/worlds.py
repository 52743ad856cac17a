"""What all runs of one seed share: facts, pairs, a start, its references, and what each of them says of every token.

In: a seed. Out: a folder with the pairs, the models and one store of log-probs, made once; and from it a `World`.

    student    supervised, stopped early, half of its facts wrong half of the time: the start of every run
    weak       the student after DPO with itself as reference: the paper's weak reference
    teacher    larger, trained on clean facts: the strong reference
    stranger   as good as the teacher, but of another style: it fills its answers otherwise
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from selective_pref import dpo_loss
from selective_pref_adapters.batch import labels_of, responses
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.pairs import TokenizedPair, collate, read_rows, tokenize_pairs
from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space
from selective_pref_adapters.replication.miniature.judging import decisive_mask
from selective_pref_adapters.replication.miniature.language import (
    OTHER_STYLE,
    PLAIN,
    Language,
    Style,
    check_disjoint,
    make_language,
    make_tokenizer,
    preference_rows,
    split_prompts,
    supervised_texts,
    write_rows,
)
from selective_pref_adapters.replication.miniature.supervised import (
    SUPERVISED_BATCH,
    load,
    make_model,
    save,
    train_supervised,
)

HELD_OUT_PROMPTS = 0.2
SUPERVISED_ERRORS = 0.5
SWAPPED_LABELS = 0.2
BATCH = 32
WEAK_RATE, WEAK_BETA = 1e-4, 0.1
MODELS = ("student", "weak", "teacher", "stranger")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything. `steps` are preference steps, of `BATCH` pairs each."""

    student_steps: int
    teacher_steps: int
    steps: int
    pairs: int
    eval_pairs: int
    samples: int


FULL = Scale(student_steps=250, teacher_steps=300, steps=150, pairs=1500, eval_pairs=256, samples=1000)
TINY = Scale(student_steps=4, teacher_steps=4, steps=3, pairs=64, eval_pairs=16, samples=32)
"""Too few steps to learn anything: shows that everything runs."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Pairs, and what every model says of their tokens.

    Attributes:
        batch: all of them in the trainers' layout, [2N T+1], chosen rows first.
        logps: by the name of a model, [2N T] float32, 0 where no token of an answer stands.
        decisive: which tokens decide a pair, bool [2N T].
        luck: uniform in [0, 1), one for each pair: labels are swapped where it is below a share.
    """

    batch: dict[str, Tensor]
    logps: dict[str, Tensor]
    decisive: Tensor
    luck: Tensor

    def __len__(self) -> int:
        return len(self.luck)

    def rows(self, chosen: Tensor, swapped: float) -> Tensor:
        """The rows [2B] of some pairs, chosen ones first, with the labels of a share `swapped` exchanged."""
        other = (self.luck[chosen] < swapped) * len(self)
        return torch.cat([chosen + other, chosen + len(self) - other])


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that the runs of a seed read. Models are in folders of their names below `folder`."""

    seed: int
    folder: Path
    scale: Scale
    language: Language
    tokenizer: PreTrainedTokenizerFast
    train: Texts
    held_out: Texts
    prompts: list[str]

    def model(self, name: str) -> PreTrainedModel:
        """A model of this world, in evaluation mode, a copy of one's own."""
        return load(self.folder / name)


def prepare(folder: Path, seed: int, scale: Scale, models: Sequence[str] = MODELS) -> World:
    """The world of a seed with some of its models: what its folder holds already is read, and the rest is made."""
    folder.mkdir(parents=True, exist_ok=True)
    language, tokenizer = make_language(seed), make_tokenizer()
    prompts = split_prompts(seed, HELD_OUT_PROMPTS)
    check_disjoint(prompts.train, prompts.held_out)
    facts = {"table": language.table, "doubtful": sorted(language.doubtful)}
    write_whole(folder / "language.json", json.dumps(facts, indent=2) + "\n")
    for name, some, count in (("pairs", prompts.train, scale.pairs), ("held_out", prompts.held_out, scale.eval_pairs)):
        rng = random.Random(f"{name} {seed}")
        asked = rng.choices(some, k=count) if name == "pairs" else some[-count:]
        write_rows(folder / f"{name}.jsonl", preference_rows(language, asked, rng, swapped=0.0))

    def supervised(name: str, size: int, steps: int, error_rate: float, style: Style = PLAIN) -> None:
        rng = random.Random(f"supervised {name} {seed}")
        asked = rng.choices(prompts.train, k=steps * SUPERVISED_BATCH)
        model = make_model(tokenizer, size, seed)
        texts = supervised_texts(language, asked, rng, error_rate=error_rate, style=style)
        train_supervised(model, tokenizer, texts, f"{name} {seed}")
        save_whole(model, tokenizer, folder / name)

    if not (folder / "student").exists():
        supervised("student", 64, scale.student_steps, SUPERVISED_ERRORS)
    if not (folder / "teacher").exists():
        supervised("teacher", 96, scale.teacher_steps, 0.0)
    if "stranger" in models and not (folder / "stranger").exists():
        supervised("stranger", 96, scale.teacher_steps, 0.0, OTHER_STYLE)
    train = _read(folder / "pairs.jsonl", tokenizer, seed)
    if "weak" in models and not (folder / "weak").exists():
        save_whole(_weak(load(folder / "student"), train, scale, seed), tokenizer, folder / "weak")
    folders = [folder / name for name in models]
    train, held_out = (
        _read(folder / f"{name}.jsonl", tokenizer, seed, store=folder / "store", models=folders)
        for name in ("pairs", "held_out")
    )
    return World(
        seed=seed,
        folder=folder,
        scale=scale,
        language=language,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        prompts=prompts.held_out[: scale.samples],
    )


def save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves a model under another name first, so that a folder of its name always holds all of it."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    save(model, tokenizer, unfinished)
    unfinished.rename(folder)


def answers_of(batch: dict[str, Tensor]) -> Tensor:
    """Which entries of [.. T] are tokens of an answer."""
    return batch["completion_mask"][:, 1:] != 0


def dense_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """log π of every word at every position: [2B T V] float32."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def of_the_tokens(all_logps: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """log π of the tokens that stand there, 0 off the answers: [2B T]."""
    found = all_logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return torch.where(answers_of(batch), found, 0.0)


def take(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of a batch."""
    return {name: tensor[rows] for name, tensor in batch.items()}


def order_of_pairs(count: int, steps: int, seed: int) -> list[Tensor]:
    """`BATCH` pairs for every step: every pair once, in an order drawn anew, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(count, generator=generator) for _ in range(-(-steps * BATCH // count))]
    return list(torch.cat(drawn)[: steps * BATCH].split(BATCH))


def _weak(model: PreTrainedModel, texts: Texts, scale: Scale, seed: int) -> PreTrainedModel:
    """The student after DPO with its own start as reference, on the same pairs and doubtful labels."""
    with torch.no_grad():
        start = torch.cat([of_the_tokens(dense_logps(model, part), part) for part in _parts(texts.batch)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=WEAK_RATE, weight_decay=0.0)
    model.train()
    for pairs in order_of_pairs(len(texts), scale.steps, seed):
        rows = texts.rows(pairs, SWAPPED_LABELS)
        batch = take(texts.batch, rows)
        sides = responses(batch, of_the_tokens(dense_logps(model, batch), batch), start[rows])
        dpo_loss(*sides, beta=WEAK_BETA).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _parts(batch: dict[str, Tensor], size: int = 256) -> list[dict[str, Tensor]]:
    rows = torch.arange(len(batch["input_ids"]))
    return [take(batch, some) for some in rows.split(size)]


def _read(
    path: Path, tokenizer: PreTrainedTokenizerFast, seed: int, *, store: Path | None = None, models: Sequence[Path] = ()
) -> Texts:
    pairs, report = tokenize_pairs(read_rows(path), tokenizer, max_length=64)
    if report.kept != report.rows:
        raise AssertionError(f"{path}: {report.rows - report.kept} pairs of the made-up language were left out")
    batch = collate(pairs, tokenizer.pad_token_id)
    decisive = torch.cat(decisive_mask(pairs, tokenizer, labels_of(batch).shape[1] - 1))
    generator = torch.Generator().manual_seed(seed)
    logps = {} if store is None else _logps(store, models, pairs, batch, tokenizer)
    return Texts(batch=batch, logps=logps, decisive=decisive, luck=torch.rand(len(pairs), generator=generator))


def _logps(
    store: Path, models: Sequence[Path], pairs: Sequence[TokenizedPair], batch: dict[str, Tensor], tokenizer: Any
) -> dict[str, Tensor]:
    """What every model says of all tokens, from the store, which computes what it lacks."""
    found = {}
    for folder in models:
        model = load(folder)
        with ReferenceStore.create(store, reference_space(model, tokenizer)) as opened:
            fill_store(opened, pairs, model, pad_token_id=tokenizer.pad_token_id, progress=False)
            found[folder.name] = opened.lookup(batch)
    return found
