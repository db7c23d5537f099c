"""Run a Megatron model without its output layer, so that head and loss can be computed together."""

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
from nemo_minitron.distillation.linear import MainGrad
from nemo_minitron.distillation.vocab import Vocab
from nemo_minitron.families.split import padded_vocab_size

_LOSS_SCALE = "minitron_loss_scale"
"""Attribute of the output layer's weight, beside Megatron's own `main_grad`."""


def model_hidden(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Return the input of the output layer [B, S, D] on the last stage, whole on every tensor-parallel rank.

    Other stages return hidden states [S, B, D] for the next stage. The incoming gradient may cover only this rank's
    part of the vocabulary: it is summed over the tensor-parallel ranks.
    """
    with _headless(bare(model)):
        return model_logits(model, batch)


def bare(model: torch.nn.Module) -> Model:
    """Unwrap a model from its data-parallel wrapper."""
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
        # For a non-contiguous gradient Megatron sums a copy and returns the unsummed original. The model transposes
        # the output to batch first; transposing here as well makes the gradient arrive contiguous.
        hidden_BSD = copy_to_tensor_model_parallel_region(hidden_SBD.transpose(0, 1).contiguous())
        return hidden_BSD.transpose(0, 1), None

    head.forward = whole
    try:
        yield
    finally:
        del head.forward


def head_weight(model: torch.nn.Module, vocab_size: int) -> Tensor:
    """Return this rank's rows of the output layer [V, D], without vocabulary padding."""
    rows = parts.head_weight(bare(model))
    start = parallel_state.get_tensor_model_parallel_rank() * rows.shape[0]
    return rows[: max(0, min(rows.shape[0], vocab_size - start))]


def head_main_grad(model: torch.nn.Module) -> MainGrad | None:
    """Return the gradient buffer of the output layer's weight; None if autograd collects its gradient."""
    weight = parts.head_weight(bare(model))
    scale = getattr(weight, _LOSS_SCALE, None)
    return None if scale is None else MainGrad(weight, scale, has_other_gradient=_has_embeddings(bare(model)))


def collect_head_gradient_in_place(model: Model, loss_scale: float) -> None:
    """Let `head_main_grad` return the gradient buffer of this model, which a data-parallel wrapper has made.

    Args:
        loss_scale: what the training multiplies the loss of a micro-batch by before its backward pass.
    """
    if model.post_process:
        setattr(parts.head_weight(model), _LOSS_SCALE, loss_scale)


def _has_embeddings(model: Model) -> bool:
    """Return whether the weight of the output layer is that of the embeddings. Pipeline stages have a copy each."""
    return bool(model.share_embeddings_and_output_weights and model.pre_process)


def vocab_of_model(session: Session, vocab_size: int) -> Vocab:
    """Return the vocabulary split of a model that was padded for its own vocabulary, on any pipeline stage."""
    return vocab_of(session, padded_vocab_size(vocab_size, session.parallel.tp) // session.parallel.tp, vocab_size)


def vocab_of(session: Session, rows_per_rank: int, vocab_size: int) -> Vocab:
    """Return the vocabulary split of this rank, with reductions over the tensor-parallel group.

    Args:
        rows_per_rank: rows of each rank's output layer, padding included.
        vocab_size: rows of all ranks without padding.
    """
    if session.parallel.tp == 1:
        return Vocab()
    group = parallel_state.get_tensor_model_parallel_group()

    def reduce(op: Any) -> Callable[[Tensor], Tensor]:
        def apply(tensor: Tensor) -> Tensor:
            # all_reduce works in place and needs a contiguous tensor.
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
        rows=rows_per_rank,
        size=vocab_size,
        max=reduce(torch.distributed.ReduceOp.MAX),
        sum=reduce(torch.distributed.ReduceOp.SUM),
        gather=gather,
    )
