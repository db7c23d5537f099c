"""How much the output of a model changes when layers are removed. Pure functions of tensors.

A metric makes partial sums, which can be added over batches and data-parallel ranks, and turns their total into an
importance: the higher, the more the removed layers matter.
Shapes: S sequence, B batch, V this rank's part of the vocabulary, K the metric's sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Consecutive layers, 0-based: start, start + 1, ..., start + length - 1."""

    start: int
    length: int = 1

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Removal:
    """Logits of one batch, of the model without the removed layers and of the whole model."""

    logits: Tensor
    whole: Tensor
    nll: Tensor
    """-log p(label) without the layers, nats."""
    loss_mask: Tensor
    answer: Tensor | None
    """In a task: index of the answer in each row [B]."""
    vocab_sum: Callable[[Tensor], Tensor]
    """Sums over the ranks that share the vocabulary; may overwrite its argument."""


@dataclass(frozen=True)
class DepthMetric:
    """A function of a removal that makes sums, and a function of their totals."""

    num_sums: int
    sums: Callable[[Removal], Tensor]
    """Sums [K] of one batch, fp64."""
    importance: Callable[[Tensor], float]
    """Total [K] -> importance of the removed layers."""


def lm_loss() -> DepthMetric:
    """Return the metric "next-token loss without the layers", nats per token (PPL in 2407.14679, section 2.2)."""

    def sums(removal: Removal) -> Tensor:
        mask = removal.loss_mask
        return torch.stack([(removal.nll * mask).double().sum(), mask.double().sum()])

    return DepthMetric(2, sums, lambda total: float(total[0] / total[1]))


def logit_mse(vocab_size: int) -> DepthMetric:
    """Return the metric "mean squared difference from the logits of the whole model" (2508.14444)."""

    def sums(removal: Removal) -> Tensor:
        gap_BSV = removal.logits.to(_wide(removal.logits)) - removal.whole
        squares_BS = removal.vocab_sum(gap_BSV.square().sum(-1))
        mask = removal.loss_mask
        return torch.stack([(squares_BS * mask).double().sum(), mask.double().sum() * vocab_size])

    return DepthMetric(2, sums, lambda total: float(total[0] / total[1]))


def task_error(num_answers: int, accuracy: Callable[[Tensor], float]) -> DepthMetric:
    """Return the metric "1 - accuracy on a multiple-choice task".

    Args:
        accuracy: a function of the summed log-likelihoods of all answers [num_answers].
    """

    def sums(removal: Removal) -> Tensor:
        assert removal.answer is not None
        likelihood_B = -(removal.nll * removal.loss_mask).double().sum(-1)
        out = torch.zeros(num_answers, dtype=torch.float64, device=likelihood_B.device)
        return out.index_add_(0, removal.answer, likelihood_B)

    return DepthMetric(num_answers, sums, lambda total: 1.0 - accuracy(total))


def runs_of(num_layers: int, length: int) -> list[Run]:
    """Return every run of this many consecutive layers."""
    return [Run(start, length) for start in range(num_layers - length + 1)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
