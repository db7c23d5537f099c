"""Tables and numbers as the report and the model card write them, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_minitron.system.terminal import visible


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; vertical bars and line breaks in cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def plain(text: str) -> str:
    """Escape text from data as one line of Markdown without markup, links or invisible characters."""
    escaped = re.sub(r"([\\`*\[\]<>~&])", r"\\\1", visible(" ".join(text.split())))
    # GitHub turns bare addresses into links.
    return re.sub(r"(?i)(:)(?=//)|(?<=\bwww)(\.)|(?<=\w)(@)(?=\w)", r"\\\g<0>", escaped)


def code(text: str) -> str:
    """Return text from data as a code span."""
    return "`" + visible(" ".join(text.replace("`", "'").split())) + "`"


def millions(count: float) -> str:
    """Format a count, e.g. 230K, 134.5M, 8.03B."""
    if count < 1e6:
        return f"{count / 1e3:.0f}K"
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def mebibytes(num_bytes: float) -> str:
    """Format the size of a file in MiB, e.g. 179, 0.3."""
    size = num_bytes / 2**20
    return f"{size:,.0f}" if size >= 10 else f"{size:.1f}"
