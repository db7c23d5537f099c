"""Prompts for trainings on rewards, rendered from the conversations of a chat_data stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.bad_rows import BadRows
from nemo_minitron.data.chat.render import read_normalized
from nemo_minitron.data.chat.rows import BadRow
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
    that is also a training prompt is left out. The number of training prompts becomes a multiple of prompts_per_step:
    NeMo-Aligner stops at a step that the prompts of an epoch do not fill.

    Raises:
        DataError: the template cannot render too many rows, or fewer prompts are left than a step needs.
    """
    folder, where = ctx.work_dir / "prompts", f"stages.{ctx.name}"
    folder.mkdir(parents=True, exist_ok=True)
    needed = {"train": params.prompts_per_step, "valid": params.num_valid_prompts}
    seen: set[str] = set()
    facts: dict[str, Any] = {}
    for part in PARTS:
        rows, counts = _prompts(params, template, chats.file(part), seen, where)
        if len(rows) < needed[part]:
            key, more = ("prompts_per_step", "rows") if part == "train" else ("num_valid_prompts", "valid_rows")
            raise DataError(
                f"{len(rows)} prompts of the {part} part are left, and {key} = {needed[part]}: {counts['repeated']} "
                f"were repeated, {counts['too_long']} longer than {params.longest_prompt_tokens} tokens.",
                where=f"{where}.{key}",
                next_step=f"Lower it, raise max_seq_len_tokens, or give the chat_data stage more {more}.",
            )
        left_over = len(rows) % params.prompts_per_step if part == "train" else 0
        rows = rows[: len(rows) - left_over]
        facts[part] = {"prompts": len(rows), **counts, "left_over": left_over}
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stop = template.stop or str(template.tokenizer.eos_token)
    return Prompts(folder / "train.jsonl", folder / "valid.jsonl", facts["train"]["prompts"], stop, facts)


def _prompts(
    params: RolloutTraining, template: ChatTemplate, file: Path, seen: set[str], where: str
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the rows of new prompts, which are added to `seen`, and how many were left out."""
    bad, rows, counts = BadRows(), [], {"repeated": 0, "too_long": 0}
    for row in read_normalized(file):
        bad.num_rows += 1
        try:
            prompt = _rendered(row, template)
        except BadRow as reason:
            bad.add(row["origin"], reason)
            continue
        if prompt in seen:
            counts["repeated"] += 1
        elif len(template.ids(prompt)) > params.longest_prompt_tokens:
            counts["too_long"] += 1
        else:
            seen.add(prompt)
            rows.append({"text": prompt, **_for_rules(row)})
    bad.require_few(params.max_bad_fraction, where)
    return rows, {**counts, "bad": bad.num_bad}


def _rendered(row: Mapping[str, Any], template: ChatTemplate) -> str:
    if "messages" not in row:
        raise BadRow("the row is a pair of answers, not a conversation")
    messages = row["messages"]
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    template.require_no_marker(before)
    return template.prompt(before)


def _for_rules(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rules of rewards read in the row of a prompt."""
    last, kept = row["messages"][-1], {key: row[key] for key in ("instruction_id_list", "kwargs") if key in row}
    return {**({"reference": last["content"]} if last["role"] == "assistant" else {}), **kept}
