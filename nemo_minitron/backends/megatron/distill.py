"""What a student is trained to do: match a frozen teacher, or the text itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_minitron.backends.megatron.datasets import HeldOutBatches, heldout_batches, training_samples
from nemo_minitron.backends.megatron.evaluate import EVAL_BATCH_SIZE
from nemo_minitron.backends.megatron.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.head import head_weight, model_hidden, vocab_of
from nemo_minitron.backends.megatron.optim import make_trainable
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.backends.megatron.training import Job, Objective, Parts
from nemo_minitron.backends.megatron.weights import load_model
from nemo_minitron.config.schema import DistillStage, LogitsLoss, Loss, Optimization, TrainStage
from nemo_minitron.distillation.linear import CHUNK_BYTES, Head, chunks
from nemo_minitron.distillation.losses import forward_kl, next_token
from nemo_minitron.distillation.objective import Distance, live_teacher, token_loss
from nemo_minitron.distillation.vocab import Vocab

NEXT_TOKEN = Loss(logits=None, next_token=1.0)
KL = LogitsLoss()


@dataclass(frozen=True)
class Classroom:
    """The models and the text of one training."""

    loss: Loss
    student: GPTModel
    teacher: GPTModel | None
    vocab_size: int
    heldout: HeldOutBatches
    session: Session

    @property
    def vocab(self) -> Vocab:
        rows = self.student.output_layer.output_size_per_partition if self.session.is_last_stage else 0
        return vocab_of(self.session, rows)


def prepare(
    params: DistillStage, student_dir: Path, teacher_dir: Path | None, data_dir: Path, work_dir: Path, session: Session
) -> Job:
    """Load the student and, where the loss needs it, the teacher; open the data."""
    teacher = None
    if teacher_dir is not None and params.loss.needs_teacher:
        options = {"precision": params.precision, "seq_len_tokens": params.seq_len_tokens}
        teacher, _ = load_model(teacher_dir, session, **options)  # type: ignore[arg-type]
        teacher.requires_grad_(False).eval()
    return _job("distill", params, params.num_steps, params.loss, student_dir, teacher, data_dir, work_dir, session)


def prepare_training(params: TrainStage, model_dir: Path, data_dir: Path, work_dir: Path, session: Session) -> Job:
    """Load the model and open the data: next-token cross entropy, no teacher."""
    return _job("train", params, params.num_steps, NEXT_TOKEN, model_dir, None, data_dir, work_dir, session)


def _job(
    stage: str,
    params: Optimization,
    num_steps: int,
    loss: Loss,
    student_dir: Path,
    teacher: GPTModel | None,
    data_dir: Path,
    work_dir: Path,
    session: Session,
) -> Job:
    student, shape = load_model(student_dir, session, precision=params.precision, seq_len_tokens=params.seq_len_tokens)
    heldout = heldout_batches(
        data_dir,
        session,
        num_tokens=params.valid_num_tokens,
        seq_len_tokens=params.seq_len_tokens,
        batch_size=EVAL_BATCH_SIZE,
    )
    samples = training_samples(
        data_dir,
        num_samples=num_steps * params.global_batch_size,
        seq_len_tokens=params.seq_len_tokens,
        seed=params.seed,
        cache_dir=work_dir / "data_index",
    )
    classroom = Classroom(loss, student, teacher, shape.vocab_size, heldout, session)
    trainable = make_trainable(student, params, num_steps)
    return Job(stage, params, num_steps, trainable, shape, samples, session, objective_of(classroom))


def objective_of(room: Classroom) -> Objective:
    """The recipe's loss over these models."""

    def prepare(step: int, batches: list[Batch]) -> Iterator[Tensor | None]:
        return teacher_hidden(room, batches)

    def forward(model: torch.nn.Module, batch: Batch, extra: Tensor | None) -> Any:
        def loss(hidden_BSD: Tensor) -> tuple[Tensor, Parts]:
            mask = batch["loss_mask"].flatten()
            return token_loss(
                room.loss,
                hidden_BSD.flatten(0, 1),
                head_weight(model, room.vocab_size),
                batch["labels"].flatten(),
                mask / mask.sum(),
                _distance(room, extra),
                room.vocab,
            )

        return model_hidden(model, batch), loss

    return Objective(_part_names(room.loss), prepare, forward, lambda: validate(room))


def _part_names(loss: Loss) -> tuple[str, ...]:
    text = ("lm_loss",) if loss.next_token else ()
    return ("train_loss", *(("logits_loss",) if loss.logits is not None else ()), *text)


def _distance(room: Classroom, teacher_hidden_BSD: Tensor | None) -> Distance | None:
    if room.loss.logits is None:
        return None
    assert room.teacher is not None
    assert teacher_hidden_BSD is not None
    weight = head_weight(room.teacher, room.vocab_size)
    return live_teacher(teacher_hidden_BSD.flatten(0, 1), weight, room.loss.logits, vocab=room.vocab)


def teacher_hidden(room: Classroom, batches: list[Batch]) -> Iterator[Tensor | None]:
    """The input of the teacher's output layer [B, S, D] for each micro-batch, on the last pipeline stage.

    Without pipeline stages it is computed one micro-batch at a time, when the student asks. With stages the teacher
    runs its own forward schedule first.
    """
    if room.teacher is None:
        return repeat(None, len(batches))
    if room.session.parallel.pp == 1:
        return _teacher_now(room.teacher, batches)
    collected: list[Tensor] = []
    forward_batches(
        room.teacher, batches, room.session, lambda hidden, _: collected.append(hidden), forward=model_hidden
    )
    return iter(collected) if room.session.is_last_stage else repeat(None, len(batches))


def _teacher_now(teacher: GPTModel, batches: list[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        with torch.no_grad():
            hidden = model_hidden(teacher, batch)
        yield hidden


def validate(room: Classroom) -> dict[str, float]:
    """KL to the teacher at temperature 1 and next-token losses of both, on held-out text, in nats per token."""
    sums = torch.zeros(4, dtype=torch.float64, device=room.session.device)
    with evaluating(room.student):
        for batch in room.heldout.batches:
            teacher = next(teacher_hidden(room, [batch]))

            def add(hidden: Tensor, batch: Batch, teacher: Tensor | None = teacher) -> None:
                sums.add_(_measure(room, hidden, batch, teacher))

            forward_batches(room.student, [batch], room.session, add, forward=model_hidden)
    if not (room.session.is_last_stage and room.session.tp_rank == 0):
        sums.zero_()
    room.session.sum(sums)
    kl, loss, teacher_loss = (sums[:3] / sums[3]).tolist()
    if room.teacher is None:
        return {"valid_loss": loss}
    return {"valid_kl": kl, "valid_loss": loss, "valid_teacher_loss": teacher_loss}


def _measure(room: Classroom, hidden_BSD: Tensor, batch: Batch, teacher_BSD: Tensor | None) -> Tensor:
    """Sums over the batch's tokens: KL, loss of the student, loss of the teacher, tokens."""
    labels, mask, vocab = batch["labels"].flatten(), batch["loss_mask"].flatten(), room.vocab
    student = Head(head_weight(room.student, room.vocab_size))
    teacher = None if room.teacher is None else Head(head_weight(room.teacher, room.vocab_size))
    sums = torch.zeros(4, dtype=torch.float64, device=mask.device)
    for rows in chunks(len(mask), max(1, CHUNK_BYTES // (4 * student.weight.shape[0]))):
        logits = student.logits(hidden_BSD.flatten(0, 1)[rows])
        values = [torch.zeros_like(mask[rows]), next_token(logits.clone(), labels[rows], vocab)[0]]
        if teacher is not None and teacher_BSD is not None:
            expected = teacher.logits(teacher_BSD.flatten(0, 1)[rows])
            values.append(next_token(expected.clone(), labels[rows], vocab)[0])
            values[0] = forward_kl(logits, expected, KL, vocab)[0]
        else:
            values.append(values[0])
        weights = mask[rows].double()
        sums += torch.stack([value.double() @ weights for value in (*values, torch.ones_like(mask[rows]))])
    return sums
