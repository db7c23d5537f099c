"""Short forms of values and names from files, for messages: never long, always printable."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

_CHARACTERS, _MOST, _NAMES = 40, 100, 12
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _CHARACTERS


def shown(value: Any) -> str:
    """A short form of any value."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def shown_name(name: str) -> str:
    """The name of a field, in quotes where it could not be printed as it is."""
    return name if name.isprintable() and len(name) <= _CHARACTERS else shown(name)


def shown_names(row: Mapping[str, Any]) -> str:
    """The names of a row's fields."""
    names = [shown_name(name) for name in row][:_NAMES]
    more = [f"and {len(row) - _NAMES} more"] if len(row) > _NAMES else []
    return ", ".join([*names, *more]) or "no field"
