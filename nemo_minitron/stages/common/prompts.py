"""Prompt files of a training on rewards, from the rows of a chat_data stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.prompts import PromptsOfFile, read_prompts
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from nemo_minitron.schema.rewards import RolloutTraining
from nemo_minitron.stages.artifacts import ChatRows
from nemo_minitron.stages.common.alignment_rows import PARTS
from nemo_minitron.stages.context import StageContext


@dataclass(frozen=True)
class Prompts:
    """Files of prompts {"text", "reference" (if the row has an answer), and IFEval's rules}, each prompt once."""

    train: Path
    valid: Path
    num_train: int
    stop: str
    """Text that ends an answer."""
    facts: dict[str, Any]
    """Numbers of each part: its prompts, and those left out as repeated, too long, bad, or left over."""


def write_prompts(params: RolloutTraining, template: ChatTemplate, chats: ChatRows, ctx: StageContext) -> Prompts:
    """Write the text before the last answer of every row, that answer as the reference, and the row's rules.

    Of the rows with the same prompt the first is kept, because the server finds a row by its prompt. A held-out prompt
    that is also a training prompt is left out.

    Raises:
        DataError: the template cannot render too many rows, fewer prompts are left than a step needs, or nothing ends
            an answer.
    """
    folder, where = ctx.work_dir / "prompts", f"stages.{ctx.name}"
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    facts: dict[str, dict[str, int]] = {}
    for part in PARTS:
        found = read_prompts(chats.file(part), template, longest_tokens=params.longest_prompt_tokens, seen=seen)
        found.bad.require_few(params.max_bad_fraction, where)
        _require_enough(found, part, params, where)
        if part == "train":
            found.keep_whole_steps(params.prompts_per_step)
        lines = [json.dumps({"text": prompt.text, **_for_rules(prompt.row)}) + "\n" for prompt in found.prompts]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        facts[part] = found.counts()
    stop = template.end_of_turn()
    if stop is None:
        raise DataError(
            "The chat template writes no special token after an answer, and the tokenizer has no eos token.",
            where=f"{where}.template",
            next_step="Choose another template, or add an eos token to the model's tokenizer.",
        )
    return Prompts(folder / "train.jsonl", folder / "valid.jsonl", facts["train"]["prompts"], stop, facts)


def _require_enough(found: PromptsOfFile, part: str, params: RolloutTraining, where: str) -> None:
    key, more = ("prompts_per_step", "rows") if part == "train" else ("num_valid_prompts", "valid_rows")
    needed = getattr(params, key)
    if len(found.prompts) < needed:
        raise DataError(
            f"{len(found.prompts)} prompts of the {part} part are left, and {key} = {needed}: {found.repeated} "
            f"were repeated, {found.too_long} longer than {params.longest_prompt_tokens} tokens.",
            where=f"{where}.{key}",
            next_step=f"Lower it, raise max_seq_len_tokens, or give the chat_data stage more {more}.",
        )


def _for_rules(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rules of rewards read in the row of a prompt."""
    last, kept = row["messages"][-1], {key: row[key] for key in ("instruction_id_list", "kwargs") if key in row}
    return {**({"reference": last["content"]} if last["role"] == "assistant" else {}), **kept}
