"""Adapters: a row of a public format -> a checked row. One small function each, in the table FORMATS."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nemo_minitron.config.schema import RowKind
from nemo_minitron.data.chat.rows import ATTRIBUTES, MAX_RATING, ROLES, BadRow, Message, Row, conversation, pair

Fields = Mapping[str, Any]
Renames = Mapping[str, str | None]
"""Attribute in the row -> ours; None: left out."""

_PROMPTS = ("prompt", "instruction", "input", "question")
_ANSWERS = ("completion", "output", "response", "answer")
_CHOSEN, _REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
_CHOSEN_REWARD = ("chosen_reward", "score_chosen", "chosen_score")
_REJECTED_REWARD = ("rejected_reward", "score_rejected", "rejected_score")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_UNRATED = ("violence",)
"""OASST asks its raters for it; NeMo-Aligner has no place for it."""


@dataclass(frozen=True)
class Format:
    """One public format."""

    rows: RowKind
    adapt: Callable[[Fields, Renames], Row]
    fits: Callable[[Fields], bool]
    """Whether a row looks like it; the first of the table that fits is taken."""


def detect(row: Fields, rows: RowKind) -> str:
    """The name of the format that a row's keys tell.

    Raises:
        BadRow: none that gives such rows.
    """
    for name in FORMATS_OF[rows]:
        if FORMATS[name].fits(row):
            return name
    raise BadRow(f"no known format of {rows} has the fields {_names(row)}")


# --- conversations ------------------------------------------------------------------------------


def _messages(row: Fields, renames: Renames) -> Row:
    return conversation(_read(row, ("messages",)), _renamed(_ratings(row, renames), renames))


def _oasst(row: Fields, renames: Renames) -> Row:
    """Messages with ratings from 0 to 4, or `labels` from 0 to 1, as OASST publishes them."""
    found = {**_labels(row.get("labels")), **_ratings(row, renames)}
    rated = {name: value for name, value in found.items() if name in renames or name not in _UNRATED}
    return conversation(_read(row, ("messages",)), _renamed(rated, renames))


def _sharegpt(row: Fields, renames: Renames) -> Row:
    turns = _field(row, ("conversations", "conversation"))
    messages = _system(row) + _messages_of(turns, "conversations")
    label = turns[-1].get("label")
    return conversation(messages, _renamed({**_ratings(row, renames), **_label_string(label)}, renames))


def _prompt_completion(row: Fields, renames: Renames) -> Row:
    instructed = "instruction" in row
    messages = [*_system(row), *_prompt(row), *_read(row, _ANSWERS, role="assistant")]
    if instructed and "prompt" not in row and row.get("input"):
        # Alpaca: the instruction first, then what it is about.
        messages[-2] = {"role": "user", "content": f"{_string(row, 'instruction')}\n\n{_string(row, 'input')}"}
    return conversation(messages, _renamed(_ratings(row, renames), renames))


def _gsm8k(row: Fields, renames: Renames) -> Row:
    answer = _CALCULATOR.sub("", _string(row, "answer"))
    return conversation([*_system(row), _user(_string(row, "question")), _assistant(answer)], {})


def _helpsteer(row: Fields, renames: Renames) -> Row:
    """Every number beside prompt and response is a rating; one that is none has to be renamed to null."""
    rated = {name: value for name, value in row.items() if _is_rating(value) or name in ATTRIBUTES}
    messages = [*_system(row), *_prompt(row), *_read(row, ("response",), role="assistant")]
    return conversation(messages, _renamed(rated, renames))


# --- pairs --------------------------------------------------------------------------------------


def _pairs(row: Fields, renames: Renames) -> Row:
    """Chosen and rejected as texts, as one message, or as whole conversations that begin alike."""
    chosen = _read(row, _CHOSEN, role="assistant")
    rejected = _read(row, _REJECTED, role="assistant")
    prompt = _shared_prompt(chosen, rejected) or _prompt(row)
    if prompt[0]["role"] != "system":
        prompt = [*_system(row), *prompt]
    rewards = (_first(row, _CHOSEN_REWARD), _first(row, _REJECTED_REWARD))
    return pair(prompt, chosen[-1]["content"], rejected[-1]["content"], rewards)


def _answer_of_pair(row: Fields, renames: Renames, *, which: str) -> Row:
    """One answer of a pair, in any format of pairs, as a conversation for an attribute model to rate."""
    found = FORMATS[detect(row, "pairs")].adapt(row, renames)
    return conversation([*found["prompt"], _assistant(found[which])], {})


def _worked_answers(row: Fields, renames: Renames) -> Row:
    """GSM8K for preferences: the worked answer over the bare number behind its `####`."""
    answer = _CALCULATOR.sub("", _string(row, "answer"))
    bare = answer.rpartition("####")[2].strip()
    if not bare or "####" not in answer:
        raise BadRow("answer has no number behind ####")
    return pair([*_system(row), _user(_string(row, "question"))], answer, bare, (1.0, 0.0))


def _hh(row: Fields, renames: Renames) -> Row:
    chosen, rejected = (_hh_messages(_string(row, key), key) for key in ("chosen", "rejected"))
    return pair(_shared_prompt(chosen, rejected), chosen[-1]["content"], rejected[-1]["content"])


def _hh_messages(text: str, key: str) -> list[Message]:
    before, *parts = _HH_TURN.split(text)
    if before.strip() or not parts:
        raise BadRow(f"{key} does not begin with 'Human:'")
    return [{"role": ROLES[name.lower()], "content": said} for name, said in zip(parts[::2], parts[1::2], strict=True)]


def _shared_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadRow(f"{name} ends with a message from {messages[-1]['role']}, not from assistant")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected answer different prompts")
    return list(chosen[:-1])


# --- parts of rows ------------------------------------------------------------------------------


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _prompt(row: Fields) -> list[Message]:
    """The prompt's messages; a `context` comes before the question, as a passage does before what is asked of it."""
    found = _read(row, _PROMPTS, role="user")
    if row.get("context"):
        found[-1] = {**found[-1], "content": f"{_string(row, 'context')}\n\n{found[-1]['content']}"}
    return found


def _system(row: Fields) -> list[Message]:
    return [{"role": "system", "content": _string(row, "system")}] if row.get("system") else []


def _read(row: Fields, names: Sequence[str], role: str = "user") -> list[Message]:
    """The messages of the first of these fields; a plain text is one message of the role."""
    name = next((name for name in names if row.get(name) is not None), names[0])
    value = _field(row, names)
    if isinstance(value, str) and name != "messages":
        return [{"role": role, "content": value}]
    return _messages_of([value] if isinstance(value, dict) else value, name)


def _messages_of(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} is {value!r:.40}, not a list of messages")
    return [_message(turn, number) for number, turn in enumerate(value, start=1)]


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is {turn!r:.40}, not an object")
    role, content = _first(turn, ("role", "from")), _first(turn, ("content", "value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(f"message {number} has the role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"message {number} has no text")
    return {"role": ROLES[role.lower()], "content": content}


def _first(row: Fields, names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _field(row: Fields, names: Sequence[str]) -> Any:
    value = _first(row, names)
    if value is None:
        raise BadRow(f"there is no field {' or '.join(names)}; the row has {_names(row)}")
    return value


def _string(row: Fields, name: str) -> str:
    value = _field(row, (name,))
    if not isinstance(value, str):
        raise BadRow(f"{name} is {value!r:.40}, not text")
    return value


def _object(row: Fields, name: str) -> Fields:
    value = row.get(name) or {}
    if not isinstance(value, dict):
        raise BadRow(f"{name} is {value!r:.40}, not an object")
    return value


def _names(row: Fields) -> str:
    return ", ".join(row) or "no field"


# --- ratings ------------------------------------------------------------------------------------


def _ratings(row: Fields, renames: Renames) -> dict[str, Any]:
    """Ratings under `attributes`, and those that stand beside the text under a known or renamed name."""
    plain = {name: value for name, value in row.items() if name in ATTRIBUTES or name in renames}
    return {**plain, **_object(row, "attributes")}


def _renamed(ratings: Fields, renames: Renames) -> dict[str, Any]:
    """Our names; what the row leaves open (null) is left out."""
    out: dict[str, Any] = {}
    for name, value in ratings.items():
        ours = renames.get(name, name)
        if ours is None or value is None:
            continue
        if ours in out:
            raise BadRow(f"two attributes are called {ours}")
        out[ours] = value
    return out


def _labels(labels: Any) -> dict[str, Any]:
    """{name: {value, count}}, {name: value} or {name: [...], value: [...]}, from 0 to 1 -> whole ratings."""
    if not isinstance(labels, dict):
        return {}
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):
        labels = dict(zip(labels["name"], labels["value"], strict=False))
    values = {name: found.get("value") if isinstance(found, dict) else found for name, found in labels.items()}
    out = {}
    for name in ATTRIBUTES:
        value = values.get(name)
        if value is None:
            continue
        if not _is_rating(value) or not 0 <= value <= 1:
            raise BadRow(f"label {name} is {value!r}, not a number from 0 to 1")
        out[name] = round(value * MAX_RATING)
    return out


def _label_string(label: Any) -> dict[str, float]:
    """NeMo's "helpfulness:3,correctness:4"."""
    if label is None or label == "":
        return {}
    out = {}
    for part in str(label).split(","):
        name, _, value = part.partition(":")
        try:
            number = float(value)
        except ValueError as error:
            raise BadRow(f"label {label!r:.60} is not of the form name:number,name:number") from error
        out[name.strip()] = int(number) if number.is_integer() else number
    return out


def _is_rating(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- the table ----------------------------------------------------------------------------------


def _has(*groups: Sequence[str]) -> Callable[[Fields], bool]:
    """Whether a row has one field of each group."""
    return lambda row: all(_first(row, names) is not None for names in groups)


def _is_oasst(row: Fields) -> bool:
    return "messages" in row and any(name in row for name in ("attributes", "labels", *ATTRIBUTES))


def _is_helpsteer(row: Fields) -> bool:
    return "prompt" in row and "response" in row and any(name in row for name in ATTRIBUTES)


def _only_by_name(row: Fields) -> bool:
    """Two formats would fit, or half of the row would be left out: the recipe has to ask for it."""
    return False


def _is_hh(row: Fields) -> bool:
    return isinstance(row.get("chosen"), str) and not any(row.get(name) for name in _PROMPTS)


FORMATS: dict[str, Format] = {
    "oasst": Format("conversations", _oasst, _is_oasst),
    "messages": Format("conversations", _messages, _has(("messages",))),
    "sharegpt": Format("conversations", _sharegpt, _has(("conversations", "conversation"))),
    "gsm8k": Format("conversations", _gsm8k, _has(("question",), ("answer",))),
    "helpsteer": Format("conversations", _helpsteer, _is_helpsteer),
    "prompt_completion": Format("conversations", _prompt_completion, _has(_PROMPTS, _ANSWERS)),
    "chosen_answers": Format("conversations", partial(_answer_of_pair, which="chosen"), _only_by_name),
    "rejected_answers": Format("conversations", partial(_answer_of_pair, which="rejected"), _only_by_name),
    "hh": Format("pairs", _hh, _is_hh),
    "pairs": Format("pairs", _pairs, _has(_CHOSEN, _REJECTED)),
    "worked_answers": Format("pairs", _worked_answers, _has(("question",), ("answer",))),
}
FORMATS_OF: dict[str, tuple[str, ...]] = {
    rows: tuple(name for name, found in FORMATS.items() if found.rows == rows) for rows in ("conversations", "pairs")
}
"""Kind of rows -> names of the formats that give it, in the order in which they are tried."""
