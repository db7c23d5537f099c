"""Repair a pruned model in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.stages.artifacts import Model, PrunePlanArtifact, TokenizedText
from nemo_minitron.stages.common.compensation import RepairTexts, repair_model
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.compensate.params import CompensateStage
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    teacher: Model
    student: Model
    plan: PrunePlanArtifact
    data: TokenizedText
    heldout: TokenizedText | None = None


def compensate(params: CompensateStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write the repaired model as a Hugging Face checkpoint, and compensation.json with the gain of each layer.

    Raises:
        DataError: the models and the texts do not share a tokenizer.
        ArtifactError: the plan does not belong to these models.
    """
    from nemo_minitron.hf.checkpoint import model_facts

    texts = RepairTexts(inputs.data, inputs.heldout or inputs.data)
    for text in (inputs.data, *([inputs.heldout] if inputs.heldout is not None else [])):
        require_one_tokenizer({"student": inputs.student, "teacher": inputs.teacher}, text, ctx)
    models = (inputs.teacher.path, inputs.student.path, inputs.plan.path)
    facts = repair_model(params, *models, texts, ctx, ctx.out_dir)
    if not ctx.is_main:
        return {}
    return {**model_facts(ctx.out_dir), "license": inputs.student.license, **facts}
