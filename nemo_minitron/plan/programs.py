"""Programs that a recipe starts besides its stages, and a warning if another user owns the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.schema.execution import Execution
from nemo_minitron.system.places import require_recipe

_ADMINISTRATOR = 0


def programs_of(execution: Execution) -> Iterator[str]:
    """Yield the keys that name a program or script, which would run with the user's rights."""
    if execution.notify_command:
        yield "execution.notify_command"
    cluster = execution.cluster
    if cluster is None:
        return
    if cluster.setup_script is not None:
        yield "execution.cluster.setup_script"
    if cluster.command is not None:
        yield "execution.cluster.command"


def foreign_programs(recipe: Path, execution: Execution) -> list[str]:
    """Return a warning if a recipe that runs programs belongs to another user. Recipes of root are trusted."""
    named = list(programs_of(execution))
    owner = require_recipe(recipe).stat().st_uid
    if not named or owner in (os.getuid(), _ADMINISTRATOR):
        return []
    return [f"{recipe} belongs to another user (uid {owner}) and runs programs as you: {', '.join(named)}."]
