"""An attribute model's opinion of answers: written into rows, and compared with people's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import MISSING, rated_row, read_normalized
from nemo_minitron.data.chat.rows import ATTRIBUTES, BadRow, Row
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError, PlanError
from nemo_minitron.schema.base import TEMPLATE_DATE
from nemo_minitron.schema.chats import ChatRendering
from nemo_minitron.stages.align.rows import PARTS
from nemo_minitron.stages.annotate.params import AnnotateStage
from nemo_minitron.stages.artifacts import ChatRows, RewardModel
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result

LOWEST, HIGHEST = 0, 4
"""Attributes of HelpSteer (2311.09528): integers of this range."""


@dataclass(frozen=True)
class Inputs:
    """What the stage reads."""

    attribute_model: RewardModel
    chats: ChatRows


def annotate(params: AnnotateStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Add the attributes that a trained attribute model gives to every answer; publishes rows like chat_data.

    Predictions are rounded to whole numbers from 0 to 4 (2310.05344, step 2). Rows that are too long are left out.

    Raises:
        PlanError: the model ranks, or the data are pairs.
        DataError: too many rows that the model's template cannot carry, or none left.
    """
    model, data = inputs.attribute_model, inputs.chats
    if model.result.get("reward") != "regression" or data.result.get("rows") != "conversations":
        raise PlanError(
            "annotate needs an attribute model that was trained by regression, and conversations.",
            where=f"stages.{ctx.name}.inputs",
        )
    template = ChatTemplate.load(
        model.path / "nemo.tokenizer",
        model.result["template"],
        whole_markers=model.result["whole_markers"],
        day=learnt_day(model.result),
    )
    facts: dict[str, Any] = {"rows": "conversations"}
    for part in PARTS:
        rows, texts, stats = _readable(data.path / f"{part}.jsonl", template, params, f"stages.{ctx.name}")
        found = predict(model.path / "nemo", texts, params.batch_size, ctx) if texts else []
        with (ctx.out_dir / f"{part}.jsonl").open("w", encoding="utf-8") as out:
            for row, values in zip(rows, found, strict=True):
                out.write(json.dumps({**row, "attributes": merged(row, values, params)}) + "\n")
        facts |= {f"{part}_rows": len(rows), f"{part}_lengths": stats.facts()}
    (ctx.out_dir / "facts.json").write_text(json.dumps(facts, indent=2))
    return facts


def learnt_day(result: Mapping[str, Any]) -> date:
    """The day in the texts that an attribute model was trained on; manifests of older versions do not say it."""
    return date.fromisoformat(result.get("template_date", TEMPLATE_DATE.isoformat()))


def _readable(
    file: Path, template: ChatTemplate, params: AnnotateStage, where: str
) -> tuple[list[Row], list[str], LengthStats]:
    """The rows that the attribute model can read, and their texts.

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


def answer_text(row: Row, template: ChatTemplate, max_seq_len_tokens: int, stats: LengthStats) -> str | None:
    """The dialogue as the attribute model was trained to see it; None: too long."""
    options = ChatRendering(turns="last", max_seq_len_tokens=max_seq_len_tokens)
    unrated = {**row, "attributes": {ATTRIBUTES[0]: LOWEST}}  # the label is not looked at
    rendered = rated_row(unrated, template, options, stats)
    return None if rendered is None else str(rendered["text"])


def predict(nemo: Path, texts: Sequence[str], batch_size: int, ctx: StageContext) -> list[list[float]]:
    """The attribute model's numbers for each text, in the order of ATTRIBUTES."""
    work = ctx.work_dir / "annotation"
    work.mkdir(parents=True, exist_ok=True)
    rows, out = work / "rows.jsonl", work / "found.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = nemo.with_name(f"{nemo.name}.tokenizer")
    task = {
        "nemo": str(nemo),
        "tokenizer": str(tokenizer),
        "rows": str(rows),
        "out": str(out),
        "batch_size": batch_size,
    }
    # On the CPU if that was asked for; else wherever its Python can.
    on_cpu = True if ctx.execution.device == "cpu" else None
    run_task("annotate", task, work, ctx.work_dir / "aligner.log", ctx.progress, ctx.stop, on_cpu=on_cpu)
    return [json.loads(line) for line in out.read_text().splitlines()]


def merged(row: Mapping[str, Any], values: Sequence[float], params: AnnotateStage) -> dict[str, float]:
    """A row's attributes after annotation."""
    known = dict(row.get("attributes") or {}) if params.keep_human else {}
    predicted = dict(zip(ATTRIBUTES, values, strict=True))
    for name in params.attributes:
        known.setdefault(name, int(np.clip(round(predicted[name]), LOWEST, HIGHEST)))
    return known


def agreement(
    labels: Sequence[Sequence[float]], found: Sequence[Sequence[float]], train: Iterable[Sequence[float]]
) -> dict[str, Any]:
    """How the model does beside a constant, the mean of the training labels; for each attribute that people rated.

    Returns:
        {attribute: {rows, mse, mse_of_mean, r2_over_mean, pearson}}, and the same for `all` together.
    """
    truth, predicted, before = (np.asarray(list(part), dtype=float) for part in (labels, found, train))
    out: dict[str, Any] = {}
    errors, constants = [], []
    for index, name in enumerate(ATTRIBUTES):
        rated, seen = truth[:, index] != MISSING, before[:, index] != MISSING
        if rated.sum() < 2 or not seen.any():
            continue
        wanted, given = truth[rated, index], predicted[rated, index]
        error, constant = (wanted - given) ** 2, (wanted - before[seen, index].mean()) ** 2
        errors.append(error)
        constants.append(constant)
        out[name] = _measures(error, constant) | {"pearson": _pearson(wanted, given)}
    if errors:
        out["all"] = _measures(np.concatenate(errors), np.concatenate(constants))
    return out


def _measures(error: NDArray[Any], constant: NDArray[Any]) -> dict[str, float]:
    mse, mse_of_mean = float(error.mean()), float(constant.mean())
    ratio = 1.0 - mse / mse_of_mean if mse_of_mean else 0.0
    return {"rows": len(error), "mse": mse, "mse_of_mean": mse_of_mean, "r2_over_mean": ratio}


def _pearson(wanted: NDArray[Any], given: NDArray[Any]) -> float | None:
    if wanted.std() == 0 or given.std() == 0:
        return None
    return float(np.corrcoef(wanted, given)[0, 1])


def read_labels(file: Path) -> Iterator[tuple[str, list[float]]]:
    """(text, label) of rendered rows."""
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["text"], row["label"]
