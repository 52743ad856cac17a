"""The fused KL on a GPU: errors against float64, time and peak memory, beside whole logits.

    python tests/gpu/kl_gpu.py [--tiny]

Inputs are rounded to the dtype first, and the truth is computed in float64 from those. The step that is timed is
forward and backward where 0.4 of the positions are wanted; milliseconds are medians of 5, peak memory is above
inputs. `--tiny` runs it on a CPU and measures errors only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from selective_pref.fused_kl import fused_per_token_kl

Direction = Literal["forward", "reverse"]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Divergence = Callable[[Inputs, Tensor, Direction], Tensor]
MIB = 2**20


def fused(inputs: Inputs, mask: Tensor, direction: Direction) -> Tensor:
    return fused_per_token_kl(*inputs, direction=direction, mask=mask)


def whole_logits(inputs: Inputs, mask: Tensor, direction: Direction) -> Tensor:
    hidden, weight, ref_hidden, ref_weight = inputs
    logits, ref_logits = hidden @ weight.t(), (ref_hidden @ ref_weight.t()).detach()
    wide = torch.promote_types(logits.dtype, torch.float32)
    policy, reference = logits.to(wide).log_softmax(-1), ref_logits.to(wide).log_softmax(-1)
    first, second = (reference, policy) if direction == "forward" else (policy, reference)
    return (first.exp() * (first - second)).sum(-1) * mask


WAYS: dict[str, Divergence] = {"ours": fused, "whole logits": whole_logits}


def run(way: Divergence, inputs: Inputs, mask: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """(KL, gradients of the policy's hidden states and of its head), in float64."""
    hidden, weight = (one.detach().requires_grad_() for one in inputs[:2])
    found = way((hidden, weight, *inputs[2:]), mask, direction)
    found.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return found.detach().double(), hidden.grad.double(), weight.grad.double()


def cost(way: Divergence, inputs: Inputs, mask: Tensor, direction: Direction) -> tuple[float, float]:
    """(milliseconds, MiB above what is held before)."""
    seconds = list[float]()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(6):
        hidden, weight = (one.detach().requires_grad_() for one in inputs[:2])
        torch.cuda.synchronize()
        start = time.perf_counter()
        way((hidden, weight, *inputs[2:]), mask, direction).sum().backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        del hidden, weight
    return 1000 * statistics.median(seconds[1:]), (torch.cuda.max_memory_allocated() - before) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = "cpu" if tiny else "cuda"
    rows, width, words = (64, 32, 500) if tiny else (1024, 2048, 151_936)
    print(f"{'CPU' if tiny else torch.cuda.get_device_name()}, torch {torch.__version__}, {rows} × {width} × {words}\n")
    print("| dtype | KL | way | mean error, nats | largest | of d hidden | of d weight | ms | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden = torch.randn(rows, width, device=device)
        weight = torch.randn(words, width, device=device) * 0.03
        ref_hidden = hidden + 0.3 * torch.randn_like(hidden)
        ref_weight = weight + 0.003 * torch.randn_like(weight)
        inputs: Inputs = (hidden.to(dtype), weight.to(dtype), ref_hidden.to(dtype), ref_weight.to(dtype))
        del hidden, weight, ref_hidden, ref_weight
        mask = torch.rand(rows, device=device) < 0.4
        for direction in ("forward", "reverse"):
            exact = (inputs[0].double(), inputs[1].double(), inputs[2].double(), inputs[3].double())
            truth = run(whole_logits, exact, mask, direction)
            del exact
            for name, way in WAYS.items():
                found = run(way, inputs, mask, direction)
                error = (found[0] - truth[0]).abs()[mask]
                off = [float((a - b).norm() / b.norm()) for a, b in zip(found[1:], truth[1:], strict=True)]
                cells = [f"{float(error.mean()):.1e}", f"{float(error.max()):.1e}", *(f"{one:.1e}" for one in off)]
                del found
                if not tiny:
                    milliseconds, peak = cost(way, inputs, mask, direction)
                    cells += [f"{milliseconds:.1f}", f"{peak:.0f}"]
                print(
                    f"| {str(dtype).removeprefix('torch.')} | {direction} | {name} | {' | '.join(cells)} |", flush=True
                )


if __name__ == "__main__":
    main()
