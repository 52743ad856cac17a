"""Prompts shared between the rows of a batch, on a GPU: exactness in bf16, time and peak memory of a step.

    python tests/gpu/shared_prefix_gpu.py [--tiny | --large] [--rounds 5]

The policy has the shape of a 0.5B model (24 layers, width 896, 151,936 tokens), with `--large` that of a 3B one (36
layers, width 2048), and random weights. A step is forward,
Selective-DPO loss, backward and SGD on a batch of pairs; reference log-probs are stored. The layouts run in one
process, in shuffled order, round after round; ratios are taken within a round. A case that does not fit into the
memory, or that an implementation of attention refuses, is left out with a line that says so. `--tiny` runs the same
code on a CPU with a model of two layers.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from selective_pref import selective_dpo_loss
from selective_pref_adapters.batch import responses
from selective_pref_adapters.heads import install_fused_head, model_per_token_logps

ATTENTION = ("sdpa", "flex_attention")
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    device: str
    model: dict[str, int]
    cases: list[tuple[int, int, int]]  # pairs, tokens of the prompt, tokens of the longer response
    tokens: int  # of a row, where exactness is looked at


FULL = Sizes(
    device="cuda",
    model={
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    cases=[(2, 256, 256), (2, 512, 512), (1, 1536, 512), (4, 512, 512), (1, 3072, 1024), (1, 1, 2048)],
    tokens=512,
)
LARGE = Sizes(
    device="cuda",
    model={
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    cases=[(2, 512, 512), (1, 1536, 512), (4, 512, 512), (1, 3072, 1024), (4, 1024, 256), (1, 1, 2048)],
    tokens=512,
)
TINY = Sizes(
    device="cpu",
    model={
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    cases=[(2, 96, 32), (1, 1, 64)],
    tokens=64,
)


def make_model(sizes: Sizes, attention: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(**sizes.model, max_position_embeddings=8192, tie_word_embeddings=True)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.float32)
    model = model.to(sizes.device, dtype).train()
    install_fused_head(model)
    return model


def make_batch(sizes: Sizes, pairs: int, prompt: int, response: int) -> Batch:
    """Responses of between half and all of `response` tokens, padded on the right."""
    pick = random.Random(0)
    lengths = [response if row < pairs else pick.randint(response // 2, response) for row in range(2 * pairs)]
    width = prompt + max(lengths)
    ids = torch.randint(sizes.model["vocab_size"], (2 * pairs, width), generator=torch.Generator().manual_seed(0))
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    place = torch.arange(width)
    present = place < (prompt + torch.tensor(lengths)).unsqueeze(1)
    batch = {
        "input_ids": ids,
        "attention_mask": present.long(),
        "completion_mask": (present & (place >= prompt)).long(),
    }
    return {name: tensor.to(sizes.device) for name, tensor in batch.items()}


def backward(model: Any, batch: Batch, *, share: bool) -> Tensor:
    model._share_prefix = "auto" if share else "off"
    logps = model_per_token_logps(model, batch)
    reference = (logps.detach() + 0.1 * torch.sin(batch["input_ids"][:, 1:].float())).float()
    selective_dpo_loss(*responses(batch, logps, reference), beta=0.1, selection_ratio=0.4).loss.backward()
    return logps.detach()


def gradient(model: Any) -> Tensor:
    parts = torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()]).float()
    model.zero_grad()
    return parts


def exactness(sizes: Sizes, attention: str) -> None:
    """Errors of both layouts in bf16, against float32 rows as they are."""
    batch = make_batch(sizes, 2, sizes.tokens // 2, sizes.tokens // 2)
    on = batch["completion_mask"][:, 1:] != 0
    model = make_model(sizes, "sdpa", torch.float32)
    truth = backward(model, batch, share=False)[on], gradient(model)
    del model
    model = make_model(sizes, attention, torch.bfloat16)
    for name, share in (("padded rows", False), ("shared prompts", True)):
        logps = backward(model, batch, share=share)[on]
        error = (logps - truth[0]).abs()
        found = gradient(model)
        off = float((found - truth[1]).norm() / truth[1].norm())
        print(
            f"| {attention} | {name} | {float(error.mean()):.2e} | {float(error.max()):.2e} | {off:.2e} |", flush=True
        )


def synchronize(sizes: Sizes) -> None:
    if sizes.device == "cuda":
        torch.cuda.synchronize()


def steps(sizes: Sizes, attention: str, rounds: int) -> None:
    model = make_model(sizes, attention, torch.bfloat16)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step(batch: Batch, share: bool) -> tuple[float, float]:
        """(milliseconds, peak MiB)."""
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(sizes)
        start = time.perf_counter()
        backward(model, batch, share=share)
        optimiser.step()
        optimiser.zero_grad()
        synchronize(sizes)
        took = 1000 * (time.perf_counter() - start)
        return took, torch.cuda.max_memory_allocated() / 2**20 if sizes.device == "cuda" else 0.0

    for pairs, prompt, response in sizes.cases:
        batch = make_batch(sizes, pairs, prompt, response)
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(rounds + 2):
            for share in random.Random(number).sample([False, True], 2):
                measured = step(batch, share)
                found[share] += [measured] if number > 1 else []  # the first two warm up, and compile
        ratio = statistics.median(off[0] / on[0] for off, on in zip(found[False], found[True], strict=True))
        cells = [f"{statistics.median(one[0] for one in found[share]):.0f}" for share in (False, True)]
        peaks = [f"{max(one[1] for one in found[share]):.0f}" for share in (False, True)]
        sizes_of = f"{pairs} × ({prompt} + {response})"
        print(
            f"| {attention} | {sizes_of} | {cells[0]} | {cells[1]} | **{ratio:.2f}** | {peaks[0]} | {peaks[1]} |",
            flush=True,
        )


def attempt(what: Any, attention: str, *arguments: Any) -> None:
    try:
        what(*arguments)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # out of memory; refused by an implementation
        print(f"left out from here on: {attention} ({type(error).__name__}: {str(error).splitlines()[0][:120]})")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--no-exactness", action="store_true")
    parser.add_argument("--attention", nargs="+", default=ATTENTION, choices=ATTENTION)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sizes = TINY if options.tiny else LARGE if options.large else FULL
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: expected a CUDA device, or --tiny")
    device = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {options.rounds} rounds\n")
    if not options.no_exactness:
        print("| attention | layout | mean error of log-probs, bf16 | largest | error of the gradient |")
        print("|---|---|---|---|---|")
        for attention in options.attention:
            attempt(exactness, attention, sizes, attention)
    print("\n| attention | pairs × (prompt + response) | padded ms | shared ms | padded / shared | peak MiB | shared |")
    print("|---|---|---|---|---|---|---|")
    for attention in options.attention:
        attempt(steps, attention, sizes, attention, options.rounds)


if __name__ == "__main__":
    main()
