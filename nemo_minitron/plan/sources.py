"""Sources outside the run that a stage reads, and their sizes: a file of another size makes its stage `changed`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.data.found import FORMATS_OF, source_files
from nemo_minitron.data.globs import files_below, matches
from nemo_minitron.errors import DataError
from nemo_minitron.hf.source import HUB, model_files, source_path
from nemo_minitron.schema.base import StageParams
from nemo_minitron.stages.kind import Source
from nemo_minitron.stages.registry import STAGES


def sources_of(stage: StageParams) -> Iterable[Source]:
    """Return everything that a stage reads from outside the run."""
    return STAGES[stage.kind].sources(stage)


def source_facts(stage: StageParams, recipe: Recipe, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return source -> {files, bytes} as the files are now.

    Args:
        before: the facts when the stage ran. They are returned for a source that has been deleted since then, so that
            the stages of a finished run do not become `changed` when the raw data are removed.
    """
    facts = {}
    for source in sources_of(stage):
        location, assets_dir = source.location, Path(recipe.execution.assets_dir)
        if found := _facts(source, assets_dir, before.get(location)):
            facts[location] = found
        elif location in before:
            facts[location] = before[location]
    return facts


def changed_sources(stage: StageParams, recipe: Recipe, before: Mapping[str, Any]) -> dict[str, dict[str, int] | None]:
    """Return the sources whose facts differ from those before, with the facts as they are now; None: it is missing."""
    assets_dir = Path(recipe.execution.assets_dir)
    now = {source.location: _facts(source, assets_dir, before.get(source.location)) for source in sources_of(stage)}
    return {location: now.get(location) for location, facts in before.items() if now.get(location) != facts}


def _facts(source: Source, assets_dir: Path, before: Mapping[str, int] | None) -> dict[str, int] | None:
    """Return {files, bytes} of what the stage would read of a source; None if there is nothing."""
    facts = _sum(listed_files(source, assets_dir))
    if source.content == "model" and before is not None and facts != before:
        # Manifests of older versions have the sums of all files below the folder.
        with suppress(DataError):
            everything = _sum(_files_below(source_path(source.location, assets_dir)))
            return everything if everything == before else facts
    return facts


def _sum(files: Iterable[Path]) -> dict[str, int] | None:
    sizes = [file.stat().st_size for file in files]
    return {"files": len(sizes), "bytes": sum(sizes)} if sizes else None


def listed_files(source: Source, assets_dir: Path) -> list[Path]:
    """List the files that the stage would read: of text and chats the data files, of a model its own files."""
    if source.location.startswith(HUB):
        return []
    path = source_path(source.location, assets_dir)
    if source.content in FORMATS_OF:
        # The stage and `minitron check` report errors in a source.
        with suppress(DataError):
            return source_files(path, FORMATS_OF[source.content])
        return []
    if path.is_dir():
        of_model = model_files(path) if source.content == "model" else []
        return of_model or _files_below(path)
    with suppress(DataError):
        return [file for file in ([path] if path.exists() else matches(path)) if file.is_file()]
    return []


def _files_below(folder: Path) -> list[Path]:
    return [file for file in files_below(folder) if file.is_file()]
