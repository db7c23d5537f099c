"""Run a recipe on this machine: in this environment, or each stage in a container of docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import EnvironmentProblem, Interrupted, PlanError
from nemo_minitron.execution.runner import RunOptions, settle, write_recipe
from nemo_minitron.launch import record
from nemo_minitron.launch.containers import IN_CONTAINER, docker_environment, docker_run, folders_to_make, inside
from nemo_minitron.launch.jobs import jobs_of, missing_images, misspelt_images
from nemo_minitron.launch.submit import cluster_of, placed
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan, make_plan
from nemo_minitron.schema.cluster import Cluster
from nemo_minitron.system.disclosure import environment_script, write_private
from nemo_minitron.system.safe_files import own_folder

INTERRUPTED = 130


def uses_containers(recipe: Recipe) -> bool:
    """Whether stages run anywhere but in this environment."""
    cluster = recipe.execution.cluster
    return cluster is not None and cluster.container.runtime != "none"


def commands(plan: RunPlan, launch_dir: Path, options: RunOptions) -> list[tuple[str, list[str]]]:
    """(stage, command) for all that is left to do, in order.

    Raises:
        PlanError: an image is missing, or pyxis was asked for, which is Slurm's.
    """
    cluster, where = cluster_of(plan.recipe), placed(plan.recipe, launch_dir)
    runtime = cluster.container.runtime
    if runtime == "pyxis":
        raise PlanError("execution.cluster.container.runtime = pyxis needs Slurm.", allowed="docker, apptainer, none")
    # Here one node takes every process.
    jobs = jobs_of(plan, cluster.model_copy(update={"ranks_per_node": 10**6}), plan.needed_for(options.until))
    missing = [*missing_images(cluster, jobs), *misspelt_images(cluster, jobs, where.place.cwd)]
    if missing:
        raise PlanError(
            "\n".join(missing), next_step="Build it from the Dockerfile (docs/how-to/cluster.md), and name it there."
        )
    found = []
    for job in jobs:
        for stage in job.stages:
            program = cluster.command or IN_CONTAINER
            command = [program, "stage", str(where.recipe_file), stage]
            if runtime == "docker":
                user = f"{os.getuid()}:{os.getgid()}"
                terminal = sys.stdin.isatty()
                command = docker_run(command, cluster, job.environment, where.place, user=user, terminal=terminal)
            else:
                command = inside(command, cluster, job.environment, where.place)
            found.append((stage, command))
    return found


def launch(recipe: Recipe, options: RunOptions) -> None:
    """Run each stage in its container, one after the other.

    Raises:
        EnvironmentProblem: the runtime is not here, or a stage failed (its own words stand above).
        Interrupted: a stage was.
    """
    cluster = cluster_of(recipe)
    if shutil.which(cluster.container.runtime) is None:
        raise EnvironmentProblem(
            f"There is no {cluster.container.runtime} on this machine.",
            next_step="Install it, or set execution.cluster.container.runtime=none.",
        )
    with record.launching(run_dir(recipe)):
        _launch(recipe, options, cluster)


def _launch(recipe: Recipe, options: RunOptions, cluster: Cluster) -> None:
    plan = settle(make_plan(recipe), options)
    folder = record.next_folder(run_dir(recipe))
    to_run = commands(plan, folder, options)
    own_folder(run_dir(recipe), folder.parent.name)
    folder.mkdir()
    place = placed(recipe, folder).place
    for made in folders_to_make(place):
        made.mkdir(parents=True, exist_ok=True)
    write_recipe(plan.recipe, folder / record.RECIPE_FILE)
    write_private(place.environment_file, environment_script(cluster.environment))
    own = {**os.environ, **(docker_environment(cluster) if cluster.container.runtime == "docker" else {})}
    for stage, command in to_run:
        code = subprocess.run(command, env=own, check=False).returncode
        if code == INTERRUPTED:
            raise Interrupted(f"Stopped in stage {stage}; the same command goes on.")
        if code:
            raise EnvironmentProblem(f"Stage {stage} ended with code {code}.", next_step="Its message stands above.")


def dry_run(recipe: Recipe, options: RunOptions) -> list[tuple[str, list[str]]]:
    """The commands of `launch`. Writes nothing."""
    return commands(make_plan(recipe), run_dir(recipe) / record.LAUNCH_DIR / "NNN", options)
