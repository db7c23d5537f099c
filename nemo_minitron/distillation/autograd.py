"""Prototype a logit loss as a plain differentiable function, before anyone derives its gradient.

`autograd_loss` turns a function of logits into a loss for the head-and-loss pass (linear.py). torch.autograd computes
the gradient of one block of tokens at a time, so whole logits need never exist. Reverse KL in five lines:

    def reverse_kl(student, teacher):
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    loss, head = autograd_loss(reverse_kl), Head(teacher_weight, teacher_hidden)
    total = linear_loss(hidden, weight, token_weights, lambda s, rows: loss(s, head.logits(rows), LogitsLoss()))

An entry in LOSSES (losses.py) makes the loss available to recipes, once its name is a `kind` of LogitsLoss. The graph
of a block holds several more [n, V] tensors than a closed form does: replace a prototype before a long training.

Shapes: n tokens of a block, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_minitron.distillation.losses import LossAndGrad
from nemo_minitron.distillation.vocab import WHOLE, Vocab
from nemo_minitron.errors import PlanError
from nemo_minitron.schema.losses import LogitsLoss


class LogitLoss(Protocol):
    """A loss as in losses.py: a function of student and teacher logits [n, V], which it may overwrite."""

    def __call__(self, student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad: ...


def autograd_loss(function: Callable[[Tensor, Tensor], Tensor]) -> LogitLoss:
    """Make a loss of a function of whole vocabulary rows.

    The loss raises PlanError if tensor parallelism splits the vocabulary.

    Args:
        function: (student logits [n, V], teacher logits [n, V]), both divided by the temperature -> loss [n].
    """

    def loss(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
        if vocab != WHOLE:
            raise PlanError(
                f"The loss {function.__name__} needs whole vocabulary rows, but tensor parallelism splits them.",
                allowed="tp = 1",
                next_step="Set tp to 1, or write the loss for a split vocabulary with split_autograd_loss.",
            )
        return _loss_and_grad(lambda s, t, _: function(s, t), student, teacher, params.temperature, vocab)

    return loss


def split_autograd_loss(function: Callable[[Tensor, Tensor, Vocab], Tensor]) -> LogitLoss:
    """Make a loss of a function that supports a vocabulary split over tensor-parallel ranks.

    Args:
        function: (student logits [n, V], teacher logits [n, V], both divided by the temperature, vocabulary split)
            -> loss [n], equal on every rank. `vocab.sum` is differentiable; results of `vocab.max` and `vocab.gather`
            are constants.
    """

    def loss(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
        return _loss_and_grad(function, student, teacher, params.temperature, vocab)

    return loss


def log_softmax(logits: Tensor, vocab: Vocab) -> Tensor:
    """Compute differentiable log-probabilities [n, V] over the whole vocabulary, for `split_autograd_loss`."""
    shifted = logits - vocab.max(logits.amax(-1, keepdim=True))
    return shifted - vocab.sum(shifted.exp().sum(-1, keepdim=True)).log()


def _loss_and_grad(
    function: Callable[[Tensor, Tensor, Vocab], Tensor],
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    vocab: Vocab,
) -> LossAndGrad:
    leaf = student.detach().requires_grad_()
    # The head-and-loss pass disables gradients around its loss.
    with torch.enable_grad():
        loss = function(leaf / temperature, teacher.detach() / temperature, _differentiable(vocab))
    if loss.shape != student.shape[:1]:
        raise ValueError(f"A loss has shape {list(loss.shape)}, not one value per token: {list(student.shape[:1])}.")
    # The backward pass of a sum adds the gradients of all ranks, each of which starts with the same loss.
    num_ranks = vocab.sum(torch.ones_like(loss))
    (grad,) = torch.autograd.grad(loss, leaf, 1.0 / num_ranks)
    return loss.detach(), grad.contiguous()


class _SumOverRanks(torch.autograd.Function):
    """A differentiable `vocab.sum`; its backward pass is the same sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, vocab: Vocab) -> Tensor:
        ctx.vocab = vocab
        return vocab.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.vocab.sum(grad_outputs[0].clone()), None


def _differentiable(vocab: Vocab) -> Vocab:
    """Return the vocabulary split with a differentiable sum and reductions that do not modify their arguments."""

    def total(tensor: Tensor) -> Tensor:
        result: Tensor = _SumOverRanks.apply(tensor, vocab)
        return result

    def constant(reduce: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        return reduce(tensor.detach().clone())

    return replace(vocab, sum=total, max=partial(constant, vocab.max), gather=partial(constant, vocab.gather))
