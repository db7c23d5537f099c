"""The loss of a recipe over a batch of tokens: distance to the teacher, next-token cross entropy, and their weights.

Shapes: T tokens, n tokens of a block, D hidden size, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.distillation.fused_kl import FusedForwardKl
from nemo_minitron.distillation.linear import Head, MainGrad, linear_loss
from nemo_minitron.distillation.losses import LossAndGrad, balancing_weight, distance, next_token
from nemo_minitron.distillation.sparse import SparseTeacher, sparse_distance, sparsify
from nemo_minitron.distillation.vocab import WHOLE, Vocab
from nemo_minitron.schema.losses import LogitsLoss, Loss

Distance = Callable[[Tensor, slice], LossAndGrad]
"""Student logits of a block [n, V], and the positions of its tokens -> distance to the teacher [n], gradient [n, V]."""


def live_teacher(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    params: LogitsLoss,
    uniforms: Tensor | None = None,
    vocab: Vocab = WHOLE,
    *,
    chunk_tokens: int | None = None,
) -> Distance:
    """Return the distance to a teacher whose head runs on each chunk of tokens.

    Args:
        hidden_TD: input of the teacher's output layer; D may differ from the student's.
        uniforms: random numbers [T, rounds] for draws (`sparse: {kind: sampled}`).
    """
    head = Head(weight_VD, hidden_TD, vocab, chunk_tokens=chunk_tokens)

    @torch.no_grad()
    def of(student: Tensor, rows: slice) -> LossAndGrad:
        logits = head.logits(rows)
        if params.sparse is None:
            return distance(student, logits, params, vocab)
        points = None if uniforms is None else uniforms[rows]
        kept = sparsify(logits, params.sparse, params.temperature, points, vocab)
        return sparse_distance(student, kept, params, vocab)

    return of


def cached_teacher(teacher: SparseTeacher, params: LogitsLoss, vocab: Vocab = WHOLE) -> Distance:
    """Return the distance to a teacher whose distributions were read from a cache."""

    def of(student: Tensor, rows: slice) -> LossAndGrad:
        return sparse_distance(student, teacher.rows(rows), params, vocab)

    return of


def token_loss(
    params: Loss,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    token_weights_T: Tensor,
    teacher: Distance | None = None,
    vocab: Vocab = WHOLE,
    *,
    over_ranks: Callable[[Tensor], Tensor] = lambda share: share,
    chunk_tokens: int | None = None,
    main_grad: MainGrad | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum over tokens of `logits + next_token * CE`, differentiable in hidden and weight.

    Args:
        token_weights_T: usually mask / number of tokens.
        teacher: None if the loss has no teacher.
        over_ranks: sums over the ranks that have the other tokens of the same sequences.
        main_grad: where the gradient of the weight is added in the forward pass; None: autograd gets it.

    Returns:
        The loss, a scalar, and those of its detached parts `logits_loss` and `lm_loss` (unweighted) that it has.
    """
    if params.logits is not None and teacher is None:
        raise AssertionError("a loss with logits needs a teacher")
    if params.next_token and isinstance(teacher, FusedForwardKl):
        raise AssertionError("a fused loss allows no other term on logits")
    weight: float | Tensor
    if params.next_token == "balanced":
        with torch.no_grad():
            mixture = Mixture(teacher, labels_T, token_weights_T, 1.0, vocab)
            linear_loss(hidden_TD, weight_VD, token_weights_T, mixture, vocab, chunk_tokens=chunk_tokens)
            whole = over_ranks(torch.stack((mixture.parts["logits_loss"], mixture.parts["lm_loss"])))
            weight = balancing_weight(of=whole[1], to=whole[0])
    else:
        weight = params.next_token
    mixture = Mixture(teacher, labels_T, token_weights_T, weight, vocab)
    total = linear_loss(
        hidden_TD,
        weight_VD,
        token_weights_T,
        mixture,
        vocab,
        chunk_tokens=chunk_tokens,
        in_place=isinstance(teacher, FusedForwardKl),
        main_grad=main_grad,
    )
    return total, mixture.parts


class Mixture:
    """The loss of a block of tokens; accumulates the parts of the loss."""

    def __init__(
        self,
        teacher: Distance | None,
        labels_T: Tensor,
        token_weights_T: Tensor,
        lm_weight: float | Tensor,
        vocab: Vocab,
    ) -> None:
        self.teacher, self.labels, self.token_weights = teacher, labels_T, token_weights_T
        self.lm_weight, self.vocab = lm_weight, vocab
        self.parts: dict[str, Tensor] = {}

    def __call__(self, student: Tensor, rows: slice) -> LossAndGrad:
        if self.teacher is None:
            loss, grad = next_token(student, self.labels[rows], self.vocab)
            self._add("lm_loss", loss, rows)
            return loss * self.lm_weight, grad.mul_(self.lm_weight)
        if isinstance(self.lm_weight, float) and not self.lm_weight:
            loss, grad = self.teacher(student, rows)
            self._add("logits_loss", loss, rows)
            return loss, grad
        # Each loss overwrites its logits.
        text_loss, text_grad = next_token(student.clone(), self.labels[rows], self.vocab)
        loss, grad = self.teacher(student, rows)
        self._add("lm_loss", text_loss, rows)
        self._add("logits_loss", loss, rows)
        return loss + self.lm_weight * text_loss, grad.add_(text_grad.mul_(self.lm_weight))

    def _add(self, name: str, loss: Tensor, rows: slice) -> None:
        value = loss @ self.token_weights[rows].to(loss.dtype)
        self.parts[name] = self.parts[name] + value if name in self.parts else value
