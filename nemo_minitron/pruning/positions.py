"""From the kept indices of a plan to the kept positions on each label of the axis table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.families import ModelShape
from nemo_minitron.families.registry import axes_of, width_axes
from nemo_minitron.pruning.plan_file import Indices, PrunePlan

Keep = Mapping[str, Tensor]
"""Label -> kept positions, int64. A label without an entry stays whole (vocab, head_dim)."""


def kept_positions(plan: PrunePlan, source: ModelShape, layer: int | None) -> Keep:
    """Return the kept positions for the parameters of one layer of the teacher; None: for those outside the layers."""
    axes = [axis for axis in width_axes(source) if not axis.per_layer]
    axes += [] if layer is None else axes_of(source, layer)
    sizes = source.axis_sizes()
    out: dict[str, Tensor] = {}
    for axis in axes:
        unit = 1 if axis.unit is None else getattr(source, axis.unit)
        positions = expand(plan.kept(axis, layer), unit)
        out |= {label: torch.tensor(positions) for label in axis.coupled if len(positions) < sizes[label]}
    return out


def expand(indices: Indices, unit: int) -> Indices:
    """Return the positions of these indices: index i has [i * unit, (i + 1) * unit), as a head has its channels."""
    return tuple(index * unit + offset for index in indices for offset in range(unit))
