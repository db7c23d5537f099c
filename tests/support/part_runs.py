"""Finished runs without their last stages, to run one stage again, and comparisons of stages that ran twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nemo_minitron.api import load_plan
from nemo_minitron.artifacts.manifest import sha256_of
from tests.conftest import TOY

SAME = (
    "*.safetensors", "*.bin", "*.idx", "*.npy", "config.json", "tokenizer.json", "scores.json", "prune_plan.json",
    "data_used.json", "data.json", "cache.json", "metrics.json", "search.json", "train.jsonl", "valid.jsonl",
)  # fmt: skip
"""Files that must be bit-equal: all computed ones, without times and folders."""
TIMES = ("tokens_per_s", "mfu", "train/step_time", "val/validation_step_time")


def copy_before(finished: Path, root: Path, stage: str, recipe: Path = TOY, name: str = "toy/width") -> Path:
    """Copy a finished run below `root` without this stage and what follows from it; returns the run's folder.

    Args:
        finished: the run_root of a toy run.
        name: name of the run in the recipe.
    """
    run = root / name
    shutil.copytree(finished / "toy/width", run)
    plan = load_plan(recipe, [f"execution.run_root={root}"])
    for follower in plan.followers({stage}):
        shutil.rmtree(run / follower, ignore_errors=True)
    return run


def computed(stage: Path) -> dict[str, object]:
    """Return what a stage has computed: checksums of its files, and its curves without times."""
    files = {file for pattern in SAME for file in stage.glob(pattern)}
    found: dict[str, object] = {file.name: sha256_of(file) for file in files}
    curves = stage / "curves.jsonl"
    if curves.is_file():
        rows = [json.loads(line) for line in curves.read_text().splitlines()]
        found[curves.name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return found


def flip(file: Path) -> None:
    """Flip one bit in the middle."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def cut(file: Path) -> None:
    """Keep the first half."""
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
