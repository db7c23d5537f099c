"""Check of lm-eval task names against the files of the installed package, because importing it takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.data.globs import matches
from nemo_minitron.hf.source import HUB, source_path
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.stages.registry import STAGES

DATA_FILE = "validation.arrow"
"""File name of a task's offline data: <folder>/<name of the task in lm-eval>/validation.arrow."""


def unknown_tasks(plan: RunPlan) -> Iterator[str]:
    """Yield one line for each unknown lm-eval task of a stage that has not finished."""
    recipe = plan.recipe
    for name, stage in recipe.stages.items():
        if plan.states[name].status == "finished":
            continue
        for task in STAGES[stage.kind].tasks(stage):
            yield from _problem(f"stages.{name}.{task.key}", task.name, task.source, recipe)


def _problem(key: str, task: str, source: str | None, recipe: Recipe) -> Iterator[str]:
    if source is not None and not source.startswith(HUB):
        folder = source_path(source, Path(recipe.execution.assets_dir))
        present = sorted(file.parent.name for file in matches(folder / "*" / DATA_FILE)) if folder.is_dir() else []
        if present:
            if task not in present:
                yield f"{key} = {task!r}: there is no data for it in {folder}. Allowed: {', '.join(present)}."
            return
    if not is_known(task):
        near = get_close_matches(task, _file_stems(), 3, 0.7)
        yield f"{key} = {task!r}: lm-eval has no such task.{f' Did you mean {near[0]}?' if near else ''}"


@lru_cache(maxsize=1024)
def is_known(task: str) -> bool:
    """Return whether the installed lm-eval has a task or group of this name; True if lm-eval is not installed."""
    folder = _folder()
    if folder is None or task in _file_stems():
        return True
    # Some names occur only inside a file; others consist of a name and a language as its suffix.
    word = re.compile(rb"(?<![\w-])" + re.escape(task.encode()) + rb"(?![\w-])")
    return any(word.search(file.read_bytes()) for file in folder.rglob("*") if "yaml" in file.name and file.is_file())


@lru_cache(maxsize=1)
def _file_stems() -> frozenset[str]:
    folder = _folder()
    return frozenset() if folder is None else frozenset(file.stem for file in folder.rglob("*.yaml"))


def _folder() -> Path | None:
    found = find_spec("lm_eval")
    places = [] if found is None else list(found.submodule_search_locations or [])
    folder = Path(places[0]) / "tasks" if places else None
    return folder if folder is not None and folder.is_dir() else None
