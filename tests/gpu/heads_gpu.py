"""The fused head on a GPU: errors of log-probs and gradients against float64, beside TRL's head and whole logits.

    python tests/gpu/heads_gpu.py [--tiny]

Inputs are rounded to the dtype first, and the truth is computed in float64 from those, so that what is left is the
head's own error. Errors of gradients are relative, ‖found − truth‖ / ‖truth‖. `--tiny` runs it on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from selective_pref.fused import fused_per_token_logps

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def trl_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 8192, None, 1.0, ())[0]


def whole_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


HEADS: dict[str, Head] = {
    "ours": fused_per_token_logps,
    "ours, kept logits": lambda *inputs: fused_per_token_logps(*inputs, keep_logits=True),
    "TRL head": trl_head,
    "whole logits": whole_logits,
    "cut-cross-entropy": cut_cross_entropy,
}


def run(head: Head, inputs: tuple[Tensor, Tensor, Tensor], gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, gradient of the hidden states, of the weight), in float64."""
    hidden, weight, labels = inputs
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = head(hidden, weight, labels)
    out.backward(gradient.to(out.dtype))
    return out.detach().double(), hidden.grad.double(), weight.grad.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = "cpu" if tiny else "cuda"
    sizes = [(64, 32, 500)] if tiny else [(1024, 896, 151_936), (512, 4096, 32_000)]
    print(f"{'CPU' if tiny else torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| N × D × V | dtype | head | log-probs, mean error | largest | of d hidden | of d weight |")
    print("|---|---|---|---|---|---|---|")
    for rows, width, words in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            hidden = torch.randn(rows, width, device=device).to(dtype)
            weight = (torch.randn(words, width, device=device) * 0.03).to(dtype)
            labels = torch.randint(words, (rows,), device=device)
            gradient = torch.randn(rows, device=device) * (torch.rand(rows, device=device) < 0.4)
            truth = run(whole_logits, (hidden.double(), weight.double(), labels), gradient)
            for name, head in HEADS.items():
                try:
                    found = run(head, (hidden, weight, labels), gradient)
                except Exception as error:  # a peer that is not installed, or needs other hardware
                    print(f"left out: {name}, {dtype} ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
                    continue
                error = (found[0] - truth[0]).abs()
                off = [float((a - b).norm() / b.norm()) for a, b in zip(found[1:], truth[1:], strict=True)]
                cells = [f"{float(error.mean()):.1e}", f"{float(error.max()):.1e}", *(f"{one:.1e}" for one in off)]
                size = f"{rows} × {width} × {words}"
                print(
                    f"| {size} | {str(dtype).removeprefix('torch.')} | {name} | " + " | ".join(cells) + " |", flush=True
                )


if __name__ == "__main__":
    main()
