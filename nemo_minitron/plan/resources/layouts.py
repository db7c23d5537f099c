"""Proposals of layouts with which a stage fits on a number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product

from nemo_minitron.plan.checks import layout_problems, refused_layout
from nemo_minitron.plan.planner import StageCall
from nemo_minitron.plan.resources.costs import limit_gib, load_of, peak_memory, training_of
from nemo_minitron.plan.resources.hardware import hardware_of, peak_tflops
from nemo_minitron.plan.resources.step_time import step_time
from nemo_minitron.plan.view import View
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Optimization
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.workload.load import Load
from nemo_minitron.workload.memory import GIB

MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Proposal:
    """A layout that fits into memory, with its peak memory and its expected MFU."""

    layout: Parallel
    peak_gib: float
    mfu: float | None
    """Expected MFU, which ranks the proposals (step_time.py); None for a stage that is no Megatron training."""


def proposals(call: StageCall, view: View, num_gpus: int, gpus_per_node: int, *, most: int = 3) -> list[Proposal]:
    """Return layouts for GPUs that fit and that `check` accepts; an empty list on CPUs, or if sizes are unknown.

    Those of a training are the fastest, fastest first. Those of other stages split the model over the fewest GPUs.

    Args:
        most: maximum number of proposals.
    """
    recipe = view.recipe
    if hardware_of(recipe).name == "CPU" or STAGES[call.kind].whole_layers:
        return []
    training = training_of(view.stages[call.name])
    found = []
    for layout in _candidates(call, training, num_gpus, gpus_per_node):
        load = load_of(call, view, layout)
        if load is None or not _divides(load, layout):
            continue
        peak, limit = peak_memory(load).peak / GIB, limit_gib(recipe, layout)
        if limit is None or peak > limit:
            continue
        mfu = None
        if training is not None:
            peak_rate = peak_tflops(recipe, training.precision)
            mfu = step_time(load, layout, hardware_of(recipe), peak_rate, gpus_per_node).mfu
        found.append(Proposal(layout, peak, mfu))
    ranked = sorted(found, key=lambda proposal: -(proposal.mfu or 0.0))
    return list(islice((one for one in ranked if not refused_layout(call.name, one.layout, view)), most))


def _candidates(
    call: StageCall, training: Optimization | None, num_gpus: int, gpus_per_node: int
) -> Iterator[Parallel]:
    """Yield layouts for all GPUs whose tp stays inside a node; the fewest GPUs for a model come first.

    Context parallelism is not tried unless the recipe uses it.
    """
    tps, own = [tp for tp in (1, 2, 4, 8, 16) if tp <= gpus_per_node], call.parallel
    sizes = product(tps, (1, 2, 4, 8), sorted({1, own.cp}))
    for tp, pp, cp in sorted(sizes, key=lambda size: size[0] * size[1] * size[2]):
        if num_gpus % (tp * pp * cp) == 0:
            split = own.model_copy(
                update={
                    "tp": tp,
                    "pp": pp,
                    "cp": cp,
                    "dp": num_gpus // (tp * pp * cp),
                    "sequence_parallel": tp > 1,
                }
            )
            yield from _others(split) if training is None else _trainings(split, training)


def _others(split: Parallel) -> Iterator[Parallel]:
    """Yield the layout with the recipe's own micro-batches, and with the smallest ones."""
    for micro in sorted({1, split.micro_batch_size}, reverse=True):
        yield split.model_copy(update={"micro_batch_size": micro})


def _trainings(split: Parallel, training: Optimization) -> Iterator[Parallel]:
    """Yield the layout for each micro-batch size whose product with dp divides the batch, and each recomputation."""
    replicas = split.dp * split.cp
    # Gradients cannot be summed meanwhile where a loss of hidden states crosses pipeline stages.
    compares_hidden = getattr(getattr(training, "loss", None), "hidden", None) is not None
    overlaps = replicas > 1 and not (split.pp > 1 and compares_hidden)
    for micro, recompute in product(MICRO_BATCHES, ("none", "full")):
        if training.global_batch_size % (split.dp * micro) == 0:
            yield split.model_copy(
                update={
                    "micro_batch_size": micro,
                    "distributed_optimizer": replicas > 1,
                    "overlap_grad_reduce": overlaps,
                    "overlap_param_gather": overlaps,
                    "recompute": recompute,
                }
            )


def _divides(load: Load, layout: Parallel) -> bool:
    shapes = [shape for shape in (load.work.shape, load.work.teacher) if shape is not None]
    if load.work.seq_len_tokens % layout.tp:
        return False
    return not any(problem for shape in shapes for problem in layout_problems(shape, layout))
