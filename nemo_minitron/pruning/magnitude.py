"""Scores from the weights alone: a control for importance that needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_minitron.families import parameters
from nemo_minitron.families.axes import SCORED_WIDTH_AXES
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.importance import head_scores
from nemo_minitron.pruning.selection import layer_score, target_of
from nemo_minitron.schema.pruning import Selection


def magnitude_scores(checkpoint: Checkpoint, selection: Selection) -> dict[str, Tensor]:
    """Return the L2 norm of all weights that an index has; fp64. The weights are read tensor by tensor.

    Embeddings and head are left out: they would outweigh the layers on the hidden axis. The score of a query group is
    made of the scores of its query heads.
    """
    shape = checkpoint.shape
    sizes, layers = shape.axis_sizes(), shape.num_layers
    axes = {label: axis for axis in SCORED_WIDTH_AXES for label in axis.coupled}
    squares = {
        label: torch.zeros(*((layers,) if axis.per_layer else ()), sizes[label], dtype=torch.float64)
        for label, axis in axes.items()
    }
    by_layer = torch.zeros(layers, dtype=torch.float64)
    for parameter in parameters(shape):
        if parameter.layer is None:
            continue
        tensor = checkpoint.read(parameter.hf).double().square()
        by_layer[parameter.layer] += tensor.sum()
        for dim, label in enumerate(parameter.row.axes):
            if label in axes:
                target = squares[label][parameter.layer] if axes[label].per_layer else squares[label]
                others = [other for other in range(tensor.dim()) if other != dim]
                # For torch, a sum over no dimension is one over all.
                target += tensor.sum(others) if others else tensor
    drops = layers - target_of(selection, shape).num_layers
    runs = by_layer.unfold(0, max(drops, 1), 1).sum(-1) if selection.layer_removal == "contiguous" else by_layer
    scores = {}
    for label, axis in axes.items():
        norms = squares[label].sqrt()
        scores[axis.name] = norms if axis.unit is None else head_scores(norms, getattr(shape, axis.unit))
    return {**scores, layer_score(selection, drops): runs.sqrt()}
