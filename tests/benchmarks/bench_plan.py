"""What `selective-pref plan` computes, beside what two processes of the loop hold: ZeRO 0 to 3, on a CPU.

    python tests/benchmarks/bench_plan.py [--dtypes float32 bfloat16] [--stages 0 1 2 3] [--layers 6]

Policy and a running reference are Llamas of about 100 MiB in float32, with random weights; a step has one pair of two
full sequences on each process. PyTorch's own allocator is followed from before the models are loaded (the profiler's
memory events): what is allocated after a step, and the most during one. On a CPU that is what a GPU's allocator would
hold, without CUDA's and NCCL's own memory. Counts, not times: a busy machine changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "adapters"), str(ROOT), str(ROOT / "adapters")]
LENGTH, MIB = 64, 2**20


def prepare(folder: Path, layers: int) -> None:
    from tiny import make_model, write_jsonl

    words = [f"w{number}" for number in range(8180)]
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": layers, "initializer_range": 0.02}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    for seed, name in enumerate(("policy", "reference")):
        make_model(folder / name, seed, words, **shape, **heads)
    pick = random.Random(0)

    def text(count: int) -> str:
        return " ".join(pick.choices(words, k=count))

    rows = [{"prompt": text(8) + " ", "chosen": text(LENGTH), "rejected": text(LENGTH)} for _ in range(16)]
    write_jsonl(folder / "pairs.jsonl", rows)


def job(folder: Path, cases: list[tuple[str, int, bool]]) -> None:
    """What each process runs; what it has measured goes to a file of its own."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from selective_pref_adapters.deepspeed_loop import loop, reference
    from selective_pref_adapters.options import TrainConfig

    step, load = loop.training_step, loop.load

    def marked(*arguments: Any) -> Any:
        with record_function(f"step {arguments[1]}"):
            return step(*arguments)

    def loaded(config: TrainConfig, name: str) -> Any:
        model = load(config, name)
        if config.zero_stage < 3:  # its tensors are views of a mapped file, which the allocator does not see
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return model

    loop.training_step, loop.load, reference.load = marked, loaded, loaded
    measured: dict[str, dict[str, float]] = {}
    for dtype, stage, checkpointing in cases:
        name = f"{dtype} {stage} {checkpointing}"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            torch.empty(1)  # what is counted before
            loop.train(
                TrainConfig(
                    model=str(folder / "policy"),
                    ref_model=str(folder / "reference"),
                    pairs=str(folder / "pairs.jsonl"),
                    output_dir=str(folder / f"run {name}"),
                    max_length=LENGTH,
                    batch_size=1,
                    max_steps=3,
                    eval_fraction=0,
                    dtype=dtype,
                    zero_stage=stage,
                    gradient_checkpointing=checkpointing,
                    share_prefix="off",
                )
            )
            gc.collect()  # what is freed when nobody looks would count for ever
        trace = folder / f"trace-{os.environ['RANK']}.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        trace.unlink()
        last = next(event for event in events if event.get("name") == "step 3")
        begin, end = last["ts"], last["ts"] + last["dur"]
        held = [(e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]"]
        held.sort()
        start = held[0][1]
        before = [size for at, size in held if at < begin]
        during = [size for at, size in held if begin <= at <= end]
        measured[name] = {"between": before[-1] - start, "peak": max(during) - start, "left": start}
        del seen, events, held
        torch.distributed.barrier()
    (folder / f"measured-{os.environ['RANK']}.json").write_text(json.dumps(measured))


def planned(folder: Path, dtype: str, stage: int, checkpointing: bool) -> dict[str, Any]:
    from selective_pref_adapters.cli import main

    flags = ["--model", f"{folder / 'policy'}", "--ref-model", f"{folder / 'reference'}", "--devices", "2", "--json"]
    flags += ["--dtype", dtype, "--zero-stage", str(stage), "--max-length", str(LENGTH)]
    flags += ["--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["plan", *flags])
    return json.loads(printed.getvalue())["ways"]["running"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--parts", action="store_true", help="print the parts of what is planned, too")
    options = parser.parse_args()

    import ranks

    ranks.PATIENCE = 3600
    cases = [(dtype, stage, options.gradient_checkpointing) for dtype in options.dtypes for stage in options.stages]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.layers)
        if ranks.run_ranks(job, folder, cases) != [0, 0]:
            raise SystemExit("a process ended with an error")
        found = [json.loads((folder / f"measured-{rank}.json").read_text()) for rank in (0, 1)]
        print("| dtype, ZeRO | between steps: planned MiB | held | most in a step: planned MiB | held |")
        print("|---|---|---|---|---|")
        for case in cases:
            parts = planned(folder, *case)["device"]
            lasting = sum(size for part, size in parts.items() if part in LASTING)
            key = " ".join(map(str, case))
            between, peak = (max(one[key][what] for one in found) / MIB for what in ("between", "peak"))
            total = sum(parts.values()) / MIB
            print(f"| {case[0]}, {case[1]} | {lasting / MIB:.0f} | {between:.0f} | {total:.0f} | {peak:.0f} |")
            if options.parts:
                print("of earlier runs:", round(max(one[key]["left"] for one in found) / MIB, 1))
                print({part: round(size / MIB, 1) for part, size in parts.items()})


LASTING = ("policy: weights", "policy: gradients", "policy: optimizer", "reference: weights")

if __name__ == "__main__":
    main()
