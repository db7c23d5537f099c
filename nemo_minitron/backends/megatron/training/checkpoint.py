"""Training checkpoints: Megatron's distributed format in the stage's work folder.

A checkpoint is written under a temporary name and renamed when every rank has finished, so a kill at any moment leaves
the newest complete checkpoint to resume from. A checkpoint contains the checksums of its files: if one is damaged, it
is renamed and training resumes from the previous checkpoint.

All checkpoints are written by `PendingCheckpoint`. With `in_background` it copies the state and the caller continues;
otherwise the caller waits and nothing is copied.
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
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint import CheckpointException

from nemo_minitron.backends.megatron.runtime.known_pickles import only_known_pickles, require_known_backend
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.runtime.versions import SaveStrategy, load_checkpoint, require_readable
from nemo_minitron.backends.megatron.training.checkpoint_writer import Buffers, PendingCheckpoint
from nemo_minitron.backends.megatron.training.distributed_adam import (
    HAS_WHOLE_TENSORS,
    load_optimizer_state,
    sharded_optimizer_state,
)
from nemo_minitron.backends.megatron.training.gathered_states import GatheredStates
from nemo_minitron.backends.megatron.training.integrity import FACTS_FILE, find_damage, read_facts, write_facts
from nemo_minitron.backends.megatron.training.optim import Trainable, use_fused_adam
from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.system.disk import disk_problem
from nemo_minitron.system.out_of_memory import is_out_of_memory

_PREFIX, _PARTIAL, _DAMAGED = "step_", ".partial_", "damaged_"
_RECIPE_OPTIONS = ("max_lr", "min_lr", "weight_decay", "betas", "eps")
"""Fields of the optimizer's groups that are not restored from a checkpoint: the recipe may have changed them."""


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training has progressed."""

    step: int = 0
    """Completed steps."""
    good_losses: tuple[float, ...] = ()
    """Losses of the last good steps, for the loss guard."""


class Checkpoints:
    """The training checkpoints in one folder. Call every method on every rank.

    Args:
        keep: number of newest checkpoints to keep.
        in_background: write from a thread while training continues, at most one checkpoint at a time.
    """

    def __init__(self, folder: Path, session: Session, *, keep: int, in_background: bool) -> None:
        self.folder, self._session, self._keep, self._in_background = folder, session, keep, in_background
        self._pending: PendingCheckpoint | None = None
        self._buffers: Buffers | None = {} if in_background else None
        self._strategy = SaveStrategy()
        self._drop_partial()

    def save(self, trainable: Trainable, progress: TrainingProgress) -> None:
        """Write the state after this step; with `in_background`, `poll` or `finish` publishes it later."""
        self.finish()
        partial_dir = self.folder / f"{_PARTIAL}{progress.step:08d}"
        if self._session.is_main:
            shutil.rmtree(partial_dir, ignore_errors=True)
            partial_dir.mkdir(parents=True)
        self._session.barrier()
        gathered: list[GatheredStates] = []
        state = _sharded_state(trainable, gathered, is_loading=False)
        with _write_errors(self.folder):
            pending = self._pending = PendingCheckpoint.begin(
                state, gathered, partial_dir, self._strategy, self._buffers
            )
            facts = {**asdict(progress), **_optimizer_facts(trainable)}
            pending.on_complete(partial(self._publish, partial_dir, facts, pending.written))
        if not self._in_background:
            self.finish()

    def poll(self) -> None:
        """Publish the pending checkpoint if all ranks have written their part."""
        if self._pending is None:
            return
        busy = torch.tensor([float(self._pending.is_writing)], device=self._session.device)
        if not self._session.sum(busy).item():
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint and publish it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            with _write_errors(self.folder):
                pending.finish(self._session)
        except Exception:
            self._drop_partial()
            raise

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        found = checkpoints(self.folder)
        return found[-1] if found else None

    def resume(self, trainable: Trainable, report: Callable[[str], None] = lambda _: None) -> TrainingProgress:
        """Load the newest intact checkpoint, if there is one; rename damaged ones.

        Args:
            report: called with a message for each damaged checkpoint.

        Raises:
            CheckpointError: the only remaining checkpoint is damaged, or a checkpoint cannot be read.
        """
        while True:
            # The first rank decides for all: another node may see a checkpoint later.
            names = self._session.gather([path.name for path in checkpoints(self.folder)])[0]
            found = [self.folder / name for name in names]
            if not found:
                return TrainingProgress()
            problem = find_damage(found[-1], self._session)
            if problem is None:
                return _load(trainable, found[-1])
            if len(found) == 1:
                raise _no_older_checkpoint(found[-1], problem)
            aside = self._set_aside(found[-1])
            report(f"{found[-1].name} is damaged ({problem}): resuming from {found[-2].name}; it is kept as {aside}")

    def _drop_partial(self) -> None:
        """Delete incomplete checkpoints that a kill or a full disk has left."""
        if self._session.is_main:
            for left in self.folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)

    def _set_aside(self, checkpoint: Path) -> Path:
        """Rename a damaged checkpoint, so that it does not count toward `keep`."""
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
                # Delete the completeness marker first, in case of a kill before the rest is deleted.
                (old / FACTS_FILE).unlink()
                shutil.rmtree(old)
        self._session.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """List complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / FACTS_FILE).is_file())


def step_of(checkpoint: Path) -> int:
    """Return the number of completed steps of a checkpoint."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _load(trainable: Trainable, checkpoint: Path) -> TrainingProgress:
    try:
        facts = read_facts(checkpoint)
        progress = TrainingProgress(int(facts["step"]), tuple(map(float, facts.get("good_losses", ()))))
        _require_same_optimizer(trainable, facts, checkpoint)
        require_known_backend(checkpoint)
        require_readable(checkpoint)
        wanted = _sharded_state(trainable, [], is_loading=True)
        with only_known_pickles():
            state = load_checkpoint(wanted, checkpoint)
        _restore(trainable, state, progress.step)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # CheckpointException is not a subclass of Exception
        if is_out_of_memory(error):
            raise
        failed = next(iter(error.failures.values()), (error,))[0] if isinstance(error, CheckpointException) else error
        raise CheckpointError(
            f"The training checkpoint cannot be read: {type(failed).__name__}: {shortened(failed, 1000)}",
            where=str(checkpoint),
            next_step="Delete this folder; the same command then resumes from the previous checkpoint.",
        ) from error
    return progress


def _restore(trainable: Trainable, state: dict[str, Any], step: int) -> None:
    trainable.model.load_state_dict({k.removeprefix("model."): v for k, v in state["model"].items()})
    wanted = [{key: group[key] for key in _RECIPE_OPTIONS if key in group} for group in _groups(trainable)]
    for saved in _saved_groups(state["optimizer"]):
        # Megatron-Core 0.19 also matches groups by these; all groups of a recipe have the same values.
        saved.update({key: wanted[0][key] for key in ("max_lr", "min_lr") if key in wanted[0]})
    if trainable.has_distributed_optimizer:
        load_optimizer_state(trainable.optimizer, state["optimizer"])
    else:
        trainable.optimizer.load_state_dict(state["optimizer"])
    for group, values in zip(_groups(trainable), wanted, strict=True):
        group.update(values)
    use_fused_adam(trainable.optimizer)
    trainable.schedule.step(step)
    if trainable.teacher is not None:
        _restore(trainable.teacher, state["teacher"], step)


def _optimizer_facts(trainable: Trainable) -> dict[str, bool]:
    """Return what distinguishes optimizers whose files are incompatible."""
    if not trainable.has_distributed_optimizer:
        return {"distributed_optimizer": False}
    return {"distributed_optimizer": True, "whole_tensors": HAS_WHOLE_TENSORS}


def _require_same_optimizer(trainable: Trainable, facts: Mapping[str, Any], checkpoint: Path) -> None:
    now = _optimizer_facts(trainable)
    was_distributed = bool(facts.get("distributed_optimizer", False))
    if now["distributed_optimizer"] != was_distributed:
        was, want = (str(value).lower() for value in (was_distributed, now["distributed_optimizer"]))
        raise CheckpointError(
            f"The training checkpoint was written with execution.parallel.distributed_optimizer = {was}, not {want}.",
            where=str(checkpoint),
            next_step=f"Set it to {was}, or delete the checkpoints to start from the first step.",
        )
    if was_distributed and facts.get("whole_tensors", HAS_WHOLE_TENSORS) != HAS_WHOLE_TENSORS:
        wanted = "0.14 or earlier" if HAS_WHOLE_TENSORS else "0.15 or later"
        raise CheckpointError(
            f"The training checkpoint of a distributed optimizer was written by Megatron-Core {wanted}, "
            "whose files the installed version cannot read.",
            where=str(checkpoint),
            next_step=f"Use megatron-core {wanted}, or delete the checkpoints to start from the first step.",
        )


def _groups(trainable: Trainable) -> list[dict[str, Any]]:
    return list(trainable.optimizer.param_groups)


def _saved_groups(optimizer_state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the saved groups; mixed-precision and distributed optimizers nest torch's state one level deeper."""
    found: list[dict[str, Any]] = optimizer_state.get("optimizer", optimizer_state)["param_groups"]
    return found


def _sharded_state(trainable: Trainable, gathered: list[GatheredStates], *, is_loading: bool) -> dict[str, Any]:
    """Return the state that a checkpoint stores.

    Args:
        gathered: gets the states of optimizers that have no values yet.
    """
    # Megatron otherwise stores a parameter of all layers as one tensor, of which no layer may be missing.
    metadata = {"non_homogeneous_layers": True} if trainable.has_frozen_layers else None
    model = trainable.model.sharded_state_dict(prefix="model.", metadata=metadata)
    if trainable.has_distributed_optimizer:
        optimizer, empty = sharded_optimizer_state(trainable.optimizer, model, is_loading=is_loading)
        gathered += [] if empty is None else [empty]
    else:
        optimizer = trainable.optimizer.sharded_state_dict(model, is_loading=is_loading)
    state = {"model": model, "optimizer": optimizer}
    if trainable.teacher is not None:
        state["teacher"] = _sharded_state(trainable.teacher, gathered, is_loading=is_loading)
        # Tensors are identified by their keys alone, not by their place in the state.
        add_prefix_for_sharding(state["teacher"], "teacher.")
    return state


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn failed writes into CheckpointError; Megatron's CheckpointException is not a subclass of Exception."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        # Megatron collects the ranks' failures while it writes metadata; only the main rank has them.
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        failed = next((failure for failure, _ in failures), None)
        problem = None if failed is None else disk_problem(failed, folder)
        why = f"{failed or 'see the error of another process'}".removeprefix("Worker failure: ")
        raise CheckpointError(
            f"A training checkpoint could not be written: {problem.what if problem else why}",
            where=str(folder),
            next_step="Free space or repair the disk; the same command resumes from the previous checkpoint.",
        ) from error


def _no_older_checkpoint(checkpoint: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"The only training checkpoint is damaged: {problem}.",
        where=str(checkpoint),
        next_step="Restore it, or delete its folder; the same command then starts the training from its first step.",
    )
