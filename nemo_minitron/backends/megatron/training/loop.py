"""The training loop: Megatron's schedules around an objective, with curves, checkpoints and exact resume."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.backends.megatron.data.datasets import samples_of_each
from nemo_minitron.backends.megatron.data.reader import MicroBatchReader
from nemo_minitron.backends.megatron.model.build import DTYPES
from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.model.weights import save_model
from nemo_minitron.backends.megatron.runtime.peak import matmul_flops_per_s
from nemo_minitron.backends.megatron.runtime.session import STEP_TIMEOUT, TIMEOUT, Session
from nemo_minitron.backends.megatron.training.checkpoint import Checkpoints, TrainingProgress, step_of
from nemo_minitron.backends.megatron.training.curves import Curves, Tracker
from nemo_minitron.backends.megatron.training.guard import LossWatch
from nemo_minitron.backends.megatron.training.optim import Trainable
from nemo_minitron.backends.megatron.training.schedule import Parts, Round
from nemo_minitron.data.used import DATA_USED_FILE, Sources, data_used
from nemo_minitron.distillation.rounds import round_sizes
from nemo_minitron.errors import DivergenceError, Interrupted
from nemo_minitron.families import ModelShape
from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, model_facts
from nemo_minitron.schema.execution import Execution
from nemo_minitron.schema.training import Optimization
from nemo_minitron.system.files import write_whole
from nemo_minitron.system.interrupts import REASONS, StopRequest
from nemo_minitron.system.progress import Bar, Progress

_TRAINED_MODELS = (
    ("the teacher's ", "teacher_loss", "teacher_grad_norm", ".teacher_correction"),
    ("", "train_loss", "grad_norm", ""),
)
"""Models whose values must stay finite: (owner, loss column, gradient norm column, section of the learning rate).

Check the teacher first: if its loss is not finite, the student's is not either.
"""


@dataclass(frozen=True)
class Objective:
    """The training objective: how losses, gradients and validations are computed."""

    parts: tuple[str, ...]
    """Curve columns that the loss fills, including `train_loss`."""
    prepare: Callable[[Round, Iterable[Batch]], Iterator[Any]]
    """(round, its micro-batches) -> one extra for each micro-batch, computed lazily."""
    gradients: Callable[[Trainable, Round, Iterator[Batch], Iterator[Any]], list[Parts]]
    """(model, round, its micro-batches, their extras) -> losses per micro-batch. The first round of a step replaces
    the model's gradients, the others add to them."""
    validate: Callable[[], dict[str, float]]
    """Measure the current model; the same on every rank."""
    finish: Callable[[], dict[str, float]] = dict
    """Called after each update of the model; returns more curve columns."""
    round_size: int | None = None
    """Largest number of micro-batches in a round, if `prepare` needs them all at once; None: a step is one round, and
    its micro-batches are made one at a time."""


@dataclass(frozen=True)
class Job:
    """Everything that the loop needs. Only the model and its optimizer change."""

    params: Optimization
    num_steps: int
    trainable: Trainable
    shape: ModelShape
    samples: Any
    session: Session
    objective: Objective
    flops_per_token: float
    """Student and teacher together, without recomputation."""
    separate_at: int | None = None
    """End-of-document token that attention may not cross."""
    sources: Sources = ()
    """Sources of the samples."""

    @cached_property
    def reader(self) -> MicroBatchReader:
        """Reader of the micro-batches of each step."""
        return MicroBatchReader(
            self.samples,
            self.session,
            num_steps=self.num_steps,
            global_batch_size=self.params.global_batch_size,
            separate_at=self.separate_at,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.params.global_batch_size * self.params.seq_len_tokens

    def data_used(self, num_steps: int) -> list[dict[str, Any]]:
        """Count what the first steps use of each source. Depends on their number only, so a resume gives the same."""
        counts = samples_of_each(self.samples, len(self.sources), num_steps * self.params.global_batch_size)
        return data_used(self.sources, [count * self.params.seq_len_tokens for count in counts])


@dataclass(frozen=True)
class LoopOptions:
    """Where and how a loop runs. No field changes the result."""

    execution: Execution = field(default_factory=Execution)
    recipe_name: str = "training"
    stop: StopRequest = field(default_factory=StopRequest)
    stage: str = "training"
    """Name of the stage in the recipe."""
    keys: str = "stages.training"
    """Recipe section that contains the learning rate."""
    resumes_with_other_rates: bool = True
    """Whether --accept-drift lets the stage resume from its checkpoints with another learning rate."""


@dataclass(frozen=True)
class _Loop:
    """A running loop."""

    job: Job
    curves: Curves
    checkpoints: Checkpoints
    watch: LossWatch
    options: LoopOptions
    peak_flops_per_s: float
    """Peak matrix throughput of all processes together."""
    first_step: int = 0
    """Step from which this process continues."""

    def mfu(self, tokens_per_s: float) -> float:
        """Return model FLOPs utilization: FLOPs that the training needs over the peak of the machine."""
        return tokens_per_s * self.job.flops_per_token / self.peak_flops_per_s


def run(job: Job, work_dir: Path, progress: Progress, options: LoopOptions | None = None) -> Curves:
    """Train to the end, resuming from the newest checkpoint in the work folder if there is one.

    Raises:
        Interrupted: a stop was requested; a checkpoint was written.
        DivergenceError: the loss is not finite or exceeds the guard's bound.
    """
    options = options or LoopOptions()
    peak = _peak_flops_per_s(job, options.execution)
    execution, params = options.execution, job.params
    checkpoints = Checkpoints(
        work_dir / "checkpoints", job.session, keep=params.keep_checkpoints, in_background=execution.async_checkpoints
    )
    before = checkpoints.resume(job.trainable, lambda text: progress.say(f"{options.stage}: {text}"))
    curves = Curves(work_dir, first_step=before.step or -1, enabled=job.session.is_main, tracker=_tracker(options))
    loop = _Loop(job, curves, checkpoints, LossWatch(params.guard, before.good_losses), options, peak, before.step)
    _validate_first(loop)
    try:
        with options.stop.deferred(), progress.bar(options.stage, job.num_steps, "steps", done=before.step) as bar:
            for step in range(before.step, job.num_steps):
                _advance(loop, step, bar)
                if step == before.step:
                    # The first step compiles kernels and opens connections, which takes longer.
                    job.session.set_timeout(STEP_TIMEOUT)
    finally:
        job.session.set_timeout(TIMEOUT)
        job.reader.close()
        curves.close()
    if not loop.watch.last_loss_is_good:
        progress.warn(
            f"{options.stage}: the last losses ({loop.watch.steps_above}) exceed {options.keys}.guard.max_ratio times "
            "the usual loss. The model is kept as it is; look at the curve before you use it."
        )
    return curves


def _peak_flops_per_s(job: Job, execution: Execution) -> float:
    """Return the peak throughput of all processes, from the recipe or measured."""
    dtype, device = job.trainable.model.config.params_dtype, job.session.device
    given = execution.peak_tflops
    one = given * 1e12 if given is not None else matmul_flops_per_s(dtype, device)
    return one * job.session.world_size


def _tracker(options: LoopOptions) -> Tracker | None:
    execution, name = options.execution, options.recipe_name
    if execution.wandb_project is None:
        return None
    return Tracker(execution.wandb_project, name, options.stage, Path(execution.run_root) / name / "logs")


def _validate_first(loop: _Loop) -> None:
    """Validate the model with which this process begins, unless an earlier process has.

    A process saves before it validates, and may end between the two.
    """
    job, step = loop.job, loop.first_step
    lacking = _validates_after(job, step) and job.session.is_main and not loop.curves.is_validated(step)
    if job.session.sum(torch.tensor(float(lacking), device=job.session.device)).item():
        job.trainable.gather_parameters()
        loop.curves.add(step, **job.objective.validate())


def _validates_after(job: Job, step: int) -> bool:
    return step == job.num_steps or step % job.params.valid_interval_steps == 0


def _advance(loop: _Loop, step: int, bar: Bar) -> None:
    """Run one step, then log, save, validate and stop as needed."""
    job, done = loop.job, step + 1
    started_s = time.monotonic()
    row, stop_reason = train_step(job, step, loop.options.stop)
    tokens_per_s = job.tokens_per_step / (time.monotonic() - started_s)
    _require_finite(loop, row, step)
    speed = {"tokens_per_s": tokens_per_s, "mfu": loop.mfu(tokens_per_s)}
    loop.curves.add(done, **row, tokens=done * job.tokens_per_step, **speed)
    bar.advance(loss=row["train_loss"], lr=row["lr"], tok_s=round(tokens_per_s), mfu=f"{speed['mfu']:.0%}")
    if loop.watch.is_spike(row["train_loss"]):
        raise _spike_error(loop, row["train_loss"], done)
    loop.checkpoints.poll()
    last = done == job.num_steps
    # Whoever requested a stop may kill the job soon, so the run that resumes validates instead (_validate_first).
    validates = _validates_after(job, done) and (last or not stop_reason)
    saves = (last or stop_reason or done % job.params.save_interval_steps == 0) and loop.watch.last_loss_is_good
    if validates or saves:
        job.trainable.gather_parameters()
    if saves:
        # Write the curve first, so that it always covers the steps of the checkpoint.
        loop.curves.flush()
        if job.session.is_main:
            _write_data_used(job, done, loop.curves.path.parent)
        loop.checkpoints.save(job.trainable, TrainingProgress(done, tuple(loop.watch.good_losses)))
    if validates:
        if stop_reason or done - loop.first_step <= job.params.valid_interval_steps:
            # A stopped job may be killed, and the first validation beside the optimizer's states may run out of memory.
            # The checkpoint outlives both.
            loop.checkpoints.finish()
        loop.curves.add(done, **job.objective.validate())
    if last or stop_reason:
        loop.checkpoints.finish()
    if stop_reason and not last:
        raise _interrupted(loop, done, stop_reason)


def _write_data_used(job: Job, num_steps: int, folder: Path) -> list[dict[str, Any]]:
    used = job.data_used(num_steps)
    write_whole(folder / DATA_USED_FILE, json.dumps(used, indent=2) + "\n")
    return used


def _interrupted(loop: _Loop, done: int, stop_reason: str) -> Interrupted:
    newest = loop.checkpoints.newest()
    kept = 0 if newest is None else step_of(newest)
    resumes = "" if kept == done else f" from step {kept}: the loss was above its bound, so no checkpoint was written"
    return Interrupted(
        f"{loop.options.stage} stopped after step {done} of {loop.job.num_steps} as requested by {stop_reason}; "
        f"the same command continues{resumes}."
    )


def train_step(job: Job, step: int, stop: StopRequest | None = None) -> tuple[dict[str, float], str | None]:
    """Run one optimizer step; return (curve row, reason of a stop request that reached any rank).

    Losses are in nats per token, averaged over the global batch.
    """
    found = forward_backward(job, step)
    after = update(job.trainable)
    row, stop_reason = mean_over_ranks(found, job.objective.parts, job.session, stop.source() if stop else None)
    return {**row, **after, **job.objective.finish()}, stop_reason


def update(trainable: Trainable) -> dict[str, float]:
    """Apply the gradients; return the learning rate and the gradient norm."""
    trainable.schedule.step(1)
    _, grad_norm, _ = trainable.optimizer.step()
    return {"lr": trainable.lr, "grad_norm": float(grad_norm or 0.0)}


def forward_backward(job: Job, step: int) -> list[Parts]:
    """Compute the gradients of one global batch, summed over the ranks; return this rank's losses per micro-batch."""
    objective, batches, found = job.objective, job.reader.step(step), list[Parts]()
    sizes = (job.session.parallel.micro_batch_size, job.params.seq_len_tokens)
    done, total = 0, job.reader.num_micro_batches
    for count in round_sizes(total, objective.round_size):
        part = Round(step, count, total, *sizes, is_first=done == 0, is_last=done + count == total)
        done += count
        of_round = islice(batches, count)
        if objective.round_size is None:
            of_teacher, of_student = _read_twice(of_round)
        else:
            kept = list(of_round)
            of_teacher, of_student = iter(kept), iter(kept)
        found += objective.gradients(job.trainable, part, of_student, objective.prepare(part, of_teacher))
    return found


def _read_twice(batches: Iterator[Batch]) -> tuple[Iterator[Batch], Iterator[Batch]]:
    """Return two iterators over the same micro-batches; only those that one of them has not reached are kept.

    itertools.tee keeps up to 57 more.
    """

    def read(own: deque[Batch], other: deque[Batch]) -> Iterator[Batch]:
        while True:
            if not own:
                batch = next(batches, None)
                if batch is None:
                    return
                own.append(batch)
                other.append(batch)
                del batch
            yield own.popleft()

    queues: tuple[deque[Batch], deque[Batch]] = (deque(), deque())
    return read(*queues), read(*reversed(queues))


def mean_over_ranks(
    found: list[Parts], names: tuple[str, ...], session: Session, stop_reason: str | None
) -> tuple[dict[str, float], str | None]:
    """Average the last stage's losses over micro-batches and data-parallel ranks; every rank gets the result.

    The same all-reduce carries a stop request that reached any rank, so that all ranks stop at the same step.
    """
    losses = torch.zeros(len(names) + 1, dtype=torch.float64, device=session.device)
    if found and session.is_last_stage:
        losses[:-1] = torch.stack([torch.stack([parts[name].double() for name in names]) for parts in found]).mean(0)
        # Context-parallel ranks hold shares of one loss.
        losses[-1] = 1.0 / session.parallel.cp
    flags = [float(reason == stop_reason) for reason in REASONS]
    requested = torch.tensor(flags, dtype=torch.float64, device=session.device)
    total = session.sum(torch.cat([losses, requested])).tolist()
    sums, count, requests = total[: len(names)], total[len(names)], total[len(names) + 1 :]
    reason = next((reason for reason, times in zip(REASONS, requests, strict=True) if times), None)
    return {name: value / count for name, value in zip(names, sums, strict=True)}, reason


def _require_finite(loop: _Loop, row: dict[str, float], step: int) -> None:
    for owner, of_loss, of_norm, section in _TRAINED_MODELS:
        loss, norm = row.get(of_loss, 0.0), row.get(of_norm, 0.0)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            note = "" if owner else _median_note(loop)
            what = f"{owner}loss {loss}, gradient norm {norm} at step {step + 1}{note}."
            raise _divergence(loop, what, section)


def _spike_error(loop: _Loop, loss: float, done: int) -> DivergenceError:
    guard = loop.job.params.guard
    assert guard is not None
    what = (
        f"loss {loss:.4g} at step {done}: {guard.patience_steps} steps in a row above {guard.max_ratio:g} times "
        f"the median{_median_note(loop)}."
    )
    return _divergence(loop, what)


def _median_note(loop: _Loop) -> str:
    median = loop.watch.median
    return "" if median is None else f" (median of the last {len(loop.watch.good_losses)} good steps: {median:.4g})"


def _divergence(loop: _Loop, what: str, section: str = "") -> DivergenceError:
    """Make an error that names the checkpoint to resume from. Every rank calls this at the same step."""
    loop.checkpoints.finish()
    newest, key = loop.checkpoints.newest(), loop.options.keys
    rate = f"{key}{section}"
    if not loop.options.resumes_with_other_rates:
        after = "With --rerun changed, all trainings with these keys start again."
    elif newest is None:
        after = "There is no checkpoint yet, so the training starts again."
    else:
        after = f"With --accept-drift it resumes from step {step_of(newest)}, without from the start."
    return DivergenceError(
        f"{loop.options.stage}: {what}",
        where=f"last good checkpoint: {newest}" if newest else None,
        next_step=f"Lower {rate}.lr or raise {rate}.warmup_steps. {after} Changing {key}.guard needs no flag.",
    )


def publish(job: Job, model_dir: Path, work_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Write the model as a Hugging Face checkpoint, its curves and data_used.json; return facts on the main rank."""
    writer = None
    if job.session.is_main:
        source = Checkpoint.open(model_dir)
        writer = CheckpointWriter(out_dir, source.config)
        copy_side_files(model_dir, out_dir)
        shutil.copy2(work_dir / "curves.jsonl", out_dir / "curves.jsonl")
        shutil.copytree(work_dir / "tensorboard", out_dir / "tensorboard", dirs_exist_ok=True)
    save_model(job.trainable.model, job.shape, job.session, writer, dtype=DTYPES[job.params.precision])
    if writer is None:
        return {}
    writer.close()
    return {**model_facts(out_dir), "data_used": _write_data_used(job, job.num_steps, out_dir)}
