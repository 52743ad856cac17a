"""Folders of runs → what they logged, how they were configured, and the selection of their fixed pairs.

In: a folder that `selective-pref train`, a Hugging Face `Trainer` or TRL wrote, or is writing. Out: a `Run`. A last
line that is cut short, or a file that is being written, is left out and noted; a folder without anything to read is
an error that says what was looked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from selective_pref_adapters.seeing.pictures import FOLDER
from selective_pref_adapters.seeing.shown import overlap

Line: TypeAlias = dict[str, Any]

_PATIENCE = 10  # of the callback, where a run does not say


@dataclass(frozen=True, kw_only=True)
class Visit:
    """The selection of a run's fixed pairs at one step: their records, as `pairs_json` writes them."""

    step: int
    pairs: list[dict[str, Any]]


@dataclass(kw_only=True)
class Run:
    """A run as its folder tells it.

    Attributes:
        name: what it is called in the report.
        folder: where it stands.
        lines: what it logged, one dict for each event, with "step".
        config: option → value, nested names joined by dots; empty where the folder does not tell.
        warnings: what its callback warned of: {"step", "kind", "message"}.
        visits: the selection of its fixed pairs, by step.
        patience: how many logs its callback looked back on.
        notes: what could not be read, and what that means.
    """

    name: str
    folder: Path
    lines: list[Line]
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    warnings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    visits: list[Visit] = field(default_factory=list[Visit])
    patience: int = _PATIENCE
    notes: list[str] = field(default_factory=list[str])

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a metric; NaN where it was not finite."""
        points = [(line["step"], float(line[name])) for line in self.lines if _is_number(line.get(name))]
        return [step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points]

    def overlaps(self) -> tuple[list[float], list[float]]:
        """(steps, the share of the fixed pairs' selection that was selected at the visit before)."""
        steps, shares = [], []
        for before, after in zip(self.visits, self.visits[1:], strict=False):
            both = list(zip(_weights(before), _weights(after), strict=False))
            if both and [ids for (ids, _), _ in both] == [ids for _, (ids, _) in both]:
                steps.append(float(after.step))
                shares.append(sum(overlap(ours, theirs) for (_, ours), (_, theirs) in both) / len(both))
        return steps, shares


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs of several folders, named so that they can be told apart.

    Raises:
        ValueError: no folder is given, one is given twice, or one holds no run.
    """
    if not folders:
        raise ValueError("give at least one folder of a run")
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"each run once: got {', '.join(folders)}")
    names = [path.resolve().name for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(folder: Path, name: str | None = None) -> Run:
    """The run in a folder.

    Raises:
        ValueError: there is no such folder, nothing of a run in it, or a line of its log (not the last) is broken.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    notes: list[str] = []
    if (folder / "metrics.jsonl").is_file():
        lines, (config, more) = _lines(folder / "metrics.jsonl", notes), (_loop_config(folder, notes), {})
        if not (folder / "summary.json").is_file():
            notes.append("no summary.json: the run goes on, or was ended before its end")
    else:
        state = _trainer_state(folder, notes)
        lines, config, more = state["log_history"], _trainer_config(state), _callback_state(state)
    lines = [line for line in lines if isinstance(line, dict) and _is_number(line.get("step"))]
    if not lines:
        raise ValueError(f"{folder} is the folder of a run that has not logged anything yet")
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        lines=lines,
        config=config,
        visits=_visits(folder / FOLDER, notes),
        notes=notes,
        **more,
    )


def differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """(option, its value in each run) of the options that are not the same in all runs; "–" where one has none."""
    names = sorted({name for run in runs for name in run.config})
    rows = [(name, *(_text(run.config.get(name)) for run in runs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _lines(path: Path, notes: list[str]) -> list[Line]:
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
            notes.append(f"the last line of {path.name} is cut short and was left out")
    return lines


def _loop_config(folder: Path, notes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, prefix, read in (("config.yaml", "", yaml.safe_load), ("run.json", "run", json.loads)):
        try:
            value = read((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            notes.append(f"no {name}: its options cannot be compared")
            continue
        except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError):
            value = None
        if isinstance(value, Mapping):
            flat = _flat(value, prefix)
            found.update({n: item for n, item in flat.items() if n.removeprefix("run.") not in found})
        else:
            notes.append(f"{name} is incomplete: its options cannot be compared")
    return found


def _trainer_state(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The newest whole `trainer_state.json` of a folder and its checkpoints."""
    checkpoints = sorted(
        (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)),
        key=lambda path: -int(path.name.rpartition("-")[2]),
    )
    found: list[dict[str, Any]] = []
    for path in [folder / "trainer_state.json", *(path / "trainer_state.json" for path in checkpoints)]:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (json.JSONDecodeError, UnicodeDecodeError):
            state = None
        if isinstance(state, dict) and isinstance(state.get("log_history"), list):
            found.append(state)
        else:
            notes.append(f"{path.relative_to(folder)} is incomplete and was left out")
    if not found:
        said = f" ({'; '.join(notes)})" if notes else ""
        raise ValueError(
            f"{folder} is no folder of a run{said}: expected metrics.jsonl (selective-pref train), or a "
            "trainer_state.json (Hugging Face Trainer, TRL) in it or in a checkpoint-* of it"
        )
    return max(found, key=lambda state: state.get("global_step") or 0)


def _trainer_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a trainer's state tells of its options."""
    names = ("train_batch_size", "max_steps", "num_train_epochs", "eval_steps", "logging_steps", "save_steps")
    config = {name: state[name] for name in names if name in state}
    config |= _flat(_selection_callback(state).get("args") or {}, "callback")
    for line in state["log_history"]:
        if isinstance(line, dict) and "selection/ratio" in line:  # as the first logged step had them
            config["selection_ratio"], config["beta"] = line.get("selection/ratio"), line.get("selection/beta")
            break
    return config


def _callback_state(state: Mapping[str, Any]) -> dict[str, Any]:
    stored = _selection_callback(state)
    given = (stored.get("attributes") or {}).get("warnings") or []
    return {"warnings": given, "patience": (stored.get("args") or {}).get("patience") or _PATIENCE}


def _selection_callback(state: Mapping[str, Any]) -> dict[str, Any]:
    stored = (state.get("stateful_callbacks") or {}).get("SelectionCallback") or {}
    return stored[0] if isinstance(stored, list) else stored


def _visits(folder: Path, notes: list[str]) -> list[Visit]:
    visits: list[Visit] = []
    for path in sorted(folder.glob("step-*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            visit = Visit(step=int(value["step"]), pairs=list(value["pairs"]))
            _weights(visit)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
            notes.append(f"{folder.name}/{path.name} is no whole selection and was left out")
        else:
            visits.append(visit)
    return visits


def _weights(visit: Visit) -> list[tuple[list[int], list[float]]]:
    """(ids, weights) of both sides of every pair; supervised training keeps the chosen one alone."""
    names = ("chosen", "rejected")
    sides = [pair[name] for pair in visit.pairs for name in names if name == "chosen" or name in pair]
    return [(list(side["ids"]), [weight or 0.0 for weight in side["weights"]]) for side in sides]


def _flat(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        flat.update(_flat(item, path) if isinstance(item, Mapping) else {path: item})
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
