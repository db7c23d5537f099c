"""Size of the files that a stage reads from outside the run: an edited text makes its stage `changed`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from glob import glob
from pathlib import Path
from typing import Any

from nemo_minitron.config.schema import (
    AdoptStage,
    ChatDataStage,
    EvaluateChatStage,
    ImportStage,
    InitStage,
    Recipe,
    Schema,
    TokenizeStage,
)
from nemo_minitron.hf.source import ASSET, HUB, asset_path


def source_facts(stage: Schema, recipe: Recipe, before: Mapping[str, Any]) -> dict[str, Any]:
    """source -> {files, bytes} of what is there now.

    Args:
        before: the facts when the stage was made; a source that has gone since is taken to be as it was,
            so that a finished run survives the removal of its raw data.
    """
    facts = {}
    for source in _sources(stage):
        files = [file for file in _files(source, Path(recipe.execution.assets_dir)) if file.is_file()]
        if files:
            facts[source] = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
        elif source in before:
            facts[source] = before[source]
    return facts


def _sources(stage: Schema) -> list[str]:
    if isinstance(stage, TokenizeStage | ChatDataStage):
        return [source.source for source in stage.sources]
    if isinstance(stage, InitStage):
        return [source.source for source in stage.tokenizer.sources] if stage.tokenizer is not None else []
    if isinstance(stage, ImportStage):
        return [stage.source]
    if isinstance(stage, EvaluateChatStage):
        return [stage.instructions] if stage.instructions is not None else []
    return [stage.path] if isinstance(stage, AdoptStage) else []


def _files(source: str, assets_dir: Path) -> Iterable[Path]:
    if source.startswith(HUB):
        return []
    name = source.removeprefix(ASSET)
    path = asset_path(name, assets_dir) if source.startswith(ASSET) else Path(source).expanduser()
    if path.is_dir():
        return path.rglob("*")
    return [path] if path.exists() else map(Path, glob(str(path), recursive=True))
