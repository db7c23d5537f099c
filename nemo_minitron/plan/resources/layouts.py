"""Proposals of layouts: tp, pp, micro-batch size and recomputation with which a stage fits on a number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.plan.checks import layout_problems
from nemo_minitron.plan.planner import StageCall
from nemo_minitron.plan.resources.costs import limit_gib, load_of
from nemo_minitron.plan.resources.hardware import hardware_of, peak_tflops
from nemo_minitron.plan.resources.step_time import step_time
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Optimization
from nemo_minitron.workload.load import Load
from nemo_minitron.workload.memory import GIB, memory_of

MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Proposal:
    """A layout that fits into memory, with its peak memory and its expected MFU."""

    layout: Parallel
    peak_gib: float
    mfu: float
    """Expected MFU, which ranks the proposals (step_time.py)."""


def proposals(call: StageCall, recipe: Recipe, num_gpus: int, gpus_per_node: int, *, most: int = 3) -> list[Proposal]:
    """Return the fastest layouts that fit, fastest first; an empty list on CPUs, if nothing fits or sizes are unknown.

    Args:
        most: maximum number of proposals.
    """
    stage = recipe.stages[call.name]
    if hardware_of(recipe).name == "CPU" or not isinstance(stage, Optimization):
        return []
    found = []
    for layout in _candidates(stage, num_gpus, gpus_per_node):
        load = load_of(call, recipe, layout)
        if load is None or not _divides(load, layout):
            continue
        peak, limit = memory_of(load.work).peak / GIB, limit_gib(recipe, layout)
        if limit is not None and peak <= limit:
            time = step_time(load, layout, hardware_of(recipe), peak_tflops(recipe), gpus_per_node)
            found.append(Proposal(layout, peak, time.mfu))
    return sorted(found, key=lambda proposal: -proposal.mfu)[:most]


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
                overlap_grad_reduce=dp > 1,
                overlap_param_gather=dp > 1,
                recompute=recompute,  # type: ignore[arg-type]
            )


def _divides(load: Load, layout: Parallel) -> bool:
    shapes = [shape for shape in (load.work.shape, load.work.teacher) if shape is not None]
    if load.work.seq_len_tokens % layout.tp:
        return False
    return not any(problem for shape in shapes for problem in layout_problems(shape, layout))
