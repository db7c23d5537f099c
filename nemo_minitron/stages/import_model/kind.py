"""The kind of stage that imports a model into a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import ModelShape, read_shape
from nemo_minitron.hf.json_file import read_json_object
from nemo_minitron.hf.source import source_folder
from nemo_minitron.stages.import_model.params import ImportStage
from nemo_minitron.stages.kind import Output, RecipeView, Source, StageKind


def _sources(params: ImportStage) -> Iterator[Source]:
    yield Source("source", params.source, "model", params.revision)


def _shape(name: str, params: ImportStage, view: RecipeView) -> ModelShape | None:
    """Return the shape in the stage's finished output, in the recipe, or in the folder that it imports."""
    # Ignore a damaged output: the stage that reads it reports it, and planning must work so that it can run again.
    file = view.published(name, "config.json")
    if params.architecture:
        planned = read_shape(params.architecture, where=f"stages.{name}.architecture")
        return (None if file is None else _completed(params.architecture, file)) or planned
    file = file or source_folder(params.source, params.revision, view.assets_dir) / "config.json"
    return read_shape(read_json_object(file), where=str(file)) if file.is_file() else None


def _completed(architecture: Mapping[str, Any], file: Path) -> ModelShape | None:
    """Return the shape in a published config.json; None if the recipe has other values now."""
    config = read_json_object(file)
    try:
        shape = read_shape(config)
        return shape if read_shape({**config, **architecture}) == shape else None
    except CheckpointError:
        return None


IMPORT = StageKind(
    name="import",
    params=ImportStage,
    run="nemo_minitron.stages.import_model.run:import_model",
    outputs=(Output.MODEL, Output.TOKENIZER),
    sources=_sources,
    shape=_shape,
)
