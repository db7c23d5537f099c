"""The training loop: Megatron's schedules around an objective, with curves, checkpoints and exact resume."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_minitron.backends.megatron.build import DTYPES
from nemo_minitron.backends.megatron.checkpoint import resume_training, save_training
from nemo_minitron.backends.megatron.curves import Curves
from nemo_minitron.backends.megatron.datasets import step_batches
from nemo_minitron.backends.megatron.forward import Batch
from nemo_minitron.backends.megatron.optim import Trainable
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.backends.megatron.weights import save_model
from nemo_minitron.config.schema import Optimization
from nemo_minitron.errors import NumericsError
from nemo_minitron.families import ModelShape
from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, model_facts
from nemo_minitron.progress import Progress

Parts = dict[str, Tensor]
"""What a loss is made of, for the curves: name -> detached scalar, the same on every rank of the last stage."""
ForwardStep = Callable[[torch.nn.Module, Batch, Any], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Parts]]]]
"""(model, micro-batch, what the objective prepared for it) -> (what goes to the next stage, the loss of the output)."""


@dataclass(frozen=True)
class Objective:
    """What a model is trained to do."""

    parts: tuple[str, ...]
    """Columns of the curves that its loss fills, `train_loss` among them."""
    prepare: Callable[[int, list[Batch]], Iterator[Any]]
    """(step, micro-batches) -> one extra for each, made when it is asked for."""
    forward: ForwardStep
    validate: Callable[[], dict[str, float]]
    """Figures of the model as it stands, the same on every rank."""


@dataclass(frozen=True)
class Job:
    """Everything that the loop needs; nothing in it changes but the model and its optimizer."""

    stage: str
    """For messages: `distill`, `train`."""
    params: Optimization
    num_steps: int
    trainable: Trainable
    shape: ModelShape
    samples: Any
    session: Session
    objective: Objective

    @property
    def tokens_per_step(self) -> int:
        return self.params.global_batch_size * self.params.seq_len_tokens


def run(job: Job, work_dir: Path, progress: Progress) -> Curves:
    """Train to the end, from the newest checkpoint of the work folder when there is one."""
    checkpoints = work_dir / "checkpoints"
    done = resume_training(job.trainable, checkpoints)
    curves = Curves(work_dir, first_step=done or -1, enabled=job.session.is_main)
    if done == 0:
        curves.add(0, **job.objective.validate())
    with progress.bar(job.stage, job.num_steps, "steps", done=done) as bar:
        for step in range(done, job.num_steps):
            started_s = time.monotonic()
            row = train_step(job, step)
            tokens_per_s = job.tokens_per_step / (time.monotonic() - started_s)
            curves.add(step + 1, **row, tokens=(step + 1) * job.tokens_per_step, tokens_per_s=tokens_per_s)
            bar.advance(loss=row["train_loss"], lr=row["lr"], tok_s=round(tokens_per_s))
            _after_step(job, step + 1, curves, checkpoints)
    curves.close()
    return curves


def _after_step(job: Job, step: int, curves: Curves, checkpoints: Path) -> None:
    params = job.params
    last = step == job.num_steps
    if last or step % params.valid_interval_steps == 0:
        curves.add(step, **job.objective.validate())
    if last or step % params.save_interval_steps == 0:
        # The curve reaches the disk first: a checkpoint never knows more than its curve.
        curves.flush()
        save_training(job.trainable, checkpoints, step, job.session, keep=params.keep_checkpoints)


def train_step(job: Job, step: int) -> dict[str, float]:
    """One optimizer step; losses are in nats per token, averaged over the global batch."""
    trainable = job.trainable
    found = forward_backward(job, step)
    trainable.schedule.step(1)
    _, grad_norm, _ = trainable.optimizer.step()
    row = _mean_over_ranks(found, job.objective.parts, job.session)
    _require_finite(job.stage, row["train_loss"], float(grad_norm or 0.0), step)
    return {**row, "lr": trainable.lr, "grad_norm": float(grad_norm or 0.0)}


def forward_backward(job: Job, step: int) -> list[Parts]:
    """The gradients of one global batch, summed over the ranks; returns this rank's losses of each micro-batch."""
    trainable, params, micro_batch_size = job.trainable, job.params, job.session.parallel.micro_batch_size
    batches = step_batches(
        job.samples,
        job.session,
        step=step,
        global_batch_size=params.global_batch_size,
        micro_batch_size=micro_batch_size,
    )
    trainable.ddp.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    found: list[Parts] = []
    get_forward_backward_func()(
        forward_step_func=_forward_step(job.objective.forward, found),
        data_iterator=zip(batches, job.objective.prepare(step, batches), strict=False),
        model=[trainable.ddp],
        num_microbatches=len(batches),
        seq_length=params.seq_len_tokens,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )
    return found


def _forward_step(forward: ForwardStep, found: list[Parts]) -> Callable[..., Any]:
    def step(data: Iterator[tuple[Batch, Any]], model: torch.nn.Module) -> Any:
        batch, extra = next(data)
        output, loss_of = forward(model, batch, extra)

        def loss(output: Tensor) -> tuple[Tensor, Parts]:
            value, parts = loss_of(output)
            found.append({"train_loss": value.detach().clone(), **parts})
            return value, {}

        return output, loss

    return step


def _mean_over_ranks(found: list[Parts], names: tuple[str, ...], session: Session) -> dict[str, float]:
    """The last stage's losses, averaged over micro-batches and data-parallel ranks, on every rank."""
    total = torch.zeros(len(names) + 1, dtype=torch.float64, device=session.device)
    if found and session.is_last_stage:
        total[:-1] = torch.stack([torch.stack([parts[name].double() for name in names]) for parts in found]).mean(0)
        total[-1] = 1.0
    session.sum(total)
    return dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True))


def _require_finite(stage: str, loss: float, grad_norm: float, step: int) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise NumericsError(
        f"{stage}: loss {loss}, gradient norm {grad_norm} at step {step + 1}.",
        next_step=f"Lower stages.{stage}.lr or raise warmup_steps; the last good checkpoint is kept.",
    )


def publish(job: Job, model_dir: Path, work_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Write the trained model as a Hugging Face checkpoint, with its curves; facts on the main rank."""
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
    return model_facts(out_dir)
