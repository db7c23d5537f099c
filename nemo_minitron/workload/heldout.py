"""Sizes of the batches in which a loss on held-out text is measured. No torch, because the planner needs them."""

from __future__ import annotations

MAX_SEQUENCES = 4
MAX_TOKENS = 2**15
"""Tokens of a batch of several sequences. Longer sequences come one or a few at a time, so that a measurement does not
need more memory than a training with micro-batches of one."""


def heldout_batch_size(seq_len_tokens: int) -> int:
    """Return the number of sequences of a batch; it does not depend on the layout or on micro-batches."""
    return max(1, min(MAX_SEQUENCES, MAX_TOKENS // seq_len_tokens))
