"""What a stage reads from outside the run, and its size: an edited text makes its stage `changed`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_minitron.config.schema import (
    AdoptStage,
    ChatDataStage,
    EvaluateChatStage,
    EvaluateStage,
    ImportStage,
    InitStage,
    Recipe,
    Schema,
    ScoreStage,
    TokenizeStage,
)
from nemo_minitron.data.found import CHAT_FORMATS, FORMATS, source_files
from nemo_minitron.data.globs import files_below, matches
from nemo_minitron.errors import DataError
from nemo_minitron.hf.source import ASSET, HUB, asset_path
from nemo_minitron.system.files import user_path


def read_by(stage: Schema) -> Iterator[tuple[str, str]]:
    """(key, source) of all that a stage reads from outside the run."""
    if isinstance(stage, ImportStage):
        yield "source", stage.source
    elif isinstance(stage, AdoptStage):
        yield "path", stage.path
    elif isinstance(stage, InitStage) and stage.tokenizer is not None:
        yield from ((f"tokenizer.sources.{i}.source", found.source) for i, found in enumerate(stage.tokenizer.sources))
    elif isinstance(stage, TokenizeStage):
        yield from ((f"sources.{i}.source", found.source) for i, found in enumerate(stage.sources))
    elif isinstance(stage, ChatDataStage):
        yield from ((f"sources.{i}.source", chats.source) for i, chats in enumerate(stage.sources))
    elif isinstance(stage, EvaluateStage) and stage.tasks and stage.tasks_source:
        yield "tasks_source", stage.tasks_source
    elif isinstance(stage, EvaluateChatStage) and stage.instructions is not None:
        yield "instructions", stage.instructions
    elif isinstance(stage, ScoreStage) and stage.depth_task is not None and stage.depth_task.source:
        yield "depth_task.source", stage.depth_task.source


def source_facts(stage: Schema, recipe: Recipe, before: Mapping[str, Any]) -> dict[str, Any]:
    """source -> {files, bytes} of what is there now.

    Args:
        before: the facts when the stage was made; a source that has gone since is taken to be as it was,
            so that a finished run survives the removal of its raw data.
    """
    facts = {}
    for _, source in read_by(stage):
        files = _files(stage, source, Path(recipe.execution.assets_dir))
        if files:
            facts[source] = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
        elif source in before:
            facts[source] = before[source]
    return facts


def source_path(source: str, assets_dir: Path) -> Path:
    """Where a source that is not on the hub is, or would be."""
    if source.startswith(ASSET):
        return asset_path(source.removeprefix(ASSET), assets_dir)
    return user_path(source)


def _files(stage: Schema, source: str, assets_dir: Path) -> list[Path]:
    """What the stage would read of a source; of models and tasks, all files."""
    if source.startswith(HUB):
        return []
    path = source_path(source, assets_dir)
    if isinstance(stage, TokenizeStage | InitStage | ChatDataStage | EvaluateChatStage):
        formats = CHAT_FORMATS if isinstance(stage, ChatDataStage | EvaluateChatStage) else FORMATS
        # What is wrong with it says the stage, or `check`.
        with suppress(DataError):
            return source_files(path, formats)
        return []
    if path.is_dir():
        return [file for file in files_below(path) if file.is_file()]
    with suppress(DataError):
        return [file for file in ([path] if path.exists() else matches(path)) if file.is_file()]
    return []
