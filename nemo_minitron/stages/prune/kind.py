"""The kind of stage that prunes a model according to a plan."""

from __future__ import annotations

from nemo_minitron.families import ModelShape
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, StageKind
from nemo_minitron.stages.prune.params import PruneStage


def _shape(name: str, params: PruneStage, view: RecipeView) -> ModelShape | None:
    return view.planned_shape(params.inputs.plan)


def _cuts_by(params: PruneStage) -> str:
    return params.inputs.plan


PRUNE = StageKind(
    name="prune",
    params=PruneStage,
    run="nemo_minitron.stages.prune.run:prune",
    version=2,
    outputs=(Output.MODEL,),
    inputs={"model": MODELS, "plan": (Output.PRUNE_PLAN,)},
    chat_rank=0,
    shape=_shape,
    cuts_by=_cuts_by,
)
