"""Comparison of a recipe's needs with what this machine shows of the site. Changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.errors import MinitronError
from nemo_minitron.hf.source import ASSET, BUILT_IN, HUB, source_path
from nemo_minitron.launch import images, registry
from nemo_minitron.launch.base import Finding
from nemo_minitron.launch.containers import is_visible, mounts_of, site_mounts
from nemo_minitron.launch.context import JobFolders, cluster_of, job_context
from nemo_minitron.launch.jobs import Job, images_of, jobs_of, missing_images, misspelled_images
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.plan.sources import sources_of
from nemo_minitron.schema.cluster import Cluster, Container


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
    return [*found, *_images(cluster, jobs), *_paths(cluster, plan)]


def missing_here(plan: RunPlan) -> list[str]:
    """List what a launch needs and this machine lacks: programs, images, mounts, the setup script.

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
    seen = [*_images(cluster, jobs), *_paths(cluster, plan)]
    return [*found, *(finding.text for finding in seen if finding.level == "problem")]


def _images(cluster: Cluster, jobs: list[Job]) -> Iterator[Finding]:
    yield from (Finding("problem", text) for text in misspelled_images(cluster, jobs, Path.cwd()))
    for key, image in images_of(cluster, jobs).items():
        absent = images.missing(cluster.container.runtime, image, Path.cwd())
        if absent is not None:
            yield Finding("problem", f"container.{key}: there is no file {absent}")


def _paths(cluster: Cluster, plan: RunPlan) -> Iterator[Finding]:
    container, folders = cluster.container, job_context(plan.recipe, run_dir(plan.recipe)).folders
    if container.runtime != "none":
        # The run's folder and the assets are created when they are needed.
        for mount in site_mounts(container, folders):
            if not Path(mount.source).exists():
                yield Finding("problem", f"container.mounts: there is no {mount.source} here")
        yield from _unmounted(plan, container, folders)
    elif cluster.command is not None and "/" in cluster.command and shutil.which(cluster.command) is None:
        yield Finding("problem", f"cluster.command: there is no program {cluster.command} here")
    if cluster.setup_script is not None and not Path(cluster.setup_script).is_file():
        yield Finding("problem", f"setup_script: there is no file {cluster.setup_script}")


def _unmounted(plan: RunPlan, container: Container, folders: JobFolders) -> Iterator[Finding]:
    """Yield the sources that containers do not see. Clusters may have mounts of their own, which docker has not."""
    mounts, assets_dir = mounts_of(container, folders), folders.assets
    for name, stage in plan.recipe.stages.items():
        for source in sources_of(stage) if plan.states[name].status != "finished" else ():
            if source.location.startswith(HUB) or source.location.removeprefix(ASSET) in BUILT_IN:
                continue
            path = Path(os.path.normpath(folders.cwd / source_path(source.location, assets_dir)))
            if not is_visible(path, mounts):
                yield Finding(
                    "problem" if container.runtime == "docker" else "warning",
                    f"stages.{name}.{source.key}: containers do not see {path}; add it to container.mounts",
                )
