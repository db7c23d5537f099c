"""Losses between the logits of a teacher and a student, each with its gradient in closed form.

A loss is a function of a chunk of tokens. It returns the loss of each token and its exact gradient, so that one pass
over chunks computes both, and the logits of a batch are never in memory as a whole (distillation/linear.py). Logits are
fp32 or fp64, and a loss may overwrite them: on the CPU, new memory costs more than the arithmetic.

To add one: write the function, and add an entry to LOSSES; tests/unit/test_losses.py then checks it against autograd.

Shapes: n tokens of a chunk, V the vocabulary part of this rank. Sources: 2407.14679, section 3; 2306.13649 for JSD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.distillation.vocab import WHOLE, Vocab, local_ids, pick, shift, softmax
from nemo_minitron.schema.losses import LogitsLoss

LossAndGrad = tuple[Tensor, Tensor]
"""Loss of each token [n], and its gradient with respect to the student's logits [n, V]."""
SMALLEST_BALANCED = 1e-6
"""A loss up to this size is rounding error of equal values, which no weight may enlarge."""


def forward_kl(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Compute `sum_v p_t (log p_t - log p_s)`, nats; gradient (p_s - p_t) / T."""
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
    """Compute `sum_v p_s (log p_s - log p_t)`, nats."""
    s, t = softmax(student, params.temperature, vocab), softmax(teacher, params.temperature, vocab)
    ratio = s.shifted.sub_(t.shifted).sub_(s.total.log() - t.total.log())
    loss, grad = _through_softmax(s.probs, ratio, vocab)
    return loss, _over(grad, params.temperature)


def jsd(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Compute `beta KL(p_t || m) + (1 - beta) KL(p_s || m)`, m = beta p_t + (1 - beta) p_s (2306.13649, equation 1).

    Divided by beta, it tends to forward KL for beta -> 0; divided by 1 - beta, to reverse KL for beta -> 1.
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
    """Compute the squared distance of probabilities, or of logits / T, summed over the vocabulary."""
    if params.of == "logits":
        difference = (student - teacher) / params.temperature
        return vocab.sum(difference.square().sum(-1)), _over(2.0 * difference, params.temperature)
    p_s, p_t = (softmax(x, params.temperature, vocab).probs for x in (student, teacher))
    difference = p_s - p_t
    _, grad = _through_softmax(p_s, 2.0 * difference, vocab)
    return vocab.sum(difference.square().sum(-1)), _over(grad, params.temperature)


def cosine(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Compute `1 - cos` of probabilities, or of logits."""
    if params.of == "logits":
        return _cosine(student, teacher, vocab)
    p_s, p_t = (softmax(x, params.temperature, vocab).probs for x in (student, teacher))
    loss, grad_probs = _cosine(p_s, p_t, vocab)
    _, grad = _through_softmax(p_s, grad_probs, vocab)
    return loss, _over(grad, params.temperature)


LossFunction = Callable[[Tensor, Tensor, LogitsLoss, Vocab], LossAndGrad]


@dataclass(frozen=True)
class LogitsDistance:
    """One loss on logits: how it is computed, and how model cards and logs describe it."""

    function: LossFunction
    """(student logits [n, V], teacher logits [n, V], keys of the recipe, vocabulary split) -> loss, gradient."""
    label: str
    """Description with the fields {teacher} and, if needed, {beta} and {of}."""

    def __post_init__(self) -> None:
        # An unknown field fails here, at import, instead of after a training.
        if "TEACHER" not in self.describe("TEACHER", beta=0.5, of="logits"):
            raise ValueError(f"the label {self.label!r} does not name the teacher")

    def describe(self, teacher: str, *, beta: float, of: str) -> str:
        """Return the description of the loss with this teacher."""
        return self.label.format(teacher=teacher, beta=beta, of=of)


LOSSES: dict[str, LogitsDistance] = {
    "forward_kl": LogitsDistance(forward_kl, "forward KL to {teacher}'s logits"),
    "reverse_kl": LogitsDistance(reverse_kl, "reverse KL to {teacher}'s logits"),
    "jsd": LogitsDistance(jsd, "Jensen-Shannon divergence (beta {beta:g}) from {teacher}'s logits"),
    "mse": LogitsDistance(mse, "squared distance of {of} to {teacher}'s"),
    "cosine": LogitsDistance(cosine, "cosine distance of {of} to {teacher}'s"),
}
"""Value of `kind` in a recipe's loss -> the loss."""


def next_token(student: Tensor, labels: Tensor, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Compute the cross entropy with the next token, nats; always at temperature 1.

    Args:
        labels: ids of the next tokens [n].
    """
    shifted, ids = shift(student, 1.0, vocab), labels[:, None]
    at_label = pick(shifted, ids, vocab)
    exp = shifted.exp_()
    total = vocab.sum(exp.sum(-1, keepdim=True))
    local, mine = local_ids(ids, exp.shape[-1], vocab)
    grad = exp.div_(total).scatter_add_(-1, local, -mine.to(exp.dtype))
    return (total.log() - at_label).squeeze(-1), grad


def distance(student: Tensor, teacher: Tensor, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Compute the loss of the recipe, times T^2 if `times_temperature_squared` is set.

    Gradients of softened losses shrink by about 1 / T^2 (1503.02531, section 2); the Minitron papers use T = 1.
    """
    return scaled(LOSSES[params.kind].function(student, teacher, params, vocab), params)


def balancing_weight(of: Tensor, to: Tensor) -> Tensor:
    """Return the weight with which a loss has the size of another one.

    It is never negative, which would reverse a gradient: a loss over drawn tokens can be below 0 in a micro-batch. It
    is 0 if the loss to weight is no larger than its rounding error, as between equal hidden states.

    Args:
        of: value of the loss to weight.
        to: value of the other loss.
    """
    ratio = to.clamp(min=0.0) / of.clamp(min=SMALLEST_BALANCED)
    return torch.where(of > SMALLEST_BALANCED, ratio, 0.0)


def scaled(found: LossAndGrad, params: LogitsLoss) -> LossAndGrad:
    """Multiply by T^2 if `times_temperature_squared` is set."""
    loss, grad = found
    if not params.times_temperature_squared:
        return loss, grad
    factor = params.temperature**2
    return loss * factor, grad.mul_(factor)


def _through_softmax(probs: Tensor, grad_probs: Tensor, vocab: Vocab) -> LossAndGrad:
    """Return sum p g [n], and the gradient p (g - sum p g) of logits / T, from the gradient g of probabilities."""
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
