"""The kind of stage that uses an existing model folder without copying it."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape, read_shape
from nemo_minitron.hf.json_file import read_json_object
from nemo_minitron.stages.adopt.params import AdoptStage
from nemo_minitron.stages.kind import Output, RecipeView, Source, StageKind
from nemo_minitron.system.files import user_path


def _sources(params: AdoptStage) -> Iterator[Source]:
    yield Source("path", params.path, "model")


def _shape(name: str, params: AdoptStage, view: RecipeView) -> ModelShape | None:
    file = user_path(params.path) / "config.json"
    return read_shape(read_json_object(file), where=str(file)) if file.is_file() else None


ADOPT = StageKind(
    name="adopt",
    params=AdoptStage,
    run="nemo_minitron.stages.adopt.run:adopt",
    outputs=(Output.MODEL, Output.TOKENIZER),
    sources=_sources,
    shape=_shape,
)
