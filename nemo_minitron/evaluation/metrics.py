"""Quality figures from sums. Pure."""

from __future__ import annotations

import math


def perplexity(loss_nats_per_token: float) -> float:
    """exp(loss); infinity where that overflows."""
    return math.exp(loss_nats_per_token) if loss_nats_per_token < 700 else math.inf


def bits_per_byte(nll_nats: float, num_bytes: int) -> float:
    """Total negative log-likelihood in bits over the UTF-8 bytes of the text: comparable across tokenizers."""
    return nll_nats / (math.log(2) * num_bytes)


def recovered_share(teacher: float, pruned: float, distilled: float) -> float | None:
    """Share of what pruning lost that distillation won back (lower is better); None when nothing was lost."""
    lost = pruned - teacher
    return (pruned - distilled) / lost if lost > 0 else None
