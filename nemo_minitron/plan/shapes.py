"""Sizes of teacher and student, known before anything is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.schema import AdoptStage, ImportStage, Recipe, SelectStage
from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import ModelShape, num_params, read_shape
from nemo_minitron.hf.source import ASSET, HUB, asset_path
from nemo_minitron.plan.planner import run_dir


def teacher_shape(recipe: Recipe, stage: str) -> ModelShape | None:
    """Shape of an import or adopt stage: from the recipe, the folder that it names, or its finished output."""
    config = recipe.stages[stage]
    if isinstance(config, ImportStage) and config.architecture:
        return read_shape(config.architecture, where=f"stages.{stage}.architecture")
    for folder in _folders(recipe, stage):
        if (folder / "config.json").is_file():
            try:
                return read_shape(json.loads((folder / "config.json").read_text()), where=str(folder))
            except json.JSONDecodeError as error:
                raise CheckpointError(f"config.json is not valid JSON: {error}", where=str(folder)) from error
    return None


def _folders(recipe: Recipe, stage: str) -> list[Path]:
    config = recipe.stages[stage]
    published = Store(run_dir(recipe)).published(stage)
    if isinstance(config, AdoptStage):
        return [Path(config.path).expanduser()]
    if not isinstance(config, ImportStage) or config.source.startswith(HUB):
        return [published]
    if config.source.startswith(ASSET):
        return [published, asset_path(config.source.removeprefix(ASSET), Path(recipe.execution.assets_dir))]
    return [published, Path(config.source).expanduser()]


def student_shape(teacher: ModelShape, select: SelectStage) -> ModelShape:
    """What the target leaves of the teacher."""
    target = select.target
    layers = target.num_layers
    if select.drop_layers is not None:
        layers = teacher.num_layers - len(set(select.drop_layers))
    return teacher.resized(
        num_layers=layers or teacher.num_layers,
        hidden_size=target.hidden_size or teacher.hidden_size,
        ffn_hidden_size=target.ffn_hidden_size or teacher.ffn_hidden_size,
        num_attention_heads=target.num_attention_heads or teacher.num_attention_heads,
    )


def shape_facts(shape: ModelShape) -> dict[str, Any]:
    """Sizes and exact parameter counts."""
    return {
        "num_params": num_params(shape),
        "num_params_non_embedding": num_params(shape, embeddings=False),
        **shape.sizes(),
        "vocab_size": shape.vocab_size,
        "tied_embeddings": shape.tied_embeddings,
    }
