"""Limits on the curves in a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_CURVE_ROWS = 600
"""Longer curves are thinned out; the complete ones stay in the folder of the stage."""


def thin_out(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most `most` evenly spaced rows, including the first and the last."""
    if len(rows) <= most:
        return list(rows)
    step = (len(rows) - 1) / (most - 1)
    return [rows[round(number * step)] for number in range(most)]
