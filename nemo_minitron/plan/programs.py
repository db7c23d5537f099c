"""What a recipe starts beside the stages themselves, and who wrote it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.schema.execution import Execution
from nemo_minitron.system.places import require_recipe

_ADMINISTRATOR = 0


def programs_of(execution: Execution) -> Iterator[str]:
    """Keys that name a program or a file which runs as the user."""
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
    """A warning where a recipe that runs programs belongs to another user; the administrator's are trusted."""
    named = list(programs_of(execution))
    owner = require_recipe(recipe).stat().st_uid
    if not named or owner in (os.getuid(), _ADMINISTRATOR):
        return []
    return [f"{recipe} belongs to another user (uid {owner}) and runs programs as you: {', '.join(named)}."]
