"""Sizes of the chunks of an output layer's logits. No torch, because the planner needs them.

A chunk is what one matrix product computes; a block is the part of a chunk that the arithmetic of a loss works on.
"""

from __future__ import annotations

CHUNK_BYTES = 2**28
"""Size of the logits of one chunk in fp32. Smaller chunks have smaller, slower matrix products."""
MIN_CHUNK_TOKENS = 32
GPU_TILE_TOKENS = 256
"""Rows of the largest tile of a matrix product on a GPU: other numbers of rows leave a part of the last tile empty."""
MIN_GPU_CHUNK_TOKENS = 4096
"""With fewer rows, reading and writing the weight and its fp32 gradient takes longer than the product."""
CPU_BLOCK_BYTES = 2**22
"""Size of the logits of one block in fp32 on a CPU: a part of its cache."""
GPU_BLOCK_BYTES = 2**28
"""The same on a GPU: large enough for full bandwidth, small enough to hold a few."""
MIN_BLOCK_TOKENS = 4


def chunk_tokens(vocab_size: int, *, on_gpu: bool) -> int:
    """Return the tokens of a chunk.

    Args:
        vocab_size: columns of the logits on each rank, padding included, so that all ranks get the same chunks.
    """
    fitting = CHUNK_BYTES // (4 * vocab_size)
    if not on_gpu:
        return max(MIN_CHUNK_TOKENS, fitting)
    return max(MIN_GPU_CHUNK_TOKENS, fitting // GPU_TILE_TOKENS * GPU_TILE_TOKENS)


def block_tokens(vocab_size: int, chunk: int, *, on_gpu: bool) -> int:
    """Return the tokens of a block, at most those of the chunk."""
    size = GPU_BLOCK_BYTES if on_gpu else CPU_BLOCK_BYTES
    return min(chunk, max(MIN_BLOCK_TOKENS, size // (4 * vocab_size)))
