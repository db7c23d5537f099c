"""Sizes of the models of a run, known before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.schema import (
    AdoptStage,
    CandidateStage,
    DistillOfflineStage,
    DistillStage,
    DpoStage,
    ExportStage,
    ImportStage,
    InitStage,
    PruneStage,
    Recipe,
    SelectStage,
    SftStage,
    SteerlmSftStage,
    Target,
    TrainStage,
)
from nemo_minitron.families import ModelShape, num_params, read_shape, target_shape
from nemo_minitron.hf.json_file import read_json_object
from nemo_minitron.hf.source import ASSET, HUB, asset_path, hub_copy
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.pruning.search import SEARCH_FILE, winner_of
from nemo_minitron.system.files import user_path


def model_shape(recipe: Recipe, stage: str, seen: frozenset[str] = frozenset()) -> ModelShape | None:
    """Shape of the model that a stage makes; None where it cannot be known yet, or the stage makes none."""
    config = recipe.stages.get(stage)
    if config is None or stage in seen:
        return None
    seen |= {stage}
    if isinstance(config, ImportStage | AdoptStage):
        return _given_shape(recipe, stage)
    if isinstance(config, DistillStage):
        return model_shape(recipe, config.inputs.student, seen)
    if isinstance(config, InitStage):
        if config.architecture is not None:
            return read_shape(config.architecture, where=f"stages.{stage}.architecture")
        return model_shape(recipe, config.inputs.like or "", seen)
    if isinstance(config, ExportStage | TrainStage | SftStage | SteerlmSftStage | DpoStage | DistillOfflineStage):
        return model_shape(recipe, config.inputs.model, seen)
    if isinstance(config, CandidateStage) and config.target != Target():
        source = model_shape(recipe, config.inputs.model, seen)
        return None if source is None else target_shape(source, config.target, None)
    if isinstance(config, PruneStage):
        select = recipe.stages.get(config.inputs.plan)
        return student_shape(recipe, select, seen) if isinstance(select, SelectStage) else None
    return None


def student_shape(recipe: Recipe, select: SelectStage, seen: frozenset[str] = frozenset()) -> ModelShape | None:
    """What a select stage leaves of its model; None where that depends on a search that has not finished."""
    source = model_shape(recipe, select.inputs.model, seen)
    target = select.target
    if select.inputs.search is not None:
        found = Store(run_dir(recipe)).intact(select.inputs.search, SEARCH_FILE)
        if found is None:
            return None
        target = winner_of(found.parent)
    return None if source is None else target_shape(source, target, select.drop_layers)


def _given_shape(recipe: Recipe, stage: str) -> ModelShape | None:
    """Of an import or adopt stage: from the recipe, the folder that it names, or its finished output."""
    config = recipe.stages[stage]
    if isinstance(config, ImportStage) and config.architecture:
        return read_shape(config.architecture, where=f"stages.{stage}.architecture")
    # A damaged output is told by the stage that reads it; the plan must not stand in the way of making it again.
    published = None if isinstance(config, AdoptStage) else Store(run_dir(recipe)).intact(stage, "config.json")
    outside = _folder_outside(recipe, stage)
    file = published or (outside / "config.json" if outside is not None else None)
    if file is None or not file.is_file():
        return None
    return read_shape(read_json_object(file), where=str(file))


def _folder_outside(recipe: Recipe, stage: str) -> Path | None:
    """The folder that an import or adopt stage names."""
    config = recipe.stages[stage]
    if isinstance(config, AdoptStage):
        return user_path(config.path)
    if not isinstance(config, ImportStage):
        return None
    assets_dir = Path(recipe.execution.assets_dir)
    if config.source.startswith(HUB):
        return hub_copy(config.source.removeprefix(HUB), config.revision, assets_dir)
    if config.source.startswith(ASSET):
        return asset_path(config.source.removeprefix(ASSET), assets_dir)
    return user_path(config.source)


def shape_facts(shape: ModelShape) -> dict[str, Any]:
    """Sizes and exact parameter counts."""
    return {
        "num_params": num_params(shape),
        "num_params_non_embedding": num_params(shape, embeddings=False),
        **shape.sizes(),
        "vocab_size": shape.vocab_size,
        "tied_embeddings": shape.tied_embeddings,
    }
