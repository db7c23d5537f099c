"""Losses between the logits of a teacher and a student. Functions of tensors.

The vocabulary may be split over tensor-parallel ranks; `VocabReduce` combines what needs the
whole of it. Shapes: S sequence, B batch, V the vocabulary part of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class VocabReduce:
    """In-place reductions over the ranks that share one vocabulary; the default is a single rank."""

    max: Callable[[Tensor], Tensor] = _same
    sum: Callable[[Tensor], Tensor] = _same


ONE_RANK = VocabReduce()
CHUNK_TOKENS = 128
"""Tokens whose fp32 probabilities are held at a time."""


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, reduce: VocabReduce = ONE_RANK
) -> Tensor:
    """KL(teacher || student) of every token, in nats.

    `sum_v p_t(v) (log p_t(v) - log p_s(v))` with `p(v) = softmax(logits / temperature)(v)`
    (2407.14679, section 3). No factor T^2: at the papers' T = 1 it is 1, and the loss stays a KL.

    Args:
        student_logits: [..., V], any float dtype; probabilities are computed in fp32 (fp64 stays fp64).
        teacher_logits: same shape; no gradient flows into it.

    Returns:
        [...] in fp32 (or fp64).
    """
    loss: Tensor = _ForwardKL.apply(student_logits, teacher_logits.detach(), temperature, reduce)
    return loss


class _ForwardKL(torch.autograd.Function):
    """Loss and gradient in one pass over chunks of tokens, so that fp32 copies of the logits never exist whole.

    d loss / d student_logits = (p_s - p_t) / temperature: exact for each rank's vocabulary part, without a
    backward reduction.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, reduce: VocabReduce) -> Tensor:
        flat_student, flat_teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        grad = torch.empty_like(flat_student)
        losses = []
        for start in range(0, flat_student.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            log_p_s = _log_softmax(flat_student[rows], temperature, reduce)
            log_p_t = _log_softmax(flat_teacher[rows], temperature, reduce)
            p_t = log_p_t.exp()
            losses.append(reduce.sum((p_t * log_p_t.sub_(log_p_s)).sum(-1)))
            grad[rows] = log_p_s.exp_().sub_(p_t).div_(temperature)
        ctx.save_for_backward(grad)
        return torch.cat(losses).reshape(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        grad_loss = grad_outputs[0]
        scaled = grad.mul_(grad_loss.reshape(-1, 1).to(grad.dtype))
        return scaled.reshape(*grad_loss.shape, -1), None, None, None


def _log_softmax(logits: Tensor, temperature: float, reduce: VocabReduce) -> Tensor:
    """Log-probabilities of this rank's vocabulary part, in at least fp32."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    scaled = scaled - reduce.max(scaled.max(-1, keepdim=True).values)
    total = reduce.sum(scaled.exp().sum(-1, keepdim=True))
    return scaled.sub_(total.log_())
