"""Training rows for an alignment backend, rendered and checked from the rows of a chat_data stage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import Purpose, read_normalized, render_rows
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError
from nemo_minitron.schema.alignment import Alignment
from nemo_minitron.stages.artifacts import ChatRows, Model
from nemo_minitron.stages.context import StageContext

PARTS = ("train", "valid")


@dataclass(frozen=True)
class Rows:
    """Files of training rows, in the form that the backend's objective names."""

    train: Path
    valid: Path
    num_train: int
    """Training rows that a batch counts: a pair of a ranking is one."""
    facts: dict[str, Any]
    """Lengths and counts of each part."""


def write_rows(
    params: Alignment,
    model: Model,
    chats: ChatRows,
    ctx: StageContext,
    purpose: Purpose,
    *,
    required_keys: Sequence[str] = (),
    split_pairs: bool = False,
) -> Rows:
    """Render every row with the model's tokenizer and check it, before training starts.

    Args:
        required_keys: keys that every row of the chat_data stage must have, such as rewards.
        split_pairs: write each pair as two lines, the chosen answer first, as a ranking needs them.

    Raises:
        DataError: rows of the wrong kind, unusable rows, or fewer than a batch of them.
    """
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
            _with_keys(read_normalized(source), required_keys, str(source)),
            purpose,
            template,
            params,
            stats,
            where=f"stages.{ctx.name}",
        )
        counts[part] = _write(folder / f"{part}.jsonl", rows, split_pairs=split_pairs)
        facts[part] = stats.facts()
        _require_batch(counts[part], params.global_batch_size, part, stats, ctx)
    return Rows(folder / "train.jsonl", folder / "valid.jsonl", counts["train"], facts)


def _require_kind(purpose: Purpose, chats: ChatRows, ctx: StageContext) -> None:
    needed = "pairs" if purpose == "pairs" else "conversations"
    if chats.rows != needed:
        raise DataError(
            f"Stage {chats.stage} holds {chats.rows}.",
            where=f"stages.{ctx.name}.inputs.chats",
            allowed=f"a chat_data stage with rows: {needed}",
        )


def _with_keys(rows: Iterable[Mapping[str, Any]], required_keys: Sequence[str], file: str) -> Iterable[Any]:
    """Yield the rows; raise DataError for one that lacks a required key."""
    for row in rows:
        missing = [key for key in required_keys if row.get(key) in (None, {})]
        if missing:
            raise DataError(
                f"A row has no {' and no '.join(missing)}.",
                where=f"{file}, made from {row['origin']}",
                next_step="Rewards are read from the source's rows; preference_loss: dpo and ipo need none. "
                "Attributes come from an annotate stage or from rated data.",
            )
        yield row


def _write(file: Path, rows: Iterable[dict[str, Any]], *, split_pairs: bool) -> int:
    """Write the rows as JSON lines; returns their number, where a split pair counts once."""
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            out.writelines(json.dumps(line) + "\n" for line in (_split(row) if split_pairs else [row]))
            count += 1
    return count


def _split(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"text": pair["prompt"] + pair[key]} for key in ("chosen_response", "rejected_response")]


def _require_batch(found: int, needed: int, part: str, stats: LengthStats, ctx: StageContext) -> None:
    if found < needed:
        raise DataError(
            f"{found} rows of the {part} part are left, and a batch takes {needed}; "
            f"{stats.num_dropped} were too long, {stats.bad.num_bad} of {stats.bad.num_rows} bad.",
            where=f"stages.{ctx.name}.global_batch_size",
            next_step="Lower global_batch_size, raise max_seq_len_tokens or the chat_data stage's valid_rows, "
            "or set too_long: cut_turns.",
        )
