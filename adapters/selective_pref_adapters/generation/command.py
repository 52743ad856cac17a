"""`selective-pref generate`: a benchmark's questions → its answer file.

In: a `GenerateConfig`. Out: the answer file, what it was made with, and a line that says how many answers reached the
limit of tokens. What is wrong with the input is said before any model is loaded.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from selective_pref_adapters.generation.answer_file import AnswerFile
from selective_pref_adapters.generation.options import GenerateConfig
from selective_pref_adapters.generation.questions import BENCHMARKS, Benchmark, digest, read_questions
from selective_pref_adapters.generation.records import Answer, record_of, with_length
from selective_pref_adapters.generation.style import Length, gpt_4o_length


def generate(config: GenerateConfig) -> None:
    """Answers the questions that have no answer yet, and writes the file when all have one.

    Raises:
        ValueError, OSError: a flag, a file, a model or a server that does not work. Answers that came before are kept.
    """
    benchmark = BENCHMARKS[config.benchmark]
    questions = read_questions(config.questions, benchmark, config.temperature)
    length = gpt_4o_length() if config.benchmark != "mt-bench" and config.token_len == "tiktoken" else None
    limit = config.max_new_tokens or benchmark.max_new_tokens
    settings = {
        "benchmark": config.benchmark,
        "model_id": config.model_id or Path(config.out).stem,
        "model": config.model,
        "served": config.base_url is not None,
        "questions": digest(questions),
        "max_new_tokens": limit,
        "seed": config.seed,
    }
    file = AnswerFile(out=Path(config.out), settings=settings, questions=questions)
    file.read()
    asked = len(file.missing)
    if file.missing:
        answers = _of_server(config, file, limit) if config.base_url else _of_model(config, file, limit)
        _collect(answers, file, benchmark, length)
    if length is not None:
        file.records = {name: with_length(record, length) for name, record in file.records.items()}
    file.finish()
    _say(file, benchmark, limit, asked)


def _of_model(config: GenerateConfig, file: AnswerFile, limit: int) -> Iterator[list[Answer]]:
    """The answers that a model on this process gives to the missing questions."""
    import torch

    from selective_pref_adapters.generation.local import chat_tokenizer, local_answers
    from selective_pref_adapters.models import load_model
    from selective_pref_adapters.reference_store.identity import model_identity
    from selective_pref_adapters.reference_store.spaces import digest_of_json

    tokenizer = chat_tokenizer(config.model, config.chat_template)
    template = hashlib.blake2b(tokenizer.get_chat_template().encode(), digest_size=16).hexdigest()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype or ("bfloat16" if device == "cuda" else "float32")
    file.settings = {**file.settings, "chat_template": template, "dtype": dtype}
    file.read()
    model: Any = load_model(config.model, dtype=dtype)
    file.settings = {**file.settings, "weights": digest_of_json(model_identity(model))}
    file.read()
    return local_answers(
        file.missing,
        model.to(device),
        tokenizer,
        max_new_tokens=limit,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _of_server(config: GenerateConfig, file: AnswerFile, limit: int) -> Iterator[list[Answer]]:
    """The answers that a server gives to them."""
    from selective_pref_adapters.generation.served import served_answers
    from selective_pref_adapters.reference_store.command import api_key
    from selective_pref_adapters.reference_store.served import Server

    variable = config.api_key_variable
    server = Server(
        url=str(config.base_url),
        model=config.model,
        concurrency=config.concurrency,
        timeout=config.timeout,
        attempts=config.attempts,
        headers={} if variable is None else {"Authorization": f"Bearer {api_key(variable)}"},
    )
    return served_answers(file.missing, server, max_new_tokens=limit, seed=config.seed)


def _collect(answers: Iterator[list[Answer]], file: AnswerFile, benchmark: Benchmark, length: Length | None) -> None:
    """Keeps the answers as they come."""
    model_id = file.settings["model_id"]
    with tqdm(total=len(file.questions), initial=len(file.records), unit=" questions", disable=None) as bar:
        for some in answers:
            for answer in some:
                file.add(record_of(answer, benchmark, model_id, length), answer.cut)
            bar.update(len(some))
            bar.set_postfix(at_the_limit=sum(file.cut.values()))


def _say(file: AnswerFile, benchmark: Benchmark, limit: int, asked: int) -> None:
    """What was written, and what should be known of it."""
    before = len(file.questions) - asked
    earlier = f", {before} before" if before else ""
    print(f"answered: {asked} of {len(file.questions)} questions now{earlier}: {file.out}")
    notes = []
    if file.cut:
        total = len(file.questions) * benchmark.turns
        notes.append(
            f"{sum(file.cut.values())} of {total} answers did not end within {limit} tokens, or what the model can "
            f"read, and are cut (the first: {next(iter(file.cut_turns))['id']!r})"
        )
    if file.empty:
        notes.append(f"empty answers: to {len(file.empty)} of the questions (the first: {file.empty[0]!r})")
    if any(record.get("metadata", {"token_len": 0})["token_len"] is None for record in file.records.values()):
        notes.append(
            "token_len is null: style control fails on this file until the same command fills it in with --token-len "
            "tiktoken"
        )
    for note in notes:
        print(f"selective-pref generate: {note}", file=sys.stderr)
