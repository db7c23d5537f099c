"""The jobs of a plan on a cluster, with their resources and dependencies. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_minitron.errors import PlanError
from nemo_minitron.launch import images
from nemo_minitron.plan.planner import RunPlan, StageCall
from nemo_minitron.plan.view import View
from nemo_minitron.schema.cluster import Cluster, Container, Resources
from nemo_minitron.stages.registry import STAGES

Environment = Literal["core", "aligner"]


@dataclass(frozen=True)
class Job:
    """One script: a stage, or a job array of the candidates of a search."""

    name: str
    stages: tuple[str, ...]
    """More than one: a job array with one task per stage."""
    nodes: int
    """All nodes, with those for servers."""
    processes_per_node: int
    resources: Resources
    """Resources of the job; None where the site decides."""
    environment: Environment
    uses_gpu: bool
    """Whether its stages can use a GPU and the recipe allows it."""
    after: tuple[str, ...]
    """Names of jobs that must succeed first."""
    server_nodes: int = 0
    """Nodes that run only servers."""

    @property
    def is_array(self) -> bool:
        return len(self.stages) > 1

    def is_exclusive(self, cluster: Cluster) -> bool:
        """Return whether it requests whole nodes. On several nodes, others could reach the store of its processes."""
        return cluster.exclusive and (self.uses_gpu or self.nodes > 1)


def jobs_of(plan: RunPlan, cluster: Cluster, wanted: set[str]) -> list[Job]:
    """Return the jobs for the stages of `wanted` that have not finished, each after the jobs that it depends on.

    Raises:
        PlanError: resources for stages that do not exist, or a layout that does not fill nodes evenly.
    """
    unknown = sorted(set(cluster.by_stage) - {call.name for call in plan.calls})
    if unknown:
        raise PlanError(
            f"execution.cluster.by_stage has {', '.join(unknown)}, which this recipe does not have.",
            allowed=", ".join(call.name for call in plan.calls),
        )
    calls = [call for call in plan.calls if call.name in wanted and plan.states[call.name].status != "finished"]
    job_of = {call.name: _job_name(call, plan, cluster) for call in calls}
    groups: dict[str, list[StageCall]] = {}
    for call in calls:
        groups.setdefault(job_of[call.name], []).append(call)
    return [_job(name, group, job_of, cluster, plan) for name, group in groups.items()]


def _job_name(call: StageCall, plan: RunPlan, cluster: Cluster) -> str:
    """Return the stage's name, or the name of the array of the candidates that are compared with each other.

    The tasks of an array have the same nodes: a candidate with a layout or resources of its own is no part of it.
    """
    if call.name in cluster.by_stage or call.name in plan.recipe.execution.parallel_by_stage:
        return call.name
    return STAGES[call.kind].array(call.name, plan.recipe.stages[call.name]) or call.name


def _job(name: str, group: list[StageCall], job_of: dict[str, str], cluster: Cluster, plan: RunPlan) -> Job:
    call, execution = group[0], plan.recipe.execution
    spec, whole = STAGES[call.kind], View(plan.recipe).whole(call.name)
    uses_gpu = spec.uses_gpu and execution.device != "cpu"
    resources = _merged_resources((whole, call.name), cluster, uses_gpu=uses_gpu)
    nodes, each = _share_out(call, whole, cluster)
    for_servers = _server_nodes(call, nodes, execution.server_nodes_by_stage.get(call.name))
    waits = {job_of[other]: None for member in group for other in member.depends if other in job_of}
    return Job(
        name=name,
        stages=tuple(member.name for member in group),
        nodes=nodes + for_servers,
        processes_per_node=each,
        resources=resources.model_copy(update={"gpus_per_node": _gpus(resources, cluster, each, uses_gpu=uses_gpu)}),
        environment="aligner" if spec.needs_aligner else "core",
        uses_gpu=uses_gpu,
        after=tuple(other for other in waits if other != name),
        server_nodes=for_servers,
    )


def ranks_per_node(cluster: Cluster) -> int:
    """Return how many processes of a layout one node takes."""
    return cluster.ranks_per_node or max(1, cluster.gpus_per_node)


def _share_out(call: StageCall, whole: str, cluster: Cluster) -> tuple[int, int]:
    """Return (nodes, processes on each)."""
    size, most = call.parallel.world_size, ranks_per_node(cluster)
    if not STAGES[call.kind].has_layout or size <= most:
        return 1, size
    if size % most:
        raise PlanError(
            f"Stage {call.name} has {size} processes, and a node takes {most}: its nodes cannot be filled evenly.",
            where=f"execution.parallel_by_stage.{whole} or execution.parallel",
            allowed=f"tp * pp * cp * dp of up to {most}, or a multiple of it",
            next_step="Change dp, or execution.cluster.ranks_per_node.",
        )
    return size // most, most


def _server_nodes(call: StageCall, nodes: int, wanted: int | None) -> int:
    """Return the nodes for servers: as the recipe says, else one for a stage on several nodes.

    Raises:
        PlanError: none are wanted for a stage on several nodes, whose processes cannot reach servers on the first node.
    """
    if wanted is None:
        return min(1, STAGES[call.kind].num_servers(call.params)) if nodes > 1 else 0
    if nodes > 1 and not wanted:
        raise PlanError(
            f"The processes of stage {call.name} take {nodes} nodes, and its servers need nodes of their own then.",
            where=f"execution.server_nodes_by_stage.{call.name} = 0",
            allowed="1 or more, or a layout whose processes fit on one node",
        )
    return wanted


def _gpus(resources: Resources, cluster: Cluster, processes: int, *, uses_gpu: bool) -> int:
    """Return the GPUs of each node; all of them where jobs take whole nodes."""
    if resources.gpus_per_node is not None:
        return resources.gpus_per_node
    if not uses_gpu or not cluster.gpus_per_node:
        return 0
    return cluster.gpus_per_node if cluster.exclusive else min(processes, cluster.gpus_per_node)


def _merged_resources(stages: Iterable[str], cluster: Cluster, *, uses_gpu: bool) -> Resources:
    """Merge resources: those of the stages, the last first, override those of CPU stages, and these the cluster's."""
    names = set(Resources.model_fields) & set(Cluster.model_fields) - {"gpus_per_node"}
    found = {name: getattr(cluster, name) for name in names}
    layers = [*([] if uses_gpu else [cluster.cpu]), *(cluster.by_stage.get(name, Resources()) for name in stages)]
    for layer in layers:
        found |= {name: value for name, value in layer if value is not None}
    return Resources(**found)


def image_of(container: Container, environment: Environment) -> str | None:
    """Return the image that the site names for an environment."""
    return container.aligner_image if environment == "aligner" else container.core_image


def missing_images(cluster: Cluster, jobs: list[Job]) -> Iterator[str]:
    """Yield the environments of these jobs for which the site names no image."""
    container = cluster.container
    for environment in dict.fromkeys(job.environment for job in jobs):
        if container.runtime != "none" and image_of(container, environment) is None:
            stages = ", ".join(job.name for job in jobs if job.environment == environment)
            yield f"execution.cluster.container.{environment}_image is not set; it is needed for {stages}."


def images_of(cluster: Cluster, jobs: list[Job]) -> dict[str, str]:
    """Map keys below execution.cluster.container to images, for the environments of these jobs."""
    container = cluster.container
    if container.runtime == "none":
        return {}
    named = {environment: image_of(container, environment) for environment in sorted({job.environment for job in jobs})}
    return {f"{environment}_image": image for environment, image in named.items() if image is not None}


def misspelled_images(cluster: Cluster, jobs: list[Job], folder: Path) -> Iterator[str]:
    """Yield what is wrong with the names of the jobs' images for the site's runtime.

    Args:
        folder: base of relative paths.
    """
    for key, image in images_of(cluster, jobs).items():
        wrong = images.problem(cluster.container.runtime, image, folder)
        if wrong is not None:
            yield f"execution.cluster.container.{key}: {wrong}"
