"""What can be seen of a cluster before a job is queued. Asks, changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import MinitronError
from nemo_minitron.launch import images, slurm
from nemo_minitron.launch.answers import Partition, default_partition, has_pyxis, partitions
from nemo_minitron.launch.containers import mounts_of
from nemo_minitron.launch.jobs import Job, images_of, jobs_of, misspelt_images, problems
from nemo_minitron.launch.submit import cluster_of, placed
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan, make_plan
from nemo_minitron.schema.cluster import Cluster

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    level: Level
    text: str


def probe(recipe: Recipe) -> list[Finding]:
    """Programs, partitions, limits, GPUs, the container plugin, images and mounts.

    Raises:
        PlanError: the recipe names no cluster.
    """
    cluster, plan = cluster_of(recipe), make_plan(recipe)
    jobs = jobs_of(plan, cluster, {call.name for call in plan.calls})
    found = [Finding("problem", text) for text in problems(cluster, jobs)]
    try:
        slurm.require_slurm()
        found += [*_partitions(cluster, jobs), *_plugin(cluster)]
    except MinitronError as error:
        found.append(Finding("problem", error.what))
    found += [*_images(cluster, jobs), *_paths(cluster, recipe)]
    return found


def missing_here(plan: RunPlan) -> list[str]:
    """What a launch needs and this machine does not have: the launcher's program, images, mounts, the set-up script.

    Raises:
        PlanError: the recipe names no cluster.
    """
    recipe = plan.recipe
    cluster = cluster_of(recipe)
    runtime = cluster.container.runtime
    program = "sbatch" if recipe.execution.launcher == "slurm" else runtime
    found = []
    if program != "none" and shutil.which(program) is None:
        found.append(f"{program}: there is no such program on this machine.")
    jobs = jobs_of(plan, cluster, {call.name for call in plan.calls})
    seen = [*_images(cluster, jobs), *_paths(cluster, recipe)]
    return [*found, *(finding.text for finding in seen if finding.level == "problem")]


def _partitions(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    known = partitions(slurm.ask(["sinfo", "--noheader", "--format=%R|%a|%l|%G|%D|%c|%m|%t"]))
    first = default_partition(slurm.ask(["sinfo", "--noheader", "--format=%P"]))
    if not known:
        yield Finding("problem", "sinfo names no partition here")
        return
    yield Finding("ok", f"Slurm answers; partitions: {', '.join(sorted(known))}")
    for job in jobs:
        name = job.asked.partition or first
        if name is None or any(part not in known for part in name.split(",")):
            yield Finding("problem", f"{job.name}: there is no partition {name or '(no default)'}; {', '.join(known)}")
            continue
        for part in (known[part] for part in name.split(",")):
            yield from _fits(job, part)
    yield from _shared_cores(cluster, jobs)


def _shared_cores(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    """Jobs that do not say what they need get what the site gives by default, mostly one core."""
    modest = [
        job.name
        for job in jobs
        if not (cluster.exclusive and job.uses_gpu) and (job.asked.cpus_per_node is None or job.asked.mem_gib is None)
    ]
    if modest and "--exclusive" not in cluster.sbatch:
        names = ", ".join(modest[:4]) + (" ..." if len(modest) > 4 else "")
        yield Finding(
            "warning",
            f"{names}: no cpus_per_node or mem_gib in the site's file: on shared nodes Slurm's default, mostly 1 core",
        )


def _fits(job: Job, partition: Partition) -> Iterator[Finding]:
    where = f"{job.name} on {partition.name}"
    if not partition.is_up:
        yield Finding("warning", f"{where}: the partition is down; the job would wait")
    if partition.limit_min is not None and (job.asked.time_min or 0) > partition.limit_min:
        yield Finding("problem", f"{where}: {job.asked.time_min} minutes, the limit is {partition.limit_min}")
    if (job.asked.gpus_per_node or 0) > partition.gpus:
        yield Finding("problem", f"{where}: {job.asked.gpus_per_node} GPUs of a node, it has {partition.gpus}")
    if job.nodes > partition.nodes:
        yield Finding("problem", f"{where}: {job.nodes} nodes, it has {partition.nodes}")
    elif partition.usable is not None and job.nodes > partition.usable:
        yield Finding("warning", f"{where}: {job.nodes} nodes, {partition.usable} are up now; the job would wait")
    cpus, mem_gib = job.asked.cpus_per_node or 0, job.asked.mem_gib or 0
    if partition.cpus is not None and cpus > partition.cpus:
        yield Finding("problem", f"{where}: {cpus} cores of a node, it has {partition.cpus}")
    if partition.mem_mib is not None and mem_gib * 1024 > partition.mem_mib:
        yield Finding("problem", f"{where}: {mem_gib} GiB of a node, it has {partition.mem_mib / 1024:.1f}")


def _plugin(cluster: Cluster) -> Iterator[Finding]:
    if cluster.container.runtime == "pyxis":
        has = has_pyxis(slurm.ask(["srun", "--help"]))
        text = (
            "srun takes --container-image (pyxis)" if has else "srun has no --container-image: pyxis is not installed"
        )
        yield Finding("ok" if has else "problem", text)
    elif cluster.container.runtime != "none":
        yield Finding("warning", f"whether the nodes have {cluster.container.runtime} cannot be seen from here")


def _images(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    yield from (Finding("problem", text) for text in misspelt_images(cluster, jobs, Path.cwd()))
    for key, image in images_of(cluster, jobs).items():
        absent = images.missing(cluster.container.runtime, image, Path.cwd())
        if absent is not None:
            yield Finding("problem", f"container.{key}: there is no file {absent}")


def _paths(cluster: Cluster, recipe: Recipe) -> Iterator[Finding]:
    container = cluster.container
    if container.runtime != "none":
        # The run's folder and the assets are made when they are needed.
        for mount in mounts_of(container, placed(recipe, run_dir(recipe)).place):
            if not Path(mount.source).exists() and mount in container.mounts:
                yield Finding("problem", f"container.mounts: there is no {mount.source} here")
    if cluster.setup_script is not None and not Path(cluster.setup_script).is_file():
        yield Finding("problem", f"setup_script: there is no file {cluster.setup_script}")
