"""Converting messages of public data sets to checked messages.

Fields of a message other than its text are kept, refused, or counted as lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.data.chat.fields import Fields, first, is_empty, required, string, unpacked
from nemo_minitron.data.chat.rows import ROLES, BadRow, Message
from nemo_minitron.system.shown import shown

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the field with an assistant's reasoning before its answer; normalized rows use the first."""
CONTAINERS = ("messages", "conversations", "conversation")
_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_REFUSED = ("tool_calls", "function_call", "images", "image", "audio", "videos", "video")
_REFUSED_OF_ROW = ("tools", "functions", "images", "image", "audios", "audio", "videos", "video")
_TRAIN_FLAGS = ("weight", "train", "training", "trainable")
"""Fields that say whether to train on an answer; this package trains on every answer of a row."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system_of(row: Fields) -> list[Message]:
    """Return the message of the `system` field as a list, which is empty if the field is."""
    return [{"role": "system", "content": string(row, "system")}] if not is_empty(row.get("system")) else []


def read(row: Fields, names: Sequence[str], role: str = "user") -> list[Message]:
    """Return the messages in the first of these fields that is present; a plain text is one message of `role`."""
    name = next((name for name in names if row.get(name) is not None), names[0])
    value = required(row, names)
    if isinstance(value, str):
        value = unpacked(value)
        if name not in CONTAINERS and not _is_messages(value):
            return [{"role": role, "content": row[name]}]
    return messages_of(row, [value] if isinstance(value, dict) else value, name)


def _is_messages(value: Any) -> bool:
    """Return whether JSON found in a text is a list of messages; any other JSON is ordinary text."""
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(
        isinstance(turn, dict) and any(key in turn for key in _ROLE) and any(key in turn for key in _CONTENT)
        for turn in turns
    )


def messages_of(row: Fields, value: Any, name: str) -> list[Message]:
    """Return the messages of a list, which may be given as JSON text."""
    turns = unpacked(value) if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{name} is {shown(value)}, not a list of messages")
    return [_message(row, turn, number, name) for number, turn in enumerate(turns, start=1)]


def _message(row: Fields, turn: Any, number: int, name: str) -> Message:
    what = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRow(f"{what} is {shown(turn)}, not an object")
    fields = row.message(turn)
    role = first(fields, _ROLE)
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRow(f"{what} has the role {shown(role)}; known: {', '.join(ROLES)}")
    _require_supported(fields, what, known)
    out = {"role": known, "content": _content(fields, what)}
    if known == "assistant":
        out |= reasoning_of(fields, what)
    row.mark_lost(f"{name}.{field}" for field in fields.unread())
    return out


def _content(fields: Fields, what: str) -> str:
    """Return the text of a message; join parts of type text."""
    content = first(fields, _CONTENT)
    if isinstance(content, list) and content:
        return "".join(_part(part, what) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"{what} has no text" if is_empty(content) else f"{what} has {shown(content)} in place of text")
    return content


def _part(part: Any, what: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise BadRow(f"{what} has a part of type {shown(kind)}; only text is supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRow(f"{what} has a part whose text is {shown(text)}, not a string")
    return text


def reasoning_of(fields: Fields, what: str) -> dict[str, str]:
    """Return {reasoning_content: text}, the name that chat templates use; an empty dict if there is no reasoning."""
    value = first(fields, REASONING)
    if is_empty(value):
        return {}
    if not isinstance(value, str):
        raise BadRow(f"{what} has reasoning that is {shown(value)}, not text")
    # Some data sets repeat the reasoning under another name.
    fields.mark_read(*(name for name in REASONING if fields.content.get(name) == value))
    return {REASONING[0]: value}


def plain_text(answer: Mapping[str, str], what: str) -> str:
    """Return the text of an answer of a pair; refuse reasoning, for which pairs have no field."""
    if REASONING[0] in answer:
        raise BadRow(f"{what} has {REASONING[0]}, which pairs do not support; {_drop_hint(REASONING[0])}")
    return answer["content"]


def require_supported(row: Fields) -> None:
    """Refuse a row with tools or media, without which its conversation makes no sense."""
    for name in _REFUSED_OF_ROW:
        if not is_empty(row.content.get(name)):
            raise BadRow(f"the row has {name}, which is not supported; {_drop_hint(name)}")


def _require_supported(fields: Fields, what: str, role: str) -> None:
    for name in _REFUSED:
        if not is_empty(fields.content.get(name)):
            raise BadRow(f"{what} has {name}, which is not supported; {_drop_hint(name)}")
    for name in _TRAIN_FLAGS:
        value = fields.content.get(name)
        if role == "assistant" and value is not None and value not in (1, 1.0, True):
            raise BadRow(f"{what} has {name} = {shown(value)}, but every answer is trained on; {_drop_hint(name)}")
        fields.mark_read(name)
    if fields.content.get("prefix") is True:
        raise BadRow(f"{what} is marked as a prefix, but whole answers are trained on; {_drop_hint('prefix')}")
    fields.mark_read("prefix")


def _drop_hint(name: str) -> str:
    return f"set `leave_out: [{name}]` of the source to drop it"
