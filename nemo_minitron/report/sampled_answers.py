"""Sampled answers of SteerLM 2.0 in the report's section on alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.artifacts.types import Artifact

HEADER = [
    "stage",
    "prompts",
    "answers to each",
    "log-probability of the attributes, nats",
    "effective answers",
    "tokens",
    "ended",
]


def sampled_answers(stages: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return facts about the held-out answers of each stage that samples answers."""
    keys = ("rows", "log_attributes_nats", "log_attributes_nats_se", "effective_answers", "ended")
    return [
        {
            "stage": stage.stage,
            "answers_per_prompt": stage.result["answers_per_prompt"],
            "answer_tokens": stage.result["valid"]["lengths"]["answer_tokens"]["mean"],
            **{key: stage.result["valid"][key] for key in keys},
        }
        for stage in stages
    ]


def sampled_table(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the table {title, header, rows}; all cells are text."""
    rows = [
        [
            row["stage"],
            f"{row['rows']:,}",
            str(row["answers_per_prompt"]),
            f"{row['log_attributes_nats']:.3f} ± {row['log_attributes_nats_se']:.3f}",
            f"{row['effective_answers']:.1f}",
            f"{row['answer_tokens']:.1f}",
            f"{row['ended']:.0%}",
        ]
        for row in found
    ]
    return {"title": "Sampled answers to held-out prompts that request attributes", "header": HEADER, "rows": rows}
