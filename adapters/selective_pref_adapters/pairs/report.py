"""What became of rows when they were tokenised: kept, changed or left out, for which reason, and what helps.

In: reasons. Out: sentences.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EMPTY = "empty completion"
WHITE_SPACE = "completion of white space alone"
EQUAL = "chosen and rejected are equal"
SAME_TOKENS = "chosen and rejected have the same tokens"
NO_COMPLETION = "no completion left after truncation"
EQUAL_AFTER = "chosen and rejected are equal after truncation"
UNWRITTEN = "a tool call that the chat template does not write"
UNSEEN = "no token of the completion is the assistant's"

_REMEDIES = {
    EMPTY: "there is nothing to learn from; repair or remove the rows",
    WHITE_SPACE: "there is nothing to learn from; repair or remove the rows",
    EQUAL: "neither is better; repair or remove the rows",
    SAME_TOKENS: "the chat template (or the tokenizer) leaves out what they differ in, such as reasoning or tool "
    "calls; use a template that shows it",
    UNWRITTEN: "the answer would be trained on as if it were empty; use a template that writes tool_calls",
    UNSEEN: "the chat template rewrites earlier turns; mark the assistant's text in it with {% generation %}, or give "
    "one row for each answer",
}
_TOO_LONG = {
    ("keep_start", NO_COMPLETION): "the prompt alone is as long; a larger max_length, or truncation_mode 'keep_end'",
    ("keep_end", NO_COMPLETION): "a larger max_length",
    ("keep_start", EQUAL_AFTER): "they differ later; a larger max_length, or truncation_mode 'keep_end'",
    ("keep_end", EQUAL_AFTER): "they differ earlier; a larger max_length",
}


@dataclass
class TokenizationReport:
    """What became of the rows: counts by reason of those left out, and of those changed.

    Attributes:
        rows: how many there were.
        kept: how many pairs were made of them.
        left_out: reason → how many rows.
        truncated: kept pairs of which a side was cut.
        boundary_merged: kept pairs whose prompt ends in other tokens once a completion follows.
        tools_unread: kept pairs with tools that the chat template does not write.
        unteachable: reason → how many kept pairs teach nothing (`keep_unteachable`).
        malformed: rows that the chat template refused, where that was not to be an error.
        max_length, truncation_mode: those in force.
        unit: what is counted: "pairs", or "rows" of one answer.
    """

    rows: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter[str])
    truncated: int = 0
    boundary_merged: int = 0
    tools_unread: int = 0
    unteachable: Counter[str] = field(default_factory=Counter[str])
    malformed: int = 0
    max_length: int = 0
    truncation_mode: str = "keep_start"
    unit: str = "pairs"

    def lines(self) -> list[str]:
        """One sentence for each thing worth knowing; empty where every row was kept whole."""
        lines = [
            f"{count} of {self.rows} {self.unit} left out: {reason} ({self.remedy(reason)})"
            for reason, count in self.left_out.most_common()
        ]
        if self.malformed:
            lines.append(f"{self.malformed} of {self.rows} rows left out: the chat template refuses them")
        if self.truncated:
            lines.append(
                f"{self.truncated} of {self.kept} kept {self.unit} truncated to max_length {self.max_length} "
                f"({self.truncation_mode})"
            )
        if self.boundary_merged:
            lines.append(
                f"{self.boundary_merged} of {self.kept} kept {self.unit} have a prompt whose last tokens change when a "
                "completion follows: their completion starts where the ids diverge"
            )
        if self.unteachable:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.unteachable.most_common())
            lines.append(
                f"{self.unteachable.total()} of {self.kept} kept {self.unit} teach nothing ({reasons}): training "
                "leaves them out, unless TRL tokenises by itself (stock_tokenization)"
            )
        if self.tools_unread:
            lines.append(
                f"{self.tools_unread} of {self.kept} kept {self.unit} have tools, which the chat template does not "
                "write into the prompt: use a template that does"
            )
        return lines

    def remedy(self, reason: str) -> str:
        """What helps rows that are left out for a reason."""
        if reason in _REMEDIES:
            return _REMEDIES[reason]
        what = _TOO_LONG[self.truncation_mode, reason]
        return f"max_length {self.max_length}, {self.truncation_mode}: {what} would keep them"
