r"""A hook of the site: \(…\) and \[…\] in a page become MathML, so that a browser needs no script to show a formula.

Arithmatex finds the formulas and keeps Markdown away from them; latex2mathml translates them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with a page's HTML; returns it with its formulas as MathML."""

    def mathml(found: re.Match[str]) -> str:
        tag, opening, latex = found.groups()
        try:
            formula = convert(html.unescape(latex), display="block" if opening == "[" else "inline")
        except Exception as error:  # each of its errors is a class of its own
            raise PluginError(
                f"{page.file.src_uri}: no LaTeX formula: {latex.strip()!r} ({type(error).__name__})"
            ) from error
        unknown = re.search(r"\\[A-Za-z]+", html.unescape(formula))
        if unknown:  # latex2mathml writes commands that it does not know as text
            raise PluginError(f"{page.file.src_uri}: {unknown[0]} is unknown to latex2mathml: {latex.strip()!r}")
        return f'<{tag} class="formula">{formula}</{tag}>'

    return FORMULA.sub(mathml, content)
