"""A multiple-choice task as token ids and a function of log-likelihoods, for models of any framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class ChoiceTask:
    """Questions with their answers; `pairs[i]` is (question, answer) as token ids, both not empty."""

    name: str
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    metric: str
    _task: Any
    _instances: tuple[Any, ...]

    def accuracy(self, log_likelihoods: Sequence[float]) -> float:
        """Mean accuracy over the examples, by lm-eval's own code, from the log-likelihood of each pair."""
        found: list[float] = []
        numbered = zip(self._instances, log_likelihoods, strict=True)
        for _, group in groupby(numbered, key=lambda item: item[0].doc_id):
            items = list(group)
            # Whether an answer is the greedy one plays no part in accuracy.
            results = self._task.process_results(items[0][0].doc, [(value, False) for _, value in items])
            found.append(float(results[self.metric]))
        return sum(found) / len(found)
