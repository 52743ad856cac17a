"""What the selection looks like: pages, pictures and reports of what a loss read, for people.

    from selective_pref_adapters.seeing import selection_page

    selection_page(out, batch["input_ids"], tokenizer).write("selection.html")

`out` is what any loss of `selective_pref` returned. Importing this package imports nothing but the standard library;
what a picture needs is imported when it is drawn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selective_pref_adapters.seeing.page import SelectionPage, selection_page
    from selective_pref_adapters.seeing.pictures import selection_svg
    from selective_pref_adapters.seeing.terminal import selection_text

__all__ = ["SelectionPage", "selection_page", "selection_svg", "selection_text"]

_HOMES = {
    "SelectionPage": "page",
    "selection_page": "page",
    "selection_svg": "pictures",
    "selection_text": "terminal",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
