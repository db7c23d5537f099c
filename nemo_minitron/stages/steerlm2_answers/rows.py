"""Training rows of SteerLM 2.0, and facts about them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.evaluation.attribute_likelihood import (
    answer_weights,
    attributes_log_prob,
    distance_to_uniform,
    effective_answers,
)
from nemo_minitron.stages.steerlm2_answers.prompts import Prompt
from nemo_minitron.stages.steerlm2_answers.sampling import Record

SPEAKERS = {"user": "User", "assistant": "Assistant"}
"""Role -> name in NeMo-Aligner's rows."""
LOG_ATTRIBUTES, LOG_REFERENCE, LOG_MODEL = "log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))"
"""Names of the three log-probabilities in NeMo-Aligner's rows."""


@dataclass
class PartFacts:
    """Facts about the rows of one part."""

    drawn: int = 0
    ended: int = 0
    left_out: int = 0
    """Prompts with too few usable answers."""
    log_attributes: list[float] = field(default_factory=list)
    """Mean log P(a|x,y) of the answers to each prompt."""
    effective: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    lengths: LengthStats = field(default_factory=LengthStats)

    def add(self, record: Record, logs: Mapping[str, Sequence[float]]) -> None:
        """Count the answers to one prompt."""
        prompt_tokens, *answer_tokens = record["sizes"]
        self.lengths.add(prompt_tokens, answer_tokens, cut=False)
        weights = answer_weights(logs[LOG_ATTRIBUTES], logs[LOG_REFERENCE], logs[LOG_MODEL])
        self.log_attributes.append(math.fsum(logs[LOG_ATTRIBUTES]) / len(weights))
        self.effective.append(effective_answers(weights))
        self.distances.append(distance_to_uniform(weights))

    def facts(self) -> dict[str, Any]:
        """Return the facts for the manifest; errors are standard errors over prompts."""
        mean, error = _mean(self.log_attributes)
        return {
            "rows": len(self.log_attributes),
            "left_out": self.left_out,
            "drawn": self.drawn,
            "ended": self.ended / self.drawn if self.drawn else 0.0,
            "log_attributes_nats": mean,
            "log_attributes_nats_se": error,
            "effective_answers": _mean(self.effective)[0],
            "distance_nats": _mean(self.distances)[0],
            "lengths": self.lengths.facts(),
        }


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return (mean, its standard error)."""
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def write_part(
    file: Path, prompts: Iterable[tuple[Prompt, Record, Sequence[float], Sequence[Sequence[float]]]]
) -> PartFacts:
    """Write the rows of one part in NeMo-Aligner's format, and return facts about them.

    A row also has the rendered texts: `prompt`, and the `output` of each answer.

    Args:
        prompts: (prompt, its answers, log P(y|x) of each, predicted attributes of each).
    """
    facts = PartFacts()
    with file.open("w", encoding="utf-8") as out:
        for prompt, record, log_reference, ratings in prompts:
            facts.drawn += record["drawn"]
            facts.ended += record["ended"]
            if not record["values"]:
                facts.left_out += 1
                continue
            logs = {
                LOG_ATTRIBUTES: [attributes_log_prob(found, prompt.attributes) for found in ratings],
                LOG_REFERENCE: log_reference,
                LOG_MODEL: record["log_q"],
            }
            facts.add(record, logs)
            out.write(json.dumps(_row(prompt, record, logs)) + "\n")
    return facts


def _row(prompt: Prompt, record: Record, logs: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    messages = list(prompt.messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    responses = [
        {"from": SPEAKERS["assistant"], "value": value, "output": output, **dict(zip(logs, each, strict=True))}
        for value, output, *each in zip(record["values"], record["outputs"], *logs.values(), strict=True)
    ]
    return {
        "origin": prompt.origin,
        "system": system,
        "prompt_turns": [{"from": SPEAKERS[turn["role"]], "value": turn["content"]} for turn in messages],
        "label": prompt.label,
        "prompt": prompt.conditioned,
        "responses": responses,
    }
