"""Training checkpoints: Megatron's distributed format in the stage's work folder.

A checkpoint is written beside its final name and renamed when every rank is done, so a kill
at any moment leaves the newest complete one to resume from. It has the checksums of its files: a
damaged one is set aside, and the one before it is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint import CheckpointException

from nemo_minitron.backends.megatron.runtime.known_pickles import only_known_pickles, require_known_backend
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.runtime.versions import require_readable
from nemo_minitron.backends.megatron.training.distributed_adam import (
    HAS_WHOLE_TENSORS,
    load_optimizer_state,
    sharded_optimizer_state,
)
from nemo_minitron.backends.megatron.training.intact import FACTS_FILE, damage, read_facts, write_facts
from nemo_minitron.backends.megatron.training.optim import Trainable
from nemo_minitron.backends.megatron.training.writing import Buffers, Writing
from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.system.disk import disk_problem

_PREFIX, _PARTIAL, _DAMAGED = "step_", ".partial_", "damaged_"
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
        in_background: a thread writes while the training goes on; at most one checkpoint at a time.
    """

    def __init__(self, folder: Path, session: Session, *, keep: int, in_background: bool) -> None:
        self.folder, self._session, self._keep, self._in_background = folder, session, keep, in_background
        self._writing: Writing | None = None
        self._buffers: Buffers | None = {} if in_background else None
        self._drop_partial()

    def save(self, trainable: Trainable, progressed: Progressed) -> None:
        """Begin to write the state after this step; with `in_background`, `poll` or `finish` publish it."""
        self.finish()
        partial_dir = self.folder / f"{_PARTIAL}{progressed.step:08d}"
        if self._session.is_main:
            shutil.rmtree(partial_dir, ignore_errors=True)
            partial_dir.mkdir(parents=True)
        self._session.barrier()
        state = _sharded_state(trainable, is_loading=False)
        with _write_errors(self.folder):
            writing = self._writing = Writing.begin(state, partial_dir, self._buffers)
            facts = {**asdict(progressed), **_optimizer_facts(trainable)}
            writing.then(partial(self._publish, partial_dir, facts, writing.written))
        if not self._in_background:
            self.finish()

    def poll(self) -> None:
        """Publish the checkpoint that is being written when all ranks have written their part."""
        if self._writing is None:
            return
        busy = torch.tensor([float(self._writing.is_busy)], device=self._session.device)
        if not self._session.sum(busy).item():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            with _write_errors(self.folder):
                writing.finish(self._session)
        except Exception:
            self._drop_partial()
            raise

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = checkpoints(self.folder)
        return found[-1] if found else None

    def resume(self, trainable: Trainable, tell: Callable[[str], None] = lambda _: None) -> Progressed:
        """Load the newest checkpoint that is as it was written, when there is one; damaged ones are set aside.

        Args:
            tell: hears of those.

        Raises:
            CheckpointError: all are damaged, or it cannot be read.
        """
        while True:
            found = checkpoints(self.folder)
            # No rank may publish or remove a checkpoint before all have looked.
            self._session.barrier()
            if not found:
                return Progressed()
            problem = damage(found[-1], self._session)
            if problem is None:
                return _load(trainable, found[-1])
            if len(found) == 1:
                raise _none_before(found[-1], problem)
            aside = self._set_aside(found[-1])
            tell(f"{found[-1].name} is damaged ({problem}): goes on from {found[-2].name}; it is kept as {aside}")

    def _drop_partial(self) -> None:
        """What a kill or a full disk has left of a checkpoint."""
        if self._session.is_main:
            for left in self.folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)

    def _set_aside(self, checkpoint: Path) -> Path:
        """Rename it, so that it does not count as one of those that are kept."""
        aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
        self._session.barrier()
        if self._session.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        self._session.barrier()
        return aside

    def _publish(self, partial_dir: Path, facts: dict[str, Any], written: dict[str, Any]) -> None:
        write_facts(partial_dir, facts, written, self._session)
        if self._session.is_main:
            final = self.folder / f"{_PREFIX}{facts['step']:08d}"
            shutil.rmtree(final, ignore_errors=True)
            partial_dir.rename(final)
            for old in checkpoints(self.folder)[: -self._keep]:
                # First what makes it complete: a kill may come before the rest is gone.
                (old / FACTS_FILE).unlink()
                shutil.rmtree(old)
        self._session.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / FACTS_FILE).is_file())


def step_of(checkpoint: Path) -> int:
    """Steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _load(trainable: Trainable, checkpoint: Path) -> Progressed:
    try:
        facts = read_facts(checkpoint)
        progressed = Progressed(int(facts["step"]), tuple(map(float, facts.get("good_losses", ()))))
        _require_same_optimizer(trainable, facts, checkpoint)
        require_known_backend(checkpoint)
        require_readable(checkpoint)
        wanted = _sharded_state(trainable, is_loading=True)
        with only_known_pickles():
            state = dist_checkpointing.load(wanted, str(checkpoint))
        _take_over(trainable, state, progressed.step)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        failed = next(iter(error.failures.values()), (error,))[0] if isinstance(error, CheckpointException) else error
        raise CheckpointError(
            f"The training checkpoint cannot be read: {type(failed).__name__}: {shortened(failed, 1000)}",
            where=str(checkpoint),
            next_step="Delete this folder; the same command then resumes from the one before it.",
        ) from error
    return progressed


def _take_over(trainable: Trainable, state: dict[str, Any], step: int) -> None:
    trainable.model.load_state_dict({k.removeprefix("model."): v for k, v in state["model"].items()})
    wanted = [{key: group[key] for key in _FROM_THE_RECIPE if key in group} for group in _groups(trainable)]
    for saved in _saved_groups(state["optimizer"]):
        # Megatron-Core 0.19 tells groups apart by these, too; all groups of a recipe have the same.
        saved.update({key: wanted[0][key] for key in ("max_lr", "min_lr") if key in wanted[0]})
    if trainable.has_distributed_optimizer:
        load_optimizer_state(trainable.optimizer, state["optimizer"])
    else:
        trainable.optimizer.load_state_dict(state["optimizer"])
    for group, values in zip(_groups(trainable), wanted, strict=True):
        group.update(values)
    trainable.schedule.step(step)
    if trainable.teacher is not None:
        _take_over(trainable.teacher, state["teacher"], step)


def _optimizer_facts(trainable: Trainable) -> dict[str, bool]:
    """What tells optimizers with different files apart."""
    if not trainable.has_distributed_optimizer:
        return {"distributed_optimizer": False}
    return {"distributed_optimizer": True, "whole_tensors": HAS_WHOLE_TENSORS}


def _require_same_optimizer(trainable: Trainable, facts: Mapping[str, Any], checkpoint: Path) -> None:
    now = _optimizer_facts(trainable)
    was_distributed = bool(facts.get("distributed_optimizer", False))
    if now["distributed_optimizer"] != was_distributed:
        was, want = (str(value).lower() for value in (was_distributed, now["distributed_optimizer"]))
        raise CheckpointError(
            f"The training checkpoint is of execution.parallel.distributed_optimizer = {was}, not {want}.",
            where=str(checkpoint),
            next_step=f"Set it to {was}, or delete the checkpoints to start from the first step.",
        )
    if was_distributed and facts.get("whole_tensors", HAS_WHOLE_TENSORS) != HAS_WHOLE_TENSORS:
        wanted = "0.14 or earlier" if HAS_WHOLE_TENSORS else "0.15 or later"
        raise CheckpointError(
            f"The training checkpoint of a distributed optimizer was written by Megatron-Core {wanted}, "
            "whose files the installed one cannot read.",
            where=str(checkpoint),
            next_step=f"Use megatron-core {wanted}, or delete the checkpoints to start from the first step.",
        )


def _groups(trainable: Trainable) -> list[dict[str, Any]]:
    return list(trainable.optimizer.param_groups)


def _saved_groups(optimizer_state: dict[str, Any]) -> list[dict[str, Any]]:
    """Optimizers with fp32 copies of bf16 parameters, and distributed ones, keep torch's state one level deeper."""
    found: list[dict[str, Any]] = optimizer_state.get("optimizer", optimizer_state)["param_groups"]
    return found


def _sharded_state(trainable: Trainable, *, is_loading: bool) -> dict[str, Any]:
    model = trainable.model.sharded_state_dict(prefix="model.")
    if trainable.has_distributed_optimizer:
        optimizer = sharded_optimizer_state(trainable.optimizer, model, is_loading=is_loading)
    else:
        optimizer = trainable.optimizer.sharded_state_dict(model, is_loading=is_loading)
    state = {"model": model, "optimizer": optimizer}
    if trainable.teacher is not None:
        state["teacher"] = _sharded_state(trainable.teacher, is_loading=is_loading)
        # Tensors are told apart by their keys, wherever in the state they are.
        add_prefix_for_sharding(state["teacher"], "teacher.")
    return state


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """A failed write is an error of the user's; Megatron's own is one that `except Exception` does not catch."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        # Megatron's metadata phase collects the failures of ranks; only the main rank knows them.
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        failed = next((failure for failure, _ in failures), None)
        problem = None if failed is None else disk_problem(failed, folder)
        why = f"{failed or 'another process says why'}".removeprefix("Worker failure: ")
        raise CheckpointError(
            f"A training checkpoint could not be written: {problem.what if problem else why}",
            where=str(folder),
            next_step="Free space, or look after the disk; the same command goes on from the checkpoint before it.",
        ) from error


def _none_before(checkpoint: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"The only training checkpoint is damaged: {problem}.",
        where=str(checkpoint),
        next_step="Restore it; or delete its folder, and the same command starts the training from its first step.",
    )
