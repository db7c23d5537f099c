"""States of the jobs of a submission, by stage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.launch.base import UNKNOWN, JobState
from nemo_minitron.launch.record import Submission, Submitted
from nemo_minitron.launch.slurm import client
from nemo_minitron.launch.slurm.answers import split_id
from nemo_minitron.launch.slurm.submit import with_queued


def states(submission: Submission) -> dict[str, JobState]:
    """Return the state of each stage's job; UNKNOWN where Slurm's programs are missing or do not answer."""
    found: Mapping[str, list[JobState]] = {}
    if shutil.which("squeue") is not None:
        with suppress(EnvironmentProblem):  # the recorded jobs are shown in any case
            submission = with_queued(submission)
        found = client.states(submission.job_ids)
    jobs = [job for job in submission.jobs if job.job_ids]
    return {stage: _of_stage(job, index, found) for job in jobs for index, stage in enumerate(job.stages)}


def _of_stage(job: Submitted, index: int, found: Mapping[str, list[JobState]]) -> JobState:
    """Return the state of a task of an array, or of the active link of a chain, or of its last link."""
    if len(job.stages) > 1:
        number = split_id(job.job_ids[0])[0]
        known = {state.job_id: state for state in found.get(job.job_ids[0], [])}
        whole = known.get(number, JobState(number, UNKNOWN))
        return known.get(f"{number}_{index}", replace(whole, job_id=f"{number}_{index}"))
    links = [found.get(job_id, [JobState(split_id(job_id)[0], UNKNOWN)])[0] for job_id in job.job_ids]
    return next((link for link in links if link.is_active), links[-1])
