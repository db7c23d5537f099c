"""The output layer taken off a Megatron model: hidden states out, so that head and loss can be computed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from nemo_minitron.backends.megatron.model import parts
from nemo_minitron.backends.megatron.model.forward import Batch, model_logits
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.distillation.vocab import Vocab


def model_hidden(model: torch.nn.Module, batch: Batch) -> Tensor:
    """What the output layer would be given [B, S, D] on the last stage, whole on every tensor-parallel rank.

    Hidden states [S, B, D] for the next stage on the others. The gradient that flows back may be of this rank's part
    of the vocabulary: it is summed over the ranks.
    """
    with _headless(bare(model)):
        return model_logits(model, batch)


def bare(model: torch.nn.Module) -> Model:
    """The model inside its data-parallel wrapper."""
    return getattr(model, "module", model)


@contextmanager
def _headless(model: Model) -> Iterator[None]:
    if not model.post_process:
        yield
        return
    head = parts.head(model)

    def whole(hidden_SBD: Tensor, **_: Any) -> tuple[Tensor, None]:
        if model.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=True), None
        # Megatron sums a copy of a gradient that is not contiguous, and passes on the one that was not summed; with
        # the batch first, as the model transposes it next, the gradient arrives contiguous.
        hidden_BSD = copy_to_tensor_model_parallel_region(hidden_SBD.transpose(0, 1).contiguous())
        return hidden_BSD.transpose(0, 1), None

    head.forward = whole
    try:
        yield
    finally:
        del head.forward


def head_weight(model: torch.nn.Module, vocab_size: int) -> Tensor:
    """This rank's rows of the output layer [V, D], without those that only pad the vocabulary."""
    rows = parts.head_weight(bare(model))
    start = parallel_state.get_tensor_model_parallel_rank() * rows.shape[0]
    return rows[: max(0, min(rows.shape[0], vocab_size - start))]


def vocab_of(session: Session, rows_per_rank: int) -> Vocab:
    """Reductions over the tensor-parallel group.

    Args:
        rows_per_rank: rows of each rank's output layer, padding included.
    """
    if session.parallel.tp == 1:
        return Vocab()
    group = parallel_state.get_tensor_model_parallel_group()

    def reduce(op: Any) -> Callable[[Tensor], Tensor]:
        def apply(tensor: Tensor) -> Tensor:
            # A reduction writes into its argument: one that is not contiguous would be reduced as a copy.
            whole = tensor.contiguous()
            torch.distributed.all_reduce(whole, op=op, group=group)
            return whole

        return apply

    def gather(tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor.contiguous()) for _ in range(session.parallel.tp)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, -1)

    return Vocab(
        start=session.tp_rank * rows_per_rank,
        max=reduce(torch.distributed.ReduceOp.MAX),
        sum=reduce(torch.distributed.ReduceOp.SUM),
        gather=gather,
    )
