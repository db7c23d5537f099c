"""Run each stage in a container on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from nemo_minitron.errors import EnvironmentProblem, Interrupted, PlanError
from nemo_minitron.execution.runner import RunOptions, settle
from nemo_minitron.launch import record
from nemo_minitron.launch.base import JobState, Launcher, Log, Step
from nemo_minitron.launch.containers import folders_to_make, inside, without_host_variables
from nemo_minitron.launch.context import (
    PROGRAM,
    JobContext,
    cluster_of,
    dry_run_context,
    job_context,
    make_launch_folder,
)
from nemo_minitron.launch.docker.command import docker_environment, docker_run
from nemo_minitron.launch.jobs import jobs_of, missing_images, misspelled_images
from nemo_minitron.launch.record import Submission
from nemo_minitron.launch.status import require_no_jobs
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.schema.cluster import Cluster

INTERRUPTED = 130


def commands(plan: RunPlan, context: JobContext, options: RunOptions) -> list[tuple[str, list[str]]]:
    """Return (stage, command) for every stage that has not finished, in order.

    Raises:
        PlanError: an image is missing, or the runtime is pyxis, which is part of Slurm.
    """
    cluster, folders = cluster_of(plan.recipe), context.folders
    runtime = cluster.container.runtime
    if runtime == "pyxis":
        raise PlanError("execution.cluster.container.runtime = pyxis needs Slurm.", allowed="docker, apptainer, none")
    # On this machine one node takes every process.
    jobs = jobs_of(plan, cluster.model_copy(update={"ranks_per_node": 10**6}), plan.needed_for(options.until))
    missing = [*missing_images(cluster, jobs), *misspelled_images(cluster, jobs, folders.cwd)]
    if missing:
        raise PlanError(
            "\n".join(missing), next_step="Build it from the Dockerfile (docs/how-to/cluster.md), and name it there."
        )
    found = []
    for job in jobs:
        for stage in job.stages:
            command = [cluster.command or PROGRAM, "stage", str(context.recipe_file), stage]
            if runtime == "docker":
                user = f"{os.getuid()}:{os.getgid()}"
                terminal = sys.stdin.isatty()
                command = docker_run(command, cluster, job.environment, folders, user=user, terminal=terminal)
            else:
                command = inside(command, cluster, job.environment, folders)
            found.append((stage, command))
    return found


def render(plan: RunPlan, options: RunOptions, arguments: Sequence[str]) -> list[Step]:
    """Return the command of each stage."""
    return [Step(tuple(command)) for _, command in commands(plan, dry_run_context(plan.recipe), options)]


def submit(plan: RunPlan, options: RunOptions, log: Log) -> Submission:
    """Run each stage in its container, one after the other.

    Raises:
        EnvironmentProblem: the runtime is not installed, or a stage failed (its own message precedes this one).
        ArtifactError: jobs of an earlier submission are active.
        Interrupted: a stage was interrupted.
    """
    cluster, run = cluster_of(plan.recipe), run_dir(plan.recipe)
    if shutil.which(cluster.container.runtime) is None:
        raise EnvironmentProblem(
            f"There is no {cluster.container.runtime} on this machine.",
            next_step="Install it, or set execution.cluster.container.runtime=none.",
        )
    with record.launching(run):
        require_no_jobs(run)
        for text in _without_effect(cluster):
            log(f"warning: {text}")
        plan = settle(plan, options)
        context = job_context(plan.recipe, record.next_folder(run))
        to_run = commands(plan, context, options)
        make_launch_folder(plan.recipe, context)
        for folder in folders_to_make(context.folders):
            folder.mkdir(parents=True, exist_ok=True)
        for stage, command in to_run:
            _run_stage(stage, command, _environment(cluster))
    return Submission(context.launch_dir, LAUNCHER.name, time.time())


def _environment(cluster: Cluster) -> dict[str, str]:
    """Return the environment of the runtime's program: Apptainer passes all of it on, docker only what is named."""
    if cluster.container.runtime == "docker":
        return {**os.environ, **docker_environment(cluster)}
    return without_host_variables(os.environ)


def _without_effect(cluster: Cluster) -> Iterator[str]:
    """Yield what the scripts of Slurm's jobs do with the site's file, and a container on this machine does not."""
    for key in ("setup_script", "modules"):
        if getattr(cluster, key):
            yield (
                f"execution.cluster.{key} has no effect on this machine, only in jobs of Slurm: "
                "what the stages need belongs into the image or execution.cluster.environment"
            )


def _run_stage(stage: str, command: list[str], environment: dict[str, str]) -> None:
    code = subprocess.run(command, env=environment, check=False).returncode
    if code == INTERRUPTED:
        raise Interrupted(f"Stopped in stage {stage}; the same command continues.")
    if code:
        raise EnvironmentProblem(f"Stage {stage} ended with code {code}.", next_step="Its message is printed above.")


def states(submission: Submission) -> dict[str, JobState]:
    """Return nothing: the stages have run when `submit` returns."""
    return {}


def cancel(submission: Submission) -> list[str]:
    """Cancel nothing: Ctrl-C ends `submit`."""
    return []


def program(cluster: Cluster) -> str:
    """Return the program of the container runtime."""
    return cluster.container.runtime


LAUNCHER = Launcher("docker", render, submit, states, cancel, program)
