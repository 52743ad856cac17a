"""Bytes that a run takes on each device, on each host and on disk.

In: the sizes of policy and reference, and the settings of a run. Out: the parts of each sum, for a reference that runs
beside the policy, whose log-probs are stored, or that a server runs. Every part is what is held when it is largest, and
they are added up, although not all are at once: a sum is an upper estimate, without what CUDA itself, NCCL and the
allocator's gaps take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch

from selective_pref._tiles import make_head  # pyright: ignore[reportPrivateUsage]
from selective_pref_adapters.planning.options import PlanConfig
from selective_pref_adapters.planning.sizes import Activations, ModelSize

Way: TypeAlias = Literal["running", "stored", "served"]
WAYS: tuple[Way, ...] = get_args(Way)
LIVE_PARAMETERS = 1_000_000_000
"""Parameters of a model that DeepSpeed's ZeRO-3 keeps gathered at most, also between steps: its
stage3_max_live_parameters, for the policy and for a running reference each."""
BUCKET = 20_000_000
"""Gradients that are added up over the processes at once, and parameters fetched ahead, as the loop sets it."""
DEEPSPEED_BUCKET = 500_000_000
"""Gradients that stages 1 and 2 add up at once: DeepSpeed's default, held in full even for a small model."""
PINNED = 2
"""Times that pinned memory takes at most of what is put there: CUDA rounds a block up to a power of two."""
STORE_ROW = 32
"""Bytes of a stored row besides its log-probs: key, checksum, offset."""
_MOST_DEVICES = 1024

Bytes: TypeAlias = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of the models. Activations are those of one pair; None where they could not be found out."""

    policy: ModelSize
    reference: ModelSize
    length: int
    policy_activations: Activations | None
    reference_activations: Activations | None


def model_state(parameters: int, *, dtype: str, zero_stage: int, devices: int) -> Bytes:
    """Weights, gradients and AdamW's state of a trained model on one device.

    Two float32 moments a parameter; float32 master weights in bfloat16, and wherever DeepSpeed cuts the optimizer
    (stages 1 to 3), also in float32.
    """
    item = getattr(torch, dtype).itemsize
    masters = 4 if dtype != "float32" or zero_stage > 0 else 0
    return {
        "policy: weights": _part(parameters * item, zero_stage >= 3, devices),
        "policy: gradients": _part(parameters * item, zero_stage >= 2, devices),
        "policy: optimizer": _part(parameters * (8 + masters), zero_stage >= 1, devices),
    }


def on_device(facts: Facts, config: PlanConfig, way: Way) -> Bytes:
    """Bytes on each device while training, part by part."""
    item = getattr(torch, config.dtype).itemsize
    cut = config.zero_stage >= 3
    parts = model_state(
        facts.policy.parameters, dtype=config.dtype, zero_stage=config.zero_stage, devices=config.devices
    )
    if way == "running":
        parts["reference: weights"] = _part(facts.reference.parameters * item, cut, config.devices)
    if config.offload_parameters and cut:
        parts |= {name: 0 for name in parts if name.endswith("weights")}
    if config.offload_optimizer and config.zero_stage >= 1:
        parts["policy: optimizer"] = 0
    if cut:
        whole = _live(facts.policy) + 2 * BUCKET + facts.policy.largest_layer
        beside = _live(facts.reference) if way == "running" else 0
        parts["gathered layers, buckets"] = item * (whole + beside)
    if facts.policy_activations is not None:
        kept = facts.policy_activations
        once = kept.inputs + kept.layer if config.gradient_checkpointing else kept.whole
        parts["activations"] = config.batch_size * once
    if way == "running" and facts.reference_activations is not None:
        parts["reference: one layer at work"] = config.batch_size * facts.reference_activations.layer
    parts["head"] = _head(facts, config, item)
    if config.zero_stage in (1, 2):
        parts["gathered layers, buckets"] = item * DEEPSPEED_BUCKET
    at_work = ("activations", "reference: one layer at work", "head")
    step = _step(facts.policy.parameters, config) - sum(parts.get(name, 0) for name in at_work)
    if step > 0:
        parts["optimizer step, beyond those"] = step
    return parts


def on_host(facts: Facts, config: PlanConfig, way: Way) -> Bytes:
    """Bytes on each host, of all its processes: while models are loaded, and what is offloaded there."""
    item = getattr(torch, config.dtype).itemsize
    processes = math.ceil(config.devices / config.hosts)
    models = [facts.policy, *([facts.reference] if way == "running" else [])]
    weights = item * sum(model.parameters for model in models)
    largest = item * max(model.largest_layer for model in models)
    parts = {
        "loading, each process whole": processes * weights,
        "loading, born sharded (ZeRO-3)": processes * (math.ceil(weights / config.devices) + largest),
    }
    moved = 0
    if config.offload_optimizer and config.zero_stage >= 1:
        # Two float32 moments; float32 master weights and gradients in pinned memory.
        a_parameter = 8 + PINNED * (4 + 4)
        moved += processes * math.ceil(facts.policy.parameters * a_parameter / config.devices)
    if config.offload_parameters and config.zero_stage >= 3:
        moved += processes * math.ceil(PINNED * weights / config.devices)
    if moved:
        parts["offloaded while training"] = moved
    return parts


def filling(facts: Facts, config: PlanConfig) -> int:
    """Bytes on each device while the reference fills a store at the start of the same run.

    That is `train` with --ref-model and --reference-store: the policy is there already, without gradients.
    """
    running = on_device(facts, config, "running")
    return sum(running.values()) - running["policy: gradients"] - running.get("activations", 0)


def on_disk(facts: Facts, config: PlanConfig) -> Bytes:
    """Bytes on disk: the checkpoints, one more than are kept while it is written; the model; a store at most."""
    item = getattr(torch, config.dtype).itemsize
    state = model_state(facts.policy.parameters, dtype=config.dtype, zero_stage=config.zero_stage, devices=1)
    rows = 2 * config.number_of_pairs
    return {
        "one checkpoint": state["policy: weights"] + state["policy: optimizer"],
        "checkpoints": (config.keep_checkpoints + 1) * (state["policy: weights"] + state["policy: optimizer"]),
        "trained model": facts.policy.parameters * item,
        "store of log-probs, at most": rows * (4 * facts.length + STORE_ROW),
    }


def changes(facts: Facts, config: PlanConfig, way: Way, room: float) -> tuple[list[str], int]:
    """(what to change, one after the other, until a run fits; bytes on a device then, which are too many if none do).

    Args:
        facts, config, way: of the run as it is.
        room: bytes of a device.
    """
    made: list[str] = []
    size = sum(on_device(facts, config, way).values())
    for said, changed in _cheapest_first(config):
        if size <= room:
            break
        config = replace(config, **changed)
        smaller = sum(on_device(facts, config, way).values())
        if smaller < size:
            made.append(said)
            size = smaller
    while size > room and config.devices < _MOST_DEVICES:
        config = replace(config, devices=2 * config.devices)
        smaller = sum(on_device(facts, config, way).values())
        if smaller == size:
            break
        made = [*(one for one in made if not one.startswith("--devices")), f"--devices {config.devices}"]
        size = smaller
    return made, size


def _cheapest_first(config: PlanConfig) -> Iterator[tuple[str, Mapping[str, object]]]:
    if config.dtype == "float32":
        yield "--dtype bfloat16", {"dtype": "bfloat16"}
    if not config.fused_head:
        yield "--fused-head", {"fused_head": True}
    if not config.gradient_checkpointing:
        yield "--gradient-checkpointing", {"gradient_checkpointing": True}
    for stage in range(config.zero_stage + 1, 4):
        yield f"--zero-stage {stage}", {"zero_stage": stage}
    if config.batch_size > 1:
        yield "--batch-size 1", {"batch_size": 1}
    if not config.offload_optimizer:
        yield "--offload-optimizer", {"offload_optimizer": True}
    if not config.offload_parameters:
        yield "--offload-parameters", {"offload_parameters": True}


def _live(model: ModelSize) -> int:
    """Parameters that ZeRO-3 keeps whole at one time: a layer is, however large."""
    return min(model.parameters, max(LIVE_PARAMETERS, model.largest_layer))


def _head(facts: Facts, config: PlanConfig, item: int) -> int:
    """Bytes of the head in its backward pass: a tile of logits, hidden states and their gradient; or all logits."""
    rows = 2 * config.batch_size * facts.length
    vocabulary = facts.policy.vocabulary
    if not config.fused_head:
        return rows * vocabulary * (item + 2 * 4)  # logits, their float32 log-softmax and its gradient
    head = make_head(logit_scale=1.0, softcap=None, temperature=1.0, vocab_tile=None)
    width = next(tile.stop - tile.start for tile in head.tiles(rows, vocabulary, torch.device("cuda")))
    own_gradient = vocabulary * facts.policy.hidden * item if config.zero_stage >= 2 else 0  # before it is cut
    return rows * width * (4 + item) + rows * facts.policy.hidden * (4 + 2 * item) + own_gradient


def _step(parameters: int, config: PlanConfig) -> int:
    """Bytes of AdamW's step, when activations are gone: float32 gradients and the update itself."""
    if config.offload_optimizer and config.zero_stage >= 1:
        return 0
    if config.zero_stage >= 3:
        return 12 * min(BUCKET, math.ceil(parameters / config.devices))  # one group of parameters after another
    return _part((8 if config.dtype != "float32" else 4) * parameters, config.zero_stage >= 1, config.devices)


def _part(size: int, cut: bool, devices: int) -> int:
    return math.ceil(size / devices) if cut else size
