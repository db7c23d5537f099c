"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_minitron.system.files import user_path


def expanded(value: Any) -> Any:
    """Expand `~` in the value of an option that takes one or several paths; shells do not expand it after `--NAME=`."""
    if isinstance(value, list | tuple):
        return [user_path(path) for path in value]
    return None if value is None else user_path(value)


RecipeFile = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="A recipe YAML, or the name of one of `minitron recipes`, e.g. toy/width."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of any key of the recipe.")
]
Rerun = Annotated[
    list[str] | None,
    typer.Option(help="Run this stage again, and all that depend on it; `changed`: every changed stage."),
]
AcceptDrift = Annotated[
    bool,
    typer.Option(
        help="Use finished outputs that no longer match the recipe, and resume unfinished trainings whose rates or "
        "intervals have changed."
    ),
]
Until = Annotated[str | None, typer.Option(help="Run this stage and what it needs, nothing else.")]
AssetsDir = Annotated[Path, typer.Option(callback=expanded, help="Folder of the assets.")]
