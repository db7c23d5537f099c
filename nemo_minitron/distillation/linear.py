"""Head and loss in one pass over chunks of tokens, without the logits of the whole batch.

For each chunk, the product with the head, the loss, its gradient and the backward pass through the head are computed
together, so that only a few [chunk, V] tensors exist at a time instead of [T, V] for the student, the teacher, their
probabilities and the gradient. Matrix products are faster with large chunks. The arithmetic between them is faster on a
CPU if its operands fit into the cache, so it runs on smaller blocks of each chunk; the gradient of a block overwrites
its logits.

Shapes: T tokens, D hidden size, V this rank's part of the vocabulary (without padding), n tokens of a chunk or block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.chunks import CHUNK_BYTES, MIN_CHUNK_TOKENS
from nemo_minitron.distillation.losses import LossAndGrad

ChunkLoss = Callable[[Tensor, slice], LossAndGrad]
"""Student logits of a block [n, V], and the positions of its tokens in the batch -> loss [n], gradient [n, V]."""
CPU_BLOCK_BYTES = 2**22
"""Size of the logits of one block in fp32."""
MIN_BLOCK_TOKENS = 4


def linear_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_weights_T: Tensor,
    chunk_loss: ChunkLoss,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Compute `sum_t token_weights_t * loss_t` of the logits `hidden @ weight.T`, differentiable in hidden and weight.

    The gradients are computed in the forward pass and scaled in the backward pass, so no product is computed twice. The
    gradient of `hidden` is the share of this part of the vocabulary; the caller sums it over the ranks.

    Args:
        token_weights_T: weights of the tokens; they get no gradient.
        chunk_tokens: tokens of a chunk; None: from CHUNK_BYTES.

    Returns:
        The loss, a scalar in at least fp32.
    """
    head = Head(weight_VD, hidden_TD, chunk_tokens)
    with_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    total: Tensor = _LinearLoss.apply(hidden_TD, weight_VD, token_weights_T, chunk_loss, head, with_gradient)
    return total


class Head:
    """The logits `hidden @ weight.T`, computed in chunks and returned in blocks.

    Args:
        chunk_tokens: tokens of a chunk; None: from CHUNK_BYTES.
    """

    def __init__(self, weight_VD: Tensor, hidden_TD: Tensor, chunk_tokens: int | None = None) -> None:
        self.weight, self.hidden = weight_VD.detach(), hidden_TD.detach()
        vocab_size = weight_VD.shape[0]
        self.chunk_tokens = chunk_tokens or max(MIN_CHUNK_TOKENS, CHUNK_BYTES // (4 * vocab_size))
        of_cache = max(MIN_BLOCK_TOKENS, CPU_BLOCK_BYTES // (4 * vocab_size))
        self._block_tokens = min(self.chunk_tokens, self.chunk_tokens if weight_VD.is_cuda else of_cache)
        self._chunk, self._returned = slice(0, 0), 0
        self._product = self.hidden.new_empty(min(self.chunk_tokens, len(hidden_TD)), vocab_size)
        self._scratch = self._product
        if self.wide != self.hidden.dtype:
            self._scratch = self._product.new_empty(
                min(self._block_tokens, len(hidden_TD)), vocab_size, dtype=self.wide
            )

    @property
    def wide(self) -> torch.dtype:
        """Precision of the arithmetic on logits: at least fp32."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def chunks(self) -> Iterator[slice]:
        """Yield all tokens, a chunk at a time."""
        return slices(0, len(self.hidden), self.chunk_tokens)

    def blocks(self, chunk: slice) -> Iterator[slice]:
        """Yield the tokens of a chunk, a block at a time."""
        return slices(chunk.start, chunk.stop, self._block_tokens)

    def all_blocks(self) -> Iterator[slice]:
        """Yield all tokens, a block at a time."""
        return (rows for chunk in self.chunks() for rows in self.blocks(chunk))

    def logits(self, rows: slice) -> Tensor:
        """Return logits [n, V] in at least fp32. The caller may overwrite them; they are valid until the next call.

        Args:
            rows: at most chunk_tokens; if they are not in order, the product is computed again.
        """
        # The caller may have overwritten logits that it has already got.
        if not max(self._chunk.start, self._returned) <= rows.start < rows.stop <= self._chunk.stop:
            self._chunk = slice(rows.start, min(rows.start + self.chunk_tokens, len(self.hidden)))
            torch.mm(self.hidden[self._chunk], self.weight.t(), out=self._product[: _length(self._chunk)])
        found, self._returned = self._rows(rows), rows.stop
        return found if self._scratch is self._product else self._scratch[: _length(rows)].copy_(found)

    def put_gradient(self, rows: slice, grad_nV: Tensor) -> None:
        """Overwrite the logits of a block with its gradient."""
        found = self._rows(rows)
        if found.data_ptr() != grad_nV.data_ptr():
            found.copy_(grad_nV)

    def take_gradient(self) -> Tensor:
        """Return the gradient of a whole chunk [n, V], after all its blocks; the next chunk overwrites it."""
        chunk, self._chunk = self._chunk, slice(0, 0)
        return self._product[: _length(chunk)]

    def _rows(self, rows: slice) -> Tensor:
        return self._product[rows.start - self._chunk.start : rows.stop - self._chunk.start]


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` from start to stop."""
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_weights: Tensor,
        chunk_loss: ChunkLoss,
        head: Head,
        with_gradient: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=head.wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = None
        if with_gradient and weight.requires_grad:
            grad_weight = torch.zeros(weight.shape, dtype=head.wide, device=weight.device)
        for chunk in head.chunks():
            for rows in head.blocks(chunk):
                loss, grad = chunk_loss(head.logits(rows), rows)
                total += loss @ token_weights[rows].to(loss.dtype)
                if with_gradient:
                    head.put_gradient(rows, grad.mul_(token_weights[rows, None]))
            if grad_hidden is None:
                continue
            narrow = head.take_gradient()
            torch.mm(narrow, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, narrow, hidden[chunk])
        ctx.grads = (grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradient of a fused loss can be computed only once")
        grads, ctx.grads = ctx.grads, None
        hidden, weight = (None if grad is None else grad.mul_(grad_outputs[0]) for grad in grads)
        return hidden, weight, None, None, None, None


def _add_product(out_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor) -> None:
    """Compute out += grad.T @ hidden, accumulated in the precision of out."""
    if out_VD.dtype == grad_nV.dtype:
        out_VD.addmm_(grad_nV.t(), hidden_nD)
    else:
        out_VD.add_(grad_nV.t() @ hidden_nD)
