"""Durations in words, as reports, the status and log lines show them."""

from __future__ import annotations

_UNITS = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """Format a duration with its two largest units, e.g. 3 s, 5 min 12 s, 2 h 5 min, 21 d 0 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole else "< 1 s"
    place = next(place for place, (_, size) in enumerate(_UNITS) if whole >= size)
    (large, size), (small, part) = _UNITS[place : place + 2]
    return f"{whole // size} {large} {whole % size // part} {small}"
