"""A loss on logits, without the logits: head and loss in one pass over chunks of tokens.

For each chunk the head's product, the loss, its gradient, and that gradient's way back through the head are computed
together, so that at no time more than a few [chunk, V] tensors exist; the whole would be [T, V] for the student, the
teacher, their probabilities and the gradient. Products want large chunks. On a CPU the arithmetic between them wants
its operands in the cache, so it goes over smaller blocks of each chunk; the gradient of a block takes the place of
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
"""Student logits of a block [n, V] and which of the T tokens they are -> loss [n], gradient [n, V]."""
CPU_BLOCK_BYTES = 2**22
"""Of one block's logits in fp32."""
MIN_BLOCK_TOKENS = 4


def linear_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_weights_T: Tensor,
    chunk_loss: ChunkLoss,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`sum_t token_weights_t * loss_t` of the logits `hidden @ weight.T`, differentiable for hidden and weight.

    The gradients are computed in the forward pass and scaled in the backward pass: no product is done twice. The
    gradient for `hidden` is this vocabulary part's share; the caller sums it over the ranks.

    Args:
        token_weights_T: no gradient flows into it.
        chunk_tokens: size of a chunk; None: from CHUNK_BYTES.

    Returns:
        a scalar in at least fp32.
    """
    head = Head(weight_VD, hidden_TD, chunk_tokens)
    with_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    total: Tensor = _LinearLoss.apply(hidden_TD, weight_VD, token_weights_T, chunk_loss, head, with_gradient)
    return total


class Head:
    """The logits `hidden @ weight.T`, computed in chunks and given out in blocks.

    Args:
        chunk_tokens: size of a chunk; None: from CHUNK_BYTES.
    """

    def __init__(self, weight_VD: Tensor, hidden_TD: Tensor, chunk_tokens: int | None = None) -> None:
        self.weight, self.hidden = weight_VD.detach(), hidden_TD.detach()
        vocab_size = weight_VD.shape[0]
        self.chunk_tokens = chunk_tokens or max(MIN_CHUNK_TOKENS, CHUNK_BYTES // (4 * vocab_size))
        of_cache = max(MIN_BLOCK_TOKENS, CPU_BLOCK_BYTES // (4 * vocab_size))
        self._block_tokens = min(self.chunk_tokens, self.chunk_tokens if weight_VD.is_cuda else of_cache)
        self._chunk, self._given = slice(0, 0), 0
        self._product = self.hidden.new_empty(min(self.chunk_tokens, len(hidden_TD)), vocab_size)
        self._scratch = self._product
        if self.wide != self.hidden.dtype:
            self._scratch = self._product.new_empty(
                min(self._block_tokens, len(hidden_TD)), vocab_size, dtype=self.wide
            )

    @property
    def wide(self) -> torch.dtype:
        """Of the arithmetic on logits: at least fp32."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def chunks(self) -> Iterator[slice]:
        """All tokens, a chunk at a time."""
        return slices(0, len(self.hidden), self.chunk_tokens)

    def blocks(self, chunk: slice) -> Iterator[slice]:
        """The tokens of a chunk, a block at a time."""
        return slices(chunk.start, chunk.stop, self._block_tokens)

    def all_blocks(self) -> Iterator[slice]:
        """All tokens, a block at a time."""
        return (rows for chunk in self.chunks() for rows in self.blocks(chunk))

    def logits(self, rows: slice) -> Tensor:
        """[n, V] in at least fp32; it may be written to, and holds until the next call.

        Args:
            rows: at most chunk_tokens; out of order, the product is computed again.
        """
        # What was given out may have been written to.
        if not max(self._chunk.start, self._given) <= rows.start < rows.stop <= self._chunk.stop:
            self._chunk = slice(rows.start, min(rows.start + self.chunk_tokens, len(self.hidden)))
            torch.mm(self.hidden[self._chunk], self.weight.t(), out=self._product[: _length(self._chunk)])
        found, self._given = self._rows(rows), rows.stop
        return found if self._scratch is self._product else self._scratch[: _length(rows)].copy_(found)

    def put_gradient(self, rows: slice, grad_nV: Tensor) -> None:
        """Keep a block's gradient in the place of its logits."""
        found = self._rows(rows)
        if found.data_ptr() != grad_nV.data_ptr():
            found.copy_(grad_nV)

    def take_gradient(self) -> Tensor:
        """The gradient of a whole chunk [n, V], after that of its blocks was put; the next chunk overwrites it."""
        chunk, self._chunk = self._chunk, slice(0, 0)
        return self._product[: _length(chunk)]

    def _rows(self, rows: slice) -> Tensor:
        return self._product[rows.start - self._chunk.start : rows.stop - self._chunk.start]


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` from start to stop."""
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
            raise RuntimeError("the gradient of a fused loss can be taken once")
        grads, ctx.grads = ctx.grads, None
        hidden, weight = (None if grad is None else grad.mul_(grad_outputs[0]) for grad in grads)
        return hidden, weight, None, None, None, None


def _add_product(out_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor) -> None:
    """out += grad.T @ hidden, accumulated in out's precision."""
    if out_VD.dtype == grad_nV.dtype:
        out_VD.addmm_(grad_nV.t(), hidden_nD)
    else:
        out_VD.add_(grad_nV.t() @ hidden_nD)
