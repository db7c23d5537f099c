"""The distillation loop: a frozen teacher, a student, Megatron's schedules."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_minitron.backends.megatron.build import DTYPES
from nemo_minitron.backends.megatron.checkpoint import resume_training, save_training
from nemo_minitron.backends.megatron.curves import Curves
from nemo_minitron.backends.megatron.datasets import HeldOutBatches, heldout_batches, step_batches, training_samples
from nemo_minitron.backends.megatron.evaluate import EVAL_BATCH_SIZE
from nemo_minitron.backends.megatron.forward import (
    Batch,
    evaluating,
    forward_batches,
    mask_padded_vocab,
    model_logits,
    token_nll,
)
from nemo_minitron.backends.megatron.optim import Trainable, make_trainable
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.backends.megatron.weights import load_model, save_model
from nemo_minitron.config.schema import DistillStage
from nemo_minitron.distillation.losses import VocabReduce, forward_kl
from nemo_minitron.errors import NumericsError
from nemo_minitron.families import ModelShape
from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, model_facts
from nemo_minitron.progress import Progress

KL = Callable[[Tensor, Tensor], Tensor]
"""student logits, teacher logits [B, S, V] -> nats per token [B, S]."""


@dataclass(frozen=True)
class Distillation:
    """Everything that the loop needs; nothing in it changes but the student and its optimizer."""

    params: DistillStage
    trainable: Trainable
    teacher: GPTModel
    shape: ModelShape
    samples: Any
    heldout: HeldOutBatches
    session: Session
    micro_batch_size: int

    @property
    def tokens_per_step(self) -> int:
        return self.params.global_batch_size * self.params.seq_len_tokens


def prepare(
    params: DistillStage, student_dir: Path, teacher_dir: Path, data_dir: Path, work_dir: Path, session: Session
) -> Distillation:
    """Load both models and open the data."""
    options = {"precision": params.precision, "seq_len_tokens": params.seq_len_tokens}
    teacher, _ = load_model(teacher_dir, session, **options)  # type: ignore[arg-type]
    teacher.requires_grad_(False).eval()
    student, shape = load_model(student_dir, session, **options)  # type: ignore[arg-type]
    return Distillation(
        params=params,
        trainable=make_trainable(student, params),
        teacher=teacher,
        shape=shape,
        samples=training_samples(
            data_dir,
            num_samples=params.num_steps * params.global_batch_size,
            seq_len_tokens=params.seq_len_tokens,
            seed=params.seed,
            cache_dir=work_dir / "data_index",
        ),
        heldout=heldout_batches(
            data_dir,
            session,
            num_tokens=params.valid_num_tokens,
            seq_len_tokens=params.seq_len_tokens,
            batch_size=EVAL_BATCH_SIZE,
        ),
        session=session,
        micro_batch_size=session.parallel.micro_batch_size,
    )


def run(job: Distillation, work_dir: Path, progress: Progress) -> Curves:
    """Train to the end, from the newest checkpoint of the work folder when there is one."""
    params, session = job.params, job.session
    checkpoints = work_dir / "checkpoints"
    done = resume_training(job.trainable, checkpoints)
    curves = Curves(work_dir, first_step=done or -1, enabled=session.is_main)
    if done == 0:
        curves.add(0, **validate(job))
    with progress.bar("distill", params.num_steps, "steps", done=done) as bar:
        for step in range(done, params.num_steps):
            started_s = time.monotonic()
            row = train_step(job, step)
            tokens_per_s = job.tokens_per_step / (time.monotonic() - started_s)
            curves.add(step + 1, **row, tokens=(step + 1) * job.tokens_per_step, tokens_per_s=tokens_per_s)
            bar.advance(loss=row["train_loss"], lr=row["lr"], tok_s=round(tokens_per_s))
            _after_step(job, step + 1, curves, checkpoints)
    curves.close()
    return curves


def _after_step(job: Distillation, step: int, curves: Curves, checkpoints: Path) -> None:
    params = job.params
    last = step == params.num_steps
    if last or step % params.valid_interval_steps == 0:
        curves.add(step, **validate(job))
    if last or step % params.save_interval_steps == 0:
        # The curve reaches the disk first: a checkpoint never knows more than its curve.
        curves.flush()
        save_training(job.trainable, checkpoints, step, job.session, keep=params.keep_checkpoints)


def train_step(job: Distillation, step: int) -> dict[str, float]:
    """One optimizer step; the loss is in nats per token, averaged over the global batch."""
    trainable, session, params = job.trainable, job.session, job.params
    batches = step_batches(
        job.samples,
        session,
        step=step,
        global_batch_size=params.global_batch_size,
        micro_batch_size=job.micro_batch_size,
    )
    trainable.ddp.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    losses: list[Tensor] = []
    get_forward_backward_func()(
        forward_step_func=_training_step(kl_of(job), losses),
        data_iterator=zip(batches, teacher_logits(job, batches), strict=False),
        model=[trainable.ddp],
        num_microbatches=len(batches),
        seq_length=params.seq_len_tokens,
        micro_batch_size=job.micro_batch_size,
        forward_only=False,
    )
    trainable.schedule.step(1)
    _, grad_norm, _ = trainable.optimizer.step()
    loss = _mean_over_ranks(torch.stack(losses).mean() if losses else None, session)
    _require_finite(loss, float(grad_norm or 0.0), step)
    return {"train_loss": loss, "lr": trainable.lr, "grad_norm": float(grad_norm or 0.0)}


def _training_step(kl: KL, losses: list[Tensor]) -> Callable[..., Any]:
    def step(data: Iterator[tuple[Batch, Tensor | None]], model: torch.nn.Module) -> Any:
        batch, teacher = next(data)

        def loss(student: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            assert teacher is not None
            mask = batch["loss_mask"]
            mean = (kl(student, teacher) * mask).sum() / mask.sum()
            losses.append(mean.detach().clone())
            return mean, {}

        return model_logits(model, batch["tokens"]), loss

    return step


@torch.no_grad()
def _teacher_now(teacher: GPTModel, batches: list[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        with torch.no_grad():
            logits = model_logits(teacher, batch["tokens"])
        yield logits


def teacher_logits(job: Distillation, batches: list[Batch]) -> Iterator[Tensor | None]:
    """The teacher's logits of each micro-batch, on the last pipeline stage.

    Without pipeline stages they are computed one micro-batch at a time, when the student asks. With
    stages the teacher runs its own forward schedule first.
    """
    if job.session.parallel.pp == 1:
        return _teacher_now(job.teacher, batches)
    collected: list[Tensor] = []
    forward_batches(job.teacher, batches, job.session, lambda logits, _: collected.append(logits))
    return iter(collected) if job.session.is_last_stage else repeat(None)


def kl_of(job: Distillation) -> KL:
    """The loss of the recipe, bound to this layout."""
    reduce, temperature = vocab_reduce(job.session), job.params.loss.temperature
    vocab_size = job.shape.vocab_size

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        return forward_kl(
            mask_padded_vocab(student, vocab_size),
            mask_padded_vocab(teacher, vocab_size),
            temperature=temperature,
            reduce=reduce,
        )

    return kl


def vocab_reduce(session: Session) -> VocabReduce:
    """Reductions over the tensor-parallel group."""
    if session.parallel.tp == 1:
        return VocabReduce()
    group = parallel_state.get_tensor_model_parallel_group()

    def all_reduce(op: Any) -> Callable[[Tensor], Tensor]:
        def apply(tensor: Tensor) -> Tensor:
            torch.distributed.all_reduce(tensor, op=op, group=group)
            return tensor

        return apply

    return VocabReduce(max=all_reduce(torch.distributed.ReduceOp.MAX), sum=all_reduce(torch.distributed.ReduceOp.SUM))


def validate(job: Distillation) -> dict[str, float]:
    """KL to the teacher and next-token losses of both, on held-out text, in nats per token."""
    kl, session, vocab_size = kl_of(job), job.session, job.shape.vocab_size
    sums = torch.zeros(4, dtype=torch.float64, device=session.device)
    student = job.trainable.model
    for batch in job.heldout.batches:
        teacher = teacher_logits(job, [batch])

        def add(logits: Tensor, batch: Batch, teacher: Iterator[Tensor | None] = teacher) -> None:
            expected, mask = next(teacher), batch["loss_mask"]
            assert expected is not None
            values = (
                kl(logits, expected),
                token_nll(logits, batch["labels"], vocab_size),
                token_nll(expected, batch["labels"], vocab_size),
                torch.ones_like(mask),
            )
            sums.add_(torch.stack([(value * mask).double().sum() for value in values]))

        with evaluating(student):
            forward_batches(student, [batch], session, add)
    if not (session.is_last_stage and session.tp_rank == 0):
        sums.zero_()
    session.sum(sums)
    kl_sum, loss_sum, teacher_sum, count = sums.tolist()
    return {
        "valid_kl": kl_sum / count,
        "valid_loss": loss_sum / count,
        "valid_teacher_loss": teacher_sum / count,
    }


def _mean_over_ranks(loss: Tensor | None, session: Session) -> float:
    """The last stage's loss, averaged over data-parallel ranks, on every rank."""
    total = torch.zeros(2, dtype=torch.float64, device=session.device)
    if loss is not None and session.is_last_stage:
        total += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
    session.sum(total)
    return float(total[0] / total[1])


def _require_finite(loss: float, grad_norm: float, step: int) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise NumericsError(
        f"distill: loss {loss}, gradient norm {grad_norm} at step {step + 1}.",
        next_step="Lower stages.distill.lr or raise warmup_steps; the last good checkpoint is kept.",
    )


def publish(job: Distillation, student_dir: Path, work_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Write the trained student as a Hugging Face checkpoint, with its curves; facts on the main rank."""
    writer = None
    if job.session.is_main:
        source = Checkpoint.open(student_dir)
        writer = CheckpointWriter(out_dir, source.config)
        copy_side_files(student_dir, out_dir)
        shutil.copy2(work_dir / "curves.jsonl", out_dir / "curves.jsonl")
        shutil.copytree(work_dir / "tensorboard", out_dir / "tensorboard", dirs_exist_ok=True)
    save_model(job.trainable.model, job.shape, job.session, writer, dtype=DTYPES[job.params.precision])
    if writer is None:
        return {}
    writer.close()
    return model_facts(out_dir)
