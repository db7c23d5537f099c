"""The kind of stage that trains every layer of a student on its own."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training_rules import training_problems
from nemo_minitron.stages.common.plan_rules import plan_problems
from nemo_minitron.stages.distill_layers.params import DistillLayersStage
from nemo_minitron.stages.kind import Output, RecipeView, StageKind, trained_tokens, training_text, validation_text
from nemo_minitron.workload.load import Load, layerwise_load


def _shape(name: str, params: DistillLayersStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.student)


def _problems(name: str, params: DistillLayersStage, view: RecipeView) -> Iterator[str]:
    layout, inputs = view.layout(name), params.inputs
    yield from training_problems(name, params, params.num_steps, layout)
    if layout.recompute == "full":
        yield (
            f"execution.parallel.recompute = full: not supported by stages.{name}, which keeps the activations of "
            "one layer only. Allowed: none, selective."
        )
    yield from plan_problems(name, inputs.plan, inputs.teacher, inputs.student, view)


def _load(name: str, params: DistillLayersStage, layout: Parallel, view: RecipeView) -> Load | None:
    student, teacher = view.shape(params.inputs.student), view.shape(params.inputs.teacher)
    if student is None or teacher is None:
        return None
    return layerwise_load(student, teacher, params, params.num_steps, layout)


DISTILL_LAYERS = StageKind(
    name="distill_layers",
    params=DistillLayersStage,
    run="nemo_minitron.stages.distill_layers.run:distill_layers",
    outputs=(Output.MODEL,),
    inputs={
        "student": (Output.MODEL,),
        "teacher": (Output.MODEL,),
        "plan": (Output.PRUNE_PLAN,),
        "data": (Output.TOKENIZED_TEXT,),
    },
    distributed=True,
    trains=True,
    stops_by_itself=True,
    resumes_with_other_rates=True,
    report="training",
    chat_rank=2,
    shape=_shape,
    problems=_problems,
    text_use=training_text,
    heldout_uses=validation_text,
    load=_load,
    result_tokens=trained_tokens,
)
