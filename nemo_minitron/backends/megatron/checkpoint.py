"""Training checkpoints: Megatron's distributed format in the stage's work folder.

A checkpoint is written beside its final name and renamed when every rank is done, so a kill
at any moment leaves the newest complete one to resume from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from nemo_minitron.backends.megatron.optim import Trainable
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.errors import CheckpointError
from nemo_minitron.interrupts import serve_until_parent_ends

_PREFIX, _PARTIAL, _FACTS = "step_", ".partial_", "training.json"
_FROM_THE_RECIPE = ("max_lr", "min_lr", "weight_decay", "betas", "eps")
"""Fields of the optimizer's groups that a checkpoint must not bring back: the recipe may say otherwise by now."""


@dataclass(frozen=True)
class Progressed:
    """How far a training has come."""

    step: int = 0
    """Steps done."""
    good_losses: tuple[float, ...] = ()
    """Of the last steps; for the loss guard."""


class Checkpoints:
    """The training checkpoints in one folder. Every method is called on every rank.

    Args:
        keep: newest checkpoints that stay.
        in_background: a forked process writes while the training goes on; at most one at a time.
    """

    def __init__(self, folder: Path, session: Session, *, keep: int, in_background: bool) -> None:
        self.folder, self._session, self._keep, self._in_background = folder, session, keep, in_background
        self._pending = AsyncCallsQueue()
        # Writers of a killed run may still be at work in its partial folders.
        self._run_id = _same_everywhere(os.getpid(), session)
        if session.is_main:
            for left in folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
        # Megatron's own queue lives in a process that outlasts a killed trainer.
        filesystem_async._results_queue = _manager().Queue()

    def save(self, trainable: Trainable, progressed: Progressed) -> None:
        """Begin to write the state after this step; with `in_background`, `poll` or `finish` publish it."""
        self.finish()
        partial_dir = self.folder / f"{_PARTIAL}{progressed.step:08d}_{self._run_id}"
        if self._session.is_main:
            shutil.rmtree(partial_dir, ignore_errors=True)
            partial_dir.mkdir(parents=True)
        self._session.barrier()
        state = _sharded_state(trainable, is_loading=False)
        with _write_errors(self.folder):
            request = dist_checkpointing.save(state, str(partial_dir), async_sharded_save=self._in_background)
            if request is None:
                self._session.barrier()
                self._publish(partial_dir, progressed)
            else:
                request.add_finalize_fn(partial(self._publish, partial_dir, progressed))
                self._pending.schedule_async_request(request)

    def poll(self) -> None:
        """Publish the checkpoint that is being written when all ranks have written their part."""
        if self._pending.get_num_unfinalized_calls():
            with _write_errors(self.folder):
                self._pending.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it."""
        if self._pending.get_num_unfinalized_calls():
            with _write_errors(self.folder):
                self._pending.maybe_finalize_async_calls(blocking=True)

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = checkpoints(self.folder)
        return found[-1] if found else None

    def resume(self, trainable: Trainable) -> Progressed:
        """Load the newest checkpoint, when there is one.

        Raises:
            CheckpointError: it cannot be read.
        """
        newest = self.newest()
        # No rank may publish or remove a checkpoint before all have looked.
        self._session.barrier()
        return Progressed() if newest is None else _load(trainable, newest)

    def _publish(self, partial_dir: Path, progressed: Progressed) -> None:
        if self._session.is_main:
            facts = {"step": progressed.step, "good_losses": progressed.good_losses}
            (partial_dir / _FACTS).write_text(json.dumps(facts))
            final = self.folder / f"{_PREFIX}{progressed.step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            partial_dir.rename(final)
            for old in checkpoints(self.folder)[: -self._keep]:
                # First what makes it complete: a kill may come before the rest is gone.
                (old / _FACTS).unlink()
                shutil.rmtree(old)
        self._session.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / _FACTS).is_file())


def step_of(checkpoint: Path) -> int:
    """Steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _load(trainable: Trainable, checkpoint: Path) -> Progressed:
    try:
        facts = json.loads((checkpoint / _FACTS).read_text())
        step = int(facts["step"])
        state = dist_checkpointing.load(_sharded_state(trainable, is_loading=True), str(checkpoint))
    except Exception as error:
        raise CheckpointError(
            f"The training checkpoint cannot be read: {type(error).__name__}: {error}",
            where=str(checkpoint),
            next_step="Delete this folder; the same command then resumes from the one before it.",
        ) from error
    trainable.model.load_state_dict({k.removeprefix("model."): v for k, v in state["model"].items()})
    wanted = [{key: group[key] for key in _FROM_THE_RECIPE if key in group} for group in _groups(trainable)]
    trainable.optimizer.load_state_dict(state["optimizer"])
    for group, values in zip(_groups(trainable), wanted, strict=True):
        group.update(values)
    trainable.schedule.step(step)
    return Progressed(step, tuple(facts.get("good_losses", ())))


def _groups(trainable: Trainable) -> list[dict[str, Any]]:
    return list(trainable.optimizer.param_groups)


def _sharded_state(trainable: Trainable, *, is_loading: bool) -> dict[str, Any]:
    model = trainable.model.sharded_state_dict(prefix="model.")
    return {"model": model, "optimizer": trainable.optimizer.sharded_state_dict(model, is_loading=is_loading)}


def _same_everywhere(value: int, session: Session) -> int:
    """The main rank's value, on every rank."""
    found = torch.tensor([value if session.is_main else 0], dtype=torch.int64, device=session.device)
    return int(session.sum(found).item())


@cache
def _manager() -> SyncManager:
    """The process through which Megatron's writers answer; it ends with this one, whatever ends this one."""
    manager = SyncManager(ctx=get_context("spawn"))
    manager.start(serve_until_parent_ends)
    return manager


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Megatron reports a failed write as an exception that `except Exception` does not catch."""
    try:
        yield
    except CheckpointException as error:
        raise CheckpointError(
            f"A training checkpoint could not be written: {error}",
            where=str(folder),
            next_step="Is the disk full? The same command goes on from the checkpoint before it.",
        ) from error
