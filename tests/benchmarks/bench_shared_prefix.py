"""Prompts shared between the rows of a batch: a whole training step with and without, on real pairs and by lengths.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_shared_prefix.py [--rounds 7] [--pairs 4] [--no-memory]

One policy, one optimiser, the parts of `deepspeed_loop`, float32, AdamW, clipping, reference log-probs from a store. In
each round the same batch is trained on with shared prompts and with padded rows, in shuffled order; ratios are taken
within a round, on a CPU between process CPU seconds. Pairs are read from `../shared/data` with the tokenizer of
`../shared/models/stories260k`, or from other folders; without them only the table by lengths is printed. Peak memory is
that of a fresh process, above what it held with the policy loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step import cpu, resident, spread

from selective_pref_adapters.pairs import TokenizedPair, collate, read_rows, tokenize_pairs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SHARED = Path(__file__).resolve().parents[3] / "shared"
POLICY = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
LENGTH = 1024
LENGTHS = [(1, 32), (1, 256), (32, 32), (32, 128), (128, 32), (128, 128), (128, 512), (512, 32), (512, 128), (512, 512)]
"""(tokens of the prompt, of each response)"""


def make_policy(folder: Path, tokenizer: Path) -> None:
    """A Llama with random weights for the ids of a tokenizer, saved beside it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(read), **POLICY, num_key_value_heads=6, max_position_embeddings=2 * LENGTH, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    read.model_max_length = 2 * LENGTH
    read.save_pretrained(folder)


def made_up(prompt: int, response: int, number: int) -> TokenizedPair:
    pick = random.Random(number)
    ids = [pick.choices(range(3, 500), k=length) for length in (prompt, response, response)]
    return TokenizedPair(
        chosen_ids=ids[0] + ids[1],
        rejected_ids=ids[0] + ids[2],
        chosen_prompt_length=prompt,
        rejected_prompt_length=prompt,
        place=f"made-up:{number}",
    )


def prepare(folder: Path, pairs: list[TokenizedPair]) -> Callable[[list[TokenizedPair], str], None]:
    """A function that does one step on some of the pairs, with `share_prefix` as given."""
    from selective_pref_adapters.deepspeed_loop import checks, loop
    from selective_pref_adapters.deepspeed_loop import engine as engines
    from selective_pref_adapters.heads import model_per_token_logps
    from selective_pref_adapters.model_inputs import causal_lm
    from selective_pref_adapters.models import load_model, load_tokenizer
    from selective_pref_adapters.objectives import loss_of_batch
    from selective_pref_adapters.options import TrainConfig
    from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space

    tokenizer = load_tokenizer(str(folder))
    model = load_model(str(folder), dtype="float32")
    store = folder / "store"
    with ReferenceStore.create(store, reference_space(model, tokenizer)) as filled:
        fill_store(filled, pairs, model, pad_token_id=0, progress=False)
    config = TrainConfig(
        model=str(folder), pairs="", batch_size=4, learning_rate=1e-6, beta=0.01, reference_store=str(store)
    )
    engines.start_processes(config)
    reference = loop.open_reference(config, tokenizer, None, config.reference_store, None)
    engine, _ = engines.start_engine(config, model, 1000, 4)
    objective, causal = checks.configured_objective(config), causal_lm(engine)
    engine.train()

    def step(some: list[TokenizedPair], share_prefix: str) -> None:
        causal._share_prefix = share_prefix
        batch = {name: tensor.to(engine.device) for name, tensor in collate(some, 0).items()}
        ref_logps = reference(batch)
        out = loss_of_batch(objective, batch, model_per_token_logps(engine, batch), ref_logps)
        engine.backward(out.loss)
        engines.step_engine(engine)

    return step


def real_pairs(folder: Path, tokenizer: Any) -> dict[str, list[TokenizedPair]]:
    """The pairs of each file that are not longer than the context."""
    found = {}
    for name in ("gsm8k_pairs", "chat_pairs_en"):
        file = folder / f"{name}.jsonl"
        if file.exists():
            pairs, _ = tokenize_pairs(read_rows(file), tokenizer, max_length=10**6)
            found[name] = [pair for pair in pairs if max(len(pair.chosen_ids), len(pair.rejected_ids)) <= LENGTH]
    return found


def measure(step: Callable[..., None], batches: list[list[TokenizedPair]]) -> str:
    """Cells of a row: seconds of a step as it was, and how many times faster it is."""
    step(batches[0], "auto")  # warm
    seconds: dict[str, list[float]] = {"auto": [], "off": []}
    for number, batch in enumerate(batches):
        for share in random.Random(number).sample(list(seconds), 2):
            start = cpu()
            step(batch, share)
            seconds[share].append(cpu() - start)
    ratios = [off / auto for off, auto in zip(seconds["off"], seconds["auto"], strict=True)]
    return f"{statistics.median(seconds['off']):.2f} | **{spread(ratios)}**"


def tokens_ratio(batches: list[list[TokenizedPair]]) -> float:
    """Positions of padded rows to tokens that go through the body where prompts are shared."""
    padded = shared = 0
    for batch in batches:
        rows = [len(ids) for pair in batch for ids in (pair.chosen_ids, pair.rejected_ids)]
        padded += len(rows) * max(rows)
        shared += sum(rows) - sum(pair.chosen_prompt_length for pair in batch)
    return padded / shared


def peak(folder: Path, share: str, pairs: list[TokenizedPair]) -> None:
    """Prints the MiB that two steps on the longest pairs needed at most, above the loaded policy."""
    longest = sorted(pairs, key=lambda pair: -len(pair.chosen_ids))[:4]
    step = prepare(folder, longest)
    gc.collect()
    before = resident("VmRSS")
    for _ in range(2):
        step(longest, share)
    used = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident("VmHWM") - before
    print(json.dumps({"peak": used}))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--pairs", type=int, default=4, help="of one step")
    flags.add_argument("--data", type=Path, default=SHARED / "data")
    flags.add_argument("--tokenizer", type=Path, default=SHARED / "models" / "stories260k")
    flags.add_argument("--no-lengths", action="store_true")
    flags.add_argument("--no-memory", action="store_true")
    flags.add_argument("--peak", nargs=2, metavar=("FOLDER", "SHARE"), help=argparse.SUPPRESS)
    options = flags.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    real = real_pairs(options.data, tokenizer)
    if options.peak:
        return peak(Path(options.peak[0]), options.peak[1], real["gsm8k_pairs"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_policy(folder, options.tokenizer)
        pick = random.Random(0)
        batches = {
            file: [pick.sample(pairs, options.pairs) for _ in range(options.rounds)] for file, pairs in real.items()
        }
        for prompt, response in () if options.no_lengths else LENGTHS:
            some = [made_up(prompt, response, number) for number in range(options.pairs)]
            batches[f"{prompt} + {response}"] = [some] * options.rounds
        step = prepare(folder, [pair for some in batches.values() for batch in some for pair in batch])
        print(f"torch {torch.__version__}, {options.pairs} pairs a step, {options.rounds} rounds; {POLICY}\n")
        print("| pairs, or prompt + response | positions to tokens | s a step, padded rows | padded / shared |")
        print("|---|---|---|---|")
        for file, some in batches.items():
            print(f"| {file} | {tokens_ratio(some):.2f} | {measure(step, some)} |", flush=True)
        for share in () if options.no_memory or not real else ("off", "auto"):
            command = [sys.executable, __file__, "--data", str(options.data), "--tokenizer", str(options.tokenizer)]
            run = subprocess.run([*command, "--peak", name, share], capture_output=True, text=True, check=True)
            print(f"\npeak MiB of two steps on the longest gsm8k pairs, {share}: {run.stdout.splitlines()[-1]}")


if __name__ == "__main__":
    main()
