"""The folder of a run."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config.recipe import Recipe


def run_dir(recipe: Recipe) -> Path:
    """Return the folder of the run."""
    return Path(recipe.execution.run_root) / recipe.name
