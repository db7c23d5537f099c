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
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Optimization
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.cores import usable_memory_bytes
from nemo_minitron.workload.load import Load
from nemo_minitron.workload.memory import GIB, WEIGHT_BYTES, Memory, memory_of, optimizer_bytes

FORWARD_MFU_SHARE = 0.8
"""MFU of stages without a backward pass, relative to that of trainings: their batches are smaller."""


@dataclass(frozen=True)
class Estimate:
    """Estimated resources of one stage."""

    memory: Memory
    tokens: int
    flops: float
    seconds: float
    gpu_hours: float
    cost: float | None
    disk_bytes: int
    limit_gib: float | None
    """Memory that a process can use; None if it is not known."""

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
        }


def estimates(plan: RunPlan) -> dict[str, Estimate]:
    """Return stage -> estimate, for the stages that compute with models of known sizes."""
    found: dict[str, Estimate] = {}
    for call in plan.calls:
        load = load_of(call, plan.recipe)
        if load is not None:
            found[call.name] = _estimate(load, call.parallel, plan.recipe, _disk(call, load, plan.recipe))
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


def totals(found: Mapping[str, Estimate], more_disk_bytes: int = 0) -> dict[str, Any]:
    """Sum the estimates over the run, in which stages run one after another.

    Args:
        more_disk_bytes: disk space that is not part of the estimates.
    """
    costs = [estimate.cost for estimate in found.values() if estimate.cost is not None]
    return {
        "hours": sum(estimate.seconds for estimate in found.values()) / 3600,
        "gpu_hours": sum(estimate.gpu_hours for estimate in found.values()),
        "cost": sum(costs) if costs else None,
        "disk_gib": (more_disk_bytes + sum(estimate.disk_bytes for estimate in found.values())) / GIB,
    }


def limit_gib(recipe: Recipe, layout: Parallel) -> float | None:
    """Return the memory that a process can use: that of a GPU without the planning reserve, or its share of this
    machine's; None on CPUs of a cluster, whose memory is not known."""
    execution, memory = recipe.execution, hardware_of(recipe).memory_gib
    if memory is not None:
        return memory - execution.planning.reserve_gib
    return usable_memory_bytes() / GIB / layout.world_size if execution.cluster is None else None


def _estimate(load: Load, layout: Parallel, recipe: Recipe, disk_bytes: int) -> Estimate:
    hardware, planning = hardware_of(recipe), recipe.execution.planning
    mfu = (planning.mfu or hardware.usual_mfu) * (1.0 if load.work.trains else FORWARD_MFU_SHARE)
    flops = load.tokens * load.flops_per_token
    seconds = flops / (layout.world_size * peak_tflops(recipe) * 1e12 * mfu)
    gpu_hours = 0.0 if hardware.name == "CPU" else seconds / 3600 * layout.world_size
    price = planning.price_per_gpu_hour
    return Estimate(
        memory=memory_of(load.work),
        tokens=load.tokens,
        flops=flops,
        seconds=seconds,
        gpu_hours=gpu_hours,
        cost=None if price is None else price * gpu_hours,
        disk_bytes=disk_bytes,
        limit_gib=limit_gib(recipe, layout),
    )


def load_of(call: StageCall, recipe: Recipe, layout: Parallel | None = None) -> Load | None:
    """Return the load of a stage in a layout, by default its own; None if it computes nothing or sizes are unknown."""
    load = STAGES[call.kind].load(call.name, recipe.stages[call.name], layout or call.parallel, View(recipe))
    if load is None:
        return None
    on_gpu = hardware_of(recipe).name != "CPU"
    return replace(load, work=replace(load.work, on_gpu=on_gpu, kernels=recipe.execution.kernels))


def _disk(call: StageCall, load: Load, recipe: Recipe) -> int:
    """Return the disk space of a stage's output and, for a training, of its checkpoints."""
    stage = recipe.stages[call.name]
    count = num_params(load.work.shape)
    own = STAGES[call.kind].disk_bytes(stage, load)
    if own is not None:
        return own
    if not load.work.trains:
        return 0
    precision = load.work.precision
    weights = WEIGHT_BYTES[precision] * count
    checkpoint = weights + optimizer_bytes(count, precision, Parallel())
    if load.work.teacher is not None and load.work.teacher_learns:
        teacher = num_params(load.work.teacher)
        checkpoint += WEIGHT_BYTES[precision] * teacher + optimizer_bytes(teacher, precision, Parallel())
    kept = stage.keep_checkpoints + 1 if isinstance(stage, Optimization) else 2
    return weights + kept * checkpoint
