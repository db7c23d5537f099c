"""Proposals of layouts: tp, pp, micro-batch size and recomputation with which a stage fits on a number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import log2

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.plan.checks import layout_problems
from nemo_minitron.plan.planner import StageCall
from nemo_minitron.plan.resources.costs import limit_gib, load_of
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Optimization
from nemo_minitron.workload.load import Load
from nemo_minitron.workload.memory import GIB, memory_of

MICRO_BATCHES = (1, 2, 4, 8)
TP_LOSS, RECOMPUTE_SHARE, SMALL_BATCH_TOKENS = 0.06, 0.75, 4096
"""Relative loss of speed for each doubling of tp inside a node; relative speed with full recomputation, which adds one
forward pass to the three of a training step; tokens of a micro-batch below which matrix products are too small for
full speed. These are rules of thumb that only rank the proposals."""


@dataclass(frozen=True)
class Proposal:
    """A layout that fits into memory, with its peak memory and its relative speed."""

    layout: Parallel
    peak_gib: float
    speed: float
    """1 means that every process reaches its full speed."""


def proposals(call: StageCall, recipe: Recipe, num_gpus: int, gpus_per_node: int, *, most: int = 3) -> list[Proposal]:
    """Return the fastest layouts that fit, fastest first; an empty list if nothing fits or sizes are unknown.

    Args:
        most: maximum number of proposals.
    """
    stage = recipe.stages[call.name]
    limit = limit_gib(recipe)
    if limit is None or not isinstance(stage, Optimization):
        return []
    found = []
    for layout in _candidates(stage, num_gpus, gpus_per_node):
        load = load_of(call, recipe, layout)
        if load is None or not _divides(load, layout):
            continue
        peak = memory_of(load.work).peak / GIB
        if peak <= limit:
            found.append(Proposal(layout, peak, _speed(load, layout)))
    return sorted(found, key=lambda proposal: -proposal.speed)[:most]


def _candidates(stage: Optimization, num_gpus: int, gpus_per_node: int) -> Iterator[Parallel]:
    """Yield layouts whose tp stays inside a node and whose dp * micro-batch size divides the global batch."""
    tps = [tp for tp in (1, 2, 4, 8, 16) if tp <= gpus_per_node]
    for tp, pp, micro, recompute in product(tps, (1, 2, 4, 8), MICRO_BATCHES, ("none", "full")):
        if num_gpus % (tp * pp):
            continue
        dp = num_gpus // (tp * pp)
        if stage.global_batch_size % (dp * micro) == 0:
            yield Parallel(
                tp=tp,
                pp=pp,
                dp=dp,
                sequence_parallel=tp > 1,
                micro_batch_size=micro,
                distributed_optimizer=dp > 1,
                recompute=recompute,  # type: ignore[arg-type]
            )


def _divides(load: Load, layout: Parallel) -> bool:
    shapes = [shape for shape in (load.work.shape, load.work.teacher) if shape is not None]
    if load.work.seq_len_tokens % layout.tp:
        return False
    return not any(problem for shape in shapes for problem in layout_problems(shape, layout))


def _speed(load: Load, layout: Parallel) -> float:
    micro_batches = load.work.num_micro_batches
    bubble = micro_batches / (micro_batches + layout.pp - 1)
    tokens = load.work.seq_len_tokens * layout.micro_batch_size
    filled = min(1.0, (tokens / SMALL_BATCH_TOKENS) ** 0.25)
    again = RECOMPUTE_SHARE if layout.recompute == "full" else 1.0
    return bubble * filled * again * (1.0 - TP_LOSS * log2(layout.tp))
