"""A whole training step: this library's loop with the fused head and a store, against stock TRL with a live reference.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py [--rounds 7] [--pairs 4] [--no-memory]

Same policy, same reference, same pairs, AdamW, float32, clipping, no gradient checkpointing. The methods run in one
process, a step each in shuffled order, round after round; ratios are taken within a round between process CPU seconds
(on a CPU; on a GPU between wall seconds). One reference has the policy's size, the other is several times larger. Peak
memory is that of a fresh process, above what it held before models were loaded.

*Padded rows* is this library's loop with `share_prefix` off: the prompt of a pair goes through the body for each side.

Where the time goes is read from hooks: *body* is everything below the last hidden states, forward and backward; *head*
is what lies between them and the per-token log-probs (and, backward, the loss); *reference* is a forward pass, or a
look into the store; *selection* is from log-probs to losses; *optimiser* is clipping and AdamW.
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
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapters"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

VOCABULARY = 16_000
POLICY = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
LARGE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8}
BETA, RATIO, RATE, LENGTH = 0.01, 0.4, 1e-6, 192
PARTS = ("body", "head", "reference", "selection", "optimiser")
NAMES = ("ours, store", "ours, store, padded rows", "ours, live reference", "TRL")
METHODS = [(name, size) for size in ("same", "large") for name in NAMES]


def cpu() -> float:
    """Seconds of work: a shared machine stretches wall time only."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Clock:
    """Sums the seconds of each part of a step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.body_forward = self.hidden_gradient = 0.0

    def time(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = cpu()
            out = function(*args, **kwargs)
            self.seconds[part] += cpu() - start
            return out

        return timed

    def watch(self, causal: Any) -> None:
        """Notes when a causal LM's body starts and ends, forward, and when the gradient reaches its output."""
        marks: dict[str, float] = {}
        body = causal.base_model

        def leave_body(_: Any, __: Any, out: Any) -> None:
            self.body_forward += cpu() - marks["body"]  # rows of shared prompts may take several calls
            if out[0].requires_grad:
                out[0].register_hook(lambda _: setattr(self, "hidden_gradient", self.hidden_gradient or cpu()))

        def enter_model(*_: Any) -> None:
            self.body_forward = self.hidden_gradient = 0.0
            marks["model"] = cpu()

        def leave_model(*_: Any) -> None:
            self.seconds["body"] += self.body_forward
            self.seconds["head"] += cpu() - marks["model"] - self.body_forward

        body.register_forward_pre_hook(lambda *_: marks.__setitem__("body", cpu()))
        body.register_forward_hook(leave_body)
        causal.register_forward_pre_hook(enter_model)
        causal.register_forward_hook(leave_model)

    def backward(self, function: Callable[[], Any]) -> None:
        start = cpu()
        function()
        self.seconds["head"] += self.hidden_gradient - start
        self.seconds["body"] += cpu() - self.hidden_gradient


def ours(folder: Path, size: str, pairs: list[Any], clock: Clock, *, stored: bool, share: str) -> Callable[[], None]:
    """One step of `deepspeed_loop`, from its own parts."""
    from selective_pref_adapters.deepspeed_loop import checks, loop
    from selective_pref_adapters.deepspeed_loop import engine as engines
    from selective_pref_adapters.heads import model_per_token_logps
    from selective_pref_adapters.models import load_model, load_tokenizer
    from selective_pref_adapters.objectives import loss_of_batch
    from selective_pref_adapters.options import TrainConfig
    from selective_pref_adapters.pairs import collate

    source = {"reference_store": str(folder / f"store-{size}")} if stored else {"ref_model": str(folder / size)}
    config = TrainConfig(
        model=str(folder / "policy"),
        pairs="",
        batch_size=len(pairs),
        learning_rate=RATE,
        beta=BETA,
        share_prefix=share,
        **source,
    )
    engines.start_processes(config)
    policy, tokenizer = load_model(config.model, dtype="float32"), load_tokenizer(config.model)
    opened = loop.open_reference(config, tokenizer, config.ref_model, config.reference_store, None)
    engine, _ = engines.start_engine(config, policy, 1000, len(pairs))
    reference = clock.time("reference", opened)
    loss_of = clock.time("selection", loss_of_batch)
    end = clock.time("optimiser", engines.step_engine)
    objective = checks.configured_objective(config)
    clock.watch(engine.module)
    engine.train()

    def step() -> None:
        batch = {name: tensor.to(engine.device) for name, tensor in collate(pairs, 0).items()}
        ref_logps = reference(batch)
        out = loss_of(objective, batch, model_per_token_logps(engine, batch), ref_logps)
        clock.backward(lambda: engine.backward(out.loss))
        end(engine)

    return step


def trl(folder: Path, size: str, rows: list[dict[str, str]], clock: Clock) -> Callable[[], None]:
    """One step of the stock trainer: its own forward, backward and clipping around its own loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    gpu = torch.cuda.is_available()
    args = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=not gpu,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(rows),
        beta=BETA,
        learning_rate=RATE,
        max_length=LENGTH * 2,
        max_steps=1000,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / size),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )
    trainer.create_optimizer_and_scheduler(1000)
    (inputs,) = list(trainer.get_train_dataloader())
    model = trainer.model
    clock.watch(model)
    trainer.ref_model.forward = clock.time("reference", trainer.ref_model.forward)
    inner = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **options: clock.backward(lambda: inner(loss, **options))
    trainer.current_gradient_accumulation_steps = 1

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    optimise = clock.time("optimiser", optimise)

    def step() -> None:
        trainer.training_step(model, dict(inputs))
        optimise()

    return step


def make_files(folder: Path, count: int) -> None:
    """Policy, both references, rows and both stores."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selective_pref_adapters.pairs import read_rows, tokenize_pairs
    from selective_pref_adapters.reference_store import ReferenceStore, fill_store, reference_space
    from tiny import make_model, write_jsonl

    words = [f"w{number}" for number in range(VOCABULARY - 6)]
    pick = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(pick.choices(words, k=pick.randint(low, high)))

    rows = [{"prompt": text(16, 48) + " ", "chosen": text(64, 128), "rejected": text(64, 128)} for _ in range(count)]
    write_jsonl(folder / "rows.jsonl", rows)
    context = {"max_position_embeddings": 2 * LENGTH, "num_key_value_heads": None, "initializer_range": 0.02}
    for seed, (name, shape) in enumerate((("policy", POLICY), ("same", POLICY), ("large", LARGE))):
        make_model(folder / name, seed, words, **shape, **context)
    for size in ("same", "large"):
        model, tokenizer = (kind.from_pretrained(folder / size) for kind in (AutoModelForCausalLM, AutoTokenizer))
        pairs, _ = tokenize_pairs(read_rows(folder / "rows.jsonl"), tokenizer, max_length=2 * LENGTH)
        space = reference_space(model, tokenizer)
        start = cpu()
        with ReferenceStore.create(folder / f"store-{size}", space) as store:
            fill_store(store, pairs, model, pad_token_id=0, progress=False)
        (folder / f"scoring-{size}.json").write_text(json.dumps((cpu() - start) / count))


def prepare(folder: Path, method: str, size: str, clock: Clock) -> Callable[[], None]:
    """A callable that does one step."""
    from transformers import AutoTokenizer

    from selective_pref_adapters.pairs import read_rows, tokenize_pairs

    if method == "TRL":
        return trl(folder, size, [json.loads(line) for line in (folder / "rows.jsonl").open()], clock)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    pairs, _ = tokenize_pairs(read_rows(folder / "rows.jsonl"), tokenizer, max_length=2 * LENGTH)
    share = "off" if method.endswith("padded rows") else "auto"
    return ours(folder, size, pairs, clock, stored="store" in method, share=share)


def resident(name: str) -> float:
    """MiB of this process now (VmRSS) or at most so far (VmHWM); getrusage would count the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def peak(folder: Path, method: str, size: str) -> None:
    """Prints the MiB that two steps needed at most, above the process before it loaded anything."""
    if method == "TRL":
        import trl  # noqa: F401
    from selective_pref_adapters import deepspeed_loop  # noqa: F401

    gc.collect()
    before = resident("VmRSS")
    step = prepare(folder, method, size, Clock())
    for _ in range(2):
        step()
    used = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident("VmHWM") - before
    print(json.dumps({"peak": used}))


def spread(values: list[float], digits: int = 2) -> str:
    """median (lowest to highest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--pairs", type=int, default=4, help="of one step")
    flags.add_argument("--no-memory", action="store_true")
    flags.add_argument("--peak", nargs=3, metavar=("FOLDER", "METHOD", "SIZE"), help=argparse.SUPPRESS)
    options = flags.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.peak:
        folder, method, size = options.peak
        return peak(Path(folder), method, size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, options.pairs)
        clocks = {case: Clock() for case in METHODS}
        steps = {case: prepare(folder, *case, clocks[case]) for case in METHODS}
        for case in METHODS:
            steps[case]()  # warm
            clocks[case].seconds = dict.fromkeys(PARTS, 0.0)
        seconds: dict[tuple[str, str], list[float]] = {case: [] for case in METHODS}
        for number in range(options.rounds):
            order = METHODS.copy()
            random.Random(number).shuffle(order)
            for case in order:
                start = cpu()
                steps[case]()
                seconds[case].append(cpu() - start)
        steps.clear()
        peaks = {}
        for case in () if options.no_memory else METHODS:
            command = [sys.executable, __file__, "--peak", str(folder), *case]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[case] = json.loads(run.stdout.splitlines()[-1])["peak"]
        scoring = {size: json.loads((folder / f"scoring-{size}.json").read_text()) for size in ("same", "large")}
    print(f"torch {torch.__version__}, {options.pairs} pairs a step, {options.rounds} rounds\n")
    print("| reference | method | pairs a second | step to ours with a store | peak MiB | " + " | ".join(PARTS) + " |")
    print("|---|---|---|---|---|" + "---|" * len(PARTS))
    for case in METHODS:
        method, size = case
        ratios = [one / base for one, base in zip(seconds[case], seconds["ours, store", size], strict=True)]
        rates = [options.pairs / value for value in seconds[case]]
        parts = [f"{clocks[case].seconds[part] / options.rounds:.3f}" for part in PARTS]
        peak_of = f"{peaks[case]:.0f}" if case in peaks else ""
        print(f"| {size} | {method} | {spread(rates)} | **{spread(ratios)}** | {peak_of} | " + " | ".join(parts) + " |")
    for size, value in scoring.items():
        print(f"\nfilling the store of the {size} reference took {value:.3f} s a pair, once")


if __name__ == "__main__":
    main()
