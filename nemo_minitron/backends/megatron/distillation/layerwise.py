"""Layer-local distillation: every layer of a student learns its part of the teacher apart from all other layers.

The teacher runs forward once for a micro-batch. Each student layer starts from the teacher's own residual stream and
learns the stream where the next kept layer begins. The backward pass of a layer runs as soon as its loss is known, so
only one layer has activations in memory, and no pipeline stage waits for another one's gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.backends.megatron.distillation.distill import heldout_text, load_pair, make_job, validate
from nemo_minitron.backends.megatron.distillation.hidden import own_token_weights
from nemo_minitron.backends.megatron.distillation.setup import DistillSetup
from nemo_minitron.backends.megatron.distillation.stage_transfer import Move, transfer
from nemo_minitron.backends.megatron.model.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.model.head import bare, model_hidden
from nemo_minitron.backends.megatron.model.layers import require_document_mask
from nemo_minitron.backends.megatron.model.parts import (
    Model,
    after_layers,
    layers,
    separate_layers,
    train_only_layers,
    without_shared_embeddings,
)
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.training.loop import Job, Objective
from nemo_minitron.backends.megatron.training.optim import Trainable
from nemo_minitron.backends.megatron.training.schedule import Parts, Round
from nemo_minitron.distillation.flops import layerwise_flops_per_token
from nemo_minitron.distillation.layers import relative_errors, stream_positions
from nemo_minitron.errors import PlanError
from nemo_minitron.families import ModelShape
from nemo_minitron.families.axes import HIDDEN
from nemo_minitron.families.registry import width_axes
from nemo_minitron.families.split import stage_bounds
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.schema.losses import Loss
from nemo_minitron.schema.training import LayerDistillation

Streams = dict[int, Tensor]
"""Position -> the teacher's stream at the kept channels [S, B, D]; [S / tp, B, D] with sequence parallelism."""
LAYER_LOSS = "valid_layer_loss"
"""Curve column of the mean over all layers; that of layer i has `_i` at the end."""


@dataclass(frozen=True)
class TeacherStreams:
    """The teacher's residual streams that the student's layers start from and learn."""

    teacher: Model
    positions: tuple[int, ...]
    """Student layer i maps the stream at the i-th position to that at the next one."""
    channels: Tensor | None
    """Kept hidden channels; None: all."""
    hidden_size: int
    """Hidden size of the student."""
    moves: list[Move[int]]
    session: Session

    def of(self, batches: Iterable[Batch]) -> Iterator[Streams]:
        """Run the teacher on one micro-batch at a time; yield the streams that this pipeline stage needs."""
        dtype = self.teacher.config.params_dtype
        for batch in batches:
            sizes = dict.fromkeys(self.positions, self._size(batch))
            yield transfer(self._recorded(batch), self.moves, sizes, dtype, self.session)

    def _recorded(self, batch: Batch) -> Streams:
        wanted, found = {move.key for move in self.moves if move.source == self.session.pp_rank}, Streams()

        def keep(layer: int, given: Tensor, out: Tensor) -> None:
            for position, stream in ((layer, given), (layer + 1, out)):
                if position in wanted and position not in found:
                    found[position] = stream if self.channels is None else stream.index_select(-1, self.channels)

        with after_layers(self.teacher, keep):
            forward_batches(self.teacher, [batch], self.session, lambda _, __: None, forward=model_hidden)
        return found

    def _size(self, batch: Batch) -> tuple[int, int, int]:
        size, length = batch["tokens"].shape
        parallel = self.session.parallel
        return length // (parallel.tp if parallel.sequence_parallel else 1), size, self.hidden_size


def stream_moves(positions: Sequence[int], num_teacher_layers: int, pp: int) -> list[Move[int]]:
    """Return where each pipeline stage gets its streams from: from itself if it can, as in width pruning."""
    teacher = stage_bounds(num_teacher_layers, pp)
    moves = []
    for target, (start, stop) in enumerate(stage_bounds(len(positions) - 1, pp)):
        for position in positions[start : stop + 1]:
            # A stream between two stages is in both: as output of the one and as input of the other.
            having = [stage for stage, (first, end) in enumerate(teacher) if first <= position <= end]
            moves.append(Move(position, target if target in having else having[0], target))
    return moves


class LayerwiseTraining:
    """The losses and gradients of all layers of the student on this rank.

    Values are shares: those of all tensor-, pipeline- and context-parallel ranks sum to the loss.
    """

    def __init__(self, streams: TeacherStreams, setup: DistillSetup) -> None:
        self._streams, self._setup, self._session = streams, setup, setup.session
        self._num_layers = len(streams.positions) - 1
        parallel = setup.session.parallel
        # Without sequence parallelism all tensor-parallel ranks have the same tokens.
        self._copies = 1 if parallel.sequence_parallel else parallel.tp
        self._losses_of_step = torch.zeros(self._num_layers)

    def teacher_streams(self, part: Round, batches: Iterable[Batch]) -> Iterator[Streams]:
        """Yield the teacher's streams of each micro-batch, computed when they are needed."""
        return self._streams.of(batches)

    def gradients(
        self, trainable: Trainable, part: Round, batches: Iterator[Batch], streams: Iterator[Streams]
    ) -> list[Parts]:
        """Compute the gradients of these micro-batches; return the mean loss of the layers of each."""
        trainable.ddp.zero_grad_buffer()
        trainable.optimizer.zero_grad()
        count = part.num_micro_batches
        values = self._zeros(count)
        scale = self._session.parallel.cp / count  # Megatron averages gradients over context-parallel ranks.
        for number, batch in enumerate(batches):
            given = next(streams)
            with nullcontext() if number == count - 1 else trainable.ddp.no_sync():
                self._run(trainable.ddp, batch, given, batch["token_weights"], values[number], scale)
            del given  # Finish these before the teacher computes the next ones.
        with without_shared_embeddings(trainable.model):
            trainable.model.config.finalize_model_grads_func([trainable.ddp])
        dist.all_reduce(values, group=parallel_state.get_model_parallel_group())
        self._losses_of_step = values.mean(0)
        return [{"train_loss": row.mean()} for row in values]

    def finish(self) -> dict[str, float]:
        """Return the largest loss of a layer in the step, over the global batch."""
        losses = self._losses_of_step.clone()
        dist.all_reduce(losses, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return {"worst_layer_loss": float(losses.max()) / self._session.parallel.dp}

    def validate(self) -> dict[str, float]:
        """Measure the whole student, as `distill` does, and each layer on the teacher's streams."""
        found = validate(self._setup)
        batches = self._setup.heldout.batches
        values, counts = self._zeros(1)[0], self._zeros(1)[0]
        with evaluating(self._setup.student), torch.no_grad():
            for batch, given in zip(batches, self._streams.of(batches), strict=True):
                self._run(self._setup.student, batch, given, batch["loss_mask"], values)
                counts += batch["loss_mask"].double().sum()
        copies = self._session.parallel.tp * self._session.parallel.pp
        losses = (self._session.sum(values) / self._session.sum(counts / copies)).tolist()
        each = {f"{LAYER_LOSS}_{number}": loss for number, loss in enumerate(losses)}
        return {**found, LAYER_LOSS: sum(losses) / len(losses), **each}

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._num_layers, dtype=torch.float64, device=self._session.device)

    def _run(
        self,
        student: torch.nn.Module,
        batch: Batch,
        streams: Streams,
        weights_BS: Tensor,
        values: Tensor,
        scale: float | None = None,
    ) -> None:
        """Run each layer on the teacher's stream and add its weighted loss to `values`.

        Args:
            scale: factor of the gradients; None: no backward pass.
        """
        tokens, positions = own_token_weights(weights_BS, self._session), self._streams.positions

        def compare(layer: int, out: Tensor) -> None:
            loss = (relative_errors(out, streams[positions[layer + 1]]) * tokens).sum()
            if scale is not None and loss.requires_grad:
                (loss * scale).backward()
            values[layer] += loss.detach() / self._copies

        model = bare(student)
        if not self._session.is_first_stage:
            # The stage needs an input of the right size; its first layer gets the stream anyway.
            model.set_input_tensor(streams[positions[layers(model)[0].index]])
        with separate_layers(model, lambda layer: streams[positions[layer]], compare):
            model_hidden(student, batch)


def prepare(
    params: LayerDistillation,
    plan: PrunePlan,
    student_dir: Path,
    teacher_dir: Path,
    data_dir: Path,
    work_dir: Path,
    session: Session,
) -> Job:
    """Load both models, open the data, and leave only layers trainable from which the plan takes something.

    Raises:
        PlanError: a pipeline stage has no such layer.
    """
    require_document_mask(params.reset_attention_mask, session.parallel.cp)
    (student, shape), (teacher, teacher_shape) = load_pair(params, student_dir, teacher_dir, session)
    teacher.requires_grad_(False).eval()
    positions = stream_positions(plan.layers, teacher_shape.num_layers)
    _train_cut_layers(student, cut_layers(plan, teacher_shape), session)
    setup = DistillSetup(
        Loss(),
        student,
        teacher,
        min(shape.vocab_size, teacher_shape.vocab_size),
        heldout_text(params, data_dir, session),
        session,
        params.seed,
        teacher_shape=teacher_shape,
    )
    kept = plan.shared[HIDDEN.name]
    everything = len(kept) == teacher_shape.hidden_size
    streams = TeacherStreams(
        teacher=teacher,
        positions=positions,
        channels=None if everything else torch.tensor(kept, device=session.device),
        hidden_size=len(kept),
        moves=stream_moves(positions, teacher_shape.num_layers, session.parallel.pp),
        session=session,
    )
    training = LayerwiseTraining(streams, setup)
    job = make_job(params, params.num_steps, setup, shape, data_dir, work_dir)
    return replace(
        job,
        trainable=replace(job.trainable, has_frozen_layers=True),
        objective=Objective(
            parts=("train_loss",),
            prepare=training.teacher_streams,
            gradients=training.gradients,
            validate=training.validate,
            finish=training.finish,
        ),
        flops_per_token=layerwise_flops_per_token(shape, teacher_shape, params.seq_len_tokens),
    )


def cut_layers(plan: PrunePlan, teacher: ModelShape) -> list[int]:
    """Return the student's layers that cannot just repeat the teacher's, because they have another task or less width.

    The last kept layer before dropped ones also stands for these, and the first layer starts from the embeddings even
    if layers before it were dropped. The others start without error, and Adam would only move them away, however small
    their gradients are.
    """
    width = [axis for axis in width_axes(teacher) if axis.name in plan.shared or axis.name in plan.by_layer]
    positions = stream_positions(plan.layers, teacher.num_layers)
    return [
        number
        for number, layer in enumerate(plan.layers)
        if positions[number : number + 2] != (layer, layer + 1)
        or any(len(plan.kept(axis, layer)) < getattr(teacher, axis.target_key) for axis in width)
    ]


def _train_cut_layers(student: Model, cut: list[int], session: Session) -> None:
    idle = torch.tensor(float(not train_only_layers(student, cut)), device=session.device)
    if session.sum(idle).item():
        raise PlanError(
            "The plan leaves every layer of the model, or of a pipeline stage, as it is, so there is nothing to train.",
            allowed=f"stages with one of the layers {', '.join(map(str, cut)) or '(none)'} each",
            next_step="Use fewer pipeline stages (dp instead), or leave out this stage if no layer was cut.",
        )
