"""The kinds of stage that train a model on text: general training, and the correction of a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training_rules import training_problems
from nemo_minitron.stages.kind import MODELS, HeldoutUse, Output, RecipeView, StageKind, TextUse, trained_tokens
from nemo_minitron.stages.train.params import CorrectStage, TrainStage
from nemo_minitron.workload.load import Load, training_load


def _shape(name: str, params: TrainStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.model)


def _problems(name: str, params: TrainStage, view: RecipeView) -> Iterator[str]:
    yield from training_problems(name, params, params.num_steps, view.layout(name))


def _text_use(params: TrainStage) -> TextUse:
    return TextUse(params.inputs.data, params.num_steps * params.global_batch_size * params.seq_len_tokens)


def _heldout_uses(params: TrainStage) -> Iterator[HeldoutUse]:
    yield HeldoutUse(params.inputs.data, params.valid_num_tokens, "valid_num_tokens")


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
    text_use=_text_use,
    heldout_uses=_heldout_uses,
    load=_load,
    result_tokens=trained_tokens,
)
CORRECT = replace(TRAIN, name="correct", params=CorrectStage)
