"""The load of a stage: the model that it runs, its number of tokens, and the operations per token."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_minitron.distillation.flops import (
    forward_flops_per_token,
    layerwise_flops_per_token,
    training_flops_per_token,
)
from nemo_minitron.families import ModelShape, num_params
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Distillation, Optimization, Training
from nemo_minitron.workload.work import Work


@dataclass(frozen=True)
class Load:
    """Computational load of a stage."""

    work: Work
    tokens: int
    flops_per_token: float
    """All operations, those of recomputation included."""
    recomputed_flops_per_token: float = 0.0
    """Operations that repeat others, to save memory."""
    work_bytes: int = 0
    """Disk space in the stage's work folder, without the checkpoints of a training."""
    others: tuple[Load, ...] = ()
    """What the stage computes before or after this, such as a repair before a training."""

    @property
    def phases(self) -> tuple[Load, ...]:
        """All that the stage computes, one after the other."""
        return (self, *self.others)

    @property
    def useful_flops_per_token(self) -> float:
        return self.flops_per_token - self.recomputed_flops_per_token

    @property
    def trained_params(self) -> int:
        """Parameters that have gradients."""
        work = self.work
        teacher = num_params(work.teacher) if work.teacher is not None and work.teacher_learns else 0
        return (num_params(work.shape) if work.trains else 0) + teacher


def training_load(
    shape: ModelShape,
    teacher: ModelShape | None,
    keys: Optimization,
    num_steps: int,
    layout: Parallel,
    *,
    teacher_learns: bool = False,
    hidden_pairs: int = 0,
    anchors: tuple[str, ...] = (),
) -> Load:
    """Return the load of a Megatron training.

    Args:
        teacher: model in memory beside the student; None if there is none.
        teacher_learns: whether the teacher is trained as well (teacher correction).
        hidden_pairs: number of hidden states that are compared with the teacher's.
        anchors: outputs inside each layer that are compared with the teacher's.
    """
    micro_batches = max(1, keys.global_batch_size // (layout.dp * layout.micro_batch_size))
    work = Work(
        shape,
        layout,
        keys.precision,
        keys.seq_len_tokens,
        num_micro_batches=micro_batches,
        teacher=teacher,
        teacher_learns=teacher_learns,
        hidden_pairs=hidden_pairs,
        anchors=anchors,
        validates=True,
    )
    each = training_flops_per_token(shape, teacher, keys.seq_len_tokens, teacher_learns=teacher_learns)
    again = forward_flops_per_token(shape, keys.seq_len_tokens) if layout.recompute == "full" else 0.0
    return Load(work, num_steps * keys.global_batch_size * keys.seq_len_tokens, each + again, again)


def layerwise_load(
    student: ModelShape, teacher: ModelShape, keys: Optimization, num_steps: int, layout: Parallel
) -> Load:
    """Return the load of layer-local distillation, whose training steps do not run the heads."""
    whole = training_load(student, teacher, keys, num_steps, layout)
    each = layerwise_flops_per_token(student, teacher, keys.seq_len_tokens)
    return replace(whole, work=replace(whole.work, layerwise=True), flops_per_token=each)


def distillation_load(
    student: ModelShape | None,
    teacher: ModelShape | None,
    keys: Training,
    num_steps: int,
    layout: Parallel,
    *,
    cached: bool = False,
    teacher_learns: bool = False,
) -> Load | None:
    """Return the load of a distillation; None if the sizes of a model that it runs are not known.

    Args:
        cached: whether the teacher's distributions are read from disk, so that the teacher is not in memory.
    """
    if student is None or (teacher is None and not cached):
        return None
    needed = teacher if keys.loss.needs_teacher and not cached else None
    pairs = 0 if keys.loss.hidden is None else keys.loss.hidden.num_states
    found = training_load(
        student,
        needed,
        keys,
        num_steps,
        layout,
        teacher_learns=teacher_learns,
        hidden_pairs=pairs,
        anchors=() if keys.loss.anchors is None else keys.loss.anchors.of,
    )
    in_fp8 = needed is not None and isinstance(keys, Distillation) and keys.teacher_fp8 is not None
    alone = keys.loss.is_lone_forward_kl and not cached
    return replace(found, work=replace(found.work, lone_forward_kl=alone, teacher_in_fp8=in_fp8))


def alignment_load(
    shape: ModelShape,
    num_steps: int,
    global_batch_size: int,
    seq_len_tokens: int,
    layout: Parallel,
    *,
    answers_per_row: int = 1,
    has_reference: bool = False,
) -> Load:
    """Return the load of a bf16 training by an alignment backend.

    Every row counts with the maximum length, so tokens and hours are upper bounds.

    Args:
        answers_per_row: sequences in a row: two for pairs.
        has_reference: whether a frozen reference model is in memory beside the trained one.
    """
    reference = shape if has_reference else None
    micro_batches = max(1, global_batch_size // (layout.dp * layout.micro_batch_size))
    in_micro_batch = layout.model_copy(update={"micro_batch_size": layout.micro_batch_size * answers_per_row})
    # At most pp micro-batches are in flight. More would count as rounds of targets, which the reference does not keep.
    in_flight = min(layout.pp, micro_batches)
    work = Work(shape, in_micro_batch, "bf16", seq_len_tokens, num_micro_batches=in_flight, teacher=reference)
    tokens = num_steps * global_batch_size * answers_per_row * seq_len_tokens
    return Load(work, tokens, training_flops_per_token(shape, reference, seq_len_tokens))


def forward_load(
    shape: ModelShape, tokens: int, seq_len_tokens: int, precision: str, layout: Parallel, *, batch_size: int = 1
) -> Load:
    """Return the load of forward passes over text, without training.

    Args:
        batch_size: sequences of the largest batch, if it is above the layout's micro-batch.
    """
    layout = layout.model_copy(update={"micro_batch_size": max(batch_size, layout.micro_batch_size)})
    work = Work(shape, layout, precision, seq_len_tokens, trains=False)
    return Load(work, tokens, forward_flops_per_token(shape, seq_len_tokens))
