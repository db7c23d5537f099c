"""The checkpoint from which NeMo resumes a training."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

EXPERIMENT_DIR = "nemo_experiment"
"""Folder of NeMo's experiment in the work folder of a training."""
UNFINISHED = "-unfinished"
"""End of the name of the file that marks a checkpoint while NeMo writes or removes it."""


def keep_last_checkpoint(work_dir: Path) -> int:
    """Remove what a kill or a full disk can leave beside the newest finished checkpoint; returns its step, 0 if none.

    NeMo refuses to resume if the only checkpoint is unfinished, or if there are two finished ones, as between writing
    the new one and removing the one before. No process of the training may be running.
    """
    checkpoints = work_dir / EXPERIMENT_DIR / "checkpoints"
    for marker in checkpoints.glob(f"*{UNFINISHED}"):
        shutil.rmtree(marker.with_name(marker.name.removesuffix(UNFINISHED)), ignore_errors=True)
        marker.unlink()
    finished = sorted(checkpoints.glob("*-last"), key=_step)
    for older in finished[:-1]:
        shutil.rmtree(older)
    return _step(finished[-1]) if finished else 0


def _step(checkpoint: Path) -> int:
    match = re.search(r"step=(\d+)", checkpoint.name)
    return int(match.group(1)) if match else 0
