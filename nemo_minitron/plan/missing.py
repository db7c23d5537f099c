"""Files that a recipe reads and that are missing on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from glob import has_magic
from pathlib import Path

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.data.found import source_exists
from nemo_minitron.hf.source import ASSET, HUB, asset_path
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.plan.sources import sources_of
from nemo_minitron.system.files import user_path


def missing_sources(plan: RunPlan) -> Iterator[str]:
    """Yield one line for each missing source of a stage that has not finished."""
    for name, stage in plan.recipe.stages.items():
        if plan.states[name].status != "finished":
            for source in sources_of(stage):
                yield from _source(f"stages.{name}.{source.key}", source.location, plan.recipe)


def _source(key: str, source: str, recipe: Recipe) -> Iterator[str]:
    if not source.removeprefix(ASSET).removeprefix(HUB).strip():
        yield f"{key}: is empty. Allowed: a file, a folder, asset:NAME or hf:ORG/NAME."
        return
    if source.startswith(HUB):
        return
    if source.startswith(ASSET):
        name = source.removeprefix(ASSET)
        if not asset_path(name, Path(recipe.execution.assets_dir)).exists():
            yield f"{key} = {source}: not fetched yet. Next: minitron assets fetch {name}"
        return
    if not source_exists(user_path(source)):
        problem = "matches no file" if has_magic(source) else "there is no such file or folder"
        yield f"{key} = {source}: {problem}."
