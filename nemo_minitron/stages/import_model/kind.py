"""The kind of stage that imports a model into a run."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape, read_shape
from nemo_minitron.hf.json_file import read_json_object
from nemo_minitron.hf.source import source_folder
from nemo_minitron.stages.import_model.params import ImportStage
from nemo_minitron.stages.kind import Output, RecipeView, Source, StageKind


def _sources(params: ImportStage) -> Iterator[Source]:
    yield Source("source", params.source, "model", params.revision)


def _shape(name: str, params: ImportStage, view: RecipeView) -> ModelShape | None:
    """Return the shape in the recipe, in the stage's finished output, or in the folder that it imports."""
    if params.architecture:
        return read_shape(params.architecture, where=f"stages.{name}.architecture")
    # Ignore a damaged output: the stage that reads it reports it, and planning must work so that it can run again.
    outside = source_folder(params.source, params.revision, view.assets_dir) / "config.json"
    file = view.published(name, "config.json") or outside
    return read_shape(read_json_object(file), where=str(file)) if file.is_file() else None


IMPORT = StageKind(
    name="import",
    params=ImportStage,
    run="nemo_minitron.stages.import_model.run:import_model",
    outputs=(Output.MODEL, Output.TOKENIZER),
    sources=_sources,
    shape=_shape,
)
