"""What Slurm says of the jobs of a run's last submission."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.launch import record, slurm
from nemo_minitron.launch.answers import UNKNOWN, JobState, split_id
from nemo_minitron.launch.record import Submitted
from nemo_minitron.launch.submit import last_submission


def job_facts(run: Path) -> dict[str, dict[str, Any]]:
    """stage -> job id, state, restarts, reason and time left, of the last submission; empty when nothing was submitted.

    Where Slurm's programs are not at hand, the state is unknown.
    """
    last = record.newest(run)
    if last is None or last.launcher != "slurm":
        return {}
    states: Mapping[str, list[JobState]] = {}
    if shutil.which("squeue") is not None:
        with suppress(EnvironmentProblem):  # what is recorded is shown in any case
            last = last_submission(run) or last
        states = slurm.states(last.job_ids)
    jobs = [job for job in last.jobs if job.job_ids]
    return {stage: _facts(job, index, states) for job in jobs for index, stage in enumerate(job.stages)}


def _facts(job: Submitted, index: int, states: Mapping[str, list[JobState]]) -> dict[str, Any]:
    state = _of_stage(job, index, states)
    return {
        "job": state.job_id,
        "state": state.state.lower(),
        "reason": state.reason,
        "restarts": state.restarts,
        "used": state.used,
        "left": state.left,
        "nodes": state.nodes,
    }


def _of_stage(job: Submitted, index: int, states: Mapping[str, list[JobState]]) -> JobState:
    """Of a chain of links the one that is at work, else the last."""
    if len(job.stages) > 1:
        number = split_id(job.job_ids[0])[0]
        known = {state.job_id: state for state in states.get(job.job_ids[0], [])}
        whole = known.get(number, JobState(number, UNKNOWN))
        return known.get(f"{number}_{index}", replace(whole, job_id=f"{number}_{index}"))
    links = [states.get(job_id, [JobState(split_id(job_id)[0], UNKNOWN)])[0] for job_id in job.job_ids]
    return next((link for link in links if link.is_active), links[-1])
