"""The runs of the demo: data, supervised models, and the preference runs that start from them.

In: a language and a seed. Out: files of rows, models in folders, and a `TrainConfig` for each preference run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_scheduler,
)

from selective_pref import per_token_logps
from selective_pref_adapters.batch import labels_of
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.replication.language import (
    EOS,
    Language,
    check_disjoint,
    preference_rows,
    split_prompts,
    write_rows,
)

BETA = 0.01
RATIO = 0.4
SWAPPED_LABELS = 0.2
SUPERVISED_ERRORS = 0.5
HELD_OUT_PROMPTS = 0.2
BATCH = 32
SUPERVISED_BATCH = 64
SUPERVISED_RATE = 3e-3

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


def short(learning_rate: float) -> str:
    """0.001 → 1e-3."""
    return f"{learning_rate:.0e}".replace("e-0", "e-")


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


def make_model(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> LlamaForCausalLM:
    """A Llama of two layers with hidden size `size` and random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=2 * size,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.1,  # at this width the usual 0.02 learns late
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def supervised_batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """(prompt, answer) → input_ids and attention_mask [B T+1], completion_mask 1 on the answer and its EOS."""
    batch = tokenizer([prompt + answer + EOS for prompt, answer in texts], padding=True, return_tensors="pt")
    completion_mask = batch["attention_mask"].clone()
    for row, (prompt, _) in enumerate(texts):
        completion_mask[row, : len(tokenizer(prompt)["input_ids"])] = 0
    return {**batch, "completion_mask": completion_mask}


def train_supervised(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]], name: str
) -> None:
    """One pass over `texts` with AdamW: mean −log π of the answers' tokens, EOS included. Changes `model`."""
    steps = len(texts) // SUPERVISED_BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=SUPERVISED_RATE, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    for step in (bar := tqdm(range(steps), desc=f"supervised {name}", unit="step")):
        batch = supervised_batch(tokenizer, texts[step * SUPERVISED_BATCH : (step + 1) * SUPERVISED_BATCH])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logps, mask = per_token_logps(logits, labels_of(batch))
        loss = -logps.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


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
