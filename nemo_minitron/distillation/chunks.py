"""How large the chunks of an output layer's logits are. No torch: the planner reckons with them."""

from __future__ import annotations

CHUNK_BYTES = 2**28
"""Of one chunk's logits in fp32. Smaller chunks make smaller, slower matrix products."""
MIN_CHUNK_TOKENS = 32
