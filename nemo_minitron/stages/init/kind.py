"""The kind of stage that makes a model with random weights."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape, read_shape
from nemo_minitron.stages.init.params import SAME_VOCABULARY, InitStage, vocabulary_problem
from nemo_minitron.stages.kind import Output, RecipeView, Source, StageKind


def _sources(params: InitStage) -> Iterator[Source]:
    if params.tokenizer is not None:
        for number, text in enumerate(params.tokenizer.sources):
            yield Source(f"tokenizer.sources.{number}.source", text.source, "text")


def _shape(name: str, params: InitStage, view: RecipeView) -> ModelShape | None:
    if params.architecture is not None:
        return read_shape(params.architecture, where=f"stages.{name}.architecture")
    return view.shape(params.inputs.like or "")


def _problems(name: str, params: InitStage, view: RecipeView) -> Iterator[str]:
    problem = vocabulary_problem(params)
    if problem is not None:
        yield f"stages.{name}: {problem} Next: {SAME_VOCABULARY}"


INIT = StageKind(
    name="init",
    params=InitStage,
    run="nemo_minitron.stages.init.run:init",
    outputs=(Output.MODEL, Output.TOKENIZER),
    inputs={"like": (Output.MODEL,)},
    sources=_sources,
    shape=_shape,
    problems=_problems,
)
