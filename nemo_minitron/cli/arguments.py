"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
AssetsDir = Annotated[Path, typer.Option(help="Folder of the assets.")]
