"""`selective-pref plan`: a table, or JSON.

In: a `PlanConfig`. Out: what a run takes with a running, a stored and a served reference; what fits, what to change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from selective_pref_adapters.models import usable_length
from selective_pref_adapters.planning.memory import WAYS, Facts, Way, changes, filling, on_device, on_disk, on_host
from selective_pref_adapters.planning.options import PlanConfig
from selective_pref_adapters.planning.sizes import Activations, ModelSize, activations, model_size

GIB = 2**30


def plan(config: PlanConfig) -> int:
    """Prints what a run takes. Returns the exit status: 1 where device_memory was given and no way fits.

    Raises:
        ValueError: an option out of range, or a folder without the configuration of a causal language model.
    """
    _check(config)
    facts, notes = _facts(config)
    found = whole_plan(facts, config, notes)
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found, config)
    return int(config.device_memory is not None and not any(way["fits"] for way in found["ways"].values()))


def whole_plan(facts: Facts, config: PlanConfig, notes: Sequence[str]) -> dict[str, Any]:
    """Everything that is printed: sizes in bytes."""
    return {
        "settings": {**asdict(config), "max_length": facts.length},
        "models": {name: _described(size) for name, size in (("policy", facts.policy), ("reference", facts.reference))},
        "ways": {way: _way(facts, config, way) for way in WAYS},
        "device_total_by_zero_stage": {
            str(stage): {way: sum(on_device(facts, replace(config, zero_stage=stage), way).values()) for way in WAYS}
            for stage in (0, 1, 2, 3)
        },
        "disk": on_disk(facts, config),
        "notes": list(notes),
    }


def _way(facts: Facts, config: PlanConfig, way: Way) -> dict[str, Any]:
    parts = on_device(facts, config, way)
    found: dict[str, Any] = {
        "device": parts,
        "device_total": sum(parts.values()),
        "host": on_host(facts, config, way),
    }
    if way == "stored":
        found["device_while_the_store_is_filled_in_the_same_run"] = filling(facts, config)
    if way == "served":
        found["weights_on_the_servers_own_devices"] = facts.reference.parameters * _item(config)
    if config.device_memory is not None:
        room = config.device_memory * GIB
        found["fits"] = found["device_total"] <= room
        found["change"], found["device_total_then"] = changes(facts, config, way, room)
    return found


def _described(size: ModelSize) -> dict[str, Any]:
    return {"name": size.name, "parameters": size.parameters, "largest_layer": size.largest_layer}


def _item(config: PlanConfig) -> int:
    return getattr(torch, config.dtype).itemsize


def _check(config: PlanConfig) -> None:
    """Raises ValueError where an option is out of range."""
    for name, least in (
        ("devices", 1),
        ("hosts", 1),
        ("batch_size", 1),
        ("number_of_pairs", 0),
        ("keep_checkpoints", 1),
    ):
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if config.max_length is not None and config.max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens; got {config.max_length}")
    if config.devices % config.hosts:
        raise ValueError(f"devices must be shared evenly: {config.devices} devices on {config.hosts} hosts are not")
    if config.device_memory is not None and not (0 < config.device_memory < math.inf):
        raise ValueError(f"device_memory must be a number of GiB above 0; got {config.device_memory}")
    if config.offload_optimizer and config.zero_stage == 0:
        raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; got 0")
    if config.offload_parameters and config.zero_stage < 3:
        raise ValueError(f"offload_parameters needs zero_stage 3; got {config.zero_stage}")


def _facts(config: PlanConfig) -> tuple[Facts, list[str]]:
    """What is known of the models; sentences about what is not."""
    notes: list[str] = []
    policy = model_size(config.model)
    reference = policy if config.ref_model is None else model_size(config.ref_model)
    length = usable_length(config.max_length, {"policy": policy.config, "reference": reference.config})

    def traced(size: ModelSize, checkpointing: bool) -> Activations | None:
        dtype = getattr(torch, config.dtype)
        try:
            return activations(size.config, sequences=2, length=length, dtype=dtype, checkpointing=checkpointing)
        except ValueError as error:
            notes.append(f"Activations are not counted: {error}")
            return None

    own = traced(policy, True)
    facts = Facts(
        policy=policy,
        reference=reference,
        length=length,
        policy_activations=own,
        reference_activations=own if reference is policy else traced(reference, False),
    )
    return facts, notes


# --- the table -------------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any], config: PlanConfig) -> None:
    console = Console(highlight=False, soft_wrap=True)
    models, settings, ways = found["models"], found["settings"], found["ways"]
    for name, model in models.items():
        console.print(f"{name}: {model['name']}, {model['parameters']:,} parameters", markup=False)
    hosts = "1 host" if config.hosts == 1 else f"{config.hosts} hosts"
    console.print(
        f"{config.devices} devices on {hosts}, {config.dtype}, {config.batch_size} × 2 sequences of "
        f"{settings['max_length']} tokens a device, gradient checkpointing "
        f"{'on' if config.gradient_checkpointing else 'off'}\n"
    )
    table = _table(f"GiB on each device, ZeRO-{config.zero_stage}", [*WAYS])
    for part in dict.fromkeys(part for way in WAYS for part in ways[way]["device"]):
        _row(table, part, [ways[way]["device"].get(part) for way in WAYS])
    table.add_section()
    _row(table, "together, at most", [ways[way]["device_total"] for way in WAYS])
    if config.device_memory is not None:
        table.add_row(
            f"of {config.device_memory:g} GiB", *("fits" if ways[way]["fits"] else "too much" for way in WAYS)
        )
    _row(
        table,
        "while the store is filled",
        [None, ways["stored"]["device_while_the_store_is_filled_in_the_same_run"], None],
    )
    _row(table, "the server's own devices", [None, None, ways["served"]["weights_on_the_servers_own_devices"]])
    console.print(table)

    table = _table("GiB on each device, together", [*WAYS])
    for stage, totals in found["device_total_by_zero_stage"].items():
        _row(table, f"ZeRO-{stage}" + (", FSDP2" if stage == "3" else ""), [totals[way] for way in WAYS])
    console.print(table)

    table = _table("GiB of memory of each host", [*WAYS])
    for part in ways["running"]["host"]:
        _row(table, part, [ways[way]["host"].get(part) for way in WAYS])
    console.print(table)

    table = _table("GiB on disk", [""])
    for part, size in found["disk"].items():
        _row(table, part, [size])
    console.print(table)
    for note in [*_advice(ways, config), *found["notes"]]:
        console.print(note, markup=False)


def _advice(ways: dict[str, Any], config: PlanConfig) -> list[str]:
    if config.device_memory is None:
        return []
    said: list[str] = []
    for way, its in ways.items():
        if its["fits"]:
            continue
        then = f"{its['device_total_then'] / GIB:.1f} GiB"
        if its["device_total_then"] <= config.device_memory * GIB:
            said.append(f"{way}: fits with {' '.join(its['change'])} ({then})")
        else:
            tried = f", {then} even with {' '.join(its['change'])}" if its["change"] else ""
            said.append(f"{way}: does not fit{tried}: shorten --max-length, or use larger devices")
    return said


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _row(table: Table, name: str, sizes: Sequence[int | None]) -> None:
    table.add_row(name, *("" if size is None else f"{size / GIB:,.2f}" for size in sizes))
