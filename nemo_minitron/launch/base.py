"""What every launcher provides: render, submit, states and cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nemo_minitron.execution.runner import RunOptions
    from nemo_minitron.launch.jobs import Job
    from nemo_minitron.launch.record import Submission
    from nemo_minitron.plan.planner import RunPlan
    from nemo_minitron.schema.cluster import Cluster

Log = Callable[[str], None]
"""Shows a message to the user."""
Level = Literal["ok", "warning", "problem"]
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
    "LAUNCH_FAILED",
    "RECONFIG_FAIL",
)
FORGOTTEN, UNKNOWN = "FORGOTTEN", "UNKNOWN"
"""States of a job that the scheduler no longer knows, and of one for which it gave no answer."""


@dataclass(frozen=True)
class JobState:
    """State of one job, or of one task of a job array.

    The states are Slurm's (PENDING, RUNNING, COMPLETED, ...), FORGOTTEN and UNKNOWN; launchers for other schedulers
    translate theirs.
    """

    job_id: str
    state: str
    reason: str = ""
    used: str = ""
    left: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def is_active(self) -> bool:
        """Whether the job waits, runs or is about to end."""
        return self.state not in ENDED and self.state not in (FORGOTTEN, UNKNOWN)


@dataclass(frozen=True)
class Step:
    """One command of a launch, as a dry run shows it."""

    command: tuple[str, ...]
    script: str | None = None
    """Text of the script that the command submits; None: the command needs no script."""


@dataclass(frozen=True)
class Finding:
    """One result of looking at a site before anything is submitted."""

    level: Level
    text: str


def _no_program(cluster: Cluster) -> str | None:
    return None


@dataclass(frozen=True)
class Launcher:
    """One way to run the stages of a recipe. Every operation that changes a run takes that run's locks itself."""

    name: str
    """Value of `execution.launcher`; also recorded with each submission."""
    render: Callable[[RunPlan, RunOptions, Sequence[str]], list[Step]]
    """Return the commands and scripts for the stages that have not finished, without writing anything.

    The last argument has the recipe, overrides and options as the user typed them.
    """
    submit: Callable[[RunPlan, RunOptions, Log], Submission | None]
    """Submit or run the stages that have not finished. None: all have finished.

    A launcher that runs the stages itself returns a submission without jobs.
    """
    states: Callable[[Submission], Mapping[str, JobState]]
    """Return the state of each stage's job. Must not fail where the scheduler does not answer: the state is UNKNOWN."""
    cancel: Callable[[Submission], list[str]]
    """Cancel the jobs that wait or run, and return their ids."""
    program: Callable[[Cluster], str | None] = _no_program
    """Name the program that must be on the machine that launches; None: no program is needed."""
    inspect: Callable[[Cluster, list[Job]], Iterator[Finding]] | None = None
    """Compare the jobs with what the scheduler offers; None: there is no scheduler."""
