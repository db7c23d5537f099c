"""Estimates for each stage of a plan: memory of a process, tokens, operations, hours, cost and disk space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.families import num_params
from nemo_minitron.plan.planner import RunPlan, StageCall
from nemo_minitron.plan.resources.hardware import hardware_of, peak_tflops
from nemo_minitron.plan.sources import listed_files, sources_of
from nemo_minitron.plan.view import View
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Optimization
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.cores import usable_memory_bytes
from nemo_minitron.workload.load import Load
from nemo_minitron.workload.memory import GIB, WEIGHT_BYTES, Memory, memory_of, optimizer_bytes

FORWARD_MFU_SHARE = 0.8
"""MFU of stages without a backward pass, relative to that of trainings: their batches are smaller."""

ONE_AFTER_ANOTHER = ("local", "docker")
"""Launchers that run one stage at a time."""


@dataclass(frozen=True)
class Estimate:
    """Estimated resources of one stage."""

    memory: Memory
    tokens: int
    flops: float
    seconds: float
    gpu_hours: float
    cost: float | None
    output_bytes: int
    """Disk space that the stage leaves."""
    work_bytes: int
    """Disk space of its work folder, which is deleted when the stage has finished."""
    limit_gib: float | None
    """Memory that a process can use; None if it is not known."""
    is_bound: bool = False
    """Whether a search decides the sizes of its models; they are then those of the largest candidate."""

    @property
    def disk_bytes(self) -> int:
        """Disk space while the stage runs."""
        return self.output_bytes + self.work_bytes

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def fits(self) -> bool:
        return self.limit_gib is None or self.memory.peak / GIB <= self.limit_gib

    def facts(self) -> dict[str, Any]:
        return {
            "memory": self.memory.facts(),
            "limit_gib": self.limit_gib,
            "fits": self.fits,
            "tokens": self.tokens,
            "flops": self.flops,
            "tokens_per_s": self.tokens_per_s,
            "hours": self.seconds / 3600,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "disk_gib": self.disk_bytes / GIB,
            "is_bound": self.is_bound,
        }


def estimates(plan: RunPlan) -> dict[str, Estimate]:
    """Return stage -> estimate, for the stages that compute with models of known sizes or of sizes from a search."""
    found: dict[str, Estimate] = {}
    exact = View(plan.recipe)
    bounded = exact.for_estimates()
    for call in plan.calls:
        load = load_of(call, exact)
        is_bound = load is None
        if load is None:
            load = load_of(call, bounded)
        if load is not None:
            found[call.name] = replace(_estimate(load, call, plan.recipe), is_bound=is_bound)
    return found


def tokenized_bytes(plan: RunPlan) -> int:
    """Return the disk space of tokenization while it joins its shards, for the sources that exist."""
    return sum(
        disk_bytes(file, file.stat().st_size)
        for call in plan.calls
        if (disk_bytes := STAGES[call.kind].source_disk_bytes) is not None
        for source in sources_of(plan.recipe.stages[call.name])
        for file in listed_files(source, Path(plan.recipe.execution.assets_dir))
    )


def totals(plan: RunPlan, found: Mapping[str, Estimate], more_disk_bytes: int = 0) -> dict[str, Any]:
    """Sum the estimates over the run, in which stages run one after another.

    The disk holds what all stages leave, and the work folders that can exist together.

    Args:
        more_disk_bytes: disk space that is not part of the estimates.
    """
    left = sum(estimate.output_bytes for estimate in found.values())
    costs = [estimate.cost for estimate in found.values() if estimate.cost is not None]
    return {
        "hours": sum(estimate.seconds for estimate in found.values()) / 3600,
        "gpu_hours": sum(estimate.gpu_hours for estimate in found.values()),
        "cost": sum(costs) if costs else None,
        "disk_gib": (more_disk_bytes + left + _work_bytes(plan, found)) / GIB,
    }


def _work_bytes(plan: RunPlan, found: Mapping[str, Estimate]) -> int:
    """Return a bound of the disk space of all work folders that exist at the same time.

    On one machine stages run one after another. Jobs of a cluster can run together unless one waits for the other, so
    each stage counts with all that do not wait for it and that it does not wait for.
    """
    if plan.recipe.execution.launcher in ONE_AFTER_ANOTHER:
        return max((estimate.work_bytes for estimate in found.values()), default=0)
    before: dict[str, set[str]] = {}
    for call in plan.calls:
        before[call.name] = {*call.depends, *(name for other in call.depends for name in before[other])}
    works = {name: estimate.work_bytes for name, estimate in found.items() if estimate.work_bytes}
    together = (
        sum(works[other] for other in works if other not in before[name] and name not in before[other])
        for name in works
    )
    return max(together, default=0)


def limit_gib(recipe: Recipe, layout: Parallel) -> float | None:
    """Return the memory that a process can use: that of a GPU without the planning reserve, or its share of this
    machine's; None on CPUs of a cluster, whose memory is not known."""
    execution, memory = recipe.execution, hardware_of(recipe).memory_gib
    if memory is not None:
        return memory - execution.planning.reserve_gib
    return usable_memory_bytes() / GIB / layout.world_size if execution.cluster is None else None


def peak_memory(load: Load) -> Memory:
    """Return the memory of a process in the phase of a stage that needs the most."""
    return max((memory_of(phase.work) for phase in load.phases), key=lambda memory: memory.peak)


def _estimate(load: Load, call: StageCall, recipe: Recipe) -> Estimate:
    processes = call.parallel.world_size
    seconds = sum(_seconds(phase, recipe) for phase in load.phases) / processes
    gpu_hours = 0.0 if hardware_of(recipe).name == "CPU" else seconds / 3600 * processes
    price = recipe.execution.planning.price_per_gpu_hour
    output_bytes, work_bytes = _disk(call, load, recipe)
    return Estimate(
        memory=peak_memory(load),
        tokens=load.tokens,
        flops=sum(phase.tokens * phase.flops_per_token for phase in load.phases),
        seconds=seconds,
        gpu_hours=gpu_hours,
        cost=None if price is None else price * gpu_hours,
        output_bytes=output_bytes,
        work_bytes=work_bytes,
        limit_gib=limit_gib(recipe, call.parallel),
    )


def _seconds(phase: Load, recipe: Recipe) -> float:
    """Return the time of a phase on one process."""
    mfu = recipe.execution.planning.mfu or hardware_of(recipe).usual_mfu
    share = 1.0 if phase.work.trains else FORWARD_MFU_SHARE
    return phase.tokens * phase.flops_per_token / (peak_tflops(recipe, phase.work.precision) * 1e12 * mfu * share)


def load_of(call: StageCall, view: View, layout: Parallel | None = None) -> Load | None:
    """Return the load of a stage in a layout, by default its own; None if it computes nothing or sizes are unknown."""
    recipe = view.recipe
    load = STAGES[call.kind].load(call.name, recipe.stages[call.name], layout or call.parallel, view)
    if load is None:
        return None
    on_gpu = hardware_of(recipe).name != "CPU"
    here, *others = (
        replace(phase, work=replace(phase.work, on_gpu=on_gpu, kernels=recipe.execution.kernels))
        for phase in load.phases
    )
    return replace(here, others=tuple(others))


def training_of(stage: StageParams) -> Optimization | None:
    """Return the keys of a stage's Megatron training; None if it has none."""
    training = getattr(stage, "retraining", stage)
    return training if isinstance(training, Optimization) else None


def _disk(call: StageCall, load: Load, recipe: Recipe) -> tuple[int, int]:
    """Return the disk space of a stage's output and of its work folder, with the checkpoints of a training."""
    stage = recipe.stages[call.name]
    training = training_of(stage)
    count = num_params(load.work.shape)
    own = STAGES[call.kind].disk_bytes(stage, load)
    if own is not None:
        return own, load.work_bytes
    if not load.work.trains:
        return 0, load.work_bytes
    precision = load.work.precision
    weights = WEIGHT_BYTES[precision] * count
    checkpoint = weights + optimizer_bytes(count, precision, Parallel())
    if load.work.teacher is not None and load.work.teacher_learns:
        teacher = num_params(load.work.teacher)
        checkpoint += WEIGHT_BYTES[precision] * teacher + optimizer_bytes(teacher, precision, Parallel())
    kept = 2 if training is None else training.keep_checkpoints + 1
    return weights, load.work_bytes + kept * checkpoint
