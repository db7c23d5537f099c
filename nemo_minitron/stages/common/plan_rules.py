"""A rule for stages that read a pruned model and the plan by which it was pruned. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.stages.kind import RecipeView


def plan_problems(name: str, plan: str, student: str, view: RecipeView) -> Iterator[str]:
    """Check that the plan leaves the student's sizes, if both are known.

    Args:
        name: name of the stage that reads both.
        plan, student: names of the stages that provide them.
    """
    planned, found = view.planned_shape(plan), view.shape(student)
    if planned is not None and found is not None and planned.sizes() != found.sizes():
        yield (
            f"stages.{name}.inputs.plan = {plan}: it leaves {planned.sizes()}, but {student} has {found.sizes()}. "
            "Next: name the plan by which the student was pruned."
        )
