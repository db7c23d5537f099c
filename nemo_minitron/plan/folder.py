"""Where a run lives."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config.recipe import Recipe


def run_dir(recipe: Recipe) -> Path:
    """Folder of the run."""
    return Path(recipe.execution.run_root) / recipe.name
