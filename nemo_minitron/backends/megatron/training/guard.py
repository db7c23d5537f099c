"""Watch the training loss for spikes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from nemo_minitron.schema.training import LossGuard

MIN_GOOD_STEPS = 10
"""Before so many good losses are known there is no bound."""


class LossWatch:
    """Compares each loss with the median of the good ones before it.

    Args:
        rules: None: every loss is good.
        good_losses: what a checkpoint knows of the steps before it.
    """

    def __init__(self, rules: LossGuard | None, good_losses: Sequence[float] = ()) -> None:
        self._rules = rules
        self._good = deque(good_losses, maxlen=rules.window_steps if rules else 0)
        self.steps_above = 0

    @property
    def good_losses(self) -> list[float]:
        """Of the last window_steps good steps, oldest first."""
        return list(self._good)

    @property
    def median(self) -> float | None:
        """None until enough good steps were seen."""
        return median(self._good) if len(self._good) >= MIN_GOOD_STEPS else None

    @property
    def is_calm(self) -> bool:
        """Whether the last loss was good: only then is a state worth keeping."""
        return self.steps_above == 0

    def is_spike(self, loss: float) -> bool:
        """Take in the loss of the next step; True when it is the patience_steps-th in a row above the bound."""
        if self._rules is None:
            return False
        usual = self.median
        if usual is None or loss <= self._rules.max_ratio * usual:
            self._good.append(loss)
            self.steps_above = 0
            return False
        self.steps_above += 1
        return self.steps_above >= self._rules.patience_steps
