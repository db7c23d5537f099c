"""Prompts for trainings on rewards, from normalized rows of conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.bad_rows import BadRows
from nemo_minitron.data.chat.render import read_normalized
from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.data.chat.tokenizing import ChatTemplate


@dataclass(frozen=True)
class Prompt:
    """A prompt and the row that it comes from."""

    text: str
    row: Mapping[str, Any]


@dataclass
class PromptsOfFile:
    """The usable prompts of a file, and how many rows gave none."""

    prompts: list[Prompt] = field(default_factory=list)
    repeated: int = 0
    too_long: int = 0
    bad: BadRows = field(default_factory=BadRows)
    left_over: int = 0
    """Prompts that `keep_whole_steps` removed."""

    def keep_whole_steps(self, prompts_per_step: int) -> None:
        """Make the number of prompts a multiple of those of a step, unless there are fewer than one step needs.

        NeMo-Aligner stops at a step that the prompts of an epoch do not fill.
        """
        if len(self.prompts) >= prompts_per_step:
            self.left_over = len(self.prompts) % prompts_per_step
            del self.prompts[len(self.prompts) - self.left_over :]

    def counts(self) -> dict[str, int]:
        """Return the counts for a manifest."""
        return {
            "prompts": len(self.prompts),
            "repeated": self.repeated,
            "too_long": self.too_long,
            "bad": self.bad.num_bad,
            "left_over": self.left_over,
        }


def read_prompts(file: Path, template: ChatTemplate, *, longest_tokens: int, seen: set[str]) -> PromptsOfFile:
    """Read the text before the last answer of every row, up to and including the generation prompt.

    Args:
        longest_tokens: longer prompts are left out.
        seen: prompts that are left out as repeated. New prompts are added, so that a set that is shared by the files
            of training and held-out rows keeps them apart.
    """
    found = PromptsOfFile()
    for row in read_normalized(file):
        found.bad.num_rows += 1
        try:
            text = _rendered(row, template)
        except BadRow as reason:
            found.bad.add(row["origin"], reason)
            continue
        if text in seen:
            found.repeated += 1
        elif len(template.ids(text)) > longest_tokens:
            found.too_long += 1
        else:
            seen.add(text)
            found.prompts.append(Prompt(text, row))
    return found


def _rendered(row: Mapping[str, Any], template: ChatTemplate) -> str:
    if "messages" not in row:
        raise BadRow("the row is a pair of answers, not a conversation")
    messages = row["messages"]
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    template.require_no_marker(before)
    return template.prompt(before)
