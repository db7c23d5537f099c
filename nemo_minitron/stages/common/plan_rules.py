"""A rule for stages that read a model, a plan that prunes it, and the pruned model. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.stages.kind import RecipeView


def plan_problems(name: str, plan: str, teacher: str, student: str, view: RecipeView) -> Iterator[str]:
    """Check that the plan leads from the teacher's sizes to the student's, as far as they are known.

    Args:
        name: name of the stage that reads all three.
        plan, teacher, student: names of the stages that provide them.
    """
    key = f"stages.{name}.inputs.plan = {plan}"
    whole, source = view.shape(teacher), _source(plan, view)
    if whole is not None and source is not None and whole.sizes() != source.sizes():
        yield (
            f"{key}: it was made for {source.sizes()}, but {teacher} has {whole.sizes()}. "
            f"Next: set stages.{name}.inputs.teacher to the model that the plan cuts."
        )
    planned, found = view.planned_shape(plan), view.shape(student)
    if planned is not None and found is not None and planned.sizes() != found.sizes():
        yield (
            f"{key}: it leaves {planned.sizes()}, but {student} has {found.sizes()}. "
            "Next: name the plan by which the student was pruned."
        )


def _source(plan: str, view: RecipeView) -> ModelShape | None:
    """Return the shape of the model that a plan is made for."""
    model = getattr(getattr(view.stages.get(plan), "inputs", None), "model", None)
    return view.shape(model) if isinstance(model, str) else None
