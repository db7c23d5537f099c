"""Short, printable forms of values and names from input files, for messages."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

_CHARACTERS, _MOST, _NAMES = 40, 100, 12
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _CHARACTERS


def shown(value: Any) -> str:
    """Return a short form of any value."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number with thousands of digits"
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def shown_name(name: str) -> str:
    """Return the name of a field, shortened and quoted if it is long or not printable."""
    return name if name.isprintable() and len(name) <= _CHARACTERS else shown(name)


def shown_names(row: Mapping[str, Any]) -> str:
    """Return the names of a row's fields as a list in a sentence."""
    names = [shown_name(name) for name in row][:_NAMES]
    more = [f"and {len(row) - _NAMES} more"] if len(row) > _NAMES else []
    return ", ".join([*names, *more]) or "no field"
