"""Rows and messages as public files hold them: reading their fields, and knowing which were not read."""

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
    """A row, or a message, that remembers which of its fields were read.

    Reading is `row[name]` and `row.get(name)`; `name in row` is not.

    Args:
        leave_out: fields that the recipe drops on purpose, also from the messages of a row.
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
        """The fields of one message of this row."""
        return Fields(content, [name for name in self.leave_out if name not in _NEVER_LEFT_OUT])

    def mark_read(self, *names: str) -> None:
        self._read.update(names)

    def mark_lost(self, names: Iterable[str]) -> None:
        """Add names, as `messages.name`, of what was left behind below the top level of the row."""
        self._lost.update(dict.fromkeys(names))

    def unread(self) -> list[str]:
        """Fields that have a value and that nothing has read."""
        skipped = [name for name, value in self.content.items() if name not in self._read and not is_empty(value)]
        return [*map(shown_name, skipped), *map(shown_name, self._lost)]


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, blank, or an empty list or object, also where it is written as text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, list | dict) and not value)


def first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these fields that is not null; None where all are."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def required(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """As `first`, but a row without any of them is bad."""
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
    """An object, which may be written as JSON text; empty where the field is missing."""
    value = row.get(name)
    value = unpacked(value) if isinstance(value, str) else value
    if is_empty(value):
        return {}
    if not isinstance(value, dict):
        raise BadRow(f"{name} is {shown(value)}, not an object")
    return value


def unpacked(text: str) -> Any:
    """The list or object that a text holds as JSON, which is how tables often store messages; else the text.

    Raises:
        BadRow: the text is a list of messages as Python prints it, which is not JSON.
    """
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if _PYTHON_MESSAGES.match(text):
                raise BadRow(f"{shown(text)} is a Python list of messages written as text; write it as JSON") from None
    return text
