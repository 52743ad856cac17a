"""Draws `docs/architecture.svg` from the imports in the source: python docs/draw_architecture.py

In: the source of `selective_pref_adapters`. Out: one box for each room (a module or folder of the top floor), on the
lowest floor that lets every import point downwards, with a line to each room that it imports and that none of its other
imports leads to already.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGE = "selective_pref_adapters"
SOURCE = Path(__file__).resolve().parents[1] / "adapters" / PACKAGE
PICTURE = Path(__file__).with_name("architecture.svg")
CORE = "selective_pref"


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


def draw(path: Path) -> None:
    """Writes the picture."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "architecture", "font.family": "monospace"}
    import matplotlib.pyplot as plt

    graph = imports()
    floor_of = floors(graph)
    levels = [
        sorted(room for room, floor in floor_of.items() if floor == level)
        for level in range(max(floor_of.values()) + 1)
    ]
    figure, axes = plt.subplots(figsize=(9, 0.95 * len(levels)))
    boxes = {}
    for level, rooms in enumerate(levels):
        for place, room in enumerate(rooms):
            x = (place + 0.5) / len(rooms)
            folder = (SOURCE / room).is_dir() or room == CORE
            style = {
                "boxstyle": "round,pad=0.4",
                "facecolor": "#dbe9f6" if folder else "#ffffff",
                "edgecolor": "#30597d",
            }
            boxes[room] = axes.text(
                x, level, room, ha="center", va="center", fontsize=10, color="#10202e", bbox=style, zorder=3
            )
    axes.set(xlim=(0, 1), ylim=(-0.6, len(levels) - 0.4))
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
