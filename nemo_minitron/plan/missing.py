"""Files that a recipe reads and that are missing or unreadable on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from glob import has_magic
from pathlib import Path

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.data.found import FORMATS_OF, source_exists, source_files
from nemo_minitron.errors import DataError
from nemo_minitron.hf.source import ASSET, HUB, source_path
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.plan.sources import sources_of
from nemo_minitron.stages.kind import Source


def missing_sources(plan: RunPlan) -> Iterator[str]:
    """Yield one line for each source without readable files of a stage that has not finished."""
    for name, stage in plan.recipe.stages.items():
        if plan.states[name].status != "finished":
            for source in sources_of(stage):
                yield from _source(f"stages.{name}.{source.key}", source, plan.recipe)


def _source(key: str, named: Source, recipe: Recipe) -> Iterator[str]:
    source = named.location
    if not source.removeprefix(ASSET).removeprefix(HUB).strip():
        yield f"{key}: is empty. Allowed: a file, a folder, asset:NAME or hf:ORG/NAME."
        return
    if source.startswith(HUB) and named.content not in FORMATS_OF:
        return
    path = source_path(source, Path(recipe.execution.assets_dir))
    try:
        if source.startswith(ASSET) and not path.exists():
            yield f"{key} = {source}: not fetched yet. Next: minitron assets fetch {source.removeprefix(ASSET)}"
        elif not source_exists(path):
            problem = "matches no file" if has_magic(source) else "there is no such file or folder"
            yield f"{key} = {source}: {problem}."
        elif named.content in FORMATS_OF:
            source_files(path, FORMATS_OF[named.content])
    except DataError as error:
        yield f"{key} = {source}: {_in_one_line(error)}"


def _in_one_line(error: DataError) -> str:
    parts = (("Where", error.where), ("Allowed", error.allowed), ("Next", error.next_step))
    return " ".join([error.what, *(f"{label}: {text.removesuffix('.')}." for label, text in parts if text)])
