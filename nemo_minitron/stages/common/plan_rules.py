"""A rule for stages that read a model, a plan that prunes it, and the pruned model. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.stages.kind import RecipeView


def plan_problems(name: str, plan: str, teacher: str, student: str, view: RecipeView) -> Iterator[str]:
    """Check that the student was cut by the plan, and that its sizes lead from the teacher's to the student's.

    Both as far as they are known: the teacher may be a corrected one, and a student from outside has no plan here.

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
    own = view.plan_of(student)
    # Stages with the same keys make the same plan. Others of the same sizes keep other indices.
    if own is not None and view.stages.get(own) != view.stages.get(plan):
        yield f"{key}: {student} was pruned by {own}. Next: name {own}, or the student that {plan} has pruned."


def _source(plan: str, view: RecipeView) -> ModelShape | None:
    """Return the shape of the model that a plan is made for."""
    model = getattr(getattr(view.stages.get(plan), "inputs", None), "model", None)
    return view.shape(model) if isinstance(model, str) else None
