"""Anchors: losses between the inner outputs of the student's layers and the teacher's at the indices of a prune plan.

As in `hidden.py`, hooks read the outputs, and a loss is attached to the student's output, so that the stage's own
backward pass adds its gradient. The weight depends on the step only, so no pipeline stage needs another one's values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from nemo_minitron.backends.megatron.distillation.hidden import AttachedLoss, own_token_weights
from nemo_minitron.backends.megatron.distillation.stage_transfer import Move, transfer
from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.model.head import bare
from nemo_minitron.backends.megatron.model.parts import Layer, Model, layers
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.distillation.layers import squared_errors
from nemo_minitron.families import ModelShape
from nemo_minitron.families.axes import FFN, HIDDEN
from nemo_minitron.families.split import stage_bounds
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.schema.losses import AnchorLoss


class Anchor(NamedTuple):
    """An output inside a layer of the student."""

    layer: int
    of: str


Outputs = dict[Anchor, Tensor]
"""The teacher's outputs at the kept indices: [S, B, D], or gate and up [S, B, 2, F / tp] of this rank's neurons."""
MODULES: dict[str, Callable[[Layer], nn.Module]] = {
    "gate_up": lambda layer: layer.mlp_input,
    "attention_output": lambda layer: layer.attention_output,
    "mlp_output": lambda layer: layer.mlp_output,
}


@dataclass(frozen=True)
class Anchors:
    """The anchors of one distillation, with this rank's part in them."""

    params: AnchorLoss
    plan: PrunePlan
    teacher: ModelShape
    student: ModelShape
    session: Session
    num_microbatches: int
    num_steps: int
    values: list[Tensor] = field(default_factory=list)
    """This rank's shares of the loss in the current step."""

    def weight_at(self, step: int) -> float:
        """Return the weight of the loss in a step, counted from 0."""
        return self.params.weight_at(step, self.num_steps)

    @property
    def projections(self) -> int:
        """Number of projections to the neurons: gate and up, or up alone."""
        return 2 if self.student.gated else 1

    def finish(self) -> dict[str, float]:
        """Return the loss of the step, unweighted, over the global batch; forget its parts."""
        if not self.values:
            return {}
        total = self.session.sum(torch.stack(self.values).double().sum())
        self.values.clear()
        return {"anchor_loss": float(total) / (self.num_microbatches * self.session.parallel.dp)}

    def moves(self) -> list[Move[Anchor]]:
        """Return where each stage gets the teacher's outputs from; another stage only if layers were dropped."""
        pp = self.session.parallel.pp
        teacher, student = (_stages(shape.num_layers, pp) for shape in (self.teacher, self.student))
        return [
            Move(Anchor(number, of), teacher[layer], student[number])
            for number, layer in enumerate(self.plan.layers)
            for of in self.params.of
        ]


def _stages(num_layers: int, pp: int) -> list[int]:
    """Return the pipeline stage of each layer."""
    return [stage for stage, (start, stop) in enumerate(stage_bounds(num_layers, pp)) for _ in range(start, stop)]


@contextmanager
def recording_anchors(teacher: torch.nn.Module, anchors: Anchors | None) -> Iterator[Outputs]:
    """Record the teacher's outputs at the kept indices in forward passes inside the context."""
    found: Outputs = {}
    with ExitStack() as stack:
        for anchor, module in _modules(bare(teacher), anchors, of_teacher=True):
            assert anchors is not None
            kept = _kept_by(anchors, anchor)

            def keep(_: Any, __: Any, out: Any, anchor: Anchor = anchor, kept: Callable[..., Tensor] = kept) -> None:
                found[anchor] = kept(out[0].detach())

            stack.callback(module.register_forward_hook(keep).remove)
        yield found


def _modules(model: Model, anchors: Anchors | None, *, of_teacher: bool) -> Iterator[tuple[Anchor, nn.Module]]:
    """Yield the modules of this stage whose outputs are compared."""
    if anchors is None:
        return
    numbers = {layer: number for number, layer in enumerate(anchors.plan.layers)} if of_teacher else None
    for layer in layers(model):
        number = layer.index if numbers is None else numbers.get(layer.index)
        if number is not None:
            for of in anchors.params.of:
                yield Anchor(number, of), MODULES[of](layer)


def _kept_by(anchors: Anchors, anchor: Anchor) -> Callable[[Tensor], Tensor]:
    """Return a function of the teacher's output on this rank that selects what the student's rank has."""
    session, device = anchors.session, anchors.session.device
    if anchor.of != "gate_up":
        channels = torch.tensor(anchors.plan.kept(HIDDEN, None), device=device)
        return lambda out: out.index_select(-1, channels)
    kept = anchors.plan.kept(FFN, anchors.plan.layers[anchor.layer])
    size = len(kept) // session.parallel.tp
    neurons = torch.tensor(kept[session.tp_rank * size :][:size], device=device)

    def of_neurons(out: Tensor) -> Tensor:
        # The student's neurons on this rank may be on any rank of the teacher.
        whole = gather_from_tensor_model_parallel_region(out.unflatten(-1, (anchors.projections, -1)))
        return whole.index_select(-1, neurons)

    return of_neurons


def transfer_anchors(local: list[Outputs], anchors: Anchors, batches: list[Batch], dtype: torch.dtype) -> list[Outputs]:
    """Send the teacher's outputs to the stages that compare them; return this stage's, of each micro-batch."""
    moves, found = anchors.moves(), []
    for outputs, batch in zip(local, batches, strict=True):
        sizes = {move.key: _size(anchors, move.key, batch) for move in moves}
        found.append(transfer(outputs, moves, sizes, dtype, anchors.session))
    return found


def _size(anchors: Anchors, anchor: Anchor, batch: Batch) -> tuple[int, ...]:
    (size, length), parallel, student = batch["tokens"].shape, anchors.session.parallel, anchors.student
    if anchor.of == "gate_up":
        return length, size, anchors.projections, student.ffn_hidden_size // parallel.tp
    return length // (parallel.tp if parallel.sequence_parallel else 1), size, student.hidden_size


@contextmanager
def attached_anchors(
    student: torch.nn.Module, anchors: Anchors | None, targets: Outputs, weight: float, token_weights_BS: Tensor
) -> Iterator[None]:
    """Attach the losses to the student's outputs in the forward pass inside the context.

    The gradients equal those of a loss that is added on the last stage, times `weight`, averaged over micro-batches.
    """
    if anchors is None or not targets:
        yield
        return
    factor = torch.tensor(weight)
    scale = anchors.session.parallel.cp / anchors.num_microbatches
    with ExitStack() as stack:
        for anchor, module in _modules(bare(student), anchors, of_teacher=False):

            def compare(_: Any, __: Any, out: Any, anchor: Anchor = anchor) -> Any:
                loss, share = _loss(anchors, anchor, out[0], targets[anchor], token_weights_BS)
                anchors.values.append(share)
                return AttachedLoss.apply(out[0], loss, lambda: factor, scale), *out[1:]

            stack.callback(module.register_forward_hook(compare).remove)
        yield


def _loss(
    anchors: Anchors, anchor: Anchor, out: Tensor, target: Tensor, token_weights_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss whose gradient this rank needs, and its share of the value; all shares sum to the value."""
    count = anchors.student.num_layers * len(anchors.params.of)
    tp, group = anchors.session.parallel.tp, parallel_state.get_tensor_model_parallel_group()
    if anchor.of == "gate_up":
        errors, norms = squared_errors(out.unflatten(-1, (anchors.projections, -1)), target)
        if tp > 1:
            dist.all_reduce(norms, group=group)
        loss = ((errors / norms).mean(-1) * token_weights_BS.t()).sum() / count
        return loss, loss.detach()
    errors, norms = squared_errors(out, target)
    loss = (errors / norms * own_token_weights(token_weights_BS, anchors.session)).sum() / count
    # Without sequence parallelism all tensor-parallel ranks have the same tokens.
    return loss, loss.detach() / (1 if anchors.session.parallel.sequence_parallel else tp)
