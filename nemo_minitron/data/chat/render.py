"""Checked rows -> the rows that NeMo-Aligner trains on.

Training and inference see the same text: a prompt is what `apply_chat_template` gives with a generation prompt, an
answer is what it adds, up to and with the token that ends the turn. All special tokens stand in the text; whoever
tokenizes it must add none.
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
"""NeMo-Aligner's label of an attribute that was not rated."""


def read_normalised(file: Path) -> Iterator[Row]:
    """Rows of a train.jsonl or valid.jsonl of a chat_data stage."""
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
    """Training rows of all rows, in order; `stats` counts them as they come.

    Args:
        where: the recipe's key above `max_bad_fraction`, for the message.

    Raises:
        DataError: at the end, when too many rows are unusable.
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
    """[{"input": text up to and with the generation prompt, "output": answer and end of turn}], one for each answer.

    Attributes rate the last answer, and stand in its prompt alone. What is too long is left out.

    Raises:
        BadRow: the template or the tokenizer cannot carry the row.
    """
    options, stats = options or ChatRendering(), stats or LengthStats()
    messages = conversation["messages"]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    fitted = []
    for index in answers if options.turns == "all" else answers[-1:]:
        rated = options.condition_on_attributes and index == answers[-1]
        attributes = conversation.get("attributes") if rated else None
        fitted.append(_fitted(messages[:index], [messages[index]], template, options, attributes))
    _count(fitted, stats)
    return [{"input": found.prompt, "output": found.answers[0]} for found in fitted if found is not None]


def pair_row(
    pair: Row, template: ChatTemplate, options: ChatRendering | None = None, stats: LengthStats | None = None
) -> dict[str, Any] | None:
    """{"prompt", "chosen_response", "rejected_response", and the rewards if the pair has them}; None: too long.

    Raises:
        BadRow: the template or the tokenizer cannot carry the row.
    """
    options, stats = options or ChatRendering(), stats or LengthStats()
    texts = [{"role": "assistant", "content": pair[key]} for key in ("chosen", "rejected")]
    found = _fitted(pair["prompt"], texts, template, options)
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
    """{"text": the dialogue with its last answer, "label": nine ratings in the order of ATTRIBUTES}; None: too long.

    Raises:
        BadRow: there are no ratings; the template or the tokenizer cannot carry the row.
    """
    options, stats = options or ChatRendering(), stats or LengthStats()
    attributes = conversation.get("attributes")
    if not attributes:
        raise BadRow("the row has no attributes to learn")
    *before, last = conversation["messages"]
    found = _fitted(before, [last], template, options)
    _count([found], stats)
    if found is None:
        return None
    (answer,) = found.answers
    if template.rated_end:
        # As NeMo-Aligner writes it: the marker of the ratings in place of the next turn's.
        answer = answer.removesuffix(template.stop or "") + template.rated_end
    return {"text": found.prompt + answer, "label": [float(attributes.get(name, MISSING)) for name in ATTRIBUTES]}


@dataclass(frozen=True)
class _Fitted:
    """A prompt with the answers to it."""

    prompt: str
    answers: list[str]
    prompt_tokens: int
    answer_tokens: list[int]
    cut: bool


def _count(fitted: Sequence[_Fitted | None], stats: LengthStats) -> None:
    """Called when all of a row is rendered: a bad row counts as nothing else."""
    for found in fitted:
        if found is None:
            stats.num_dropped += 1
        else:
            stats.add(found.prompt_tokens, found.answer_tokens, cut=found.cut)


def _fitted(
    before: Sequence[Message],
    answers: Sequence[Message],
    template: ChatTemplate,
    options: ChatRendering,
    attributes: Attributes | None = None,
) -> _Fitted | None:
    """Prompt and answers within the limit, without the oldest turns if need be; None: it cannot be."""
    most, cut = options.max_seq_len_tokens, False
    while True:
        prompt = template.prompt(before, attributes)
        texts = [template.answer(prompt, [*before, answer], attributes) for answer in answers]
        sizes = [template.require_boundary(prompt, text) for text in texts]
        if most is None or max(map(sum, sizes)) <= most:
            return _Fitted(prompt, texts, sizes[0][0], [size for _, size in sizes], cut)
        shorter = _without_oldest(before) if options.too_long == "cut_turns" else None
        if shorter is None:
            return None
        before, cut = shorter, True


def _without_oldest(before: Sequence[Message]) -> list[Message] | None:
    """Messages without the first question and its answer; None: only one question is left."""
    system = [message for message in before[:1] if message["role"] == "system"]
    turns = list(before[len(system) :])
    return [*system, *turns[2:]] if len(turns) > 2 else None


def _one(render: Callable[..., dict[str, Any] | None]) -> Callable[..., list[dict[str, Any]]]:
    def rendered(*args: Any) -> list[dict[str, Any]]:
        row = render(*args)
        return [] if row is None else [row]

    return rendered


_RENDERERS: dict[Purpose, Callable[..., list[dict[str, Any]]]] = {
    "sft": sft_rows,
    "pairs": _one(pair_row),
    "rated": _one(rated_row),
}
