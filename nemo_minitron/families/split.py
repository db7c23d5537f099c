"""How Megatron shares a model out over tensor- and pipeline-parallel ranks. No torch."""

from __future__ import annotations

from itertools import accumulate
from math import ceil, prod

from nemo_minitron.errors import PlanError
from nemo_minitron.families.shape import ModelShape
from nemo_minitron.families.table import rows

SPLIT_AXES = frozenset({"vocab", "q", "kv", "ffn"})
"""Axes that tensor parallelism splits; all others are whole on every rank."""


def stage_bounds(num_layers: int, pp: int) -> list[tuple[int, int]]:
    """[start, stop) of each pipeline stage's layers.

    Where they do not divide, the stages in the middle, which hold neither embeddings nor head, get more.

    Raises:
        PlanError: fewer layers than stages.
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
    """Megatron splits the vocabulary evenly over the tensor-parallel ranks; the rows added are zeros."""
    return -(-vocab_size // tp) * tp


def params_of_rank(shape: ModelShape, *, tp: int, pp: int, stage: int) -> int:
    """Parameters on one rank of this pipeline stage (0-based), padding of the vocabulary included.

    Tied embeddings are kept on the first and on the last stage.
    """
    start, stop = stage_bounds(shape.num_layers, pp)[stage]
    sizes = {**shape.axis_sizes(), "vocab": padded_vocab_size(shape.vocab_size, tp)}
    total = 0
    for row in rows(shape):
        count = prod(sizes[axis] // tp if axis in SPLIT_AXES else sizes[axis] for axis in row.axes)
        if row.per_layer:
            total += count * (stop - start)
        elif "vocab" in row.axes and row.megatron.startswith("embedding"):
            total += count * (stage == 0 or (shape.tied_embeddings and stage == pp - 1))
        else:
            total += count * (stage == pp - 1)
    return total
