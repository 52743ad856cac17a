"""What the loss read in the demo, as a page. In: the folder of a seed. Out: a page, and a sentence that names it."""

from __future__ import annotations

from pathlib import Path

ROWS = "1-12"
"""Held-out pairs that are shown."""


def show_selection(folder: Path, *, policy: str, reference: str, selection_ratio: float, beta: float) -> str:
    """Writes `selection.html`: the first held-out pairs, as a policy reads them beside a reference.

    Args:
        folder: where models and held-out pairs stand.
        policy, reference: names of their folders in it.
        selection_ratio, beta: of the run that is shown.

    Returns:
        A sentence that ends with the page's path; without the libraries that draw it, one that says so.
    """
    try:
        from selective_pref_adapters.seeing.inspect_command import inspect
        from selective_pref_adapters.seeing.options import InspectConfig
    except ModuleNotFoundError as error:
        return f"no page of the selection was written: {error}; pip install 'selective-pref[seeing]'"
    path = folder / "selection.html"
    inspect(
        InspectConfig(
            model=str(folder / policy),
            ref_model=str(folder / reference),
            pairs=str(folder / "eval_pairs.jsonl"),
            rows=ROWS,
            out=str(path),
            title="What Selective-DPO read at its first step",
            selection_ratio=selection_ratio,
            beta=beta,
        )
    )
    return f"which tokens Selective-DPO read at its first step, to be opened in a browser: {path}"
