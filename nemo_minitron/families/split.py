"""How Megatron divides a model over tensor- and pipeline-parallel ranks. No torch."""

from __future__ import annotations

from itertools import accumulate
from math import ceil, prod

from nemo_minitron.errors import PlanError
from nemo_minitron.families.axes import SPLIT_LABELS
from nemo_minitron.families.shape import ModelShape
from nemo_minitron.families.table import placed_rows


def stage_bounds(num_layers: int, pp: int) -> list[tuple[int, int]]:
    """Return [start, stop) of the layers of each pipeline stage.

    If they do not divide evenly, the stages in the middle, which have neither embeddings nor head, get more.

    Raises:
        PlanError: there are fewer layers than stages.
    """
    middle = ceil(num_layers / pp)
    while num_layers - middle * (pp - 2) < 2 and middle > 1:
        middle -= 1
    ends = num_layers - middle * (pp - 2) if num_layers % pp else 2 * middle
    counts = [num_layers] if pp == 1 else [ends - ends // 2, *[middle] * (pp - 2), ends // 2]
    if min(counts) < 1 or sum(counts) != num_layers:
        raise PlanError(f"{num_layers} layers cannot be spread over {pp} pipeline stages.")
    stops = list(accumulate(counts))
    return list(zip([0, *stops], stops, strict=False))


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Return the vocabulary size after padding: Megatron splits it evenly over the tensor-parallel ranks.

    The added rows are zeros.
    """
    return -(-vocab_size // tp) * tp


def params_of_rank(shape: ModelShape, *, tp: int, pp: int, stage: int, layers_only: bool = False) -> int:
    """Return the number of parameters on one rank of this pipeline stage (0-based), with the padded vocabulary.

    Tied embeddings are on the first and on the last stage.

    Args:
        layers_only: leave out embeddings, final norm and head.
    """
    start, stop = stage_bounds(shape.num_layers, pp)[stage]
    sizes = {**shape.axis_sizes(), "vocab": padded_vocab_size(shape.vocab_size, tp)}
    total = 0
    for row, places in placed_rows(shape).items():
        count = prod(sizes[label] // tp if label in SPLIT_LABELS else sizes[label] for label in row.axes)
        if row.per_layer:
            here = sum(layer is not None and start <= layer < stop for layer in places)
            total += count * here * len(row.experts)
        elif layers_only:
            continue
        elif "vocab" in row.axes and row.megatron.startswith("embedding"):
            total += count * (stage == 0 or (shape.tied_embeddings and stage == pp - 1))
        else:
            total += count * (stage == pp - 1)
    return total
