"""The rows that NeMo-Aligner reads, from the checked rows of a chat_data stage; and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import Purpose, read_normalized, render_rows
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from nemo_minitron.schema.alignment import Alignment
from nemo_minitron.stages.align.params import AttributeModelStage, DpoStage, SteerlmSftStage
from nemo_minitron.stages.artifacts import ChatRows, Model
from nemo_minitron.stages.context import StageContext

PARTS = ("train", "valid")


@dataclass(frozen=True)
class Rows:
    """Files for NeMo-Aligner."""

    train: Path
    valid: Path
    num_train: int
    """Rows that a batch counts: a pair of a ranking is one."""
    facts: dict[str, Any]
    """Lengths and counts, by part."""


def write_rows(params: Alignment, model: Model, chats: ChatRows, ctx: StageContext) -> Rows:
    """Render every row with the model's tokenizer, and check it, before anything is trained.

    Raises:
        DataError: rows of the wrong kind, unusable rows, or fewer than a batch of them.
    """
    purpose = _purpose(params)
    _require_kind(purpose, chats, ctx)
    template = ChatTemplate.load(
        model.path, params.template, whole_markers=params.whole_markers, day=params.template_date
    )
    folder = ctx.work_dir / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    counts, facts = {}, {}
    for part in PARTS:
        stats = LengthStats()
        source = chats.file(part)
        rows = render_rows(
            _with_needed(read_normalized(source), params, str(source)),
            purpose,
            template,
            params,
            stats,
            where=f"stages.{ctx.name}",
        )
        counts[part] = _write(folder / f"{part}.jsonl", _in_aligners_form(rows, params))
        facts[part] = stats.facts()
        _require_batch(counts[part], params.global_batch_size, part, stats, ctx)
    return Rows(folder / "train.jsonl", folder / "valid.jsonl", counts["train"], facts)


def _purpose(params: Alignment) -> Purpose:
    if isinstance(params, DpoStage):
        return "pairs"
    if isinstance(params, AttributeModelStage):
        return "rated" if params.reward == "regression" else "pairs"
    return "sft"


def _require_kind(purpose: Purpose, chats: ChatRows, ctx: StageContext) -> None:
    needed = "pairs" if purpose == "pairs" else "conversations"
    if chats.rows != needed:
        raise DataError(
            f"Stage {chats.stage} holds {chats.rows}.",
            where=f"stages.{ctx.name}.inputs.chats",
            allowed=f"a chat_data stage with rows: {needed}",
        )


def _with_needed(rows: Iterable[Mapping[str, Any]], params: Alignment, file: str) -> Iterable[Any]:
    """The rows, each with what this training cannot do without."""
    needs_rewards = isinstance(params, DpoStage) and params.preference_loss.startswith("rpo")
    needs_attributes = isinstance(params, SteerlmSftStage)
    for row in rows:
        missing = [key for key in ("chosen_reward", "rejected_reward") if needs_rewards and key not in row]
        if needs_attributes and not row.get("attributes"):
            missing.append("attributes")
        if missing:
            raise DataError(
                f"A row has no {' and no '.join(missing)}.",
                where=f"{file}, made from {row['origin']}",
                next_step="Rewards are read from the source's rows; preference_loss: dpo and ipo need none. "
                "Attributes come from an annotate stage or from rated data.",
            )
        yield row


def _in_aligners_form(rows: Iterable[dict[str, Any]], params: Alignment) -> Iterable[list[dict[str, Any]]]:
    """The lines that stand for each row."""
    ranking = isinstance(params, AttributeModelStage) and params.reward == "ranking"
    for row in rows:
        if ranking:
            yield [{"text": row["prompt"] + row[key]} for key in ("chosen_response", "rejected_response")]
        else:
            yield [row]


def _write(file: Path, rows: Iterable[list[dict[str, Any]]]) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for lines in rows:
            out.writelines(json.dumps(line) + "\n" for line in lines)
            count += 1
    return count


def _require_batch(found: int, needed: int, part: str, stats: LengthStats, ctx: StageContext) -> None:
    if found < needed:
        raise DataError(
            f"{found} rows of the {part} part are left, and a batch takes {needed}; "
            f"{stats.num_dropped} were too long, {stats.bad.num_bad} of {stats.bad.num_rows} bad.",
            where=f"stages.{ctx.name}.global_batch_size",
            next_step="Lower global_batch_size, raise max_seq_len_tokens or the chat_data stage's valid_rows, "
            "or set too_long: cut_turns.",
        )
