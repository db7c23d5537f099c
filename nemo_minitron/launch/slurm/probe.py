"""Inspection of a Slurm cluster before a job is queued. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.launch.base import Finding
from nemo_minitron.launch.jobs import Job
from nemo_minitron.launch.slurm import client
from nemo_minitron.launch.slurm.answers import PARTITIONS, Partition, default_partition, has_pyxis, partitions
from nemo_minitron.schema.cluster import Cluster


def problems(cluster: Cluster, jobs: list[Job]) -> Iterator[str]:
    """Yield what is wrong with the cluster's keys for these jobs."""
    if cluster.container.runtime == "docker":
        yield "execution.cluster.container.runtime = docker is for launcher=local; on Slurm: pyxis, apptainer or none."
    for job in jobs:
        time_min = job.resources.time_min or 0
        if time_min * 60 <= cluster.grace_s:
            yield f"Stage {job.name} has {time_min} minutes, not more than the grace of {cluster.grace_s} s."


def inspect(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    """Compare the jobs with partitions, limits, GPUs and the container plugin.

    Raises:
        EnvironmentProblem: there is no Slurm on this machine, or it does not answer.
    """
    yield from (Finding("problem", text) for text in problems(cluster, jobs))
    client.require_slurm()
    yield from _partitions(cluster, jobs)
    yield from _plugin(cluster)


def _partitions(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    known = partitions(client.query(PARTITIONS))
    first = default_partition(client.query(["sinfo", "--noheader", "--format=%P"]))
    if not known:
        yield Finding("problem", "sinfo lists no partitions here")
        return
    yield Finding("ok", f"Slurm answers; partitions: {', '.join(sorted(known))}")
    for job in jobs:
        name = job.resources.partition or first
        if name is None or any(part not in known for part in name.split(",")):
            yield Finding("problem", f"{job.name}: there is no partition {name or '(no default)'}; {', '.join(known)}")
            continue
        # Slurm starts the job in one partition of the list.
        findings = [list(_fits(job, known[part])) for part in name.split(",")]
        fits = [all(finding.level != "problem" for finding in found) for found in findings]
        for finding in (finding for found in findings for finding in found):
            yield Finding("warning", finding.text) if any(fits) else finding
    yield from _shared_cores(cluster, jobs)


def _shared_cores(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    """Warn of jobs that request no cores or memory: they get the site's default, mostly one core."""
    modest = [
        job.name
        for job in jobs
        if not job.is_exclusive(cluster) and (job.resources.cpus_per_node is None or job.resources.mem_gib is None)
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
    if partition.limit_min is not None and (job.resources.time_min or 0) > partition.limit_min:
        yield Finding("problem", f"{where}: needs {job.resources.time_min} minutes; the limit is {partition.limit_min}")
    if (job.resources.gpus_per_node or 0) > partition.gpus:
        yield Finding(
            "problem", f"{where}: needs {job.resources.gpus_per_node} GPUs per node; its nodes have {partition.gpus}"
        )
    if job.nodes > partition.nodes:
        yield Finding("problem", f"{where}: needs {job.nodes} nodes; it has {partition.nodes}")
    elif partition.usable is not None and job.nodes > partition.usable:
        yield Finding(
            "warning", f"{where}: needs {job.nodes} nodes; {partition.usable} are up now, so the job would wait"
        )
    cpus, mem_gib = job.resources.cpus_per_node or 0, job.resources.mem_gib or 0
    if partition.cpus is not None and cpus > partition.cpus:
        yield Finding("problem", f"{where}: needs {cpus} cores per node; its nodes have {partition.cpus}")
    if partition.mem_mib is not None and mem_gib * 1024 > partition.mem_mib:
        yield Finding(
            "problem", f"{where}: needs {mem_gib} GiB per node; its nodes have {partition.mem_mib / 1024:.1f}"
        )


def _plugin(cluster: Cluster) -> Iterator[Finding]:
    if cluster.container.runtime == "pyxis":
        has = has_pyxis(client.query(["srun", "--help"]))
        text = (
            "srun takes --container-image (pyxis)" if has else "srun has no --container-image: pyxis is not installed"
        )
        yield Finding("ok" if has else "problem", text)
    elif cluster.container.runtime != "none":
        yield Finding("warning", f"whether the nodes have {cluster.container.runtime} cannot be seen from here")
