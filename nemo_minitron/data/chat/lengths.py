"""Length statistics of rendered rows, for manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_minitron.data.chat.bad_rows import BadRows


@dataclass
class LengthStats:
    """Length statistics of one pass over rows."""

    prompt_tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    sequence_tokens: list[int] = field(default_factory=list)
    """Tokens of prompt and answer together; a pair has two sequences."""
    num_rows: int = 0
    """Number of rendered rows; one conversation can give several."""
    num_dropped: int = 0
    """Number of rows left out because they are too long."""
    num_cut: int = 0
    """Number of rows rendered without their oldest turns."""
    bad: BadRows = field(default_factory=BadRows)

    def add(self, prompt_tokens: int, answer_tokens: Sequence[int], *, cut: bool) -> None:
        """Count one rendered row with its one or two answers."""
        self.num_rows += 1
        self.num_cut += cut
        self.prompt_tokens.append(prompt_tokens)
        self.answer_tokens += answer_tokens
        self.sequence_tokens += [prompt_tokens + number for number in answer_tokens]

    def facts(self) -> dict[str, Any]:
        """Return {rows, tokens, loss_share, prompt_tokens: {mean, p50, p95, max}, ..., dropped_rows, ...}."""
        total = sum(self.sequence_tokens)
        return {
            "rows": self.num_rows,
            "tokens": total,
            "loss_share": sum(self.answer_tokens) / total if total else 0.0,
            "prompt_tokens": _summary(self.prompt_tokens),
            "answer_tokens": _summary(self.answer_tokens),
            "sequence_tokens": _summary(self.sequence_tokens),
            "dropped_rows": self.num_dropped,
            "cut_rows": self.num_cut,
            **self.bad.facts(),
        }


def _summary(numbers: Sequence[int]) -> dict[str, float]:
    if not numbers:
        return {"mean": 0.0, "p50": 0.0, "p95": 0.0, "max": 0.0}
    middle, high = np.percentile(numbers, [50, 95])
    return {"mean": float(np.mean(numbers)), "p50": float(middle), "p95": float(high), "max": float(max(numbers))}
