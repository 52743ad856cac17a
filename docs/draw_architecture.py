"""Draws `docs/architecture.svg` from the imports in the source: python docs/draw_architecture.py

In: the source of `selective_pref_adapters`. Out: one box per room (a module or folder right below the package), above
all rooms that it imports, with a line to each of them that none of its other imports leads to already.
"""

from __future__ import annotations

import ast
import random
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

PACKAGE = "selective_pref_adapters"
SOURCE = Path(__file__).resolve().parents[1] / "adapters" / PACKAGE
PICTURE = Path(__file__).with_name("architecture.svg")
CORE = "selective_pref"
COLUMNS = 7
STARTS = 40


def room_of(path: Path) -> str:
    """The module or folder, right below the package, that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports() -> dict[str, set[str]]:
    """Room → the rooms that its files import anywhere, functions included; `selective_pref` stands for the core."""
    found: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if path == SOURCE / "__init__.py":
            continue
        rooms = found.setdefault(room_of(path), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                package, _, module = name.partition(".")
                rooms |= {module.split(".")[0]} if package == PACKAGE and module else set()
                rooms |= {CORE} if package == CORE else set()
    return {room: others - {room} for room, others in found.items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Room → its floor, counted from the core's, 0: one above the highest room that it imports.

    Raises:
        ValueError: rooms import one another in a circle; names them.
    """

    @cache
    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            raise ValueError(f"imports run in a circle: {' → '.join([*above[above.index(room) :], room])}")
        return 0 if room == CORE else 1 + max((floor(other, (*above, room)) for other in graph[room]), default=0)

    return {CORE: 0, **{room: floor(room) for room in graph}}


def lines(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """(room, imported room) without those that another import of the room leads to already."""

    def reach(room: str) -> set[str]:
        direct = graph.get(room, set())
        return direct.union(*(reach(other) for other in direct))

    return {
        (room, other)
        for room, direct in graph.items()
        for other in direct
        if not any(other in reach(between) for between in direct - {other})
    }


def levels(graph: dict[str, set[str]]) -> list[list[str]]:
    """The rooms floor by floor, from the core's up: on each floor `COLUMNS` names, "" where no room stands.

    A room stands right below the lowest of those that import it, the topmost room (`cli`) left aside: so lines are
    short, and the trainers stand side by side. Within a floor the order is
    the best one found from `STARTS` random ones: few crossings first, short lines second.
    """
    arrows, floor_of = lines(graph), floors(graph)
    top = max(floor_of.values())
    for room in sorted(graph, key=floor_of.__getitem__, reverse=True):
        importers = [floor_of[above] for above, below in arrows if below == room and floor_of[above] < top]
        floor_of[room] = min(importers, default=floor_of[room] + 1) - 1
    rows = [[room for room in sorted(floor_of) if floor_of[room] == floor] for floor in range(top + 1)]
    pick = random.Random(0)
    starts = [[pick.sample(row + [""] * (COLUMNS - len(row)), COLUMNS) for row in rows] for _ in range(STARTS)]
    return min((untangled(start, arrows) for start in starts), key=lambda found: tangle(found, arrows))


def untangled(rows: list[list[str]], arrows: set[tuple[str, str]]) -> list[list[str]]:
    """The floors after swaps of two columns, each of which lowers `tangle`, until none does."""
    best = tangle(rows, arrows)
    improved = True
    while improved:
        improved = False
        for row in rows:
            for one, other in combinations(range(COLUMNS), 2):
                row[one], row[other] = row[other], row[one]
                if (now := tangle(rows, arrows)) < best:
                    best, improved = now, True
                else:
                    row[one], row[other] = row[other], row[one]
    return rows


def positions(rows: list[list[str]]) -> dict[str, tuple[float, int]]:
    """Room → (x of its column in [0, 1], floor)."""
    at = {room: ((n + 0.5) / COLUMNS, floor) for floor, row in enumerate(rows) for n, room in enumerate(row)}
    return {room: where for room, where in at.items() if room}


def tangle(rows: list[list[str]], arrows: set[tuple[str, str]]) -> tuple[int, float]:
    """(crossings of two lines, and of a line and a room's box; sum of the lines' widths)."""
    at = positions(rows)
    ends = [(*at[above], *at[below]) for above, below in arrows]

    def x(line: tuple[float, int, float, int], floor: int) -> float:
        return line[2] + (line[0] - line[2]) * (floor - line[3]) / (line[1] - line[3])

    crossings = 0
    for one, other in combinations(ends, 2):
        low, high = max(one[3], other[3]), min(one[1], other[1])
        crossings += low < high and (x(one, low) - x(other, low)) * (x(one, high) - x(other, high)) < 0
    hits = sum(
        line[3] < y < line[1] and abs(x(line, y) - across) < 0.6 / COLUMNS for line in ends for across, y in at.values()
    )
    return crossings + 10 * hits, round(
        sum(abs(line[0] - line[2]) for line in ends), 6
    )  # whatever the order of the sum


def draw(path: Path) -> None:
    """Writes the picture."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "architecture", "font.family": "monospace"}
    import matplotlib.pyplot as plt

    graph = imports()
    rows = levels(graph)
    figure, axes = plt.subplots(figsize=(9, 0.8 * len(rows)))
    boxes = {}
    for room, (x, floor) in positions(rows).items():
        folder = (SOURCE / room).is_dir() or room == CORE
        style = {"boxstyle": "round,pad=0.4", "facecolor": "#dbe9f6" if folder else "#ffffff", "edgecolor": "#30597d"}
        boxes[room] = axes.text(
            x, floor, room, ha="center", va="center", fontsize=10, color="#10202e", bbox=style, zorder=3
        )
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    axes.axis("off")
    figure.canvas.draw()  # boxes get their sizes, which lines end at
    for room, other in sorted(lines(graph)):
        ends = {"patchA": boxes[room].get_bbox_patch(), "patchB": boxes[other].get_bbox_patch()}
        look = {"arrowstyle": "-", "color": "#7b93a8", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.0, **ends}
        axes.annotate("", boxes[other].get_position(), boxes[room].get_position(), arrowprops=look, zorder=1)
    figure.patch.set_facecolor("#ffffff")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(PICTURE)
    print(f"{PICTURE.name}: {len(imports())} rooms", file=sys.stderr)
