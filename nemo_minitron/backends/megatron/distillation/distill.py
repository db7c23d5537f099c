"""What a student is trained to do: match a teacher, or the text itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.data.datasets import (
    HeldOutBatches,
    eod_id_of,
    heldout_batches,
    training_samples,
    training_sources,
)
from nemo_minitron.backends.megatron.distillation.correction import Correction
from nemo_minitron.backends.megatron.distillation.hidden import (
    HiddenStates,
    States,
    Weight,
    comparing,
    hidden_states,
    reading,
    total_loss,
    transport,
    weigh,
)
from nemo_minitron.backends.megatron.distillation.lesson import Lesson
from nemo_minitron.backends.megatron.model.evaluate import EVAL_BATCH_SIZE
from nemo_minitron.backends.megatron.model.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.model.head import head_weight, model_hidden, vocab_of
from nemo_minitron.backends.megatron.model.layers import require_document_mask
from nemo_minitron.backends.megatron.model.parts import Model, head
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.context import own_rows, sum_over_context
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.training.loop import Job, Objective, Parts
from nemo_minitron.backends.megatron.training.optim import make_trainable
from nemo_minitron.distillation.cache import TeacherCache, require_same_keys
from nemo_minitron.distillation.flops import training_flops_per_token
from nemo_minitron.distillation.linear import Head
from nemo_minitron.distillation.losses import forward_kl, next_token
from nemo_minitron.distillation.objective import Distance, cached_teacher, live_teacher, token_loss
from nemo_minitron.distillation.sparse import SparseTeacher, uniforms_of
from nemo_minitron.distillation.vocab import Vocab
from nemo_minitron.errors import DataError
from nemo_minitron.families import ModelShape
from nemo_minitron.families.split import padded_vocab_size
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.schema.losses import LogitsLoss, Loss, Sampled
from nemo_minitron.schema.training import Distillation, Optimization, TextTraining

NEXT_TOKEN = Loss(logits=None, next_token=1.0)
KL = LogitsLoss()
HeadLoss = Callable[[Tensor], tuple[Tensor, Parts]]
"""The input of the student's output layer [B, S, D] -> loss, parts."""


@dataclass(frozen=True)
class Classroom:
    """The models and the text of one training."""

    loss: Loss
    student: Model
    teacher: Model | None
    vocab_size: int
    """Of the tokens that both models know."""
    heldout: HeldOutBatches
    session: Session
    seed: int
    hidden: HiddenStates | None = None
    cache: TeacherCache | None = None
    teacher_loss: float | None = None
    """Held-out, as the cache has it; None where it was measured on other text."""
    teacher_shape: ModelShape | None = None
    correction: Correction | None = None
    """Where the teacher goes on learning."""

    @property
    def vocab(self) -> Vocab:
        rows = head(self.student).output_size_per_partition if self.session.is_last_stage else 0
        return vocab_of(self.session, rows)


def prepare_cached(
    params: Distillation, student_dir: Path, cache_dir: Path, data_dir: Path, work_dir: Path, session: Session
) -> Job:
    """Load the student; the teacher is read from a cache, whose samples are the training samples."""
    require_document_mask(params.reset_attention_mask)
    cache = TeacherCache(cache_dir)
    require_same_keys(cache.facts, params, cache_dir)
    student, shape = load_model(student_dir, session, precision=params.precision, seq_len_tokens=params.seq_len_tokens)
    if shape.vocab_size < cache.facts.vocab_size:
        raise DataError(
            f"The student knows {shape.vocab_size:,} tokens, the teacher cache has {cache.facts.vocab_size:,}.",
            where=f"{student_dir}, {cache_dir}",
        )
    heldout = _heldout(params, data_dir, session)
    size, loss = cache.facts.vocab_size, cache.facts.teacher_loss(params)
    room = Classroom(params.loss, student, None, size, heldout, session, params.seed, cache=cache, teacher_loss=loss)
    return _job(params, params.num_steps, room, shape, data_dir, work_dir, cache.facts.num_samples)


def prepare(
    params: Distillation, student_dir: Path, teacher_dir: Path, data_dir: Path, work_dir: Path, session: Session
) -> Job:
    """Load the student and, where the loss needs it, the teacher; open the data."""
    require_document_mask(params.reset_attention_mask)
    shapes = [Checkpoint.open(folder).shape for folder in (student_dir, teacher_dir)]
    sizes = [shape.vocab_size for shape in shapes]
    options = {
        "precision": params.precision,
        "seq_len_tokens": params.seq_len_tokens,
        # One split of the vocabulary for both, whatever each would be padded to alone.
        "padded_vocab": padded_vocab_size(max(sizes), session.parallel.tp),
    }
    student, shape = load_model(student_dir, session, **options)  # type: ignore[arg-type]
    heldout = _heldout(params, data_dir, session)
    if not params.loss.needs_teacher:
        room = Classroom(params.loss, student, None, min(sizes), heldout, session, params.seed)
        return _job(params, params.num_steps, room, shape, data_dir, work_dir)
    teacher, _ = load_model(teacher_dir, session, **options)  # type: ignore[arg-type]
    hidden = None
    if params.loss.hidden is not None:
        micro_batches = params.global_batch_size // (session.parallel.dp * session.parallel.micro_batch_size)
        hidden = hidden_states(params.loss.hidden, shapes[1], student, shape, session, micro_batches)
    room = Classroom(
        params.loss, student, teacher, min(sizes), heldout, session, params.seed, hidden, teacher_shape=shapes[1]
    )
    if params.of_teacher is None:
        teacher.requires_grad_(False).eval()
    else:
        room = replace(room, correction=_correction(room, params.of_teacher, params.num_steps, teacher, sizes[1]))
    return _job(params, params.num_steps, room, shape, data_dir, work_dir)


def _correction(room: Classroom, params: Optimization, num_steps: int, teacher: Model, vocab_size: int) -> Correction:
    """The teacher's own training, as `prepare_training` would have it."""
    own = Classroom(NEXT_TOKEN, teacher, None, vocab_size, room.heldout, room.session, params.seed)
    trainable = make_trainable(teacher, params, num_steps, room.session.parallel)
    return Correction(trainable, objective_of(own).forward, room.hidden, room.session, params.seq_len_tokens)


def prepare_training(params: TextTraining, model_dir: Path, data_dir: Path, work_dir: Path, session: Session) -> Job:
    """Load the model and open the data: next-token cross entropy, no teacher."""
    require_document_mask(params.reset_attention_mask)
    model, shape = load_model(model_dir, session, precision=params.precision, seq_len_tokens=params.seq_len_tokens)
    heldout = _heldout(params, data_dir, session)
    room = Classroom(NEXT_TOKEN, model, None, shape.vocab_size, heldout, session, params.seed)
    return _job(params, params.num_steps, room, shape, data_dir, work_dir)


def _heldout(params: Optimization, data_dir: Path, session: Session) -> HeldOutBatches:
    return heldout_batches(
        data_dir,
        session,
        num_tokens=params.valid_num_tokens,
        seq_len_tokens=params.seq_len_tokens,
        batch_size=EVAL_BATCH_SIZE,
        whole_documents=False,
    )


def _job(
    params: Optimization,
    num_steps: int,
    room: Classroom,
    shape: ModelShape,
    data_dir: Path,
    work_dir: Path,
    num_samples: int | None = None,
) -> Job:
    samples = training_samples(
        data_dir,
        # Which sample has which number depends on how many there are.
        num_samples=num_samples or num_steps * params.global_batch_size,
        seq_len_tokens=params.seq_len_tokens,
        seed=params.seed,
        cache_dir=work_dir / "data_index",
    )
    trainable = make_trainable(room.student, params, num_steps, room.session.parallel)
    if room.correction is not None:
        trainable = replace(trainable, teacher=room.correction.trainable)
    return Job(
        params=params,
        num_steps=num_steps,
        trainable=trainable,
        shape=shape,
        samples=samples,
        session=room.session,
        objective=objective_of(room),
        flops_per_token=training_flops_per_token(
            shape, room.teacher_shape, params.seq_len_tokens, teacher_learns=room.correction is not None
        ),
        separate_at=eod_id_of(data_dir) if params.reset_attention_mask else None,
        sources=training_sources(data_dir),
    )


def objective_of(room: Classroom) -> Objective:
    """The recipe's loss over these models."""

    correction = room.correction

    def prepare(step: int, batches: list[Batch]) -> Iterator[Lesson]:
        return lessons(room, batches) if correction is None else iter(correction.lessons(batches))

    def forward(model: torch.nn.Module, batch: Batch, lesson: Lesson) -> Any:
        def loss(hidden_BSD: Tensor) -> tuple[Tensor, Parts]:
            return _head_loss(room, model, batch, lesson, hidden_BSD)

        if room.hidden is None:
            return model_hidden(model, batch), loss
        return _forward_comparing(room, room.hidden, model, batch, lesson, loss)

    finish = dict if correction is None else correction.finish
    return Objective(_part_names(room.loss), prepare, forward, lambda: validate(room), finish)


def _part_names(loss: Loss) -> tuple[str, ...]:
    used = {
        "logits_loss": loss.logits is not None,
        "lm_loss": bool(loss.next_token),
        "hidden_loss": loss.hidden is not None,
    }
    return ("train_loss", *(name for name, is_used in used.items() if is_used))


def _head_loss(
    room: Classroom, model: torch.nn.Module, batch: Batch, lesson: Lesson, hidden_BSD: Tensor
) -> tuple[Tensor, Parts]:
    return token_loss(
        room.loss,
        hidden_BSD.flatten(0, 1),
        head_weight(model, room.vocab_size),
        batch["labels"].flatten(),
        batch["token_weights"].flatten(),
        _distance(room, batch, lesson),
        room.vocab,
        over_ranks=sum_over_context,
    )


def _forward_comparing(
    room: Classroom, hidden: HiddenStates, model: torch.nn.Module, batch: Batch, lesson: Lesson, head_loss: HeadLoss
) -> Any:
    """The forward pass with hidden-state losses attached to it."""
    weight = Weight(hidden)
    with comparing(model, hidden, lesson.states, batch["token_weights"], weight) as values:
        output = model_hidden(model, batch)
    of_states = total_loss(hidden, values)

    def loss(hidden_BSD: Tensor) -> tuple[Tensor, Parts]:
        value, parts = head_loss(hidden_BSD)
        alpha = weigh(hidden, weight, parts.get("logits_loss"), of_states)
        # The attached losses bring their own gradients: here their value is added.
        return value + alpha * of_states, {**parts, "hidden_loss": of_states}

    return output, loss


def _distance(room: Classroom, batch: Batch, lesson: Lesson) -> Distance | None:
    loss = room.loss.logits
    if loss is None:
        return None
    if lesson.written is not None:
        return cached_teacher(lesson.written, loss, room.vocab)
    assert room.teacher is not None
    assert lesson.head_input is not None
    weight = head_weight(room.teacher, room.vocab_size)
    uniforms = None
    if isinstance(loss.sparse, Sampled):
        size, length = batch["sample_tokens"].shape
        uniforms = uniforms_of(room.seed, batch["sample_ids"], length, loss.sparse.rounds)
        uniforms = own_rows(uniforms, size, room.session).to(batch["tokens"].device)
    return live_teacher(lesson.head_input.flatten(0, 1), weight, loss, uniforms, room.vocab)


def lessons(room: Classroom, batches: list[Batch]) -> Iterator[Lesson]:
    """What the teacher says of each micro-batch.

    Without pipeline stages it is computed one micro-batch at a time, when the student asks. With stages the teacher
    runs its own forward schedule first.
    """
    if room.cache is not None:
        return _lessons_written(room, room.cache, batches)
    if room.teacher is None:
        return repeat(Lesson(), len(batches))
    if room.session.parallel.pp == 1:
        return _lessons_now(room, room.teacher, batches)
    return iter(_lessons_before(room, room.teacher, batches))


def _lessons_written(room: Classroom, cache: TeacherCache, batches: list[Batch]) -> Iterator[Lesson]:
    for batch in batches:
        numbers = _cached_numbers(room, cache, batch)
        if numbers is None or not room.session.is_last_stage:
            yield Lesson()
            continue
        whole = batch["sample_tokens"]
        found = cache.read(numbers.tolist(), whole.cpu().numpy())
        yield Lesson(written=_own_tokens(found, len(whole), room.session).to(whole.device))


def _own_tokens(teacher: SparseTeacher, batch_size: int, session: Session) -> SparseTeacher:
    fields = (teacher.ids, teacher.probs, teacher.negative_entropy)
    return SparseTeacher(*(own_rows(field, batch_size, session) for field in fields))


def _cached_numbers(room: Classroom, cache: TeacherCache, batch: Batch) -> Tensor | None:
    """Under which numbers the cache has a batch; None: it does not."""
    if "sample_ids" in batch:
        return batch["sample_ids"]
    return batch["window_ids"] + cache.facts.first_heldout if _knows_heldout(room) else None


def _knows_heldout(room: Classroom) -> bool:
    """Whether the cache has what the teacher says of the held-out text."""
    return room.cache is not None and room.teacher_loss is not None and room.cache.facts.num_heldout > 0


def _lessons_now(room: Classroom, teacher: Model, batches: list[Batch]) -> Iterator[Lesson]:
    taps = room.hidden.teacher_taps if room.hidden is not None else ()
    for batch in batches:
        with torch.no_grad(), reading(teacher, taps) as states:
            head_input = model_hidden(teacher, batch)
        yield Lesson(head_input, states)


def _lessons_before(room: Classroom, teacher: Model, batches: list[Batch]) -> list[Lesson]:
    outputs: list[Tensor | None] = []
    kept: list[States] = []
    taps = room.hidden.teacher_taps if room.hidden is not None else ()
    with reading(teacher, taps) as states:

        def after() -> None:
            kept.append(dict(states))

        def keep(hidden: Tensor, _: Batch) -> None:
            outputs.append(hidden)

        forward_batches(teacher, batches, room.session, keep, after=after, forward=model_hidden)
    if room.hidden is not None:
        kept = transport(kept, room.hidden, batches, teacher.config.params_dtype)
    if not room.session.is_last_stage:
        outputs = [None] * len(batches)
    return [Lesson(head_input, states) for head_input, states in zip(outputs, kept, strict=True)]


def validate(room: Classroom) -> dict[str, float]:
    """KL to the teacher at temperature 1 and next-token losses of both, on held-out text, in nats per token."""
    sums = torch.zeros(4, dtype=torch.float64, device=room.session.device)
    with evaluating(room.student):
        for batch in room.heldout.batches:
            lesson = next(lessons(room, [batch]))

            def add(hidden: Tensor, batch: Batch, lesson: Lesson = lesson) -> None:
                sums.add_(_measure(room, hidden, batch, lesson))

            forward_batches(room.student, [batch], room.session, add, forward=model_hidden)
    if not (room.session.is_last_stage and room.session.tp_rank == 0):
        sums.zero_()
    room.session.sum(sums)
    kl, loss, teacher_loss = (sums[:3] / sums[3]).tolist()
    if room.teacher is None:
        told = {} if room.teacher_loss is None else {"valid_teacher_loss": room.teacher_loss}
        return ({"valid_kl": kl} if _knows_heldout(room) else {}) | {"valid_loss": loss, **told}
    return {"valid_kl": kl, "valid_loss": loss, "valid_teacher_loss": teacher_loss}


def _measure(room: Classroom, hidden_BSD: Tensor, batch: Batch, lesson: Lesson) -> Tensor:
    """Sums over the batch's tokens: KL, loss of the student, loss of the teacher, tokens."""
    labels, mask, vocab = batch["labels"].flatten(), batch["loss_mask"].flatten(), room.vocab
    student = Head(head_weight(room.student, room.vocab_size), hidden_BSD.flatten(0, 1))
    teacher = None
    if room.teacher is not None and lesson.head_input is not None:
        teacher = Head(head_weight(room.teacher, room.vocab_size), lesson.head_input.flatten(0, 1))
    sums = torch.zeros(4, dtype=torch.float64, device=mask.device)
    for rows in student.all_blocks():
        logits = student.logits(rows)
        values = [torch.zeros_like(mask[rows]), next_token(logits.clone(), labels[rows], vocab)[0]]
        if teacher is not None:
            expected = teacher.logits(rows)
            values.append(next_token(expected.clone(), labels[rows], vocab)[0])
            values[0] = forward_kl(logits, expected, KL, vocab)[0]
        else:
            values.append(values[0])
            if lesson.written is not None:
                values[0] = cached_teacher(lesson.written, KL, vocab)(logits, rows)[0]
        weights = mask[rows].double()
        sums += torch.stack([value.double() @ weights for value in (*values, torch.ones_like(mask[rows]))])
    return sums
