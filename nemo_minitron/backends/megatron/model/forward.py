"""Forward passes over batches of token windows, through Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from nemo_minitron.backends.megatron.model.parts import Model, embedding
from nemo_minitron.backends.megatron.runtime.session import Session

Batch = dict[str, Tensor]
"""tokens [B, S], labels [B, S], loss_mask [B, S]; with context parallelism this rank's part of each sequence.

In training token_weights [B, S], whose sum over whole sequences is 1, and sample_ids [B] on the CPU; of held-out text
window_ids [B]; of both sample_tokens [B, S], always whole. Where documents are kept apart, attention_mask [B, 1, S, S]:
True where a token may not look.
"""


def model_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """[B, S, V / tp] on the last pipeline stage; hidden states [S, B, D] on the others."""
    # Rotary embeddings count positions by themselves.
    return model(batch["tokens"], None, batch.get("attention_mask"))


def _nothing() -> None:
    pass


@torch.no_grad()
def forward_batches(
    model: Model,
    batches: Iterable[Batch],
    session: Session,
    consume: Callable[[Tensor, Batch], None],
    *,
    after: Callable[[], None] = _nothing,
    forward: Callable[[torch.nn.Module, Batch], Tensor] = model_logits,
) -> None:
    """Run every batch; on the last stage `consume(output, batch)` gets what `forward` returned there.

    Every pipeline stage is given the same batches, and calls `after` when one has gone through it.
    """

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        consume(logits, batch)
        return logits.new_zeros(())

    for batch in batches:
        _schedule(model, batch, loss, forward=forward, forward_only=True)
        after()


def backward_batches(
    model: Model,
    batches: Iterable[Batch],
    session: Session,
    vocab_size: int,
    *,
    after: Callable[[], None] = _nothing,
) -> None:
    """Forward and backward of the summed next-token loss of every batch; no parameter gets a gradient.

    A sum, not a mean: a sample's gradients then do not depend on what else is in its batch.
    """

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return (token_nll(logits, batch["labels"], vocab_size) * batch["loss_mask"]).sum()

    with _gradients_of_activations_only(model):
        for batch in batches:
            _schedule(model, batch, loss, forward=model_logits, forward_only=False)
            after()


def _schedule(
    model: Model,
    batch: Batch,
    loss: Callable[[Tensor, Batch], Tensor],
    *,
    forward: Callable[[torch.nn.Module, Batch], Tensor],
    forward_only: bool,
) -> None:
    get_forward_backward_func()(
        forward_step_func=partial(_forward_step, loss=loss, forward=forward),
        data_iterator=iter([batch]),
        model=[model],
        num_microbatches=1,
        seq_length=batch["tokens"].shape[1] * model.config.context_parallel_size,
        micro_batch_size=batch["tokens"].shape[0],
        forward_only=forward_only,
    )


def _forward_step(
    data: Iterator[Batch],
    model: Model,
    *,
    loss: Callable[[Tensor, Batch], Tensor],
    forward: Callable[[torch.nn.Module, Batch], Tensor],
) -> Any:
    batch = next(data)
    return forward(model, batch), lambda logits: (loss(logits, batch), {})


@contextmanager
def _gradients_of_activations_only(model: Model) -> Iterator[None]:
    """Freeze the parameters; the gradient starts at the embeddings' output."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    first, handle = embedding(model), None
    if first is not None:
        handle = first.register_forward_hook(lambda _, __, out: out.requires_grad_())
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


def token_nll(logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int) -> Tensor:
    """-log p(label) [B, S], in at least fp32, over a vocabulary that is split over the tensor-parallel ranks.

    Not Megatron's cross entropy, which would make fp32 of fp64.
    """
    # Sequence first, as the head made them: a transposed gradient makes its bf16 product sixty times slower on a CPU.
    logits_SBV, labels = logits_BSV.transpose(0, 1), labels_BS.transpose(0, 1)
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)
    logits_SBV = mask_padded_vocab(logits_SBV.to(wide), vocab_size)
    group = parallel_state.get_tensor_model_parallel_group()
    with torch.no_grad():
        peak = logits_SBV.max(-1).values.contiguous()
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
    total = _sum_over_vocab_ranks((logits_SBV - peak[..., None]).exp().sum(-1))
    size = logits_SBV.shape[-1]
    local = labels - parallel_state.get_tensor_model_parallel_rank() * size
    mine = (local >= 0) & (local < size)
    found = logits_SBV.gather(-1, local.clamp(0, size - 1)[..., None])[..., 0]
    found = _sum_over_vocab_ranks(torch.where(mine, found, found.new_zeros(())))
    return (total.log() + peak - found).transpose(0, 1)


def _sum_over_vocab_ranks(tensor: Tensor) -> Tensor:
    """Summed forward, passed on as it is backward: every rank holds the gradient of its own part."""
    # Megatron reduces a contiguous copy, and returns the tensor that it was given.
    out: Tensor = reduce_from_tensor_model_parallel_region(tensor.contiguous())
    return out


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
