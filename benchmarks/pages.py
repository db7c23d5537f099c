"""Parts of docs/results.md: tables, values with their range, and the marks between which a suite writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean


def replace_part(page: Path, begin: str, end: str, part: str) -> None:
    """Replace the part of a page between two marks, or add it at the end."""
    text, marked = page.read_text(), f"{begin}\n\n{part.strip()}\n\n{end}"
    if begin in text:
        text = text[: text.index(begin)] + marked + text[text.index(end) + len(end) :]
    else:
        text = f"{text.rstrip()}\n\n{marked}\n"
    page.write_text(text)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Format the mean, and the range if there is more than one value."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"
