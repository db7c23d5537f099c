"""Scores from the weights alone: a control for importance that needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_minitron.families import parameters
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.importance import head_scores
from nemo_minitron.pruning.selection import layer_score, target_of
from nemo_minitron.schema.pruning import Selection


def magnitude_scores(checkpoint: Checkpoint, params: Selection) -> dict[str, Tensor]:
    """L2 norm of all weights that would go with an index; fp64, read tensor by tensor.

    Embeddings and head are left out: they would outweigh the layers on the hidden axis.
    A query group counts as the query heads that it serves.
    """
    shape = checkpoint.shape
    sizes, layers = shape.axis_sizes(), shape.num_layers
    squares = {
        "hidden": torch.zeros(sizes["hidden"], dtype=torch.float64),
        "ffn": torch.zeros(layers, sizes["ffn"], dtype=torch.float64),
        "q": torch.zeros(layers, sizes["q"], dtype=torch.float64),
    }
    by_layer = torch.zeros(layers, dtype=torch.float64)
    for parameter in parameters(shape):
        if parameter.layer is None:
            continue
        tensor = checkpoint.read(parameter.hf).double().square()
        by_layer[parameter.layer] += tensor.sum()
        for dim, axis in enumerate(parameter.row.axes):
            if axis in squares:
                target = squares[axis] if axis == "hidden" else squares[axis][parameter.layer]
                target += tensor.sum([other for other in range(tensor.dim()) if other != dim])
    drops = layers - target_of(params, shape).num_layers
    runs = by_layer.unfold(0, max(drops, 1), 1).sum(-1) if params.layer_removal == "contiguous" else by_layer
    return {
        "hidden": squares["hidden"].sqrt(),
        "ffn": squares["ffn"].sqrt(),
        "heads": head_scores(squares["q"].sqrt(), shape.kv_channels),
        layer_score(params, drops): runs.sqrt(),
    }
