"""From a plan's kept indices to the kept positions on every axis label of the axis table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.families import ModelShape
from nemo_minitron.pruning.plan_file import PrunePlan

Keep = Mapping[str, Tensor]
"""Axis label -> kept positions, int64. A label that is not there stays whole (vocab, head_dim)."""


def expand_keep(plan: PrunePlan, source: ModelShape, layer: int | None) -> Keep:
    """Kept positions for the parameters of one teacher layer; None: for those outside the layers."""
    lists = {"hidden": plan.hidden}
    if layer is not None:
        lists |= {
            "ffn": plan.ffn[layer],
            "q": expand_heads(plan.heads[layer], source.kv_channels),
            "kv": expand_heads(plan.groups[layer], source.kv_channels),
        }
    sizes = source.axis_sizes()
    return {axis: torch.tensor(keep) for axis, keep in lists.items() if len(keep) < sizes[axis]}


def expand_heads(heads: tuple[int, ...], kv_channels: int) -> tuple[int, ...]:
    """Rows of a projection that belong to these heads: head h owns [h * kv_channels, (h + 1) * kv_channels)."""
    return tuple(head * kv_channels + channel for head in heads for channel in range(kv_channels))
