"""What can be seen of a cluster before a job is queued. Asks, changes nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_minitron.config.schema import Cluster, Recipe
from nemo_minitron.errors import MinitronError
from nemo_minitron.launch import slurm
from nemo_minitron.launch.containers import mounts_of
from nemo_minitron.launch.jobs import Job, jobs_of, problems
from nemo_minitron.launch.submit import cluster_of, placed
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import make_plan

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    level: Level
    text: str


@dataclass(frozen=True)
class Partition:
    """As sinfo tells it; minutes and GPUs of one node."""

    name: str
    is_up: bool
    limit_min: int | None
    gpus: int
    nodes: int


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
    found += _paths(cluster, recipe)
    return found


def missing_here(recipe: Recipe) -> list[str]:
    """What a launch needs and this machine does not have: the launcher's program, images, mounts, the set-up script.

    Raises:
        PlanError: the recipe names no cluster.
    """
    cluster = cluster_of(recipe)
    runtime = cluster.container.runtime
    program = "sbatch" if recipe.execution.launcher == "slurm" else runtime
    found = []
    if program != "none" and shutil.which(program) is None:
        found.append(f"{program}: there is no such program on this machine.")
    return [*found, *(finding.text for finding in _paths(cluster, recipe) if finding.level == "problem")]


def _partitions(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    known = partitions(slurm.ask(["sinfo", "--noheader", "--format=%R|%a|%l|%G|%D"]))
    default = slurm.ask(["sinfo", "--noheader", "--format=%P"])
    first = next((name.strip("*") for name in default.split() if name.endswith("*")), None)
    yield Finding("ok", f"Slurm answers; partitions: {', '.join(sorted(known))}")
    for job in jobs:
        name = job.asked.partition or first
        if name is None or any(part not in known for part in name.split(",")):
            yield Finding("problem", f"{job.name}: there is no partition {name or '(no default)'}; {', '.join(known)}")
            continue
        for part in (known[part] for part in name.split(",")):
            yield from _fits(job, part)


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


def partitions(sinfo: str) -> dict[str, Partition]:
    """From lines of `%R|%a|%l|%G|%D`; the best node of each partition counts."""
    found: dict[str, Partition] = {}
    for line in sinfo.splitlines():
        name, up, limit, gres, nodes = (word.strip() for word in line.split("|"))
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[A-Za-z][\w.-]*)?:(\d+)", gres))
        before = found.get(name, Partition(name, False, 0, 0, 0))
        minutes = minutes_of(limit)
        longest = None if minutes is None or before.limit_min is None else max(minutes, before.limit_min)
        found[name] = Partition(
            name, before.is_up or up == "up", longest, max(gpus, before.gpus), before.nodes + int(nodes)
        )
    return found


def minutes_of(limit: str) -> int | None:
    """Slurm's [days-]hours:minutes:seconds or minutes:seconds; None for infinite."""
    if limit in ("infinite", "UNLIMITED", "n/a"):
        return None
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts += [0] * (3 - len(parts))
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + part
    return int(days or 0) * 1440 + seconds // 60


def _plugin(cluster: Cluster) -> Iterator[Finding]:
    if cluster.container.runtime == "pyxis":
        has = "--container-image" in slurm.ask(["srun", "--help"])
        text = (
            "srun takes --container-image (pyxis)" if has else "srun has no --container-image: pyxis is not installed"
        )
        yield Finding("ok" if has else "problem", text)
    elif cluster.container.runtime != "none":
        yield Finding("warning", f"whether the nodes have {cluster.container.runtime} cannot be seen from here")


def _names_a_file(image: str) -> bool:
    return image.startswith(("/", "./")) or image.endswith((".sqsh", ".sif"))


def _paths(cluster: Cluster, recipe: Recipe) -> Iterator[Finding]:
    container = cluster.container
    if container.runtime != "none":
        for key in ("core_image", "aligner_image"):
            image = getattr(container, key)
            if image is not None and _names_a_file(image) and not Path(image).is_file():
                yield Finding("problem", f"container.{key}: there is no file {image}")
        # The run's folder and the assets are made when they are needed.
        for mount in mounts_of(container, placed(recipe, run_dir(recipe)).place):
            if not Path(mount.source).exists() and mount in container.mounts:
                yield Finding("problem", f"container.mounts: there is no {mount.source} here")
    if cluster.setup_script is not None and not Path(cluster.setup_script).is_file():
        yield Finding("problem", f"setup_script: there is no file {cluster.setup_script}")
