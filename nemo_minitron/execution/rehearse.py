"""Look before a long training for what would stop the stages after it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.stages.kind import load_function
from nemo_minitron.stages.registry import STAGES


def rehearse_evaluations(training: str, recipe: Recipe, store: Store, wanted: Collection[str]) -> None:
    """Let the stages that read the trained model look now for what would stop them after the training.

    Args:
        training: a stage; nothing happens if it does not train.
        wanted: the stages of this run.

    Raises:
        DataError: a later stage would stop.
    """
    if not STAGES[recipe.stages[training].kind].trains:
        return
    for name, stage in recipe.stages.items():
        rehearsal = STAGES[stage.kind].rehearsal
        if rehearsal is not None and name in wanted and store.manifest(name) is None:
            rehearse = load_function(rehearsal)
            rehearse(name, stage, training, recipe.stages, store, Path(recipe.execution.assets_dir))
