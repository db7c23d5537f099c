"""The jobs of a run's last submission: their states, and how they are canceled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_minitron.launch import record, registry
from nemo_minitron.launch.base import JobState
from nemo_minitron.system.outer_job import outer_job_ids


def job_facts(run: Path) -> dict[str, dict[str, Any]]:
    """Return job id, state, reason, restarts and times of each stage's job; empty where nothing was submitted.

    The state is "unknown" where the scheduler does not answer.
    """
    last = record.newest(run)
    launcher = registry.find(last.launcher) if last else None
    if last is None or launcher is None:
        return {}
    return {stage: _facts(state) for stage, state in launcher.states(last).items()}


def require_no_jobs(run: Path) -> None:
    """Require that no job of the run's last submission waits or runs, because its stages may run only once.

    A job of that submission may itself run the recipe. If the scheduler does not answer, nothing is required.

    Raises:
        ArtifactError: such jobs exist.
    """
    last = record.newest(run)
    launcher = registry.find(last.launcher) if last else None
    if last is None or launcher is None:
        return
    active = {state.job_id: None for state in launcher.states(last).values() if state.is_active}
    if active and not outer_job_ids(os.environ) & {job_id.partition("_")[0] for job_id in active}:
        raise record.still_active(list(active), last)


def cancel_jobs(run: Path) -> list[str] | None:
    """Cancel the jobs of the last submission and return their ids. None: nothing was submitted.

    Raises:
        MinitronError: the jobs cannot be canceled, or `minitron launch` of this run is running.
    """
    if record.newest(run) is None:
        return None
    with record.launching(run):
        last = record.newest(run)
        return registry.get(last.launcher).cancel(last) if last else []


def _facts(state: JobState) -> dict[str, Any]:
    return {
        "job": state.job_id,
        "state": state.state.lower(),
        "reason": state.reason,
        "restarts": state.restarts,
        "used": state.used,
        "left": state.left,
        "nodes": state.nodes,
    }
