"""Adapters from rows of public formats to checked rows, one small function per format, listed in FORMATS."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from nemo_minitron.data.chat.fields import Fields, first, is_blank, is_empty, required, string, unpacked
from nemo_minitron.data.chat.messages import (
    CONTAINERS,
    assistant,
    messages_of,
    plain_text,
    read,
    reasoning_of,
    require_supported,
    system_of,
    user,
)
from nemo_minitron.data.chat.ratings import Renames, is_rating, label_string, labels, ratings, renamed
from nemo_minitron.data.chat.rows import (
    ATTRIBUTES,
    ROLES,
    BadRow,
    Message,
    Row,
    conversation,
    instructions,
    pair,
    prompt,
)
from nemo_minitron.schema.chats import RowKind
from nemo_minitron.system.shown import shown, shown_names

_PROMPTS = ("prompt", "instruction", "input", "question")
_ANSWERS = ("completion", "output", "response", "answer")
_CHOSEN, _REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
_CHOSEN_REWARD = ("chosen_reward", "score_chosen", "chosen_score")
_REJECTED_REWARD = ("rejected_reward", "score_rejected", "rejected_score")
_CALCULATOR = re.compile(r"<<[-+*/().,%$\d ]+=[-+*/().,%$\d =]*>>")
"""Mark of GSM8K's calculator, such as `<<48/2=24>>`."""
_PLACES = ("first", "last")
"""Lines in which a question can request the result of a worked answer."""
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_UNSUPPORTED_ATTRIBUTES = ("violence",)
"""OASST attributes that NeMo-Aligner does not support."""


@dataclass(frozen=True)
class Format:
    """Public format of rows."""

    rows: RowKind
    reader: Callable[[Fields, Renames], Row]
    fits: Callable[[Mapping[str, Any]], bool]
    """Returns whether a row looks like this format; detection takes the first format in the table that fits."""

    def read(self, row: Fields, renames: Renames) -> Row:
        """Return the checked row; afterward, `row.unread()` lists the fields that are not in it.

        Raises:
            BadRow: the row cannot be used.
        """
        require_supported(row)
        read = self.reader(row, renames)
        if self.rows != "pairs" and not is_empty(row.get("instruction_id_list")):
            names, settings = (unpacked(value) if isinstance(value, str) else value for value in _rules(row))
            read |= instructions(names, settings)
        return read


def _rules(row: Fields) -> tuple[Any, Any]:
    """Return IFEval's two fields, which tables may hold as JSON text."""
    return row["instruction_id_list"], row.get("kwargs")


def detect(row: Mapping[str, Any], rows: RowKind) -> str:
    """Return the name of the format that fits the row's fields.

    Raises:
        BadRow: no format of this kind of rows fits.
    """
    for name in FORMATS_OF[rows]:
        if FORMATS[name].fits(row):
            return name
    raise BadRow(f"no known format of {rows} has the fields {shown_names(row)}")


# --- conversations ------------------------------------------------------------------------------


def _messages(row: Fields, renames: Renames) -> Row:
    return conversation(_after_system(row, read(row, ("messages",))), renamed(ratings(row, renames), renames))


def _oasst(row: Fields, renames: Renames) -> Row:
    """Adapt messages with ratings from 0 to 4, or with `labels` from 0 to 1 as published by OASST."""
    found = {**labels(row), **ratings(row, renames)}
    rated = {name: value for name, value in found.items() if name in renames or name not in _UNSUPPORTED_ATTRIBUTES}
    row.mark_lost(f"attributes.{name}" for name in sorted(found.keys() - rated.keys()))
    return conversation(_after_system(row, read(row, ("messages",))), renamed(rated, renames))


def _sharegpt(row: Fields, renames: Renames) -> Row:
    name = "conversation" if row.get("conversations") is None else "conversations"
    value = required(row, ("conversations", "conversation"))
    turns = unpacked(value) if isinstance(value, str) else value
    turns, rated = _without_labels(turns)
    messages = _after_system(row, messages_of(row, turns, name))
    _require_questions_masked(row)
    if not all(map(is_empty, rated[:-1])):
        row.mark_lost([f"{name}.label"])
    return conversation(messages, renamed({**ratings(row, renames), **label_string(rated[-1])}, renames))


def _without_labels(turns: Any) -> tuple[Any, list[Any]]:
    """Return the turns without NeMo's `label`, and the label of each turn."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns, []
    plain = [{name: value for name, value in turn.items() if name != "label"} for turn in turns]
    return plain, [turn.get("label") for turn in turns]


def _require_questions_masked(row: Fields) -> None:
    """Refuse a NeMo `mask`, the role excluded from the loss, other than the user, which is the one excluded here."""
    mask = row.get("mask")
    if not is_empty(mask) and ROLES.get(str(mask).strip().lower()) != "user":
        raise BadRow(f"mask is {shown(mask)}, but only turns of the user can be excluded from the loss")
    if mask is not None:
        row.mark_read("type")  # position of the label, which depends on the kind of training here


def _prompt_completion(row: Fields, renames: Renames) -> Row:
    messages = [*system_of(row), *_history(row), *_prompt(row), *read(row, _ANSWERS, role="assistant")]
    return conversation(_with_reasoning(row, messages), renamed(ratings(row, renames), renames))


def _gsm8k(row: Fields, renames: Renames) -> Row:
    answer = _CALCULATOR.sub("", string(row, "answer"))
    messages = [*system_of(row), user(_in_context(row, string(row, "question"))), assistant(answer)]
    return conversation(_with_reasoning(row, messages), renamed(ratings(row, renames), renames))


def _helpsteer(row: Fields, renames: Renames) -> Row:
    """Adapt HelpSteer, where every number is a rating; a number that is not has to be renamed to null."""
    rated = {name: row[name] for name, value in row.content.items() if is_rating(value) or name in ATTRIBUTES}
    messages = [*system_of(row), *_prompt(row), *read(row, ("response",), role="assistant")]
    return conversation(messages, renamed(rated, renames))


def _prompts(row: Fields, renames: Renames) -> Row:
    """Adapt questions; the last answer of a row that has one is not used."""
    name = next((name for name in CONTAINERS if row.get(name) is not None), None)
    if name is not None:
        messages = read(row, (name,))
        if messages[-1]["role"] == "assistant":
            row.mark_lost([f"{name}[-1]"])
            del messages[-1]
        return prompt(_after_system(row, messages))
    return prompt([*system_of(row), *_history(row), *_prompt(row)])


# --- pairs --------------------------------------------------------------------------------------


def _pairs(row: Fields, renames: Renames) -> Row:
    """Adapt pairs whose chosen and rejected are texts, single messages, or conversations with the same beginning."""
    chosen = read(row, _CHOSEN, role="assistant")
    rejected = read(row, _REJECTED, role="assistant")
    prompt = _shared_prompt(chosen, rejected)
    if prompt:
        _mark_repeated_prompt(row, prompt)
    else:
        prompt = [*_history(row), *_prompt(row, (*_PROMPTS, *CONTAINERS))]
    rewards = (first(row, _CHOSEN_REWARD), first(row, _REJECTED_REWARD))
    texts = (plain_text(chosen[-1], "chosen"), plain_text(rejected[-1], "rejected"))
    return pair(_after_system(row, prompt), *texts, rewards)


def _mark_repeated_prompt(row: Fields, prompt: Sequence[Message]) -> None:
    """Mark a prompt field as read if chosen and rejected, which are whole conversations, repeat it."""
    texts = [message["content"].strip() for message in prompt if message["role"] == "user"]
    for name in _PROMPTS:
        if isinstance(row.content.get(name), str) and row.content[name].strip() in texts:
            row.mark_read(name)


def _answer_of_pair(row: Fields, renames: Renames, *, which: str) -> Row:
    """Adapt one answer of a pair, in any format of pairs, as a conversation that an attribute model can rate."""
    found = FORMATS[detect(row.content, "pairs")].read(row, renames)
    return conversation([*found["prompt"], assistant(found[which])], {})


def _worked_answers(row: Fields, renames: Renames) -> Row:
    """Adapt GSM8K as pairs that prefer the worked answer to the bare number after `####`."""
    answer, _, bare = _worked_answer(row)
    question = user(_in_context(row, string(row, "question")))
    return pair([*system_of(row), question], answer, bare, (1.0, 0.0))


def _result_place(row: Fields, renames: Renames) -> Row:
    """Adapt GSM8K as pairs of one worked answer with its result in the first and in the last line.

    The question requests one of the two places, chosen by its hash, and the answer that follows the request is
    preferred. Both answers have the same text, and each place is preferred in half of the pairs, so neither their
    length nor a constant preference for one place identifies the preferred answer.
    """
    question, answers = _result_at_ends(row)
    place = hashlib.sha256(question.encode(errors="replace")).digest()[0] % 2
    request = user(f"{question}\nWrite the result in the {_PLACES[place]} line.")
    return pair([*system_of(row), request], answers[place], answers[1 - place], (1.0, 0.0))


def _result_first(row: Fields, renames: Renames) -> Row:
    """Adapt GSM8K as pairs of one worked answer: with its result in the first line it is preferred."""
    question, (first_line, last_line) = _result_at_ends(row)
    return pair([*system_of(row), user(question)], first_line, last_line, (1.0, 0.0))


def _result_at_ends(row: Fields) -> tuple[str, tuple[str, str]]:
    """Return the question, and its answer with the result in the first line and in the last one."""
    _, steps, result = _worked_answer(row)
    if not steps:
        raise BadRow("answer has no steps before ####")
    return _in_context(row, string(row, "question")), (f"#### {result}\n{steps}", f"{steps}\n#### {result}")


def _worked_answer(row: Fields) -> tuple[str, str, str]:
    """Return (answer of GSM8K without the calculator's marks, its text before `####`, the number after it)."""
    answer = _CALCULATOR.sub("", string(row, "answer"))
    steps, mark, result = answer.rpartition("####")
    if not mark or not result.strip():
        raise BadRow("answer has no number after ####")
    return answer, steps.strip(), result.strip()


def _hh(row: Fields, renames: Renames) -> Row:
    chosen, rejected = (_hh_messages(string(row, key), key) for key in ("chosen", "rejected"))
    prompt = _after_system(row, _shared_prompt(chosen, rejected))
    rewards = (first(row, _CHOSEN_REWARD), first(row, _REJECTED_REWARD))
    return pair(prompt, chosen[-1]["content"], rejected[-1]["content"], rewards)


def _hh_messages(text: str, key: str) -> list[Message]:
    before, *parts = _HH_TURN.split(text)
    if before.strip() or not parts:
        raise BadRow(f"{key} does not begin with 'Human:'")
    return [{"role": ROLES[name.lower()], "content": text} for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _shared_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadRow(f"{name} ends with a message from {messages[-1]['role']}, not from assistant")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected answer different prompts")
    return list(chosen[:-1])


# --- parts of rows ------------------------------------------------------------------------------


def _prompt(row: Fields, names: Sequence[str] = _PROMPTS) -> list[Message]:
    """Return the prompt's messages, with Alpaca's `input` after the instruction and `context` before the question."""
    name = next((name for name in names if row.get(name) is not None), "")
    found = read(row, names, role="user")
    if name == "instruction" and not is_blank(row.get("input")):
        found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n\n{string(row, 'input')}"}
    return [*found[:-1], {**found[-1], "content": _in_context(row, found[-1]["content"])}]


def _in_context(row: Fields, question: str) -> str:
    """Put the row's `context`, if it has one, before the question."""
    return question if is_blank(row.get("context")) else f"{string(row, 'context')}\n\n{question}"


def _history(row: Fields) -> list[Message]:
    """Return earlier turns in the format of LLaMA-Factory: `history: [[question, answer], ...]`."""
    turns = row.get("history")
    if is_empty(turns):
        return []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns
    ):
        raise BadRow(f"history is {shown(turns)}, not a list of [question, answer]")
    return [message for question, answer in turns for message in (user(question), assistant(answer))]


def _after_system(row: Fields, messages: list[Message]) -> list[Message]:
    """Return the messages after the row's `system`; refuse messages that begin with a different system message."""
    system = system_of(row)
    if not system or not messages or messages[0]["role"] != "system":
        return [*system, *messages]
    if messages[0]["content"].strip() != system[0]["content"].strip():
        raise BadRow("the field system differs from the system message at the start")
    return messages


def _with_reasoning(row: Fields, messages: list[Message]) -> list[Message]:
    """Move the `reasoning_content` of the row to its answer."""
    found = reasoning_of(row, "the row")
    if found and messages[-1]["role"] == "assistant":
        return [*messages[:-1], {**messages[-1], **found}]
    return messages


# --- the table ----------------------------------------------------------------------------------


def _has(*groups: Sequence[str]) -> Callable[[Mapping[str, Any]], bool]:
    """Return a test of whether a row has at least one field of each group."""
    return lambda row: all(first(row, names) is not None for names in groups)


def _is_oasst(row: Mapping[str, Any]) -> bool:
    return "messages" in row and any(name in row for name in ("attributes", "labels", *ATTRIBUTES))


def _is_gsm8k(row: Mapping[str, Any]) -> bool:
    """Return whether the answer has GSM8K's mark before its result, so that other questions are not changed."""
    return row.get("question") is not None and "####" in str(row.get("answer"))


def _is_helpsteer(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and "response" in row and any(name in row for name in ATTRIBUTES)


def _only_by_name(row: Mapping[str, Any]) -> bool:
    """Return False for formats that only a recipe can choose: they are ambiguous or use only half of a row."""
    return False


def _is_hh(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("chosen"), str) and not any(row.get(name) for name in (*_PROMPTS, *CONTAINERS))


FORMATS: dict[str, Format] = {
    "oasst": Format("conversations", _oasst, _is_oasst),
    "messages": Format("conversations", _messages, _has(("messages",))),
    "sharegpt": Format("conversations", _sharegpt, _has(("conversations", "conversation"))),
    "gsm8k": Format("conversations", _gsm8k, _is_gsm8k),
    "helpsteer": Format("conversations", _helpsteer, _is_helpsteer),
    "prompt_completion": Format("conversations", _prompt_completion, _has(_PROMPTS, _ANSWERS)),
    "chosen_answers": Format("conversations", partial(_answer_of_pair, which="chosen"), _only_by_name),
    "rejected_answers": Format("conversations", partial(_answer_of_pair, which="rejected"), _only_by_name),
    "prompts": Format("prompts", _prompts, _has((*_PROMPTS, *CONTAINERS))),
    "hh": Format("pairs", _hh, _is_hh),
    "pairs": Format("pairs", _pairs, _has(_CHOSEN, _REJECTED)),
    "worked_answers": Format("pairs", _worked_answers, _has(("question",), ("answer",))),
    "result_place": Format("pairs", _result_place, _only_by_name),
    "result_first": Format("pairs", _result_first, _only_by_name),
}
FORMATS_OF: dict[str, tuple[str, ...]] = {
    rows: tuple(name for name, found in FORMATS.items() if found.rows == rows) for rows in get_args(RowKind)
}
"""Kind of rows -> names of the formats that produce it, in the order of detection."""
