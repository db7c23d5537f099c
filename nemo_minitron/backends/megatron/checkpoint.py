"""Training checkpoints: Megatron's distributed format in the stage's work folder.

A checkpoint is written beside its final name and renamed when every rank is done, so a kill
at any moment leaves the newest complete one to resume from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from nemo_minitron.backends.megatron.optim import Trainable
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.errors import CheckpointError

_PREFIX = "step_"


def save_training(trainable: Trainable, folder: Path, step: int, session: Session, *, keep: int) -> None:
    """Write the state after `step` steps; keep the `keep` newest checkpoints."""
    final, partial = folder / f"{_PREFIX}{step:08d}", folder / f".partial_{step:08d}"
    if session.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    session.barrier()
    dist_checkpointing.save(_sharded_state(trainable, is_loading=False), str(partial))
    session.barrier()
    if session.is_main:
        (partial / "training.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    session.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "training.json").is_file())


def resume_training(trainable: Trainable, folder: Path) -> int:
    """Load the newest checkpoint; returns the steps done so far, 0 when there is none.

    Raises:
        CheckpointError: the newest checkpoint cannot be read.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    try:
        step = int(json.loads((newest / "training.json").read_text())["step"])
        state = dist_checkpointing.load(_sharded_state(trainable, is_loading=True), str(newest))
    except Exception as error:
        raise CheckpointError(
            f"The training checkpoint cannot be read: {type(error).__name__}: {error}",
            where=str(newest),
            next_step="Delete this folder; the same command then resumes from the one before it.",
        ) from error
    trainable.model.load_state_dict({k.removeprefix("model."): v for k, v in state["model"].items()})
    trainable.optimizer.load_state_dict(state["optimizer"])
    trainable.schedule.step(step)
    return step


def _sharded_state(trainable: Trainable, *, is_loading: bool) -> dict[str, Any]:
    model = trainable.model.sharded_state_dict(prefix="model.")
    return {"model": model, "optimizer": trainable.optimizer.sharded_state_dict(model, is_loading=is_loading)}
