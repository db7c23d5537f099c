"""Preflight checks: find problems of later stages before a long training starts."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.stages.kind import load_function
from nemo_minitron.stages.registry import STAGES


def preflight_evaluations(training: str, recipe: Recipe, store: Store, wanted: Collection[str]) -> None:
    """Run the preflight checks of the stages that read the trained model.

    Args:
        training: name of a stage; nothing is checked if it is not a training.
        wanted: names of the stages that this run includes.

    Raises:
        DataError: a later stage would fail.
    """
    if not STAGES[recipe.stages[training].kind].trains:
        return
    for name, stage in recipe.stages.items():
        preflight = STAGES[stage.kind].preflight
        if preflight is not None and name in wanted and store.manifest(name) is None:
            check = load_function(preflight)
            check(name, stage, training, recipe.stages, store, Path(recipe.execution.assets_dir))
