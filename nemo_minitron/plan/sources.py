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
from nemo_minitron.hf.source import HUB, source_path
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
        files = listed_files(source, Path(recipe.execution.assets_dir))
        if files:
            facts[source.location] = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
        elif source.location in before:
            facts[source.location] = before[source.location]
    return facts


def listed_files(source: Source, assets_dir: Path) -> list[Path]:
    """List the files that the stage would read: of text and chats the data files, otherwise all files."""
    if source.location.startswith(HUB):
        return []
    path = source_path(source.location, assets_dir)
    if source.content in FORMATS_OF:
        # The stage and `minitron check` report errors in a source.
        with suppress(DataError):
            return source_files(path, FORMATS_OF[source.content])
        return []
    if path.is_dir():
        return [file for file in files_below(path) if file.is_file()]
    with suppress(DataError):
        return [file for file in ([path] if path.exists() else matches(path)) if file.is_file()]
    return []
