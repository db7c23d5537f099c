"""Train the pruned student to match the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.errors import ArtifactError, error_context
from nemo_minitron.stages.artifacts import (
    Model,
    PrunePlanArtifact,
    TeacherCache,
    TeacherCheck,
    TokenizedText,
    how_to_remake,
)
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.common.training import distill_student, plan_between
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    student: Model
    teacher: Model
    data: TokenizedText
    check: TeacherCheck | None = None
    cache: TeacherCache | None = None
    plan: PrunePlanArtifact | None = None


def distill(params: DistillStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Train the student from the teacher or from its cached distributions.

    Raises:
        DataError: teacher, student and data do not share a tokenizer.
        ArtifactError: the plan does not lead from the teacher to the student, or the cache is damaged or was made for
            another distillation.
        DivergenceError: the loss became NaN or infinite, or stayed above its bound.
        Interrupted: a stop was requested.
    """
    require_one_tokenizer({"student": inputs.student, "teacher": inputs.teacher}, inputs.data, ctx)
    models, cache = (inputs.student, inputs.teacher), inputs.cache
    if cache is None:
        plan = None if inputs.plan is None else plan_between(inputs.plan, inputs.teacher, inputs.student)
        return distill_student(params, *models, inputs.data, ctx, plan=plan)
    with error_context(ArtifactError, next_step=how_to_remake(cache.stage)):
        return distill_student(params, *models, inputs.data, ctx, cache=cache.path)
