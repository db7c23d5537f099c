"""Prompts that request attributes, from the conversations of a chat_data or annotate stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.data.chat.bad_rows import BadRows
from nemo_minitron.data.chat.render import read_normalized
from nemo_minitron.data.chat.rows import ATTRIBUTES, BadRow, Message, Row
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from nemo_minitron.schema.answers import AnswerSampling
from nemo_minitron.stages.artifacts import ChatRows
from nemo_minitron.stages.common.alignment_rows import PARTS


@dataclass(frozen=True)
class Prompt:
    """One prompt x with the attributes a that it requests."""

    part: str
    origin: str
    messages: Sequence[Message]
    attributes: Mapping[str, int]
    """Requested attributes, in the order of ATTRIBUTES."""
    conditioned: str
    """Text of the prompt with the attributes, up to and including the generation prompt."""
    plain: str
    """The same without the attributes."""
    tokens: list[int]
    """Token ids of `conditioned`."""

    @property
    def label(self) -> str:
        """The attributes in NeMo-Aligner's format."""
        return ",".join(f"{name}:{value}" for name, value in self.attributes.items())


@dataclass(frozen=True)
class Prompts:
    """The prompts of both parts."""

    all: list[Prompt]
    counts: dict[str, dict[str, int]]
    """Part -> numbers of prompts, and of repeated, too long and bad rows."""

    def batches(self, size: int) -> list[list[Prompt]]:
        """Return batches of prompts of one part and of similar length, in an order that depends on nothing else."""
        out = []
        for part in PARTS:
            mine = sorted((prompt for prompt in self.all if prompt.part == part), key=lambda prompt: len(prompt.tokens))
            out += [mine[start : start + size] for start in range(0, len(mine), size)]
        return out


def select_prompts(params: AnswerSampling, template: ChatTemplate, chats: ChatRows, where: str) -> Prompts:
    """Render the text before the last answer of every conversation, with the requested attributes and without.

    A prompt that requests the same attributes as an earlier one is left out.

    Args:
        where: recipe key of the stage, for error messages.

    Raises:
        DataError: the template has no place for attributes, too many rows are bad, or a part has no prompt.
    """
    if "attributes" not in template.jinja:
        raise DataError(
            "The model's chat template has no attributes, so the prompts cannot request any.",
            where=f"{where}.inputs.model",
            allowed="a model of a steerlm_sft stage",
            next_step="Name such a stage, or set `template` to the template of the training.",
        )
    found: list[Prompt] = []
    counts: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for part, most in (("train", params.max_train_prompts), ("valid", params.max_valid_prompts)):
        counts[part] = {"prompts": 0, "repeated": 0, "too_long": 0, "bad": 0}
        found += _part(part, params, template, chats.file(part), most, seen, counts[part], where)
        if not counts[part]["prompts"]:
            raise _no_prompts(part, counts[part], params, chats, where)
    return Prompts(found, counts)


def _part(
    part: str,
    params: AnswerSampling,
    template: ChatTemplate,
    file: Path,
    most: int | None,
    seen: set[str],
    counts: dict[str, int],
    where: str,
) -> list[Prompt]:
    """Return the prompts of a part, at most `most`, and count the rows that were read up to there."""
    found: list[Prompt] = []
    bad, longest = BadRows(), params.max_seq_len_tokens - params.max_new_tokens
    for row in read_normalized(file):
        bad.num_rows += 1
        try:
            prompt = _rendered(part, row, params, template)
        except BadRow as reason:
            bad.add(row["origin"], reason)
            counts["bad"] = bad.num_bad
            continue
        if prompt.conditioned in seen:
            counts["repeated"] += 1
        elif len(prompt.tokens) > longest:
            counts["too_long"] += 1
        else:
            seen.add(prompt.conditioned)
            found.append(prompt)
            if len(found) == most:
                break
    counts["prompts"] = len(found)
    bad.require_few(params.max_bad_fraction, where)
    return found


def _rendered(part: str, row: Row, params: AnswerSampling, template: ChatTemplate) -> Prompt:
    """Render one row.

    Raises:
        BadRow: the row has no attributes although the stage sets none, or the template cannot represent it.
    """
    values: Mapping[str, float] = {str(name): value for name, value in params.attributes.items()}
    values = values or row.get("attributes") or {}
    attributes = {name: round(values[name]) for name in ATTRIBUTES if name in values}
    if not attributes:
        raise BadRow("the row has no attributes, and `attributes` of the stage is empty")
    messages = row["messages"][:-1]
    template.require_no_marker(messages)
    conditioned = template.prompt(messages, attributes)
    plain = template.prompt(messages)
    return Prompt(part, row["origin"], messages, attributes, conditioned, plain, template.ids(conditioned))


def _no_prompts(part: str, counts: Mapping[str, int], params: AnswerSampling, chats: ChatRows, where: str) -> DataError:
    return DataError(
        f"No prompt of the {part} part is left: {counts['too_long']} leave no room for max_new_tokens = "
        f"{params.max_new_tokens} in max_seq_len_tokens = {params.max_seq_len_tokens}, {counts['repeated']} are "
        f"repeated, {counts['bad']} are bad.",
        where=f"{where}.inputs.chats = {chats.stage}",
        next_step="Raise max_seq_len_tokens, lower max_new_tokens, or choose more rows or valid_rows in chat_data.",
    )
