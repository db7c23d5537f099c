"""Rewards in the report's section on alignment: a table of the trainings, and answers before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.backends.alignment.base import ANSWERS_FILE

SHOWN_PROMPTS = 3
Rows = list[dict[str, Any]]


def reward_trainings(stages: Sequence[Artifact]) -> Rows:
    """Return {stage, method, num_steps, start, end} of each training on rewards."""
    keys = ("method", "num_steps", "start", "end")
    return [{"stage": stage.stage, **{key: stage.result[key] for key in keys}} for stage in stages]


def reward_table(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the table {title, header, rows} of held-out rewards; all cells are text."""
    header = [
        "stage",
        "steps",
        "reward before",
        "after",
        "KL to the start, nats per token",
        "tokens of an answer",
        "cut off",
    ]
    rows = []
    for row in trainings:
        start, end = row["start"], row["end"]
        rows.append(
            [
                row["stage"],
                f"{row['num_steps']:,}",
                *(_with_error(one["reward"], one.get("reward_se")) for one in (start, end)),
                f"{end['kl_nats_per_token']:.3f}",
                f"{start['answer_tokens']:.1f} -> {end['answer_tokens']:.1f}",
                f"{1 - start['ended']:.0%} -> {1 - end['ended']:.0%}",
            ]
        )
    return {"title": "Trained on rewards; answers to held-out prompts", "header": header, "rows": rows}


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def reward_samples(stages: Sequence[Artifact]) -> Rows:
    """Return the answers of each training to its first held-out prompts, before its first step and after its last."""
    out = []
    for stage in stages:
        text = (stage.path / ANSWERS_FILE).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        last = rows[-1]["step"]
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:SHOWN_PROMPTS]
        for prompt in prompts:
            texts = {
                f"{stage.stage}, step {row['step']}, reward {row['reward']:.2f}": row["answer"]
                for row in rows
                if row["prompt"] == prompt and row["step"] in (0, last)
            }
            out.append({"prompt": prompt, "texts": texts})
    return out
