"""Comparison of a recipe's needs with what this machine shows of the site. Changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import MinitronError
from nemo_minitron.launch import images, registry
from nemo_minitron.launch.base import Finding
from nemo_minitron.launch.containers import mounts_of
from nemo_minitron.launch.context import cluster_of, job_context
from nemo_minitron.launch.jobs import Job, images_of, jobs_of, missing_images, misspelled_images
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.schema.cluster import Cluster


def probe(plan: RunPlan) -> list[Finding]:
    """Inspect the scheduler, the container images and the mounts.

    Raises:
        PlanError: the recipe names no cluster.
    """
    recipe, cluster = plan.recipe, cluster_of(plan.recipe)
    jobs = jobs_of(plan, cluster, {call.name for call in plan.calls})
    inspect = registry.of_recipe(recipe).inspect or registry.get(registry.CLUSTER).inspect
    assert inspect
    found = [Finding("problem", text) for text in missing_images(cluster, jobs)]
    try:
        for finding in inspect(cluster, jobs):
            found.append(finding)
    except MinitronError as error:
        found.append(Finding("problem", error.what))
    return [*found, *_images(cluster, jobs), *_paths(cluster, recipe)]


def missing_here(plan: RunPlan) -> list[str]:
    """List what a launch needs and this machine lacks: the launcher's program, images, mounts, the setup script.

    Empty where the recipe names no site.
    """
    recipe, cluster = plan.recipe, plan.recipe.execution.cluster
    if cluster is None:
        return []
    program = registry.of_recipe(recipe).program(cluster)
    found = []
    if program is not None and shutil.which(program) is None:
        found.append(f"{program}: there is no such program on this machine.")
    jobs = jobs_of(plan, cluster, {call.name for call in plan.calls})
    seen = [*_images(cluster, jobs), *_paths(cluster, recipe)]
    return [*found, *(finding.text for finding in seen if finding.level == "problem")]


def _images(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    yield from (Finding("problem", text) for text in misspelled_images(cluster, jobs, Path.cwd()))
    for key, image in images_of(cluster, jobs).items():
        absent = images.missing(cluster.container.runtime, image, Path.cwd())
        if absent is not None:
            yield Finding("problem", f"container.{key}: there is no file {absent}")


def _paths(cluster: Cluster, recipe: Recipe) -> Iterator[Finding]:
    container = cluster.container
    if container.runtime != "none":
        # The run's folder and the assets are created when they are needed.
        for mount in mounts_of(container, job_context(recipe, run_dir(recipe)).folders):
            if not Path(mount.source).exists() and mount in container.mounts:
                yield Finding("problem", f"container.mounts: there is no {mount.source} here")
    if cluster.setup_script is not None and not Path(cluster.setup_script).is_file():
        yield Finding("problem", f"setup_script: there is no file {cluster.setup_script}")
