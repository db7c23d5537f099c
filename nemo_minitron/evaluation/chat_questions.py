"""Prompts of a chat evaluation, rendered with the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.data.chat.bad_rows import BadRows
from nemo_minitron.data.chat.heldout import HeldOut, read_heldout
from nemo_minitron.data.chat.rows import BadRow, Message, Row, question
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from nemo_minitron.hf.source import resolve_path
from nemo_minitron.schema.chats import ChatEvaluation

if TYPE_CHECKING:
    from nemo_minitron.evaluation.instructions import InstructionRow

LEVELS = (0, 1, 2, 3, 4)
Tokens = list[int]


@dataclass(frozen=True)
class Questions:
    """All prompts of an evaluation, as token ids; made before the model is loaded, so that errors appear early."""

    heldout: HeldOut
    generated: list[tuple[Row, int | None, Tokens]]
    """Row, level of the varied attribute, and prompt."""
    instructions: list[tuple[InstructionRow, Tokens]]
    bad_instructions: BadRows
    samples: list[tuple[str, Tokens]]

    def left_out(self) -> list[str]:
        """Return sentences about rows and instructions that are not measured."""
        bad = self.bad_instructions
        out = [self.heldout.left_out()] if len(self.heldout.rows) < self.heldout.bad.num_rows else []
        if bad.num_bad:
            out.append(f"{bad.num_bad} of {bad.num_rows} instructions are left out; the first: {bad.first[0]}")
        return out


def prepare(
    params: ChatEvaluation, chats: Artifact, template: ChatTemplate, *, name: str, assets_dir: Path
) -> Questions:
    """Render all prompts of an evaluation.

    Args:
        chats: artifact with the rows.
        name: name of the evaluation stage, for error messages.

    Raises:
        DataError: too many rows or instructions do not fit the template, or none is left.
        EnvironmentProblem: lm-eval's checkers of instructions are not installed.
    """
    where = f"stages.{name}"
    if _requests_attributes(params) and "attributes" not in template.jinja:
        raise DataError(
            "The model's chat template has no attributes, so requesting them would have no effect.",
            where=where,
            allowed="template = chatml, llama3, extra_id, or a model that was trained with one of these",
            next_step="Choose the template of the training, or remove vary_attribute and other_attributes.",
        )
    heldout = read_heldout(chats.path, chats.result["rows"], template, params, stage=chats.stage, where=where)
    generated = _rows_to_answer(params, heldout, template) if chats.result["rows"] != "pairs" else []
    instructions, bad = _instruction_prompts(params, template, where, assets_dir)
    return Questions(heldout, generated, instructions, bad, _sample_prompts(params, template, where))


def _requests_attributes(params: ChatEvaluation) -> bool:
    return params.vary_attribute is not None or bool(params.other_attributes)


def _rows_to_answer(
    params: ChatEvaluation, heldout: HeldOut, template: ChatTemplate
) -> list[tuple[Row, int | None, Tokens]]:
    """Return the prompts of the first `num_generated` questions; a question with several answers is used once."""
    first_rows: dict[str, Row] = {}
    for row in heldout.rows:
        first_rows.setdefault(question(row), row)
    levels = LEVELS if params.vary_attribute is not None else (None,)
    out: list[tuple[Row, int | None, Tokens]] = []
    for row in list(first_rows.values())[: params.num_generated]:
        for level in levels:
            attributes = _attributes(params)
            if params.vary_attribute is not None and level is not None:
                attributes[params.vary_attribute] = level
            out.append((row, level, _prompt(row["messages"][:-1], attributes, template)))
    return out


def _instruction_prompts(
    params: ChatEvaluation, template: ChatTemplate, where: str, assets_dir: Path
) -> tuple[list[tuple[InstructionRow, Tokens]], BadRows]:
    from nemo_minitron.evaluation.instructions import read_instructions

    bad, out = BadRows(), []
    if params.instructions is None:
        return [], bad
    for row in read_instructions(resolve_path(params.instructions, assets_dir), params.max_instructions, bad):
        try:
            out.append((row, _prompt([{"role": "user", "content": row.prompt}], _attributes(params), template)))
        except BadRow as reason:
            bad.add(row.where, reason)
    bad.require_few(params.max_bad_fraction, where)
    if not out:
        raise bad.none_left(f"{where}.instructions")
    return out, bad


def _sample_prompts(params: ChatEvaluation, template: ChatTemplate, where: str) -> list[tuple[str, Tokens]]:
    out = []
    for number, text in enumerate(params.prompts):
        try:
            out.append((text, _prompt([{"role": "user", "content": text}], _attributes(params), template)))
        except BadRow as reason:
            raise DataError(f"The prompt cannot be used: {reason}", where=f"{where}.prompts.{number}") from reason
    return out


def _prompt(messages: Sequence[Message], attributes: Mapping[str, float], template: ChatTemplate) -> Tokens:
    """Return the token ids of a prompt.

    Raises:
        BadRow: the template cannot render it, or a text contains one of its markers.
    """
    template.require_no_marker(messages)
    ids = template.ids(template.prompt(messages, attributes or None))
    if not ids:
        raise BadRow("the chat template writes an empty prompt")
    return ids


def _attributes(params: ChatEvaluation) -> dict[str, float]:
    return {str(name): value for name, value in params.other_attributes.items()}
