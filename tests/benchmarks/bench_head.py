"""The fused head against its peers: time, and peak memory of a fresh process. Methods interleaved, order shuffled.

    python tests/benchmarks/bench_head.py [--rounds 3] [--threads 1] [--only large] [--no-memory]

One call is forward and backward of N rows, where a share k of the rows has a gradient (a selection at ratio k). Peers
do the same work whatever k is, so they run at k = 0.4 alone; ours and the floor run at every k. The floor is the bare
matrix products that ours cannot do without: 2 + 6k units of N·V·D. Ratios are taken within a round, on the CPU between
process CPU seconds; a time alone means nothing on a shared machine. Peak memory is what a fresh process needs above
inputs and the two gradients.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from selective_pref.fused import fused_per_token_logps

SIZES = {
    "huge": (4096, 2048, 151_936),  # for a GPU
    "large": (1024, 896, 151_936),
    "medium": (1024, 2048, 32_000),
    "small": (256, 64, 4_000),
}
SHARES = (0.1, 0.2, 0.4, 0.6, 1.0)
SEQUENCES = 4  # Liger's loss wants sequences: two pairs
Case = tuple[str, float]


class Problem:
    """Inputs of one size; a method gets them, runs forward and backward, and leaves its gradients here."""

    def __init__(self, size: str, device: str, dtype: torch.dtype) -> None:
        rows, width, vocabulary = SIZES[size]
        torch.manual_seed(0)
        self.hidden = torch.empty(rows, width, device=device, dtype=dtype).normal_().requires_grad_()
        self.weight = torch.empty(vocabulary, width, device=device, dtype=dtype).normal_(std=0.03).requires_grad_()
        self.labels = torch.randint(vocabulary, (rows,), device=device)

    def gradient(self, share: float) -> torch.Tensor:
        rows = len(self.labels)
        gradient = torch.zeros(rows, device=self.labels.device)
        gradient[torch.randperm(rows)[: round(share * rows)]] = 1e-2
        return gradient


def ours(problem: Problem, share: float, keep_logits: bool = False) -> None:
    out = fused_per_token_logps(problem.hidden, problem.weight, problem.labels, keep_logits=keep_logits)
    out.backward(problem.gradient(share))


def floor(problem: Problem, share: float) -> None:
    """The matrix products alone, in the same tiles and buffers."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    rows, tile = len(hidden), 4096
    kept = round(share * rows)
    some = hidden[:kept].contiguous()
    buffer = hidden.new_empty(rows * tile)
    d_some, d_weight = torch.zeros_like(some), torch.empty_like(weight)
    for columns in weight.split(tile):
        torch.mm(hidden, columns.t(), out=buffer[: rows * len(columns)].view(rows, -1))
    for columns, d_columns in zip(weight.split(tile), d_weight.split(tile), strict=True):
        z = buffer[: kept * len(columns)].view(kept, -1)
        torch.mm(some, columns.t(), out=z)
        torch.addmm(d_some, z, columns, out=d_some)
        torch.mm(z.t(), some, out=d_columns)
    problem.weight.grad = d_weight


def materialised(problem: Problem, share: float) -> None:
    logits = (problem.hidden @ problem.weight.t()).float()
    out = logits.gather(1, problem.labels.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
    out.backward(problem.gradient(share))


def trl_head(problem: Problem, share: float) -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    out = ChunkedLogProbFunction.apply(problem.hidden, problem.weight, None, problem.labels, 1.0, 8192, None, 1.0, ())
    out[0].backward(problem.gradient(share))


def torch_linear_cross_entropy(problem: Problem, share: float) -> None:
    arguments = (problem.hidden, problem.weight, problem.labels)
    loss = torch.nn.functional.linear_cross_entropy(*arguments, reduction="none")
    loss.backward(-problem.gradient(share))


def liger(problem: Problem, share: float, *, compiled: bool, cache: dict[bool, Callable] = {}) -> None:  # noqa: B006
    """Liger's whole DPO loss without a reference; it knows no selection."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = cache.setdefault(compiled, LigerFusedLinearDPOLoss(compiled=compiled, use_ref_model=False))
    shape = (SEQUENCES, len(problem.labels) // SEQUENCES)
    out = loss(problem.weight, problem.hidden.view(*shape, -1), problem.labels.view(shape))
    out[0].backward()


def cut_cross_entropy(problem: Problem, share: float) -> None:
    from cut_cross_entropy import linear_cross_entropy

    arguments = (problem.hidden, problem.weight, problem.labels)
    loss = linear_cross_entropy(*arguments, reduction="none", impl="torch_compile")
    loss.backward(-problem.gradient(share))


OURS: dict[str, Callable[[Problem, float], None]] = {
    "ours": ours,
    "ours, kept logits": partial(ours, keep_logits=True),
    "floor (bare products)": floor,
}
PEERS: dict[str, Callable[[Problem, float], None]] = {
    "materialised logits": materialised,
    "TRL head": trl_head,
    "Liger DPO, eager": partial(liger, compiled=False),
    "Liger DPO, compiled": partial(liger, compiled=True),
    "F.linear_cross_entropy": torch_linear_cross_entropy,
    "cut-cross-entropy": cut_cross_entropy,
}
METHODS = {**OURS, **PEERS}


def timed(problem: Problem, case: Case) -> tuple[float, float]:
    """(wall seconds, process CPU seconds) of one call."""
    problem.hidden.grad = problem.weight.grad = None
    synchronize(problem)
    wall, cpu = time.perf_counter(), time.process_time()
    METHODS[case[0]](problem, case[1])
    synchronize(problem)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronize(problem: Problem) -> None:
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()


def usable(problem: Problem) -> list[str]:
    """The methods that run here, warmed up (and compiled) at k = 0.4."""
    names = []
    for name in METHODS:
        try:
            timed(problem, (name, 0.4))
        except Exception as error:  # a peer that is not installed, or needs other hardware
            print(f"left out: {name} ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
        else:
            names.append(name)
    return names


def peak_of_fresh_process(size: str, name: str, share: float, arguments: list[str]) -> float:
    """MiB above inputs and both gradients."""
    command = [sys.executable, __file__, "--peak", json.dumps([size, name, share]), *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(printed.splitlines()[-1])


def print_peak(size: str, name: str, share: float, device: str, dtype: torch.dtype) -> None:
    warm_up = size if "compiled" in name or name == "cut-cross-entropy" else "small"
    METHODS[name](Problem(warm_up, device, dtype), share)  # imports, thread pools, compilers
    problem = Problem(size, device, dtype)
    gradients = (problem.hidden.nbytes + problem.weight.nbytes) / 2**20
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        METHODS[name](problem, share)
        print(torch.cuda.max_memory_allocated() / 2**20 - before - gradients)
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    METHODS[name](problem, share)
    print(_status("VmHWM") - before - gradients)


def _status(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(size: str, rounds: int, device: str, dtype: torch.dtype, memory: bool, arguments: list[str]) -> None:
    problem = Problem(size, device, dtype)
    names = usable(problem)
    cases = [(name, share) for name in names for share in (SHARES if name in OURS else (0.4,))]
    times: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in random.sample(cases, len(cases)):
            times[case].append(timed(problem, case))
    rows, width, vocabulary = SIZES[size]
    print(f"\n### N={rows}, D={width}, V={vocabulary}, {str(dtype).removeprefix('torch.')}, {device}\n")
    print("| method | k | wall s, median (min to max) | CPU s | to ours at this k (min to max) | peak MiB |")
    print("|---|---|---|---|---|---|")
    for name, share in cases:
        wall = [wall for wall, _ in times[name, share]]
        cpu = statistics.median(cpu for _, cpu in times[name, share])
        clock = 1 if device == "cpu" else 0  # CPU seconds do not count what the neighbours take
        ratios = [a[clock] / b[clock] for a, b in zip(times[name, share], times["ours", share], strict=True)]
        peak = f"{peak_of_fresh_process(size, name, share, arguments):.0f}" if memory and share == 0.4 else ""
        row = [name, str(share) if name in OURS else "any", _spread(wall), f"{cpu:.2f}", _spread(ratios), peak]
        print("| " + " | ".join(row) + " |", flush=True)


def _spread(values: list[float]) -> str:
    return f"**{statistics.median(values):.2f}** ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", choices=list(SIZES), help="one size instead of large and medium")
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    if options.peak:
        return print_peak(*json.loads(options.peak), options.device, dtype)
    arguments = ["--threads", str(options.threads), "--device", options.device, "--dtype", options.dtype]
    versions = {name: _version(name) for name in ("torch", "trl", "liger-kernel", "cut-cross-entropy")}
    print(f"{versions}, {options.threads} thread(s), {options.rounds} rounds")
    for size in [options.only] if options.only else ["large", "medium"]:
        measure(size, options.rounds, options.device, dtype, not options.no_memory, arguments)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
