"""Submit a recipe to Slurm: settle what is on disk, write the scripts, submit all jobs at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from nemo_minitron.artifacts.run_paths import LOGS, SLURM_LOGS
from nemo_minitron.errors import MinitronError, PlanError
from nemo_minitron.execution.runner import RunOptions, settle
from nemo_minitron.launch import record
from nemo_minitron.launch.base import Log, Step
from nemo_minitron.launch.context import JobContext, cluster_of, dry_run_context, job_context, make_launch_folder
from nemo_minitron.launch.jobs import Job, jobs_of, missing_images, misspelled_images
from nemo_minitron.launch.record import Submission, Submitted
from nemo_minitron.launch.slurm import client
from nemo_minitron.launch.slurm.answers import split_id
from nemo_minitron.launch.slurm.probe import problems
from nemo_minitron.launch.slurm.script import render_script, sbatch_command, script_file
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.schema.cluster import Cluster
from nemo_minitron.system.disclosure import write_private
from nemo_minitron.system.outer_job import dropped_defaults
from nemo_minitron.system.safe_files import own_folder


def render(plan: RunPlan, options: RunOptions, arguments: Sequence[str]) -> list[Step]:
    """Return the command and script of each job that would be submitted now; names of jobs stand for their ids."""
    context, cluster = dry_run_context(plan.recipe), cluster_of(plan.recipe)
    return [
        Step(tuple(sbatch_command(job, context, after=job.after)), render_script(job, cluster, context))
        for job in jobs_left(plan, options)
    ]


def jobs_left(plan: RunPlan, options: RunOptions) -> list[Job]:
    """Return the jobs for all stages that have not finished.

    Raises:
        PlanError: keys of the cluster that do not fit the recipe.
    """
    cluster = cluster_of(plan.recipe)
    jobs = jobs_of(plan, cluster, plan.needed_for(options.until))
    _require_none([*missing_images(cluster, jobs), *problems(cluster, jobs)])
    return jobs


def _require_none(problems: Iterable[str]) -> None:
    wrong = "\n".join(f"  - {text}" for text in problems)
    if wrong:
        raise PlanError(f"The cluster does not fit the recipe:\n{wrong}")


def submit(plan: RunPlan, options: RunOptions, log: Log) -> Submission | None:
    """Submit the stages that have not finished. None: all have finished.

    Raises:
        ArtifactError: jobs of an earlier submission are active, another launch is running, or the recipe has changed
            since.
        EnvironmentProblem: Slurm refuses; no job stays in its queue then.
    """
    client.require_slurm()
    run = run_dir(plan.recipe)
    with record.launching(run):
        require_no_jobs(run)
        return _submit_stages(settle(plan, options), options, run, log)


def _submit_stages(plan: RunPlan, options: RunOptions, run: Path, log: Log) -> Submission | None:
    jobs, cluster = jobs_left(plan, options), cluster_of(plan.recipe)
    if not jobs:
        return None
    _require_none(misspelled_images(cluster, jobs, Path.cwd()))
    dropped = dropped_defaults(os.environ)
    if dropped:
        log(f"not passed on to sbatch: {', '.join(dropped)} (a site's options are keys of its file)")
    context = job_context(plan.recipe, record.next_folder(run))
    # Render every script before anything is written: a path that no script can hold is refused.
    scripts = {script_file(job, context): render_script(job, cluster, context) for job in jobs}
    make_launch_folder(plan.recipe, context)
    for file, text in scripts.items():
        write_private(file, text)
    # Slurm writes these log files directly, so secrets that programs of the site print there are not masked.
    own_folder(own_folder(run, LOGS), SLURM_LOGS, mode=0o700)
    return _submit_all(jobs, cluster, context, log)


def require_no_jobs(run: Path) -> None:
    """Require that no job of the run's last submission waits or runs.

    Raises:
        ArtifactError: such jobs exist.
    """
    last = record.newest(run)
    if last is None or last.launcher != "slurm":
        return
    active = client.active(with_queued(last).job_ids)
    if active:
        raise record.still_active(active, last)


def with_queued(last: Submission) -> Submission:
    """Add jobs that were submitted but not recorded, because `launch` was killed before it knew their ids.

    Raises:
        EnvironmentProblem: the submission is not complete, and Slurm does not answer.
    """
    if last.complete:
        return last
    known = {split_id(job_id)[0] for job_id in last.job_ids}
    queued = client.queued_scripts(last.folder)
    return last.with_ids(
        {name: [number for number in numbers if number not in known] for name, numbers in queued.items()}
    )


def cancel(last: Submission) -> list[str]:
    """Cancel the jobs that wait or run, and return their ids.

    Raises:
        EnvironmentProblem: Slurm does not answer, or scancel failed.
    """
    active = client.active(with_queued(last).job_ids)
    client.cancel(active)
    return active


def _submit_all(jobs: list[Job], cluster: Cluster, context: JobContext, log: Log) -> Submission:
    # Recorded before the first job is submitted: if this process is killed, the next one finds its jobs in the queue.
    planned = tuple(Submitted(job.name, job.stages, (), _log_of(job, context)) for job in jobs)
    submission = Submission(context.launch_dir, "slurm", time.time(), planned, complete=False)
    submission.write()
    last_of: dict[str, str] = {}
    ids: list[str] = []
    try:
        for job in jobs:
            mine = _submit(job, cluster, context, [last_of[name] for name in job.after], log, ids)
            last_of[job.name] = mine[-1]
            submission = submission.with_ids({job.name: mine})
            submission.write()
    except (MinitronError, KeyboardInterrupt):
        if _cancel_submitted(ids, context, log):
            replace(submission, complete=True).write()
        raise
    submission = replace(submission, complete=True)
    submission.write()
    return submission


def _log_of(job: Job, context: JobContext) -> str:
    words = sbatch_command(job, context, after=())
    return next(word for word in words if word.startswith("--output=")).removeprefix("--output=")


def _cancel_submitted(ids: list[str], context: JobContext, log: Log) -> bool:
    """Cancel the jobs that were submitted, and jobs of this folder's scripts whose ids sbatch did not print.

    Returns:
        Whether it is certain that no job is left.
    """
    log("canceling the jobs that were submitted")
    numbers, left, is_certain = {split_id(job_id)[0] for job_id in ids}, list(ids), True
    try:
        queued = client.queued_scripts(context.launch_dir)
        left += sorted({number for found in queued.values() for number in found} - numbers, key=int)
    except MinitronError as error:
        log(f"whether other jobs of {context.launch_dir} are in the queue is unknown ({error.what})")
        is_certain = False
    try:
        client.cancel(left)
    except MinitronError as error:
        log(f"these jobs could not be canceled: {' '.join(left)} ({error.what})")
        return False
    return is_certain


def _submit(
    job: Job, cluster: Cluster, context: JobContext, after: list[str], log: Log, submitted: list[str]
) -> list[str]:
    """Submit the job, or the links of its chain; only the last link fails when the stage has not finished.

    Args:
        submitted: receives each id as soon as it is known.
    """
    after = [split_id(job_id)[0] for job_id in after]
    if cluster.requeue:
        submitted.append(client.submit(sbatch_command(job, context, after=after), log))
        return submitted[-1:]
    ids: list[str] = []
    for number in range(cluster.links):
        export = "MINITRON_LAST_LINK=yes" if number == cluster.links - 1 else "MINITRON_LAST_LINK=no"
        waits = [split_id(job_id)[0] for job_id in ids[-1:]] or after
        words = sbatch_command(job, context, after=waits, any_end=bool(ids), export=export)
        ids.append(client.submit(words, log, known=ids))
        submitted.append(ids[-1])
    return ids
