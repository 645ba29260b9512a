"""Tables as Markdown, with columns that line up: the same text for a terminal and for a file."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what would break its form in a cell is made harmless."""
    lines = [[_cell(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    told = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    told.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(told)


def _cell(text: str) -> str:
    text = re.sub(r"(?<=['\"])/[^'\"]*/", ".../", text)  # where files lie on this machine is nobody's business
    return " ".join(text.split()).replace("|", "\\|")
