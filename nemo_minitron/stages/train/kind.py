"""The kinds of stage that train a model on text: general training, and the correction of a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training_rules import training_problems
from nemo_minitron.stages.kind import (
    MODELS,
    Output,
    RecipeView,
    StageKind,
    trained_tokens,
    training_text,
    validation_text,
)
from nemo_minitron.stages.train.params import CorrectStage, TrainStage
from nemo_minitron.workload.load import Load, training_load


def _shape(name: str, params: TrainStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.model)


def _problems(name: str, params: TrainStage, view: RecipeView) -> Iterator[str]:
    yield from training_problems(name, params, params.num_steps, view.layout(name))


def _load(name: str, params: TrainStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape = view.shape(params.inputs.model)
    return None if shape is None else training_load(shape, None, params, params.num_steps, layout)


TRAIN = StageKind(
    name="train",
    params=TrainStage,
    run="nemo_minitron.stages.train.run:train",
    outputs=(Output.MODEL,),
    inputs={"model": MODELS, "data": (Output.TOKENIZED_TEXT,)},
    distributed=True,
    trains=True,
    stops_by_itself=True,
    resumes_with_other_rates=True,
    report="training",
    shape=_shape,
    problems=_problems,
    text_use=training_text,
    heldout_uses=validation_text,
    load=_load,
    result_tokens=trained_tokens,
)
CORRECT = replace(TRAIN, name="correct", params=CorrectStage)
