"""Sizes of the chunks of an output layer's logits. No torch, because the planner needs them."""

from __future__ import annotations

CHUNK_BYTES = 2**28
"""Size of the logits of one chunk in fp32. Smaller chunks have smaller, slower matrix products."""
MIN_CHUNK_TOKENS = 32
