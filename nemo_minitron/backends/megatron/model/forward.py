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

Training batches also have token_weights [B, S], which sum to 1 over whole sequences, and sample_ids [B] on the CPU.
Held-out batches have window_ids [B]. Both have sample_tokens [B, S], always whole sequences. If attention may not cross
documents, there is attention_mask: [B, 1, S, S], True where attention is masked, or the bounds of documents, int32.
"""


def model_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Return logits [B, S, V / tp] on the last pipeline stage and hidden states [S, B, D] on the others."""
    # Megatron's rotary embeddings need no position ids.
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
    """Run every batch; on the last stage, pass the output of `forward` to `consume(output, batch)`.

    Pass the same batches on every pipeline stage. Each stage calls `after` after each batch.
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
    """Run forward and backward of the summed next-token loss of every batch, without parameter gradients.

    The loss is a sum, not a mean, so that a sample's gradients do not depend on the rest of its batch.
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
    """Freeze the parameters; only activations from the embeddings' output onward get gradients."""
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
    """Compute -log p(label) [B, S], in at least fp32, over a vocabulary split over the tensor-parallel ranks.

    Megatron's cross entropy is not used, because it converts fp64 to fp32.
    """
    # Keep the head's sequence-first layout: with a transposed gradient, the bf16 matmul on a CPU is sixty times slower.
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
    """Sum in the forward pass; pass the gradient through unchanged, since each rank needs that of its own part."""
    # For a non-contiguous tensor Megatron would reduce a copy and return the original.
    out: Tensor = reduce_from_tensor_model_parallel_region(tensor.contiguous())
    return out


def mask_padded_vocab(logits_V: Tensor, vocab_size: int) -> Tensor:
    """Give the rows that pad the vocabulary for tensor parallelism zero probability."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    real = vocab_size - rank * logits_V.shape[-1]
    if real >= logits_V.shape[-1]:
        return logits_V
    keep = torch.arange(logits_V.shape[-1], device=logits_V.device) < real
    return logits_V.masked_fill(~keep, torch.finfo(logits_V.dtype).min)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
