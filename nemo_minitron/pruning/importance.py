"""Importance scores from activations. Pure functions of tensors.

A score is computed in two steps (2407.14679, section 2.2): the activations of a sample are aggregated over its
sequence, and the results over the batch. Batch aggregation uses sums, which can be added over micro-batches and ranks,
so each parallel layout gives the same score.
Shapes: S sequence, B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["mean", "l2", "var"]
NUM_SUMS = 4
"""Rows of a sums tensor: count, sum |s|, sum s, sum s^2."""


@dataclass(frozen=True)
class Method:
    """The values that are aggregated for each channel of an activation."""

    values: Callable[[Tensor, Tensor], Tensor]
    """activation, d loss / d activation -> values of the same shape."""
    needs_gradient: bool
    weighs_columns: bool = False
    """Whether activations are first multiplied by the L2 norms of the columns of the weights that read them. The score
    is then the root of the mean over all tokens, and the aggregations are ignored."""


METHODS: dict[str, Method] = {
    "activation": Method(lambda activation, _: activation, needs_gradient=False),
    # First-order estimate of the change of the loss if the activation becomes zero.
    "taylor": Method(lambda activation, gradient: activation * gradient, needs_gradient=True),
    # ||W_j|| rms(a_j): Wanda (2306.11695, equation 1) for whole columns, as in FLAP's Wanda-sp (2312.11983).
    "wanda": Method(lambda activation, _: activation.square(), needs_gradient=False, weighs_columns=True),
}
"""A new width metric is one entry here, and its name in the schema's `WidthMethod`."""


@dataclass(frozen=True)
class Convention:
    """A choice between the formulas of the paper and the code of ModelOpt, where they differ."""

    neuron: Literal["before_activation", "after_activation"]
    """Side of the activation function on which neurons are measured; before it, a gated MLP is measured at its gate."""
    head_per_token: bool
    """True: the L2 norm of a head's output at each token is aggregated. False: each of its channels is aggregated, and
    the score is the L2 norm of the results."""


CONVENTIONS: dict[str, Convention] = {
    # F_neuron = sum X W1^T, F_head = sum ||Attn(..)||_2 (2407.14679, section 2.2).
    "paper": Convention(neuron="before_activation", head_per_token=True),
    # modelopt/torch/nas/plugins/megatron.py: inputs of linear_fc2 and of linear_proj.
    "modelopt": Convention(neuron="after_activation", head_per_token=False),
}

_SEQUENCE: dict[str, Callable[[Tensor], Tensor]] = {
    # Convert first: on the CPU, reductions of bf16 in torch take ten times as long.
    "mean": lambda x: x.abs().to(_wide(x)).mean(0),
    "l2": lambda x: x.to(_wide(x)).square().sum(0).sqrt(),
    "var": lambda x: x.to(_wide(x)).var(0, correction=0),
}


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def aggregate_sequence(activations_SBC: Tensor, how: Aggregation) -> Tensor:
    """Return the scores [B, C] of samples: mean of absolute values, L2 norm or variance over the sequence."""
    return _SEQUENCE[how](activations_SBC)


def batch_sums(scores_BC: Tensor) -> Tensor:
    """Return the sums [4, C] that the batch aggregations need, fp64. They can be added over batches and ranks."""
    scores = scores_BC.double()
    count = torch.full_like(scores[0], scores.shape[0])
    return torch.stack([count, scores.abs().sum(0), scores.sum(0), scores.pow(2).sum(0)])


def aggregate_batch(sums_4C: Tensor, how: Aggregation) -> Tensor:
    """Return the scores [C] over all samples.

    `mean = (1/n) sum |s|`, `l2 = sqrt(sum s^2)`, `var = (1/n) sum (s - mean s)^2` (2407.14679, section 2.2).
    The papers use l2 over the batch of means over the sequence.
    """
    count, sum_abs, total, squares = sums_4C.unbind(0)
    if how == "mean":
        return sum_abs / count
    if how == "l2":
        return squares.sqrt()
    return (squares / count - (total / count).pow(2)).clamp_min(0.0)


def per_head(activations_SBC: Tensor, kv_channels: int) -> Tensor:
    """Return the L2 norm of each head's output at each token [S, B, heads]."""
    heads = activations_SBC.unflatten(-1, (-1, kv_channels))
    return heads.to(_wide(heads)).square().sum(-1).sqrt()


def head_scores(channel_scores_C: Tensor, kv_channels: int) -> Tensor:
    """Return the L2 norm of the channel scores of each head's output [..., heads]."""
    return channel_scores_C.unflatten(-1, (-1, kv_channels)).norm(dim=-1)


def group_scores(head_scores_H: Tensor, heads_per_group: int) -> Tensor:
    """Return the L2 norm of the scores of the query heads that share a key and value head [..., groups]."""
    return head_scores_H.unflatten(-1, (-1, heads_per_group)).norm(dim=-1)


def block_influence_sums(layer_in_SBD: Tensor, layer_out_SBD: Tensor) -> Tensor:
    """Return the sum over tokens of the cosine of a layer's input and output, and the number of tokens: [2], fp64."""
    before, after = (x.to(_wide(x)) for x in (layer_in_SBD, layer_out_SBD))
    lengths = before.norm(dim=-1) * after.norm(dim=-1)
    cosine = (torch.linalg.vecdot(before, after) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).double()
    return torch.stack([cosine.sum(), torch.tensor(float(cosine.numel()), dtype=torch.float64, device=cosine.device)])


def block_influence(sums_L2: Tensor) -> Tensor:
    """Return `BI = 1 - E[cos(x_in, x_out)]` of each layer (2407.14679, section 2.2, after ShortGPT).

    A layer with a higher value matters more. For a run of layers, x_in is the input of its first layer and x_out the
    output of its last (2403.17887).
    """
    return 1.0 - sums_L2[..., 0] / sums_L2[..., 1]
