"""Programs and functions that a recipe runs besides its stages, and a warning if another user owns the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.places import require_recipe

_ADMINISTRATOR = 0


def programs_of(recipe: Recipe) -> Iterator[str]:
    """Yield the keys that name a program or script, and the functions that stages call; all have the user's rights."""
    for name, stage in recipe.stages.items():
        yield from (f"{function} (stages.{name})" for function in STAGES[stage.kind].functions(stage))
    execution = recipe.execution
    if execution.notify_command:
        yield "execution.notify_command"
    cluster = execution.cluster
    if cluster is None:
        return
    if cluster.setup_script is not None:
        yield "execution.cluster.setup_script"
    if cluster.command is not None:
        yield "execution.cluster.command"


def foreign_programs(file: Path, recipe: Recipe) -> list[str]:
    """Return a warning if a recipe that runs programs belongs to another user. Recipes of root are trusted."""
    named = list(programs_of(recipe))
    owner = require_recipe(file).stat().st_uid
    if not named or owner in (os.getuid(), _ADMINISTRATOR):
        return []
    return [f"{file} belongs to another user (uid {owner}) and runs programs as you: {', '.join(named)}."]
