"""Watch the training loss for spikes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from nemo_minitron.schema.training import LossGuard

MIN_GOOD_STEPS = 10
"""Good losses that are needed before a bound exists."""
SMALLEST_SPIKE = 0.1
"""A loss within this distance of the median is no spike: losses near zero may multiply, and estimates be negative."""


class LossWatch:
    """Compares each loss with the median of the preceding good losses.

    Args:
        rules: None treats every loss as good.
        good_losses: losses of the preceding steps, from a checkpoint.
    """

    def __init__(self, rules: LossGuard | None, good_losses: Sequence[float] = ()) -> None:
        self._rules = rules
        self._good = deque(good_losses, maxlen=rules.window_steps if rules else 0)
        self.steps_above = 0

    @property
    def good_losses(self) -> list[float]:
        """Losses of the last window_steps good steps, oldest first."""
        return list(self._good)

    @property
    def median(self) -> float | None:
        """Median of the good losses; None until there are enough of them."""
        return median(self._good) if len(self._good) >= MIN_GOOD_STEPS else None

    @property
    def last_loss_is_good(self) -> bool:
        """Whether the last loss was within the bound; only then is a checkpoint written."""
        return self.steps_above == 0

    def is_spike(self, loss: float) -> bool:
        """Record the loss of the next step; return True if it is the patience_steps-th in a row above the bound."""
        if self._rules is None:
            return False
        usual = self.median
        if usual is None or loss <= max(self._rules.max_ratio * usual, usual + SMALLEST_SPIKE):
            self._good.append(loss)
            self.steps_above = 0
            return False
        self.steps_above += 1
        return self.steps_above >= self._rules.patience_steps
