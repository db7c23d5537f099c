"""Reading the fields of rows and messages of public files, and tracking which fields were not read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.system.shown import shown, shown_name, shown_names

_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|from|content|value)'")
_NEVER_LEFT_OUT = ("role", "from", "content", "value")


class Fields(Mapping[str, Any]):
    """Row or message that tracks which of its fields were read.

    `row[name]` and `row.get(name)` count as reading; `name in row` does not.

    Args:
        leave_out: fields that the recipe drops on purpose, from the row and from its messages.
    """

    def __init__(self, content: Mapping[str, Any], leave_out: Sequence[str] = ()) -> None:
        self.leave_out = tuple(leave_out)
        self.content = {name: value for name, value in content.items() if name not in self.leave_out}
        self._read: set[str] = set()
        self._lost: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self.content[name]

    def __contains__(self, name: object) -> bool:
        return name in self.content

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def message(self, content: Mapping[str, Any]) -> Fields:
        """Return the fields of one message of this row."""
        return Fields(content, [name for name in self.leave_out if name not in _NEVER_LEFT_OUT])

    def mark_read(self, *names: str) -> None:
        self._read.update(names)

    def mark_lost(self, names: Iterable[str]) -> None:
        """Add names of dropped fields below the top level of the row, e.g. `messages.name`."""
        self._lost.update(dict.fromkeys(names))

    def unread(self) -> list[str]:
        """Return the fields that have a value but were not read."""
        skipped = [name for name, value in self.content.items() if name not in self._read and not is_empty(value)]
        return [*map(shown_name, skipped), *map(shown_name, self._lost)]


def is_empty(value: Any) -> bool:
    """Return whether a value is null, blank, or an empty list or object, also when written as text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, list | dict) and not value)


def is_blank(value: Any) -> bool:
    """Return whether a value contains no text; `[]`, `{}` and `null` written as text can be part of a question."""
    return not value.strip() if isinstance(value, str) else is_empty(value)


def first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the value of the first of these fields that is not null, or None if all are."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def required(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the value of the first of these fields that is not null; raise BadRow if all are."""
    value = first(row, names)
    if value is None:
        raise BadRow(f"there is no field {' or '.join(names)}; the row has {shown_names(row)}")
    return value


def string(row: Mapping[str, Any], name: str) -> str:
    value = required(row, (name,))
    if not isinstance(value, str):
        raise BadRow(f"{name} is {shown(value)}, not text")
    return value


def mapping(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the object in a field, which may be given as JSON text; an empty one if the field is missing."""
    value = row.get(name)
    value = unpacked(value) if isinstance(value, str) else value
    if is_empty(value):
        return {}
    if not isinstance(value, dict):
        raise BadRow(f"{name} is {shown(value)}, not an object")
    return value


def unpacked(text: str) -> Any:
    """Return the list or object that a text contains as JSON, as tables often store messages; otherwise the text.

    Raises:
        BadRow: the text is a list of messages as printed by Python, which is not JSON.
    """
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if _PYTHON_MESSAGES.match(text):
                raise BadRow(f"{shown(text)} is a Python list of messages written as text; write it as JSON") from None
    return text
