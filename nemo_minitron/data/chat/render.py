"""Rendering checked rows as the rows that NeMo-Aligner trains on.

Training and inference use the same text. A prompt is the output of `apply_chat_template` with a generation prompt; an
answer is the text that follows it, up to and including the token that ends the turn. The text contains all special
tokens, so it must be tokenized without adding any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.rows import ATTRIBUTES, BadRow, Message, Row
from nemo_minitron.data.chat.tokenizing import Attributes, ChatTemplate
from nemo_minitron.schema.chats import ChatRendering

Purpose = Literal["sft", "pairs", "rated"]
MISSING = -100.0
"""Label that NeMo-Aligner uses for an attribute without a rating."""


def read_normalized(file: Path) -> Iterator[Row]:
    """Yield the rows of a train.jsonl or valid.jsonl of a chat_data stage."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def render_rows(
    rows: Iterable[Row],
    purpose: Purpose,
    template: ChatTemplate,
    options: ChatRendering,
    stats: LengthStats,
    *,
    where: str,
) -> Iterator[dict[str, Any]]:
    """Yield the training rows of all rows, in order, and count them in `stats`.

    Args:
        where: recipe key that contains `max_bad_fraction`, for the error message.

    Raises:
        DataError: too many rows are bad; raised after the last row.
    """
    render = _RENDERERS[purpose]
    for row in rows:
        stats.bad.num_rows += 1
        try:
            yield from render(row, template, options, stats)
        except BadRow as reason:
            stats.bad.add(row["origin"], reason)
    stats.bad.require_few(options.max_bad_fraction, where)


def sft_rows(
    conversation: Row,
    template: ChatTemplate,
    options: ChatRendering | None = None,
    stats: LengthStats | None = None,
) -> list[dict[str, Any]]:
    """Return a row {"input", "output"} for each answer.

    "input" is the text up to and including the generation prompt, "output" the answer with its end of turn.
    Attributes rate the last answer and appear only in its prompt. Rows that are too long are left out.

    Raises:
        BadRow: the template or the tokenizer cannot represent the row.
    """
    options, stats = options or ChatRendering(), stats or LengthStats()
    messages = conversation["messages"]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    fitted = []
    for index in answers if options.turns == "all" else answers[-1:]:
        rated = options.condition_on_attributes and index == answers[-1]
        attributes = conversation.get("attributes") if rated else None
        fitted.append(_fit(messages[:index], [messages[index]], template, options, attributes))
    _count(fitted, stats)
    return [{"input": found.prompt, "output": found.answers[0]} for found in fitted if found is not None]


def pair_row(
    pair: Row, template: ChatTemplate, options: ChatRendering | None = None, stats: LengthStats | None = None
) -> dict[str, Any] | None:
    """Return {"prompt", "chosen_response", "rejected_response", and rewards if given}, or None if it is too long.

    Raises:
        BadRow: the template or the tokenizer cannot represent the row.
    """
    options, stats = options or ChatRendering(), stats or LengthStats()
    texts = [{"role": "assistant", "content": pair[key]} for key in ("chosen", "rejected")]
    found = _fit(pair["prompt"], texts, template, options)
    _count([found], stats)
    if found is None:
        return None
    chosen, rejected = found.answers
    row: dict[str, Any] = {"prompt": found.prompt, "chosen_response": chosen, "rejected_response": rejected}
    return row | {key: float(pair[key]) for key in ("chosen_reward", "rejected_reward") if key in pair}


def rated_row(
    conversation: Row,
    template: ChatTemplate,
    options: ChatRendering | None = None,
    stats: LengthStats | None = None,
) -> dict[str, Any] | None:
    """Return {"text": the dialogue, "label": nine ratings in the order of ATTRIBUTES}, or None if it is too long.

    Raises:
        BadRow: the row has no ratings, or the template or the tokenizer cannot represent it.
    """
    options, stats = options or ChatRendering(), stats or LengthStats()
    attributes = conversation.get("attributes")
    if not attributes:
        raise BadRow("the row has no attributes to train on")
    *before, last = conversation["messages"]
    found = _fit(before, [last], template, options)
    _count([found], stats)
    if found is None:
        return None
    (answer,) = found.answers
    if template.rated_end:
        # NeMo-Aligner's format: the marker of the ratings replaces that of the next turn.
        answer = answer.removesuffix(template.stop or "") + template.rated_end
    return {"text": found.prompt + answer, "label": [float(attributes.get(name, MISSING)) for name in ATTRIBUTES]}


@dataclass(frozen=True)
class _Fitted:
    """Rendered prompt with its answers."""

    prompt: str
    answers: list[str]
    prompt_tokens: int
    answer_tokens: list[int]
    cut: bool


def _count(fitted: Sequence[_Fitted | None], stats: LengthStats) -> None:
    """Count a row after all of it was rendered, so that a bad row is counted only as bad."""
    for found in fitted:
        if found is None:
            stats.num_dropped += 1
        else:
            stats.add(found.prompt_tokens, found.answer_tokens, cut=found.cut)


def _fit(
    before: Sequence[Message],
    answers: Sequence[Message],
    template: ChatTemplate,
    options: ChatRendering,
    attributes: Attributes | None = None,
) -> _Fitted | None:
    """Render prompt and answers within the limit, dropping the oldest turns if needed; return None if none fit."""
    max_tokens, cut = options.max_seq_len_tokens, False
    while True:
        prompt = template.prompt(before, attributes)
        texts = [template.answer(prompt, [*before, answer], attributes) for answer in answers]
        sizes = [template.require_boundary(prompt, text) for text in texts]
        if max_tokens is None or max(map(sum, sizes)) <= max_tokens:
            return _Fitted(prompt, texts, sizes[0][0], [size for _, size in sizes], cut)
        shorter = _without_oldest(before) if options.too_long == "cut_turns" else None
        if shorter is None:
            return None
        before, cut = shorter, True


def _without_oldest(before: Sequence[Message]) -> list[Message] | None:
    """Return the messages without the first question and its answer, or None if only one question is left."""
    system = [message for message in before[:1] if message["role"] == "system"]
    turns = list(before[len(system) :])
    return [*system, *turns[2:]] if len(turns) > 2 else None


def _as_list(render: Callable[..., dict[str, Any] | None]) -> Callable[..., list[dict[str, Any]]]:
    def rendered(*args: Any) -> list[dict[str, Any]]:
        row = render(*args)
        return [] if row is None else [row]

    return rendered


_RENDERERS: dict[Purpose, Callable[..., list[dict[str, Any]]]] = {
    "sft": sft_rows,
    "pairs": _as_list(pair_row),
    "rated": _as_list(rated_row),
}
