"""Convert between Hugging Face tensors and Megatron's fused, tensor-parallel layout. Pure functions of tensors.

Megatron stores q, k and v of one query group together ([q..q, k, v] per group) and stacks gate and up. Each
tensor-parallel rank holds a contiguous range of every split axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from nemo_minitron.families import ModelShape, Row
from nemo_minitron.families.axes import SPLIT_LABELS


def shard_range(size: int, tp_rank: int, tp: int, padded: int | None = None) -> tuple[int, int]:
    """Return [start, stop) of one rank on an axis of this size; the last ranks may get less (padded vocabulary)."""
    per_rank = ceil((padded or size) / tp)
    return min(tp_rank * per_rank, size), min((tp_rank + 1) * per_rank, size)


def shard_slices(
    row: Row, shape: ModelShape, tp_rank: int, tp: int, padded_vocab: int | None = None
) -> tuple[slice, ...]:
    """Return the slices of the Hugging Face tensor that this rank needs."""
    sizes, padded = shape.axis_sizes(), {"vocab": padded_vocab}

    def part(label: str) -> slice:
        if label not in SPLIT_LABELS:
            return slice(0, sizes[label])
        return slice(*shard_range(sizes[label], tp_rank, tp, padded.get(label)))

    return tuple(part(label) for label in row.axes)


def fuse(parts: Mapping[str, Tensor], shape: ModelShape) -> Tensor:
    """Fuse this rank's parts into Megatron's tensor: rows of a weight [rows, D] or a bias [rows]."""
    if "gate" in parts:
        return torch.cat([parts["gate"], parts["up"]])
    head = shape.kv_channels
    q, k, v = parts["q"], parts["k"], parts["v"]
    groups, rest = k.shape[0] // head, k.shape[1:]
    grouped = [q.reshape(groups, -1, *rest), k.reshape(groups, head, *rest), v.reshape(groups, head, *rest)]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def split(fused: Tensor, part: str, shape: ModelShape) -> Tensor:
    """Extract one part of this rank's fused tensor: the inverse of `fuse`."""
    if part in ("gate", "up"):
        gate, up = fused.chunk(2)
        return gate if part == "gate" else up
    head, rest = shape.kv_channels, fused.shape[1:]
    per_group = (shape.heads_per_group + 2) * head
    grouped = fused.reshape(-1, per_group, *rest)
    start, length = {
        "q": (0, shape.heads_per_group * head),
        "k": (per_group - 2 * head, head),
        "v": (per_group - head, head),
    }[part]
    return grouped.narrow(1, start, length).reshape(-1, *rest)
