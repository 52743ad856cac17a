"""What all runs on real pairs share: data split by prompt, a tokenizer, a start, its references, their log-probs.

In: a file of pairs and one of supervised rows. Out: a folder, made once; what is there is not made again.

    student    trained on the supervised rows for a while: the start of every run
    weak       the student after DPO with itself as reference
    teacher    larger, and trained for longer: the strong reference
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selective_pref_adapters.deepspeed_loop import train
from selective_pref_adapters.files import write_whole
from selective_pref_adapters.models import load_model, load_tokenizer
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import PreferenceRow, TokenizedPair, read_rows, split_by_prompt, tokenize_pairs
from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space

HELD_OUT = 0.15
MODELS = ("student", "weak", "teacher")
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class RealScale:
    """How much of everything; `steps` are preference steps of `batch` pairs each."""

    vocabulary: int = 2048
    max_length: int = 384
    batch: int = 16
    student: tuple[int, int] = (96, 3)
    """(width, layers)"""
    teacher: tuple[int, int] = (192, 4)
    student_steps: int = 200
    teacher_steps: int = 500
    steps: int = 60
    sft_rate: float = 3e-3
    weak_rate: float = 1e-4


REAL = RealScale()
TINY_REAL = RealScale(
    vocabulary=300,
    max_length=128,
    batch=4,
    student=(32, 1),
    teacher=(48, 1),
    student_steps=2,
    teacher_steps=2,
    steps=2,
)


def prepare_real(folder: Path, pairs: str, sft_data: str, scale: RealScale) -> None:
    """Makes what the folder lacks.

    Raises:
        ValueError, OSError: files that cannot be read, pairs with a single prompt, a folder made from other data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder, {"pairs": str(pairs), "sft_data": str(sft_data), **asdict(scale)})
    if not (folder / "held_out.jsonl").exists():
        _split(folder, read_rows(pairs), read_rows(sft_data, chosen_only=True))
    if not (folder / "tokenizer").exists():
        _make_tokenizer(folder, scale).save_pretrained(folder / "tokenizer")
    for name, shape, steps in (
        ("student", scale.student, scale.student_steps),
        ("teacher", scale.teacher, scale.teacher_steps),
    ):
        if not (folder / name).exists():
            initial = _initial(folder, name, shape, scale)
            _train(folder, name, initial, "sft.jsonl", objective="sft", max_steps=steps, learning_rate=scale.sft_rate)
    if not (folder / "weak").exists():
        own = {"ref_model": str(folder / "student"), "objective": "dpo", "beta": 0.1}
        _train(
            folder,
            "weak",
            folder / "student",
            "train.jsonl",
            max_steps=scale.steps,
            learning_rate=scale.weak_rate,
            **own,
        )
    if not (folder / "spaces.json").exists():
        spaces = {name: _stored(folder, name) for name in MODELS}
        write_whole(folder / "spaces.json", json.dumps(spaces) + "\n")


def tokenized(folder: Path, name: str) -> list[TokenizedPair]:
    """The pairs of "train" or "held_out", as every run reads them."""
    scale = json.loads((folder / "made_from.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    return tokenize_pairs(read_rows(folder / f"{name}.jsonl"), tokenizer, max_length=scale["max_length"])[0]


def store_of(folder: Path, name: str) -> dict[str, str]:
    """The options of `TrainConfig` that read a model's log-probs from the store."""
    spaces = json.loads((folder / "spaces.json").read_text(encoding="utf-8"))
    return {"reference_store": str(folder / "store"), "reference_space": spaces[name]}


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "made_from.json"
    made = json.loads(json.dumps(settings))
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != made:
        keys = [key for key in made if found.get(key) != made[key]]
        differ = ", ".join(f"{key} {found.get(key)} instead of {made[key]}" for key in keys)
        raise ValueError(f"{folder} was made from something else ({differ}): give another folder")
    write_whole(path, json.dumps(made, indent=2) + "\n")


def _split(folder: Path, pairs: Sequence[PreferenceRow], supervised: Sequence[PreferenceRow]) -> None:
    """Whole prompts are held out, from the supervised rows as well."""
    train_rows, held_out = split_by_prompt(pairs, HELD_OUT, seed=0)
    asked = {_question(row) for row in held_out}
    kept = [row for row in supervised if _question(row) not in asked]
    if not kept:
        raise ValueError("no supervised row is left: all of their prompts are among the held-out ones")
    _write(folder / "sft.jsonl", (_in_the_form_of(train_rows[0], row) for row in kept))
    for name, rows in (("train", train_rows), ("held_out", held_out)):  # the last file says that all are there
        _write(
            folder / f"{name}.jsonl",
            ({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows),
        )


def _question(row: PreferenceRow) -> str:
    """The words of a prompt, without the white space around them and whatever the form: in both, files differ."""
    return _prose(row.prompt).strip()


def _in_the_form_of(pair: PreferenceRow, row: PreferenceRow) -> dict[str, Any]:
    """A supervised row with its prompt and answer as text or as messages, as the pairs have theirs."""
    if isinstance(pair.prompt, str):
        end = pair.prompt[len(pair.prompt.rstrip()) :]
        return {"prompt": _question(row) + end, "completion": _prose(row.chosen)}
    if isinstance(row.prompt, str):
        said = {"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.chosen}
        return {"prompt": [said[0]], "completion": [said[1]]}
    return {"prompt": row.prompt, "completion": row.chosen}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _make_tokenizer(folder: Path, scale: RealScale) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training texts; nothing of the held-out pairs is read."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    files = [folder / f"{name}.jsonl" for name in ("sft", "train")]
    rows = (json.loads(line) for file in files for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    values = (_prose(value) for row in rows for value in row.values())
    trainer = trainers.BpeTrainer(
        vocab_size=scale.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(values, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _prose(value: Any) -> str:
    """Text, or the contents of messages."""
    return value if isinstance(value, str) else "\n".join(str(message.get("content")) for message in value)


def _initial(folder: Path, name: str, shape: tuple[int, int], scale: RealScale) -> Path:
    """A Llama with random weights."""
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    width, layers = shape
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            max_position_embeddings=scale.max_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    path = folder / f"{name}.initial"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _train(folder: Path, name: str, model: Path, rows: str, **options: Any) -> None:
    """A run of the training job; its folder gets its name when it is whole."""
    scale = json.loads((folder / "made_from.json").read_text(encoding="utf-8"))
    unfinished = cleared(folder / f"{name}.unfinished")
    train(
        TrainConfig(
            model=str(model),
            pairs=str(folder / rows),
            output_dir=str(unfinished),
            max_length=scale["max_length"],
            batch_size=scale["batch"],
            eval_fraction=0.0,
            **options,
        )
    )
    unfinished.rename(folder / name)


def cleared(path: Path) -> Path:
    """`path` without what an interrupted run left there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def _stored(folder: Path, name: str) -> str:
    """Fills the store with a model's log-probs of all pairs, and returns the name of its space."""
    model, tokenizer = load_model(str(folder / name), dtype="float32"), load_tokenizer(str(folder / name))
    space = reference_space(model, tokenizer)
    with ReferenceStore.create(folder / "store", space) as store:
        for rows in ("train", "held_out"):
            fill_store(store, tokenized(folder, rows), model, pad_token_id=tokenizer.pad_token_id, progress=False)
    return str(space.name)
