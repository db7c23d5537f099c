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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation import chunks
from nemo_minitron.distillation.losses import LossAndGrad
from nemo_minitron.distillation.matmul import add_product
from nemo_minitron.distillation.vocab import WHOLE, Vocab

ChunkLoss = Callable[[Tensor, slice], LossAndGrad]
"""Student logits of a block [n, V], and the positions of its tokens in the batch -> loss [n], gradient [n, V]."""


@dataclass(frozen=True)
class MainGrad:
    """The buffer in which a training loop sums the gradient of the output layer's weight over micro-batches."""

    parameter: Tensor
    """The whole weight, vocabulary padding included; autograd must see that it has got its gradient."""
    scale: float
    """What the training loop multiplies the loss by before its backward pass. The backward pass checks it."""
    has_other_gradient: bool = False
    """Whether the parameter gets another gradient by autograd, as tied embeddings do."""

    def rows(self, vocab_size: int) -> Tensor:
        buffer: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        return buffer[:vocab_size]


def linear_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_weights_T: Tensor,
    chunk_loss: ChunkLoss,
    vocab: Vocab = WHOLE,
    *,
    chunk_tokens: int | None = None,
    in_place: bool = False,
    main_grad: MainGrad | None = None,
) -> Tensor:
    """Compute `sum_t token_weights_t * loss_t` of the logits `hidden @ weight.T`, differentiable in hidden and weight.

    The gradients are computed in the forward pass and scaled in the backward pass, so no product is computed twice. The
    gradient of `hidden` is the share of this part of the vocabulary; the caller sums it over the ranks.

    Args:
        token_weights_T: weights of the tokens; they get no gradient.
        chunk_tokens: tokens of a chunk; None: see chunks.py.
        in_place: the loss takes the logits of a whole chunk in the precision of hidden, and overwrites them with the
            gradient times the token weights (fused_kl.py).
        main_grad: where the gradient of the weight is added in the forward pass; None: autograd gets it.

    Returns:
        The loss, a scalar in at least fp32.
    """
    head = Head(weight_VD, hidden_TD, vocab, chunk_tokens=chunk_tokens)
    with_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    options = _Options(chunk_loss, head, with_gradient, in_place, main_grad)
    parameter = weight_VD if main_grad is None else main_grad.parameter
    total: Tensor = _LinearLoss.apply(hidden_TD, parameter, token_weights_T, options)
    return total


@dataclass(frozen=True)
class _Options:
    """Arguments of a head-and-loss pass that are not tensors."""

    loss: ChunkLoss
    head: Head
    with_gradient: bool
    in_place: bool
    main_grad: MainGrad | None


class Head:
    """The logits `hidden @ weight.T`, computed in chunks and returned in blocks, which are the same on all ranks.

    Args:
        vocab: the vocabulary of which the weight is a part.
        chunk_tokens: tokens of a chunk; None: see chunks.py.
    """

    def __init__(
        self, weight_VD: Tensor, hidden_TD: Tensor, vocab: Vocab = WHOLE, *, chunk_tokens: int | None = None
    ) -> None:
        self.weight, self.hidden = weight_VD.detach(), hidden_TD.detach()
        rows, on_gpu = vocab.rows or len(weight_VD), weight_VD.is_cuda
        self.chunk_tokens = chunk_tokens or chunks.chunk_tokens(rows, on_gpu=on_gpu)
        self._block_tokens = chunks.block_tokens(rows, self.chunk_tokens, on_gpu=on_gpu)
        self._chunk, self._returned = slice(0, 0), 0
        self._product = self.hidden.new_empty(min(self.chunk_tokens, len(hidden_TD)), len(weight_VD))
        self._scratch: Tensor | None = None

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
        found = self.product(rows)
        if found.dtype == self.wide:
            return found
        if self._scratch is None or len(self._scratch) < len(found):
            self._scratch = torch.empty_like(found, dtype=self.wide)
        return self._scratch[: len(found)].copy_(found)

    def product(self, rows: slice) -> Tensor:
        """Return logits [n, V] in the precision of hidden, otherwise like `logits`."""
        # The caller may have overwritten logits that it has already got.
        if not max(self._chunk.start, self._returned) <= rows.start < rows.stop <= self._chunk.stop:
            self._chunk = slice(rows.start, min(rows.start + self.chunk_tokens, len(self.hidden)))
            torch.mm(self.hidden[self._chunk], self.weight.t(), out=self._product[: _length(self._chunk)])
        self._returned = rows.stop
        return self._rows(rows)

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
    def forward(ctx: Any, hidden: Tensor, parameter: Tensor, token_weights: Tensor, options: _Options) -> Tensor:
        head, main_grad = options.head, options.main_grad
        total = torch.zeros((), dtype=head.wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if options.with_gradient else None
        grad_weight, scale = None, 1.0
        if options.with_gradient and main_grad is not None:
            grad_weight, scale = main_grad.rows(len(head.weight)), main_grad.scale
        elif options.with_gradient and parameter.requires_grad:
            grad_weight = torch.zeros(head.weight.shape, dtype=head.wide, device=parameter.device)
        for chunk in head.chunks():
            total += _chunk_loss(options, chunk, token_weights)
            if grad_hidden is None:
                continue
            narrow = head.take_gradient()
            torch.mm(narrow, head.weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                add_product(grad_weight, narrow, head.hidden[chunk], scale)
        ctx.grads = (grad_hidden, grad_weight if main_grad is None else None)
        ctx.main_grad = main_grad
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradient of a fused loss can be computed only once")
        grads, ctx.grads = ctx.grads, None
        hidden, weight = (None if grad is None else grad.mul_(grad_outputs[0]) for grad in grads)
        if ctx.main_grad is not None:
            _require_scale(ctx.main_grad, grad_outputs[0])
            # Megatron's hook then adds the other gradient, as if it were the only one.
            weight = None if ctx.main_grad.has_other_gradient else _added_already(ctx.main_grad.parameter)
        return hidden, weight, None, None


def _chunk_loss(options: _Options, chunk: slice, token_weights: Tensor) -> Tensor:
    """Return the weighted sum of the losses of a chunk, and leave its gradient in the head."""
    head = options.head
    total = torch.zeros((), dtype=head.wide, device=token_weights.device)
    for rows in (chunk,) if options.in_place else head.blocks(chunk):
        loss, grad = options.loss(head.product(rows) if options.in_place else head.logits(rows), rows)
        total += loss @ token_weights[rows].to(loss.dtype)
        if options.with_gradient and not options.in_place:
            head.put_gradient(rows, grad.mul_(token_weights[rows, None]))
    return total


def _require_scale(main_grad: MainGrad, grad_output: Tensor) -> None:
    """Check the scale by which the gradient was multiplied in the forward pass. On a GPU this does not wait."""
    torch._assert_async(torch.isclose(grad_output, torch.full_like(grad_output, main_grad.scale)))


def _added_already(parameter: Tensor) -> Tensor:
    """Return a placeholder for the gradient of a weight whose gradient buffer has it already.

    Megatron's hook needs some gradient to see that the backward pass has reached the weight; it drops this one.
    """
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(parameter)
