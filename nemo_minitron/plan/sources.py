"""What a stage reads from outside the run, and its size: an edited text makes its stage `changed`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from glob import glob
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
from nemo_minitron.files import user_path
from nemo_minitron.hf.source import ASSET, HUB, asset_path


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
        files = [file for file in _files(source, Path(recipe.execution.assets_dir)) if file.is_file()]
        if files:
            facts[source] = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
        elif source in before:
            facts[source] = before[source]
    return facts


def _files(source: str, assets_dir: Path) -> Iterable[Path]:
    if source.startswith(HUB):
        return []
    name = source.removeprefix(ASSET)
    path = asset_path(name, assets_dir) if source.startswith(ASSET) else user_path(source)
    if path.is_dir():
        return path.rglob("*")
    return [path] if path.exists() else map(Path, glob(str(path), recursive=True))
