"""The kind of stage that exports the finished model with a model card."""

from __future__ import annotations

from nemo_minitron.families import ModelShape
from nemo_minitron.stages.export.params import ExportStage
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, StageKind


def _shape(name: str, params: ExportStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.model)


EXPORT = StageKind(
    name="export",
    params=ExportStage,
    run="nemo_minitron.stages.export.run:export",
    outputs=(Output.EXPORTED_MODEL,),
    inputs={"model": MODELS, "teacher": (Output.MODEL,), "evaluations": (Output.EVALUATION,)},
    chat_rank=8,
    shape=_shape,
)
