"""The rule of docs/explanation/token-ratio.md: ratios of end points, bounds, verdicts, and the credit model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Point = tuple[float, float]
"""(tokens or seconds, loss in nats per token)."""
PROVEN, REFUTED, UNDECIDED, NOT_RUN = "proven", "**refuted**", "undecided", "not run"
NO_VERDICT = "no verdict"
"""Times were measured beside other work."""


@dataclass(frozen=True)
class Value:
    """A number, or a bound where a curve ends before it reaches the loss."""

    number: float
    kind: Literal["exact", "at least", "at most"] = "exact"

    @property
    def low(self) -> float:
        """Smallest possible number."""
        return 0.0 if self.kind == "at most" else self.number

    @property
    def high(self) -> float:
        """Largest possible number."""
        return math.inf if self.kind == "at least" else self.number

    def __str__(self) -> str:
        sign = {"exact": "", "at least": "≥ ", "at most": "≤ "}[self.kind]
        return f"{sign}{self.number:.2f}"


def reached_at(curve: Sequence[Point], loss: float) -> Value:
    """Return where a curve first reaches a loss, which is interpolated over the logarithm of x between two points.

    Outside of the points there is a bound only: nothing is extrapolated.

    Args:
        curve: points in ascending order of x.
    """
    if curve[0][1] <= loss:
        return Value(curve[0][0], "exact" if curve[0][1] == loss else "at most")
    for (x_a, loss_a), (x_b, loss_b) in pairwise(curve):
        if loss_b <= loss:
            share = (loss_a - loss) / (loss_a - loss_b)
            return Value(math.exp(math.log(x_a) + share * (math.log(x_b) - math.log(x_a))))
    return Value(curve[-1][0], "at least")


_OPPOSITE: dict[str, Literal["exact", "at least", "at most"]] = {
    "exact": "exact", "at least": "at most", "at most": "at least"
}  # fmt: skip


Curve = Mapping[int, Point]
"""Budget -> end point of the run with that budget, by ascending budget."""


def ratio_at_baseline(baseline: Curve, arm: Curve, budget: int) -> Value:
    """Return R(l) = D_base / D_arm(l) at the loss l that the baseline ends with at a budget."""
    tokens, loss = baseline[budget]
    needed = reached_at(list(arm.values()), loss)
    return Value(tokens / needed.number, _OPPOSITE[needed.kind])


def ratio_at_arm(baseline: Curve, arm: Curve, budget: int) -> Value:
    """Return R(l) = D_base(l) / D_arm at the loss l that the arm ends with at a budget."""
    tokens, loss = arm[budget]
    needed = reached_at(list(baseline.values()), loss)
    return Value(needed.number / tokens, needed.kind)


def at_least(values: Sequence[Value], goal: float) -> str:
    """Return the verdict on "at least the goal", one value for each seed."""
    if len(values) < 2:
        return NOT_RUN
    if all(value.low >= goal for value in values):
        return PROVEN
    return REFUTED if all(value.high < goal for value in values) else UNDECIDED


def does_not_fall(earlier: Sequence[Value], later: Sequence[Value]) -> str:
    """Return the verdict on "does not fall from the earlier to the later values", which are paired by seed."""
    pairs = list(zip(earlier, later, strict=True))
    if len(pairs) < 2:
        return NOT_RUN
    if all(after.low >= before.high for before, after in pairs):
        return PROVEN
    return REFUTED if all(after.high < before.low for before, after in pairs) else UNDECIDED


def on_both(verdicts: Sequence[str]) -> str:
    """Return the verdict on both texts: proven if proven on each, refuted if refuted on one."""
    for verdict in (REFUTED, NO_VERDICT, NOT_RUN, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return PROVEN


@dataclass(frozen=True)
class Fit:
    """L(D) = L_inf + K (D + D0)^-beta, with D0 = 0 for the baseline and the rest shared by both arms."""

    l_inf: float
    beta: float
    d0_tokens: float
    residual: float
    """Root mean square in nats."""


def fit(baseline: Sequence[Point], arm: Sequence[Point]) -> Fit | None:
    """Fit the credit model to end points over training tokens; None: an arm has fewer than three budgets."""
    if min(len({x for x, _ in points}) for points in (baseline, arm)) < 3:
        return None
    import numpy as np
    from scipy.optimize import least_squares

    unit = max(x for x, _ in baseline)
    x = np.array([x for x, _ in [*baseline, *arm]]) / unit
    loss = np.array([loss for _, loss in [*baseline, *arm]])
    is_arm = np.array([0.0] * len(baseline) + [1.0] * len(arm))

    def residuals(p: Any) -> Any:
        l_inf, log_k, beta, d0 = p
        return l_inf + np.exp(log_k) * (x + d0 * is_arm) ** -beta - loss

    lowest, gap = float(loss.min()), float(np.ptp(loss)) + 1e-6
    tries = [
        least_squares(
            residuals,
            (lowest - share * gap, math.log(gap * (share + 0.1)), beta, d0),
            bounds=((0.0, -20.0, 0.02, 0.0), (lowest, 10.0, 4.0, 100.0)),
            x_scale=(gap, 1.0, 1.0, 0.1),
        )
        for share in (0.1, 1.0)
        for beta in (0.3, 0.8)
        for d0 in (0.01, 0.3)
    ]
    best = min(tries, key=lambda found: found.cost)
    l_inf, _, beta, d0 = (float(value) for value in best.x)
    return Fit(l_inf, beta, d0 * unit, math.sqrt(2 * best.cost / len(loss)))
