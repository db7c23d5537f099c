"""Language-modeling metrics, as pure functions of numbers."""

from __future__ import annotations

import math


def perplexity(loss_nats_per_token: float) -> float:
    """Return exp(loss), or infinity if that overflows."""
    return math.exp(loss_nats_per_token) if loss_nats_per_token < 700 else math.inf


def bits_per_byte(nll_nats: float, num_bytes: int) -> float:
    """Return the total negative log-likelihood in bits per UTF-8 byte of the text, comparable across tokenizers."""
    return nll_nats / (math.log(2) * num_bytes)


def recovered_share(teacher: float, pruned: float, distilled: float) -> float | None:
    """Return the share of the quality lost by pruning that distillation recovered; None if nothing was lost.

    All arguments are values of a metric where lower is better.
    """
    lost = pruned - teacher
    return (pruned - distilled) / lost if lost > 0 else None
