"""Importance scores from activations. Pure functions of tensors.

A score is made in two steps (2407.14679, section 2.2): the activations of a sample are aggregated
over its sequence, the results over the batch. Batch aggregation works on sums that can be added
over micro-batches and over ranks, so any parallel layout gives the same score.
Shapes: S sequence, B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["mean", "l2", "var"]
NUM_SUMS = 4
"""Rows of a sums tensor: count, sum |s|, sum s, sum s^2."""

_SEQUENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.abs().mean(0),
    "l2": lambda x: x.pow(2).sum(0).sqrt(),
    "var": lambda x: x.var(0, correction=0),
}


def aggregate_sequence(activations_SBC: Tensor, how: Aggregation) -> Tensor:
    """Score [B, C] of every sample: mean of absolute values, L2 norm or variance over the sequence."""
    return _SEQUENCE[how](activations_SBC.to(torch.promote_types(activations_SBC.dtype, torch.float32)))


def batch_sums(scores_BC: Tensor) -> Tensor:
    """[4, C] fp64: what the batch aggregations need of these samples; add them up over batches and ranks."""
    scores = scores_BC.double()
    count = torch.full_like(scores[0], scores.shape[0])
    return torch.stack([count, scores.abs().sum(0), scores.sum(0), scores.pow(2).sum(0)])


def aggregate_batch(sums_4C: Tensor, how: Aggregation) -> Tensor:
    """Score [C] over all samples.

    `mean = (1/n) sum |s|`, `l2 = sqrt(sum s^2)`, `var = (1/n) sum (s - mean s)^2` (2407.14679, section 2.2).
    The papers use l2 over the batch of means over the sequence.
    """
    count, sum_abs, total, squares = sums_4C.unbind(0)
    if how == "mean":
        return sum_abs / count
    if how == "l2":
        return squares.sqrt()
    return (squares / count - (total / count).pow(2)).clamp_min(0.0)


def head_scores(channel_scores_C: Tensor, kv_channels: int) -> Tensor:
    """[..., heads]: L2 norm of the channel scores of each head's output."""
    return channel_scores_C.unflatten(-1, (-1, kv_channels)).norm(dim=-1)


def block_influence_sums(layer_in_SBD: Tensor, layer_out_SBD: Tensor) -> Tensor:
    """[2] fp64: sum over tokens of the cosine between a layer's input and output, and the number of tokens."""
    cosine = torch.nn.functional.cosine_similarity(layer_in_SBD.double(), layer_out_SBD.double(), dim=-1)
    return torch.stack([cosine.sum(), torch.tensor(float(cosine.numel()), dtype=torch.float64, device=cosine.device)])


def block_influence(sums_L2: Tensor) -> Tensor:
    """`BI = 1 - E[cos(x_in, x_out)]` of each layer (2407.14679, section 2.2, after ShortGPT); higher matters more."""
    return 1.0 - sums_L2[:, 0] / sums_L2[:, 1]
