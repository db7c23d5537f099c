"""Sizes of the models of a run, as known before the run."""

from __future__ import annotations

from typing import Any

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.families import ModelShape, num_params
from nemo_minitron.plan.view import View


def model_shape(recipe: Recipe, stage: str) -> ModelShape | None:
    """Return the shape of the model that a stage makes; None if it is not known yet or the stage makes no model."""
    return View(recipe).shape(stage)


def shape_facts(shape: ModelShape) -> dict[str, Any]:
    """Return the sizes of a model and its exact parameter counts."""
    return {
        "num_params": num_params(shape),
        "num_params_non_embedding": num_params(shape, embeddings=False),
        **shape.sizes(),
        "vocab_size": shape.vocab_size,
        "tied_embeddings": shape.tied_embeddings,
    }
