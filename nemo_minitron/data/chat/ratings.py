"""Converting ratings of public rows to attributes under this package's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.data.chat.fields import Fields, mapping
from nemo_minitron.data.chat.rows import ATTRIBUTES, MAX_RATING, BadRow
from nemo_minitron.system.shown import shown, shown_name

Renames = Mapping[str, str | None]
"""Name of an attribute in the row -> name here; None leaves it out."""


def ratings(row: Fields, renames: Renames) -> dict[str, Any]:
    """Return the ratings in the field `attributes` and those in fields of the row with a known or renamed name."""
    plain = {name: row[name] for name in row if name in ATTRIBUTES or name in renames}
    listed = mapping(row, "attributes")
    for name in plain.keys() & listed.keys():
        if plain[name] is not None and plain[name] != listed[name]:
            raise BadRow(f"{name} is {shown(plain[name])} in the row, but {shown(listed[name])} in its attributes")
    return {**plain, **listed}


def renamed(found: Mapping[str, Any], renames: Renames) -> dict[str, Any]:
    """Return the attributes under this package's names, without those that are null."""
    out: dict[str, Any] = {}
    for name, value in found.items():
        ours = renames.get(name, name)
        if ours is None or value is None:
            continue
        if ours in out:
            raise BadRow(f"two attributes are named {ours}")
        out[ours] = value
    return out


def labels(row: Fields) -> dict[str, Any]:
    """Convert OASST labels from 0 to 1 to whole ratings from 0 to 4.

    The labels are {name: {value, count}}, {name: value} or {name: [...], value: [...]}.
    """
    found = mapping(row, "labels")
    if isinstance(found.get("name"), list) and isinstance(found.get("value"), list):
        names, numbers = found["name"], found["value"]
        if len(names) != len(numbers) or not all(isinstance(name, str) for name in names):
            raise BadRow(f"labels has {len(names)} names and {len(numbers)} values, not one value for each text name")
        found = dict(zip(names, numbers, strict=True))
    values = {name: each.get("value") if isinstance(each, dict) else each for name, each in found.items()}
    out = {}
    for name, value in values.items():
        if name not in ATTRIBUTES:
            row.mark_lost([f"labels.{name}"])
        elif value is not None:
            if not is_rating(value) or not 0 <= value <= 1:
                raise BadRow(f"label {name} is {shown(value)}, not a number from 0 to 1")
            out[name] = round(value * MAX_RATING)
    return out


def label_string(label: Any) -> dict[str, float]:
    """Parse NeMo's label format, "helpfulness:3,correctness:4"."""
    if label is None or label == "":
        return {}
    out: dict[str, float] = {}
    for part in str(label).split(",") if isinstance(label, str) else [""]:
        name, _, value = part.partition(":")
        try:
            number = float(value)
        except ValueError as error:
            raise BadRow(f"label {shown(label)} is not of the form name:number,name:number") from error
        if name.strip() in out:
            raise BadRow(f"label {shown(label)} rates {shown_name(name.strip())} twice")
        out[name.strip()] = int(number) if number.is_integer() else number
    return out


def is_rating(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
