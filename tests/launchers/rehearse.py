"""Every launcher, as far as one machine goes: two processes train what one does, and a process that dies ends the run.

    python tests/launchers/rehearse.py [NAME ...] [--model FOLDER --pairs FILE] [--die]

One run of `selective-pref train` by one process; then the same by each launcher that is installed (or by those named),
with two processes on gloo: as one host, or as two "hosts", which are two launchers on this machine. Printed for each:
the command, the losses, and how far they are from one process's. With --die the second process is killed in its second
step, and what is printed is the exit status and how long the launcher took. The exit status is 1 where losses differ by
more than a relative 1e-5, or where a run with a dead process ends well or hangs.

deepspeed-pdsh needs pdsh, and an ssh server on port 2222 that node1 and node2, names of this machine, reach with a key
without a pass phrase. slurm needs what slurm.sh beside this file starts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "adapters"), str(ROOT), str(ROOT / "adapters")]
CLI = "selective_pref_adapters.cli"
DYING = ROOT / "tests" / "adapters" / "failing_rank.py"
PATIENCE = 900
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """How two processes are started: one command for each host, run at the same time."""

    hosts: Sequence[str]
    """Commands; {run} stands for what is run, a module and its arguments,
    {port} for a free port, {file} for a hostfile, {folder} for that of the files."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    needs: str | None = None
    door: str = "train"
    """`train` or `dpo`: the command that is run."""


_RDZV = "--nnodes 2 --nproc-per-node 1 --rdzv-id rehearsal --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}"
_ACCELERATE = "accelerate launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
_MACHINES = "--multi_gpu --num_processes 2 --num_machines 2 --mixed_precision no --dynamo_backend no"
_MACHINES += " --main_process_ip 127.0.0.1 --main_process_port {port}"
LAUNCHERS: dict[str, Launcher] = {
    "torchrun": Launcher(hosts=["torchrun --standalone --nproc-per-node 2 -m {run}"]),
    "torchrun-two-hosts": Launcher(
        hosts=[f"torchrun --node-rank {rank} --local-addr 127.0.0.1 {_RDZV} -m {{run}}" for rank in (0, 1)]
    ),
    "deepspeed": Launcher(hosts=["deepspeed --num_gpus 2 --master_port {port} --module {run}"]),
    "deepspeed-two-hosts": Launcher(
        hosts=[
            f"deepspeed --no_ssh --node_rank {rank} --hostfile {{file}} --master_addr 127.0.0.1 --master_port {{port}} "
            "--module {run}"
            for rank in (0, 1)
        ]
    ),
    "deepspeed-pdsh": Launcher(
        hosts=[
            "deepspeed --ssh_port 2222 --hostfile {file} --master_addr 127.0.0.1 --master_port {port} --module {run}"
        ],
        needs="pdsh",
    ),
    "accelerate": Launcher(hosts=[f"{_ACCELERATE} --multi_gpu --main_process_port {{port}} --module {{run}}"]),
    "accelerate-two-hosts": Launcher(
        hosts=[f"accelerate launch {_MACHINES} --machine_rank {rank} --module {{run}}" for rank in (0, 1)]
    ),
    "mpirun": Launcher(
        hosts=["mpirun --allow-run-as-root --oversubscribe -n 2 python -m {run}"],
        env={"MASTER_PORT": "{port}"},
        needs="mpirun",
    ),
    "slurm": Launcher(hosts=["srun --nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=1 python -m {run}"], needs="srun"),
    "slurm-torchrun": Launcher(
        hosts=[f"srun --nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=1 torchrun {_RDZV} -m {{run}}"],
        needs="srun",
    ),
    "slurm-one-host": Launcher(
        hosts=["srun --nodes 1 --ntasks-per-node 2 --kill-on-bad-exit=1 python -m {run}"], needs="srun"
    ),
    "trl-torchrun": Launcher(hosts=["torchrun --standalone --nproc-per-node 2 -m {run}"], door="dpo"),
    "trl-fsdp": Launcher(
        hosts=["accelerate launch --config_file {folder}/fsdp.yaml --main_process_port {port} --module {run}"],
        door="dpo",
    ),
    "trl-zero-2": Launcher(
        hosts=["accelerate launch --config_file {folder}/zero.yaml --main_process_port {port} --module {run}"],
        door="dpo",
    ),
}
ALONE = {"train": "python -m {run}", "dpo": "python -m {run} --gradient_accumulation_steps 4"}
"""One process for the same steps: the loop keeps the pairs of a step by itself, TRL does not."""
_CONFIG = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "num_machines": 1, "num_processes": 2}
_FSDP = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True}
ACCELERATE_FILES: dict[str, dict[str, object]] = {
    "fsdp": {
        **_CONFIG,
        "distributed_type": "FSDP",
        "fsdp_config": {**_FSDP, "fsdp_state_dict_type": "FULL_STATE_DICT"},
    },
    "zero": {
        **_CONFIG,
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 2, "zero3_init_flag": False},
    },
}


def prepare(folder: Path, model: str | None, pairs: str | None) -> dict[str, object]:
    """The options of the run, with tiny models made here unless others are given."""
    import yaml

    from tiny import make_model, text_rows, write_jsonl

    if model is None:
        policy, reference = make_model(folder / "policy", seed=1), make_model(folder / "reference", seed=2)
    else:
        policy, reference = Path(model), noisy(model, folder / "reference")
    rows = folder / "pairs.jsonl"
    if pairs is None:
        write_jsonl(rows, text_rows(32))
    else:
        rows.write_text("".join(Path(pairs).read_text(encoding="utf-8").splitlines(keepends=True)[:32]))
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    for name, settings in ACCELERATE_FILES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return {
        "model": str(policy),
        "ref_model": str(reference),
        "pairs": str(rows),
        "max_length": None if model is None else 256,
        "eval_fraction": 0.25,
        "global_batch_size": 8,
        "batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "picture_pairs": 0,
        "process_timeout_minutes": 2.0,
    }


def noisy(model: str, folder: Path) -> Path:
    """A copy of a model with a little noise on its weights, so that policy and reference differ."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    copy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    copy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command_of(text: str, folder: Path, port: int, run: str) -> str:
    return text.format(run=run, port=port, file=folder / "hosts", folder=folder)


def start(launcher: Launcher, folder: Path, run: str) -> tuple[list[int | None], str, float]:
    """(exit status of each host's launcher, all that they printed, seconds). None: killed, since it hung."""
    port = free_port()
    env = {**os.environ, **{name: value.format(port=port) for name, value in launcher.env.items()}}
    commands = [command_of(host, folder, port, run) for host in launcher.hosts]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        started = [
            subprocess.Popen(shlex.split(text), env=env, stdout=said, stderr=said, cwd=folder, start_new_session=True)
            for text in commands
        ]
        statuses: list[int | None] = []
        for process in started:
            try:
                statuses.append(process.wait(max(1.0, PATIENCE - (time.monotonic() - begun))))
            except subprocess.TimeoutExpired:
                statuses.append(None)
                os.killpg(process.pid, 9)
        said.seek(0)
        return statuses, said.read(), time.monotonic() - begun


def dpo_flags(options: Mapping[str, object], out: Path) -> str:
    """The same run by TRL's trainer, as near as its options come."""
    flags = f"--model_name_or_path {options['model']} --ref_model_name_or_path {options['ref_model']} "
    flags += f"--dataset_name {options['pairs']} --max_length {options['max_length'] or 64} --output_dir {out} "
    flags += "--use_cpu --bf16 false --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 3 "
    flags += "--learning_rate 1e-3 --logging_steps 1 --save_strategy steps --save_steps 3 --report_to none "
    return flags + "--gradient_checkpointing 0"


def losses(folder: Path) -> list[float]:
    """Those of the log; TRL's is in its checkpoint."""
    if (folder / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    else:
        lines = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in lines for name in ("eval_loss", "loss") if name in line]


def rehearse(
    name: str, launcher: Launcher, folder: Path, options: Mapping[str, object], alone: list[float] | None
) -> list[float]:
    """Runs, prints what came of it. Returns the losses; none where they are not those of `alone`."""
    import yaml

    out = folder / f"run-{name}"
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**options, "output_dir": str(out)}))
    run = f"{CLI} train --config {folder / name}.yaml"
    if launcher.door == "dpo":
        run = f"{CLI} dpo {dpo_flags(options, out)}"
    statuses, said, seconds = start(launcher, folder, run)
    shown = "\n".join(f"$ {command_of(host, Path('.'), 29500, f'{CLI} train ...')}" for host in launcher.hosts)
    print(f"\n### {name}\n{shown}")
    if any(statuses):
        errors = "\n".join(
            [line for line in said.splitlines() if "Error" in line or line.startswith("selective-pref")][:9]
        )
        print(f"exit status {statuses} after {seconds:.0f} s:\n{errors}\n...\n{said[-3000:]}", flush=True)
        return []
    found = losses(out)
    print(f"losses {' '.join(f'{loss:.6f}' for loss in found)}", flush=True)
    if alone is None:
        return found
    apart = max(abs(ours / theirs - 1) for ours, theirs in zip(found, alone, strict=True))
    tables = said.count("held-out ") if launcher.door == "train" else said.count("model saved to")
    print(f"{apart:.0e} from one process's, results printed {tables} times, {seconds:.0f} s", flush=True)
    return found if apart <= TOLERANCE and tables == 1 else []


def die(name: str, launcher: Launcher, folder: Path, options: Mapping[str, object]) -> bool:
    """The second process is killed in its second step: the launcher must end with an error, and soon."""
    import yaml

    out = folder / f"dying-{name}"
    (folder / f"dying-{name}.yaml").write_text(yaml.safe_dump({**options, "output_dir": str(out)}))
    shutil.copy(DYING, folder / "dying.py")
    statuses, said, seconds = start(launcher, folder, f"dying train --config {folder}/dying-{name}.yaml")
    left = [line for line in said.splitlines() if "rror" in line][-1:]
    print(f"{name}: exit status {statuses} after {seconds:.0f} s, {' '.join(left)[:160]}", flush=True)
    return all(statuses) and not (out / "model.safetensors").exists()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(LAUNCHERS))
    parser.add_argument("--model", help="policy; default: a tiny random Llama")
    parser.add_argument("--pairs", help="the first 32 rows are read; default: made-up words")
    parser.add_argument("--die", action="store_true")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - LAUNCHERS.keys():
        parser.error(f"no launcher {', '.join(sorted(unknown))}; there are {', '.join(LAUNCHERS)}")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "adapters", os.environ.get("PYTHONPATH", ""))))
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PYTHONPATH"] += os.pathsep + str(folder)
        options = prepare(folder, chosen.model, chosen.pairs)
        alone: dict[str, list[float]] = {}
        for label in chosen.names or LAUNCHERS:
            launcher = LAUNCHERS[label]
            if launcher.needs is not None and shutil.which(launcher.needs) is None:
                print(f"\n### {label}: {launcher.needs} is not installed")
            elif chosen.die and launcher.door == "train":
                good &= die(label, launcher, folder, options)
            elif not chosen.die:
                door = launcher.door
                if door not in alone:
                    one = Launcher(hosts=[ALONE[door]], door=door)
                    alone[door] = rehearse(f"{door} alone".replace(" ", "-"), one, folder, options, None)
                good &= bool(rehearse(label, launcher, folder, options, alone[door]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
