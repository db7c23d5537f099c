"""Normalized form of the rows of all sources, and the checks that make a row bad.

conversations: {"messages": [{"role", "content"}, ...], "attributes": {name: 0..4} (optional), "origin"}
    an answer may have "reasoning_content": the assistant's reasoning before it
prompts: {"messages": [..., the last from the user], "origin"}
pairs: {"prompt": [messages], "chosen": str, "rejected": str, "chosen_reward", "rejected_reward" (optional), "origin"}

Conversations and prompts may have "instruction_id_list" and "kwargs": rules that a program can check in an answer, with
the settings of each, as in IFEval (2311.07911).

Texts are stripped of white space at both ends, because a tokenizer would merge it with the text of the template.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from nemo_minitron.errors import shortened
from nemo_minitron.schema.chats import AttributeName
from nemo_minitron.system.shown import shown

ATTRIBUTES: tuple[str, ...] = get_args(AttributeName)
MAX_RATING = 4
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "ai", "bot", "model"), "assistant"),
}
"""Name of a role in public data, in lower case -> role."""
Message = dict[str, str]
"""Message with role, content, and for some answers reasoning_content."""
Row = dict[str, Any]


class BadRow(Exception):
    """Row that cannot be used, with the reason. Bad rows are counted; only too many of them stop a stage."""


def conversation(messages: Sequence[Message], attributes: Mapping[str, Any]) -> Row:
    """Return a checked row of kind conversations, without its origin.

    Raises:
        BadRow: a text is empty, roles are out of order, or an attribute is unknown or out of range.
    """
    row: Row = {"messages": _checked(messages, last="assistant")}
    if attributes:
        row["attributes"] = {name: _rating(name, value) for name, value in attributes.items()}
    return row


def prompt(messages: Sequence[Message]) -> Row:
    """Return a checked row of kind prompts, without its origin.

    Raises:
        BadRow: a text is empty, or roles are out of order.
    """
    return {"messages": _checked(messages, last="user")}


def instructions(names: Any, settings: Any) -> Row:
    """Return the keys of a row for rules that its answer must follow; names are not compared with known rules.

    Settings that are null are left out: tables have a column for every setting of every rule.

    Raises:
        BadRow: not a list of names with an object, or null, for each.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRow(f"instruction_id_list is {shown(names)}, not a list of names")
    if not isinstance(settings, list) or not all(each is None or isinstance(each, dict) for each in settings):
        raise BadRow(f"kwargs is {shown(settings)}, not a list of objects")
    if len(names) != len(settings):
        raise BadRow(f"the row has {len(names)} rules and {len(settings)} kwargs")
    kept = [{key: value for key, value in (each or {}).items() if value is not None} for each in settings]
    _require_json({"instruction_id_list": names, "kwargs": kept})
    return {"instruction_id_list": names, "kwargs": kept}


def _require_json(fields: Mapping[str, Any]) -> None:
    """Raise BadRow for values that cannot be written to a row: lone surrogates, and bytes or dates of tables."""
    for name, value in fields.items():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"{name} has an unpaired surrogate") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRow(f"{name} cannot be written as JSON: {shortened(error)}") from error


def pair(prompt: Sequence[Message], chosen: str, rejected: str, rewards: tuple[Any, Any] = (None, None)) -> Row:
    """Return a checked row of kind pairs, without its origin.

    Args:
        rewards: of chosen and rejected; None if not given.

    Raises:
        BadRow: a text is empty, roles are out of order, the answers are equal, a reward is not a number, or only
            one reward is given.
    """
    row: Row = {
        "prompt": _checked(prompt, last="user"),
        "chosen": checked_text(chosen, "chosen"),
        "rejected": checked_text(rejected, "rejected"),
    }
    if row["chosen"] == row["rejected"]:
        raise BadRow("chosen and rejected are the same text")
    keys = ("chosen_reward", "rejected_reward")
    given = {key: _reward(key, value) for key, value in zip(keys, rewards, strict=True) if value is not None}
    if len(given) == 1:
        raise BadRow(f"{next(iter(given))} is given, but the other reward is missing")
    return {**row, **given}


def with_system(row: Row, system: str | None) -> Row:
    """Return the row with `system` as its system message, unless it already has one."""
    key = "messages" if "messages" in row else "prompt"
    if system is None or not system.strip() or row[key][0]["role"] == "system":
        return row
    return {**row, key: [{"role": "system", "content": system.strip()}, *row[key]]}


def question(row: Row) -> str:
    """Return the first text of the user, normalized in case and spaces.

    Rows with the same question belong to the same part of a split.
    """
    messages = row["messages" if "messages" in row else "prompt"]
    first = next(message["content"] for message in messages if message["role"] == "user")
    return " ".join(first.casefold().split())


def _checked(messages: Sequence[Message], *, last: str) -> list[Message]:
    found = [{name: text.strip() for name, text in message.items()} for message in messages]
    if found and found[0] == {"role": "system", "content": ""}:
        found = found[1:]
    turns = found[1:] if found and found[0]["role"] == "system" else found
    if not turns:
        raise BadRow("there are no messages")
    for number, message in enumerate(found, start=1):
        for name, text in message.items():
            checked_text(
                text, f"message {number} ({message['role']})" if name == "content" else f"{name} of message {number}"
            )
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            number = index + 1 + len(found) - len(turns)
            raise BadRow(f"message {number} is from {message['role']}, but should be from {expected}")
    if turns[-1]["role"] != last:
        raise BadRow(f"the last message is from {turns[-1]['role']}, not from {last}")
    return found


def checked_text(value: str, what: str) -> str:
    """Return the text without white space at its ends.

    Raises:
        BadRow: the text is empty or cannot be encoded as UTF-8.
    """
    text = value.strip()
    if not text:
        raise BadRow(f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} has an unpaired surrogate at character {error.start}") from error
    return text


def _rating(name: str, value: Any) -> float:
    if name not in ATTRIBUTES:
        raise BadRow(
            f"unknown attribute {shown(name)}; known: {', '.join(ATTRIBUTES)}; "
            "rename it with `attributes` of the source"
        )
    if not _is_number(value):
        raise BadRow(f"attribute {name} is {shown(value)}, not a number")
    if not 0 <= value <= MAX_RATING:
        raise BadRow(f"attribute {name} is {shown(value)}, out of the range 0 to {MAX_RATING}")
    return value


def _reward(key: str, value: Any) -> float:
    if not _is_number(value):
        raise BadRow(f"{key} is {shown(value)}, not a number")
    return value


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
