"""The jobs of a run's last submission: their states, and how they are canceled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.launch import record, registry
from nemo_minitron.launch.base import JobState


def job_facts(run: Path) -> dict[str, dict[str, Any]]:
    """Return job id, state, reason, restarts and times of each stage's job; empty where nothing was submitted.

    The state is "unknown" where the scheduler does not answer.
    """
    last = record.newest(run)
    launcher = registry.find(last.launcher) if last else None
    if last is None or launcher is None:
        return {}
    return {stage: _facts(state) for stage, state in launcher.states(last).items()}


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
