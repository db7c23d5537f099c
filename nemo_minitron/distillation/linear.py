"""A loss on logits, without the logits: head and loss in one pass over chunks of tokens.

For each chunk the head's product, the loss, its gradient, and that gradient's way back through the head are computed
together, so that at no time more than a few [chunk, V] tensors exist; the whole would be [T, V] for the student, the
teacher, their probabilities and the gradient.

Shapes: T tokens, D hidden size, V this rank's part of the vocabulary (without padding), n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.losses import LossAndGrad

ChunkLoss = Callable[[Tensor, slice], LossAndGrad]
"""Student logits of a chunk [n, V] and which of the T tokens they are -> loss [n], gradient [n, V]."""
CHUNK_BYTES = 2**28
"""Of one chunk's logits in fp32. Smaller chunks make smaller, slower matrix products."""
MIN_CHUNK_TOKENS = 32


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
    size = chunk_tokens or chunk_tokens_of(weight_VD.shape[0])
    with_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    total: Tensor = _LinearLoss.apply(hidden_TD, weight_VD, token_weights_T, chunk_loss, size, with_gradient)
    return total


class Head:
    """Logits of one chunk after the other, in at least fp32, in one piece of memory: each call overwrites the last."""

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight = weight_VD
        self._scratch: Tensor | None = None

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """hidden @ weight.T [n, V]."""
        num_tokens, wide = hidden_nD.shape[0], torch.promote_types(hidden_nD.dtype, torch.float32)
        if self._scratch is None or len(self._scratch) < num_tokens:
            self._scratch = hidden_nD.new_empty(num_tokens, self.weight.shape[0], dtype=wide)
        out = self._scratch[:num_tokens]
        if wide == hidden_nD.dtype:
            return torch.mm(hidden_nD, self.weight.t(), out=out)
        return out.copy_(hidden_nD @ self.weight.t())


def chunk_tokens_of(vocab_size: int) -> int:
    """Tokens of a chunk, for this rank's part of the vocabulary."""
    return max(MIN_CHUNK_TOKENS, CHUNK_BYTES // (4 * vocab_size))


def chunks(num_tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` tokens."""
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_weights: Tensor,
        chunk_loss: ChunkLoss,
        chunk_tokens: int,
        with_gradient: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = None
        if with_gradient and weight.requires_grad:
            grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        head = Head(weight)
        for rows in chunks(hidden.shape[0], chunk_tokens):
            loss, grad = chunk_loss(head.logits(hidden[rows]), rows)
            total += loss @ token_weights[rows].to(loss.dtype)
            if grad_hidden is None:
                continue
            narrow = grad.mul_(token_weights[rows, None]).to(hidden.dtype)
            torch.mm(narrow, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, narrow, hidden[rows])
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
