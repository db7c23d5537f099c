"""The stage that adds the attributes predicted by an attribute model to rows of conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.backends.alignment.base import alignment_backend
from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import read_normalized
from nemo_minitron.data.chat.rows import ATTRIBUTES, BadRow, Row
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError, PlanError
from nemo_minitron.stages.annotate.params import AnnotateStage
from nemo_minitron.stages.artifacts import ChatRows, RewardModel
from nemo_minitron.stages.common.alignment_rows import PARTS
from nemo_minitron.stages.common.alignment_training import task_context
from nemo_minitron.stages.common.rated_text import answer_text
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result

LOWEST, HIGHEST = 0, 4
"""Range of the attributes of HelpSteer (2311.09528), which are integers."""


@dataclass(frozen=True)
class Inputs:
    """What the stage reads."""

    attribute_model: RewardModel
    chats: ChatRows


def annotate(params: AnnotateStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Add an attribute model's predictions to the rows; publish rows in the same form as chat_data.

    Predictions are rounded to integers from 0 to 4 (2310.05344, step 2). Rows that are too long are dropped.

    Raises:
        PlanError: the model was trained by ranking, or the data are pairs.
        DataError: the template cannot render too many rows, or no row is left.
    """
    model, data = inputs.attribute_model, inputs.chats
    if model.result.get("reward") != "regression" or data.result.get("rows") != "conversations":
        raise PlanError(
            "annotate needs an attribute model that was trained by regression, and conversations.",
            where=f"stages.{ctx.name}.inputs",
        )
    backend = alignment_backend()
    template = ChatTemplate.load(
        backend.reward_tokenizer(model.path),
        model.template,
        whole_markers=model.whole_markers,
        day=model.template_date,
    )
    facts: dict[str, Any] = {"rows": "conversations"}
    for part in PARTS:
        rows, texts, stats = _readable(data.path / f"{part}.jsonl", template, params, f"stages.{ctx.name}")
        found = backend.predict_rewards(model.path, texts, params.batch_size, task_context(ctx)) if texts else []
        with (ctx.out_dir / f"{part}.jsonl").open("w", encoding="utf-8") as out:
            for row, values in zip(rows, found, strict=True):
                out.write(json.dumps({**row, "attributes": merged(row, values, params)}) + "\n")
        facts |= {f"{part}_rows": len(rows), f"{part}_lengths": stats.facts()}
    (ctx.out_dir / "facts.json").write_text(json.dumps(facts, indent=2))
    return facts


def _readable(
    file: Path, template: ChatTemplate, params: AnnotateStage, where: str
) -> tuple[list[Row], list[str], LengthStats]:
    """Return the rows that the attribute model can rate, with their texts and the statistics of all rows.

    Raises:
        DataError: too many bad rows, or none left.
    """
    rows, texts, stats = [], [], LengthStats()
    for row in read_normalized(file):
        stats.bad.num_rows += 1
        try:
            text = answer_text(row, template, params.max_seq_len_tokens, stats)
        except BadRow as reason:
            stats.bad.add(row["origin"], reason)
            continue
        if text is not None:
            rows.append(row)
            texts.append(text)
    stats.bad.require_few(params.max_bad_fraction, where)
    if stats.num_dropped and not rows:
        raise DataError(
            f"0 of {stats.num_dropped} rows of {file.name} fit into max_seq_len_tokens = {params.max_seq_len_tokens}.",
            where=f"{where}.max_seq_len_tokens",
            next_step="Raise it, up to what the attribute model was trained with, or choose shorter rows.",
        )
    if stats.bad.num_bad and not rows:
        raise stats.bad.none_left(where)
    return rows, texts, stats


def merged(row: Mapping[str, Any], values: Sequence[float], params: AnnotateStage) -> dict[str, float]:
    """Return a row's attributes after annotation."""
    known = dict(row.get("attributes") or {}) if params.keep_human else {}
    predicted = dict(zip(ATTRIBUTES, values, strict=True))
    for name in params.attributes:
        known.setdefault(name, int(np.clip(round(predicted[name]), LOWEST, HIGHEST)))
    return known
