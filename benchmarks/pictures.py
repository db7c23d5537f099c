"""Style of the pictures in docs/results.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Return matplotlib's pyplot with a backend that needs no display."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    return plt


def finish(figure: Any, file: Path) -> None:
    """Style all axes of a figure, write it as PNG or SVG, and close it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(file, dpi=150, facecolor="white")
    pyplot().close(figure)
