"""Hidden-state losses in a Megatron model: hooks read the states, which may be on different pipeline stages.

The teacher's states are sent to the stage of the student's states. The loss is computed there and attached to the
student's state, so that the stage's own backward pass adds its gradient. The loss weight is computed on the last stage,
the only one with the logit loss, and sent to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from nemo_minitron.backends.megatron.distillation.stage_transfer import Move, transfer
from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.model.head import bare
from nemo_minitron.backends.megatron.model.parts import Model, final_norm, is_hybrid, layers
from nemo_minitron.backends.megatron.runtime.context import sum_over_context
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.distillation.hidden import Pair, Tap, pairs_of, state_loss
from nemo_minitron.distillation.losses import balancing_weight
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.families import ModelShape
from nemo_minitron.families.split import stage_bounds
from nemo_minitron.schema.losses import HiddenLoss

States = dict[Tap, Tensor]
"""Outputs of norms [S, B, D]; [S / tp, B, D] with sequence parallelism."""


@contextmanager
def recording_states(model: torch.nn.Module, taps: Iterable[Tap]) -> Iterator[States]:
    """Record the outputs of these norms in the forward pass inside the context."""
    states: States = {}
    with ExitStack() as stack:
        for tap in taps:
            module = _norm(bare(model), tap)
            handle = module.register_forward_hook(lambda _, __, out, tap=tap: states.__setitem__(tap, out))
            stack.callback(handle.remove)
        yield states


def _norm(model: Model, tap: Tap) -> nn.Module:
    for layer in layers(model):
        if layer.index == tap.layer:
            return layer.input_norm if tap.norm == "input" else layer.pre_mlp_norm
    return final_norm(model)


def stage_of(tap: Tap, num_layers: int, pp: int) -> int:
    """Return the pipeline stage that holds the norm; the final norm is on the last stage."""
    bounds = stage_bounds(num_layers, pp)
    return next((stage for stage, (start, stop) in enumerate(bounds) if start <= tap.layer < stop), pp - 1)


class Projection(nn.Linear):
    """Projection from student width to teacher width, trained with the student and shared by all pairs; not exported.

    Every pipeline stage has a copy with the same weights.
    """

    def __init__(self, student_size: int, teacher_size: int, session: Session) -> None:
        super().__init__(student_size, teacher_size, bias=False)
        generator = torch.Generator().manual_seed(0)
        self.weight.data = torch.randn(self.weight.shape, generator=generator) * student_size**-0.5
        # Tells Megatron to sum the gradient over the tensor-parallel ranks.
        self.weight.sequence_parallel = session.parallel.sequence_parallel and session.parallel.tp > 1  # type: ignore[attr-defined]
        # The gradient norm counts it once, on the first stage.
        self.weight.shared = session.pp_rank > 0  # type: ignore[attr-defined]
        # Three parts, as in Megatron: pipeline rank, tensor rank, and rank among those that share gradients.
        parallel = session.parallel
        self._replica = (session.pp_rank, session.tp_rank, session.dp_rank * parallel.cp + session.cp_rank)

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, Any]:
        """Return the state for Megatron's checkpoints: whole on every rank."""
        key = f"{prefix}weight"
        return {key: ShardedTensor.from_rank_offsets(key, self.weight, replica_id=self._replica)}


@dataclass(frozen=True)
class HiddenStates:
    """The pairs of hidden states of one distillation, with this rank's part in them."""

    params: HiddenLoss
    pairs: list[Pair]
    teacher_stages: list[int]
    student_stages: list[int]
    teacher_size: int
    session: Session
    num_microbatches: int
    scalars: dist.ProcessGroup | None
    """Group for sending scalars between pipeline stages; None if every pair is on the last stage."""
    sent: deque[Any] = field(default_factory=lambda: deque(maxlen=1024))
    """Sends that may be in progress, with their buffers."""

    @property
    def teacher_taps(self) -> list[Tap]:
        """The teacher's taps on this stage."""
        taps = zip(self.pairs, self.teacher_stages, strict=True)
        return [pair.teacher for pair, stage in taps if stage == self.session.pp_rank]

    @property
    def local_pairs(self) -> list[Pair]:
        """Pairs that are compared on this stage."""
        pairs = zip(self.pairs, self.student_stages, strict=True)
        return [pair for pair, stage in pairs if stage == self.session.pp_rank]

    @property
    def earlier_stages(self) -> list[int]:
        """Stages before the last that compare pairs."""
        return sorted(set(self.student_stages) - {self.session.parallel.pp - 1})


def hidden_states(
    params: HiddenLoss,
    teacher: ModelShape,
    student: Model,
    shape: ModelShape,
    session: Session,
    num_microbatches: int,
) -> HiddenStates:
    """Find the pairs, and add the projection to the student if the widths differ."""
    pp = session.parallel.pp
    if session.parallel.recompute == "full" and is_hybrid(student):
        raise EnvironmentProblem(
            "Hidden states of a HybridModel have no gradients if its layers are recomputed.",
            next_step="Use recompute: selective, or GPTModel.",
        )
    pairs = pairs_of(params, teacher.num_layers, shape.num_layers)
    if teacher.hidden_size != shape.hidden_size:
        projection = Projection(shape.hidden_size, teacher.hidden_size, session)
        student.hidden_projection = projection.to(device=session.device, dtype=student.config.params_dtype)
    student_stages = [stage_of(pair.student, shape.num_layers, pp) for pair in pairs]
    scalars = None
    if set(student_stages) != {pp - 1}:
        scalars = _pipeline_group_for_scalars(session)
    teacher_stages = [stage_of(pair.teacher, teacher.num_layers, pp) for pair in pairs]
    return HiddenStates(
        params, pairs, teacher_stages, student_stages, teacher.hidden_size, session, num_microbatches, scalars
    )


def _pipeline_group_for_scalars(session: Session) -> dist.ProcessGroup:
    """Create a second CPU group of this pipeline's ranks, separate from the one that Megatron's schedule uses."""
    # Megatron orders ranks by pipeline stage last.
    per_stage = session.world_size // session.parallel.pp
    pipelines = [list(range(first, session.world_size, per_stage)) for first in range(per_stage)]
    mine, _ = dist.new_subgroups_by_enumeration(pipelines, backend="gloo")
    return mine


class HiddenLossWeight:
    """Weight of the hidden loss in one micro-batch, called in the backward pass.

    The last stage computes it from the logit loss; the other stages receive it when they first need it.
    """

    def __init__(self, hidden: HiddenStates) -> None:
        self.hidden = hidden
        self.value: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.value is None:
            self.value = _receive(self.hidden, self.hidden.session.parallel.pp - 1)
        return self.value


@contextmanager
def attached_losses(
    model: torch.nn.Module, hidden: HiddenStates, teacher: States, token_weights_BS: Tensor, weight: HiddenLossWeight
) -> Iterator[list[Tensor]]:
    """Attach the losses to the student's states in the forward pass inside the context; yield one value per pair.

    With context parallelism the values are this rank's share. The gradients equal those of a loss that is added on the
    last stage, times `weight`, averaged over micro-batches.
    """
    student, values = bare(model), []
    tokens = own_token_weights(token_weights_BS, hidden.session)
    project = getattr(student, "hidden_projection", None) or nn.Identity()
    # The scale that Megatron applies to the last stage's loss.
    gradient_scale = hidden.session.parallel.cp / hidden.num_microbatches
    with ExitStack() as stack:
        for pair in hidden.local_pairs:

            def compare(_: Any, __: Any, out: Tensor, pair: Pair = pair) -> Tensor:
                loss = state_loss(hidden.params.kind, out, teacher[pair.teacher], tokens, project)
                values.append(over_sequence(loss.detach(), hidden.session))
                attached: Tensor = AttachedLoss.apply(out, loss, weight, gradient_scale)
                return attached

            stack.callback(_norm(student, pair.student).register_forward_hook(compare).remove)
        yield values


class AttachedLoss(torch.autograd.Function):
    """Identity for the state; in the backward pass it starts the gradient of a loss that depends on the state.

    The loss is multiplied by `weight()`, called in the backward pass, and by `scale`.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, loss: Tensor, weight: Callable[[], Tensor], scale: float) -> Tensor:
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, loss.dtype
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grad_outputs
        factor = ctx.weight().to(device=grad.device, dtype=ctx.dtype) * ctx.scale
        return grad, factor, None, None


def total_loss(hidden: HiddenStates, values: list[Tensor]) -> Tensor:
    """Sum over all pairs of one micro-batch; earlier stages send their sum to the last stage."""
    session = hidden.session
    local = torch.stack(values).sum() if values else torch.zeros((), device=session.device)
    if hidden.scalars is None:
        return local
    if not session.is_last_stage:
        if values:
            _send(hidden, local, session.parallel.pp - 1)
        return local
    return local + sum(_receive(hidden, stage).to(local) for stage in hidden.earlier_stages)


def share_weight(
    hidden: HiddenStates, weight: HiddenLossWeight, logits_loss: Tensor | None, hidden_loss: Tensor
) -> Tensor:
    """Compute the weight of this micro-batch on the last stage and send it to the others (2407.14679, section 3)."""
    if hidden.params.weight == "dynamic":
        assert logits_loss is not None
        whole = sum_over_context(torch.stack((logits_loss, hidden_loss)))
        weight.value = balancing_weight(of=whole[1], to=whole[0]).detach()
    else:
        weight.value = torch.full_like(hidden_loss, hidden.params.weight)
    for stage in hidden.earlier_stages:
        _send(hidden, weight.value, stage)
    return weight.value


def sum_projection_gradient(model: torch.nn.Module) -> None:
    """Sum the projection's gradient over the pipeline stages, before the data-parallel reduction."""
    projection = getattr(bare(model), "hidden_projection", None)
    if projection is not None and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(projection.weight.main_grad, group=parallel_state.get_pipeline_model_parallel_group())


def transfer_states(
    local: list[States], hidden: HiddenStates, batches: list[Batch], dtype: torch.dtype
) -> list[States]:
    """Send the teacher's states to the stages that compare them; return this stage's states of each micro-batch."""
    stages = zip(hidden.pairs, hidden.teacher_stages, hidden.student_stages, strict=True)
    moves = [Move(pair.teacher, source, target) for pair, source, target in stages]
    found = []
    for states, batch in zip(local, batches, strict=True):
        sizes = dict.fromkeys((pair.teacher for pair in hidden.pairs), _state_size(batch, hidden))
        found.append(transfer(states, moves, sizes, dtype, hidden.session))
    return found


def _state_size(batch: Batch, hidden: HiddenStates) -> tuple[int, int, int]:
    batch_size, length = batch["tokens"].shape
    parallel = hidden.session.parallel
    return length // (parallel.tp if parallel.sequence_parallel else 1), batch_size, hidden.teacher_size


def own_token_weights(token_weights_BS: Tensor, session: Session) -> Tensor:
    """Return token weights [S, B]; with sequence parallelism this rank's part of the sequence."""
    weights = token_weights_BS.t()
    if session.parallel.tp > 1 and session.parallel.sequence_parallel:
        return weights.chunk(session.parallel.tp)[session.tp_rank]
    return weights


def over_sequence(value: Tensor, session: Session) -> Tensor:
    """Sum over the tensor-parallel ranks if they hold parts of the sequence."""
    if session.parallel.tp > 1 and session.parallel.sequence_parallel:
        dist.all_reduce(value, group=parallel_state.get_tensor_model_parallel_group())
    return value


def _send(hidden: HiddenStates, value: Tensor, stage: int) -> None:
    buffer = value.detach().double().cpu().reshape(1)
    hidden.sent.append((buffer, dist.isend(buffer, _rank_of(hidden, stage), group=hidden.scalars)))


def _receive(hidden: HiddenStates, stage: int) -> Tensor:
    buffer = torch.empty(1, dtype=torch.float64)
    dist.recv(buffer, _rank_of(hidden, stage), group=hidden.scalars)
    return buffer[0]


def _rank_of(hidden: HiddenStates, stage: int) -> int:
    assert hidden.scalars is not None
    return dist.get_process_group_ranks(hidden.scalars)[stage]
