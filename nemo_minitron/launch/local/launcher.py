"""Run the stages in this process, as `minitron run` does."""

from __future__ import annotations

import time
from collections.abc import Sequence

from nemo_minitron.execution.runner import RunOptions, run_plan
from nemo_minitron.launch.base import JobState, Launcher, Log, Step
from nemo_minitron.launch.record import Submission
from nemo_minitron.launch.status import require_no_jobs
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan


def render(plan: RunPlan, options: RunOptions, arguments: Sequence[str]) -> list[Step]:
    """Return the one command that runs every stage."""
    return [Step(("minitron", "run", *arguments))]


def submit(plan: RunPlan, options: RunOptions, log: Log) -> Submission:
    """Run the stages that have not finished.

    Raises:
        ArtifactError: jobs of an earlier submission are active.
        MinitronError: as `run_plan`.
    """
    require_no_jobs(run_dir(plan.recipe))
    run_plan(plan, options)
    return Submission(run_dir(plan.recipe), LAUNCHER.name, time.time())


def states(submission: Submission) -> dict[str, JobState]:
    """Return nothing: the stages have run when `submit` returns."""
    return {}


def cancel(submission: Submission) -> list[str]:
    """Cancel nothing: Ctrl-C ends `submit`."""
    return []


LAUNCHER = Launcher("local", render, submit, states, cancel)
