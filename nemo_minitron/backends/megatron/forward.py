"""Forward passes over batches of token windows, through Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_minitron.backends.megatron.session import Session

Batch = dict[str, Tensor]
"""tokens [B, S], labels [B, S], loss_mask [B, S]."""


def model_logits(model: torch.nn.Module, tokens_BS: Tensor) -> Tensor:
    """[B, S, V / tp] on the last pipeline stage; hidden states [S, B, D] on the others."""
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    return model(tokens_BS, positions, None)


@torch.no_grad()
def forward_batches(
    model: GPTModel, batches: Iterable[Batch], session: Session, consume: Callable[[Tensor, Batch], None]
) -> None:
    """Run every batch; on the last stage `consume(logits_BSV, batch)` gets this rank's vocabulary part.

    Every pipeline stage is given the same batches.
    """
    schedule = get_forward_backward_func()
    for batch in batches:
        schedule(
            forward_step_func=partial(_forward_step, consume=consume),
            data_iterator=iter([batch]),
            model=[model],
            num_microbatches=1,
            seq_length=batch["tokens"].shape[1],
            micro_batch_size=batch["tokens"].shape[0],
            forward_only=True,
        )


def _forward_step(data: Iterator[Batch], model: GPTModel, *, consume: Callable[[Tensor, Batch], None]) -> Any:
    batch = next(data)
    output = model_logits(model, batch["tokens"])

    def loss(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        consume(logits, batch)
        return logits.new_zeros(()), {}

    return output, loss


def token_nll(logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int) -> Tensor:
    """-log p(label), fp32 [B, S], over a vocabulary that is split over the tensor-parallel ranks."""
    logits = mask_padded_vocab(logits_BSV.float(), vocab_size).transpose(0, 1).contiguous()
    loss: Tensor = tensor_parallel.vocab_parallel_cross_entropy(logits, labels_BS.transpose(0, 1).contiguous())
    return loss.transpose(0, 1)


def mask_padded_vocab(logits_V: Tensor, vocab_size: int) -> Tensor:
    """Rows that only pad the vocabulary for tensor parallelism get no probability."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    real = vocab_size - rank * logits_V.shape[-1]
    if real >= logits_V.shape[-1]:
        return logits_V
    keep = torch.arange(logits_V.shape[-1], device=logits_V.device) < real
    return logits_V.masked_fill(~keep, torch.finfo(logits_V.dtype).min)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
