"""Preference losses, as NeMo-Aligner computes them, written from the papers.

With Delta = log pi/pi_ref (chosen) - log pi/pi_ref (rejected), delta = scale * (reward chosen - reward rejected), and
sigma the logistic function; all [B], nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of answers [B], summed (or averaged) over their tokens; rewards [B]."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor

    @property
    def margin(self) -> Tensor:
        """Delta."""
        return (self.chosen - self.reference_chosen) - (self.rejected - self.reference_rejected)

    def reward_margin(self, scale: float) -> Tensor:
        """delta."""
        return scale * (self.chosen_reward - self.rejected_reward)


def dpo(pairs: Pairs, beta: float, reward_scale: float = 1.0) -> Tensor:
    """Return -log sigma(beta Delta) (2305.18290, equation 7)."""
    return -logsigmoid(beta * pairs.margin)


def ipo(pairs: Pairs, beta: float, reward_scale: float = 1.0) -> Tensor:
    """Return (Delta - 1 / (2 beta))^2 (2310.12036, equation 17)."""
    return (pairs.margin - 1.0 / (2.0 * beta)) ** 2


def rpo_sq(pairs: Pairs, beta: float, reward_scale: float = 1.0) -> Tensor:
    """Return (beta Delta - delta)^2 (2502.00203)."""
    return (beta * pairs.margin - pairs.reward_margin(reward_scale)) ** 2


def rpo_bwd_kl(pairs: Pairs, beta: float, reward_scale: float = 1.0) -> Tensor:
    """KL of Bernoulli(sigma(delta)) to Bernoulli(sigma(beta Delta)) (2406.11704, section 3.3.2)."""
    return _bernoulli_kl(pairs.reward_margin(reward_scale), beta * pairs.margin)


def rpo_fwd_kl(pairs: Pairs, beta: float, reward_scale: float = 1.0) -> Tensor:
    """KL of Bernoulli(sigma(beta Delta)) to Bernoulli(sigma(delta)) (2502.00203)."""
    return _bernoulli_kl(beta * pairs.margin, pairs.reward_margin(reward_scale))


LOSSES: dict[str, Callable[[Pairs, float, float], Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "rpo_sq": rpo_sq,
    "rpo_bwd_kl": rpo_bwd_kl,
    "rpo_fwd_kl": rpo_fwd_kl,
}


def _bernoulli_kl(of: Tensor, to: Tensor) -> Tensor:
    """Return the KL of two Bernoulli distributions given by their logits."""
    yes = of.sigmoid() * (logsigmoid(of) - logsigmoid(to))
    return yes + (-of).sigmoid() * (logsigmoid(-of) - logsigmoid(-to))


def answer_log_probs(log_probs_BS: Tensor, labels_BS: Tensor, *, average: bool) -> Tensor:
    """Sum log-probabilities of tokens to those of answers [B], without tokens of label -100."""
    counted = labels_BS != -100
    total = torch.where(counted, log_probs_BS, 0.0).sum(-1)
    return total / counted.sum(-1) if average else total
