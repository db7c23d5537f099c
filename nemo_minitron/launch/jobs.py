"""A plan -> the jobs of a cluster, with what each asks for and waits for. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_minitron.errors import PlanError
from nemo_minitron.launch import images
from nemo_minitron.plan.planner import RunPlan, StageCall
from nemo_minitron.schema.cluster import Cluster, Container, Resources
from nemo_minitron.stages.registry import STAGES

Environment = Literal["core", "aligner"]


@dataclass(frozen=True)
class Job:
    """One script: a stage, or an array of candidates of a search."""

    name: str
    stages: tuple[str, ...]
    """More than one: an array, one index each."""
    nodes: int
    processes_per_node: int
    asked: Resources
    """Complete but for what the site decides."""
    environment: Environment
    uses_gpu: bool
    after: tuple[str, ...]
    """Names of jobs that must have succeeded."""

    @property
    def is_array(self) -> bool:
        return len(self.stages) > 1


def jobs_of(plan: RunPlan, cluster: Cluster, wanted: set[str]) -> list[Job]:
    """The jobs for the stages of `wanted` that have not finished, in an order in which they can be submitted.

    Raises:
        PlanError: resources for stages that are not there, or a layout that does not fill nodes evenly.
    """
    unknown = sorted(set(cluster.by_stage) - {call.name for call in plan.calls})
    if unknown:
        raise PlanError(
            f"execution.cluster.by_stage has {', '.join(unknown)}, which this recipe has not.",
            allowed=", ".join(call.name for call in plan.calls),
        )
    calls = [call for call in plan.calls if call.name in wanted and plan.states[call.name].status != "finished"]
    job_of = {call.name: _job_name(call, plan) for call in calls}
    groups: dict[str, list[StageCall]] = {}
    for call in calls:
        groups.setdefault(job_of[call.name], []).append(call)
    return [_job(name, group, job_of, cluster) for name, group in groups.items()]


def _job_name(call: StageCall, plan: RunPlan) -> str:
    """Its own, or that of the array of the candidates that are compared with each other."""
    return STAGES[call.kind].array(call.name, plan.recipe.stages[call.name]) or call.name


def _job(name: str, group: list[StageCall], job_of: dict[str, str], cluster: Cluster) -> Job:
    call = group[0]
    spec = STAGES[call.kind]
    asked = _asked(call, cluster, uses_gpu=spec.uses_gpu)
    nodes, each = _share_out(call, cluster)
    waits = {job_of[other]: None for member in group for other in member.depends if other in job_of}
    return Job(
        name=name,
        stages=tuple(member.name for member in group),
        nodes=nodes,
        processes_per_node=each,
        asked=asked.model_copy(update={"gpus_per_node": _gpus(asked, cluster, each, uses_gpu=spec.uses_gpu)}),
        environment="aligner" if spec.needs_aligner else "core",
        uses_gpu=spec.uses_gpu,
        after=tuple(other for other in waits if other != name),
    )


def ranks_per_node(cluster: Cluster) -> int:
    """Processes of a layout on one node."""
    return cluster.ranks_per_node or max(1, cluster.gpus_per_node)


def _share_out(call: StageCall, cluster: Cluster) -> tuple[int, int]:
    """(nodes, processes on each)."""
    size, most = call.parallel.world_size, ranks_per_node(cluster)
    if not STAGES[call.kind].has_layout or size <= most:
        return 1, size
    if size % most:
        raise PlanError(
            f"Stage {call.name} has {size} processes, and a node takes {most}: its nodes cannot be filled evenly.",
            where=f"execution.parallel_by_stage.{call.name} or execution.parallel",
            allowed=f"tp * pp * cp * dp of up to {most}, or a multiple of it",
            next_step="Change dp, or execution.cluster.ranks_per_node.",
        )
    return size // most, most


def _gpus(asked: Resources, cluster: Cluster, processes: int, *, uses_gpu: bool) -> int:
    """GPUs of each node; all of them where whole nodes are taken."""
    if asked.gpus_per_node is not None:
        return asked.gpus_per_node
    if not uses_gpu or not cluster.gpus_per_node:
        return 0
    return cluster.gpus_per_node if cluster.exclusive else min(processes, cluster.gpus_per_node)


def _asked(call: StageCall, cluster: Cluster, *, uses_gpu: bool) -> Resources:
    """The stage's own wishes over those of its kind over the cluster's."""
    names = set(Resources.model_fields) & set(Cluster.model_fields) - {"gpus_per_node"}
    found = {name: getattr(cluster, name) for name in names}
    layers = [*([] if uses_gpu else [cluster.cpu]), cluster.by_stage.get(call.name, Resources())]
    for layer in layers:
        found |= {name: value for name, value in layer if value is not None}
    return Resources(**found)


def image_of(container: Container, environment: Environment) -> str | None:
    """The image that the site names for an environment."""
    return container.aligner_image if environment == "aligner" else container.core_image


def missing_images(cluster: Cluster, jobs: list[Job]) -> Iterator[str]:
    """Environments of these jobs for which the site's containers have no image."""
    container = cluster.container
    for environment in dict.fromkeys(job.environment for job in jobs):
        if container.runtime != "none" and image_of(container, environment) is None:
            stages = ", ".join(job.name for job in jobs if job.environment == environment)
            yield f"execution.cluster.container.{environment}_image is not set; it is needed for {stages}."


def images_of(cluster: Cluster, jobs: list[Job]) -> dict[str, str]:
    """Key below execution.cluster.container -> the image, for the environments that these jobs run in."""
    container = cluster.container
    if container.runtime == "none":
        return {}
    named = {environment: image_of(container, environment) for environment in sorted({job.environment for job in jobs})}
    return {f"{environment}_image": image for environment, image in named.items() if image is not None}


def misspelt_images(cluster: Cluster, jobs: list[Job], folder: Path) -> Iterator[str]:
    """What is wrong with the names of the jobs' images for the site's runtime.

    Args:
        folder: where relative paths begin.
    """
    for key, image in images_of(cluster, jobs).items():
        wrong = images.problem(cluster.container.runtime, image, folder)
        if wrong is not None:
            yield f"execution.cluster.container.{key}: {wrong}"


def problems(cluster: Cluster, jobs: list[Job]) -> Iterator[str]:
    """What is wrong with the cluster's keys for these jobs."""
    container = cluster.container
    yield from missing_images(cluster, jobs)
    if container.runtime == "docker":
        yield "execution.cluster.container.runtime = docker is for launcher=local; on Slurm: pyxis, apptainer or none."
    for job in jobs:
        time_min = job.asked.time_min or 0
        if time_min * 60 <= cluster.grace_s:
            yield f"Stage {job.name} has {time_min} minutes, not more than the grace of {cluster.grace_s} s."
