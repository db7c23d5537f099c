"""Bring a recipe to Slurm: settle what is on disk, write the scripts, submit them all at once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ArtifactError, MinitronError, PlanError
from nemo_minitron.execution.runner import RunOptions, settle, write_recipe
from nemo_minitron.launch import record, slurm
from nemo_minitron.launch.containers import Place
from nemo_minitron.launch.jobs import Job, jobs_of, misspelt_images, problems
from nemo_minitron.launch.script import Scripted, render, sbatch_command, script_file
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan, make_plan
from nemo_minitron.schema.cluster import Cluster
from nemo_minitron.system.disclosure import environment_script, write_private
from nemo_minitron.system.outer_job import dropped_defaults
from nemo_minitron.system.safe_files import own_folder

Say = Callable[[str], None]


def cluster_of(recipe: Recipe) -> Cluster:
    """Raises PlanError where the recipe has none."""
    if recipe.execution.cluster is None:
        raise PlanError(
            "The launcher needs to know the site, and execution.cluster is not set.",
            next_step="Add cluster=NAME (a file of configs/cluster/), or cluster=path/to/site.yaml.",
        )
    return recipe.execution.cluster


def placed(recipe: Recipe, launch_dir: Path) -> Scripted:
    """Where the scripts of a submission find their things, as absolute paths."""
    cluster = cluster_of(recipe)
    cwd, run = Path.cwd(), run_dir(recipe).absolute()
    return Scripted(
        recipe_name=recipe.name,
        run_dir=run,
        launch_dir=launch_dir.absolute(),
        place=Place(cwd, run, Path(recipe.execution.assets_dir).absolute(), launch_dir.absolute()),
        program=cluster.command or str(Path(sys.executable).with_name("minitron")),
    )


def jobs_left(plan: RunPlan, options: RunOptions) -> list[Job]:
    """All that is left to do.

    Raises:
        PlanError: keys of the cluster that do not fit the recipe.
    """
    cluster = cluster_of(plan.recipe)
    jobs = jobs_of(plan, cluster, plan.needed_for(options.until))
    _require_none(problems(cluster, jobs))
    return jobs


def _require_none(problems: Iterable[str]) -> None:
    wrong = "\n".join(f"  - {text}" for text in problems)
    if wrong:
        raise PlanError(f"The cluster does not fit the recipe:\n{wrong}")


def dry_run(recipe: Recipe, options: RunOptions) -> list[tuple[list[str], str]]:
    """(command, script) of each job as it would be submitted now; job ids stand as job names. Writes nothing."""
    where, cluster = placed(recipe, run_dir(recipe) / record.LAUNCH_DIR / "NNN"), cluster_of(recipe)
    jobs = jobs_left(make_plan(recipe), options)
    return [(sbatch_command(job, where, after=job.after), render(job, cluster, where)) for job in jobs]


def launch(recipe: Recipe, options: RunOptions, say: Say) -> record.Submission | None:
    """Submit what is left to do; None when all has finished.

    Raises:
        ArtifactError: jobs of an earlier submission are still there, another launch is at work, or the recipe has
            changed since.
        EnvironmentProblem: Slurm refuses; nothing stays in its queue then.
    """
    slurm.require_slurm()
    run = run_dir(recipe)
    with record.launching(run):
        require_no_jobs(run)
        return _launch(recipe, options, run, say)


def _launch(recipe: Recipe, options: RunOptions, run: Path, say: Say) -> record.Submission | None:
    plan = settle(make_plan(recipe), options)
    jobs, cluster = jobs_left(plan, options), cluster_of(plan.recipe)
    if not jobs:
        return None
    _require_none(misspelt_images(cluster, jobs, Path.cwd()))
    dropped = dropped_defaults(os.environ)
    if dropped:
        say(f"not passed on to sbatch: {', '.join(dropped)} (a site's options are keys of its file)")
    where = placed(plan.recipe, record.next_folder(run))
    # All of them before anything is written: a path that no script can hold is refused.
    scripts = {script_file(job, where): render(job, cluster, where) for job in jobs}
    own_folder(run, where.launch_dir.parent.name)
    where.launch_dir.mkdir()
    write_recipe(plan.recipe, where.recipe_file)
    write_private(where.place.environment_file, environment_script(cluster.environment))
    for file, text in scripts.items():
        write_private(file, text)
    # Slurm writes these files; what programs of the site print there is masked by nobody.
    own_folder(own_folder(run, "logs"), "slurm", mode=0o700)
    return _submit_all(jobs, cluster, where, say)


def require_no_jobs(run: Path) -> None:
    """Raises ArtifactError while jobs of the run's last submission wait or run."""
    last = last_submission(run)
    if last is None:
        return
    active = slurm.active(last.job_ids)
    if active:
        raise ArtifactError(
            f"Jobs of this run are still there: {', '.join(active[:8])}{' ...' if len(active) > 8 else ''}.",
            where=str(last.folder),
            next_step="Watch them with `minitron status RECIPE`, or end them first with `minitron cancel RECIPE`.",
        )


def last_submission(run: Path) -> record.Submission | None:
    """The last one to Slurm, with jobs that were submitted and not recorded, as `launch` was killed meanwhile.

    Raises:
        EnvironmentProblem: Slurm has to be asked for those, and does not answer.
    """
    last = record.newest(run)
    if last is None or last.launcher != "slurm":
        return None
    return last if last.complete else last.with_ids(slurm.queued_scripts(last.folder))


def _submit_all(jobs: list[Job], cluster: Cluster, where: Scripted, say: Say) -> record.Submission:
    # Before the first one is submitted: if this process is killed, the next one knows for what to look in the queue.
    planned = tuple(record.Submitted(job.name, job.stages, (), _log_of(job, where)) for job in jobs)
    submission = record.Submission(where.launch_dir, "slurm", time.time(), planned, complete=False)
    submission.write()
    last_of: dict[str, str] = {}
    ids: list[str] = []
    try:
        for job in jobs:
            mine = _submit(job, cluster, where, [last_of[name] for name in job.after], say, ids)
            last_of[job.name] = mine[-1]
            submission = submission.with_ids({job.name: mine})
            submission.write()
    except (MinitronError, KeyboardInterrupt):
        if _take_back(ids, where, say):
            replace(submission, complete=True).write()
        raise
    submission = replace(submission, complete=True)
    submission.write()
    return submission


def _log_of(job: Job, where: Scripted) -> str:
    words = sbatch_command(job, where, after=())
    return next(word for word in words if word.startswith("--output=")).removeprefix("--output=")


def _take_back(ids: list[str], where: Scripted, say: Say) -> bool:
    """Cancel what was submitted, and what the queue has of this folder's scripts although sbatch did not say so.

    Returns:
        Whether nothing is left.
    """
    numbers = {slurm.split_id(job_id)[0] for job_id in ids}
    left = [*ids, *(number for number in slurm.queued_below(where.launch_dir) if number not in numbers)]
    say("taking back what was submitted")
    try:
        slurm.cancel(left)
    except MinitronError as error:
        say(f"these jobs could not be cancelled: {' '.join(left)} ({error.what})")
        return False
    return True


def _submit(job: Job, cluster: Cluster, where: Scripted, after: list[str], say: Say, submitted: list[str]) -> list[str]:
    """The job, or the links of its chain; only the last link fails when the stage has not finished.

    Args:
        submitted: gets each id as soon as it is known.
    """
    after = [slurm.split_id(job_id)[0] for job_id in after]
    if cluster.requeue:
        submitted.append(slurm.submit(sbatch_command(job, where, after=after), say))
        return submitted[-1:]
    ids: list[str] = []
    for number in range(cluster.links):
        export = "MINITRON_LAST_LINK=yes" if number == cluster.links - 1 else "MINITRON_LAST_LINK=no"
        waits = [slurm.split_id(job_id)[0] for job_id in ids[-1:]] or after
        words = sbatch_command(job, where, after=waits, any_end=bool(ids), export=export)
        ids.append(slurm.submit(words, say, known=ids))
        submitted.append(ids[-1])
    return ids
