"""Losses between the logits of a teacher and a student, each with its gradient in closed form.

A loss is a function of a chunk of tokens. It returns the loss of each token and its exact gradient, so that one pass
over chunks yields both and whole logits need never exist (distillation/linear.py). Logits come in fp32 or fp64, and a
loss may overwrite them: fresh memory costs more than the arithmetic on a CPU.

To add one: write the function and name it in LOSSES; tests/unit/test_losses.py then checks it against autograd.

Shapes: n tokens of a chunk, V the vocabulary part of this rank. Sources: 2407.14679, section 3; 2306.13649 for JSD.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.distillation.vocab import WHOLE, Vocab, local_ids, pick, shift, softmax
from nemo_minitron.schema.losses import LogitsLoss

LossAndGrad = tuple[Tensor, Tensor]
"""Loss of each token [n], and its gradient for the student's logits [n, V]."""


def forward_kl(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """`sum_v p_t (log p_t - log p_s)`, nats; gradient (p_s - p_t) / T."""
    s, t = shift(student, params.temperature, vocab), shift(teacher, params.temperature, vocab)
    exp_t = t.exp()
    # log p_t - log p_s without the totals, weighted by p_t without its total; s becomes exp(s).
    dots = t.sub_(s).mul_(exp_t).sum(-1)
    exp_s = s.exp_()
    dot, total_s, total_t = vocab.sum(torch.stack([dots, exp_s.sum(-1), exp_t.sum(-1)], -1)).split(1, -1)
    loss = dot / total_t - total_t.log() + total_s.log()
    grad = exp_s.div_(total_s).sub_(exp_t.div_(total_t))
    return loss.squeeze(-1), _over(grad, params.temperature)


def reverse_kl(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """`sum_v p_s (log p_s - log p_t)`, nats."""
    s, t = softmax(student, params.temperature, vocab), softmax(teacher, params.temperature, vocab)
    ratio = s.shifted.sub_(t.shifted).sub_(s.total.log() - t.total.log())
    loss, grad = _through_softmax(s.probs, ratio, vocab)
    return loss, _over(grad, params.temperature)


def jsd(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """`beta KL(p_t || m) + (1 - beta) KL(p_s || m)`, m = beta p_t + (1 - beta) p_s (2306.13649, equation 1).

    Divided by beta it tends to forward KL for beta -> 0; divided by 1 - beta to reverse KL for beta -> 1.
    """
    beta = params.jsd_beta
    s, t = softmax(student, params.temperature, vocab), softmax(teacher, params.temperature, vocab)
    # log(p_t / p_s), and from it log(p_s / m), without the difference of two large logarithms.
    ratio = t.shifted.sub_(s.shifted) - (t.total.log() - s.total.log())
    student_to_mix = -torch.logaddexp(ratio + math.log(beta), torch.full_like(ratio, math.log1p(-beta)))
    of_teacher = vocab.sum((t.probs * (ratio + student_to_mix)).sum(-1))
    # d loss / d p_s = (1 - beta) log(p_s / m): the terms through m cancel, as m sums to one.
    of_student, grad = _through_softmax(s.probs, student_to_mix, vocab)
    return beta * of_teacher + (1.0 - beta) * of_student, _over(grad, params.temperature) * (1.0 - beta)


def mse(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Squared distance, summed over the vocabulary: of probabilities, or of logits / T."""
    if params.of == "logits":
        difference = (student - teacher) / params.temperature
        return vocab.sum(difference.square().sum(-1)), _over(2.0 * difference, params.temperature)
    p_s, p_t = (softmax(x, params.temperature, vocab).probs for x in (student, teacher))
    difference = p_s - p_t
    _, grad = _through_softmax(p_s, 2.0 * difference, vocab)
    return vocab.sum(difference.square().sum(-1)), _over(grad, params.temperature)


def cosine(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """`1 - cos` of probabilities, or of logits."""
    if params.of == "logits":
        return _cosine(student, teacher, vocab)
    p_s, p_t = (softmax(x, params.temperature, vocab).probs for x in (student, teacher))
    loss, grad_probs = _cosine(p_s, p_t, vocab)
    _, grad = _through_softmax(p_s, grad_probs, vocab)
    return loss, _over(grad, params.temperature)


LOSSES: dict[str, Callable[[Tensor, Tensor, LogitsLoss, Vocab], LossAndGrad]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "mse": mse,
    "cosine": cosine,
}


def next_token(student: Tensor, labels: Tensor, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Cross entropy with the next token's id [n], nats; always at temperature 1."""
    shifted, ids = shift(student, 1.0, vocab), labels[:, None]
    at_label = pick(shifted, ids, vocab)
    exp = shifted.exp_()
    total = vocab.sum(exp.sum(-1, keepdim=True))
    local, mine = local_ids(ids, exp.shape[-1], vocab)
    grad = exp.div_(total).scatter_add_(-1, local, -mine.to(exp.dtype))
    return (total.log() - at_label).squeeze(-1), grad


def distance(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """The recipe's loss, times T^2 where it asks for that.

    Gradients of softened losses shrink by about 1 / T^2 (1503.02531, section 2); the papers stay at T = 1.
    """
    return scaled(LOSSES[params.kind](student, teacher, params, vocab), params)


def scaled(found: LossAndGrad, params: LogitsLoss) -> LossAndGrad:
    """Times T^2 where the recipe asks for it."""
    loss, grad = found
    if not params.times_temperature_squared:
        return loss, grad
    factor = params.temperature**2
    return loss * factor, grad.mul_(factor)


def _through_softmax(probs: Tensor, grad_probs: Tensor, vocab: Vocab) -> LossAndGrad:
    """(sum p g [n], gradient p (g - sum p g) for logits / T) from the gradient g for probabilities."""
    mean = vocab.sum((probs * grad_probs).sum(-1, keepdim=True))
    return mean.squeeze(-1), probs * (grad_probs - mean)


def _cosine(student: Tensor, teacher: Tensor, vocab: Vocab) -> LossAndGrad:
    products = [(a * b).sum(-1) for a, b in ((student, teacher), (student, student), (teacher, teacher))]
    dot, s_square, t_square = vocab.sum(torch.stack(products, -1)).split(1, -1)
    norms = (s_square * t_square).sqrt()
    value = dot / norms
    return 1.0 - value.squeeze(-1), value / s_square * student - teacher / norms


def _over(grad: Tensor, temperature: float) -> Tensor:
    return grad if temperature == 1.0 else grad.div_(temperature)
