"""The names of all files and folders of a run. No other module spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.system.interrupts import STOP_FILE

PLAN, LOCK, ACCEPTED_DRIFT = "plan.json", ".lock", "accepted_drift.json"
LOGS, SLURM_LOGS, LAUNCHES = "logs", "slurm", "launch"
WORK, SUPERSEDED, PARTIAL, COMPARED = ".work", ".superseded", ".partial-", ".compared"
PROGRESS, TASK, RESULT, ERROR = "progress.json", "call.json", "result.json", "error.json"
"""Files in the work folder of a stage that runs on several processes."""
RESERVED = (LAUNCHES, LOGS)
"""Folders of a run that no stage can be named after."""


@dataclass(frozen=True)
class RunPaths:
    """The files and folders of one run."""

    root: Path
    """`<run_root>/<recipe name>`."""

    @property
    def plan(self) -> Path:
        """The composed recipe with its searches written out, for jobs and for the report."""
        return self.root / PLAN

    @property
    def stop(self) -> Path:
        """A file that somebody makes to stop the run."""
        return self.root / STOP_FILE

    @property
    def logs(self) -> Path:
        return self.root / LOGS

    @property
    def slurm_logs(self) -> Path:
        return self.logs / SLURM_LOGS

    @property
    def launches(self) -> Path:
        """One numbered folder for each launch, with its scripts and jobs."""
        return self.root / LAUNCHES

    def published(self, stage: str) -> Path:
        """The output of a finished stage."""
        return self.root / stage

    def work(self, stage: str) -> Path:
        """What survives when a stage is killed."""
        return self.root / WORK / stage

    def progress(self, stage: str) -> Path:
        """Progress of a running stage."""
        return self.work(stage) / PROGRESS

    def log(self, stage: str) -> Path:
        """Log output of libraries in the runner's own process."""
        return self.logs / f"{stage}.log"

    def ranks_log(self, stage: str) -> Path:
        """Output of the ranks of a stage."""
        return self.logs / f"{stage}.ranks.log"

    def node_log(self, stage: str, node: int) -> Path:
        """Output of a stage on another node than the first."""
        return self.logs / f"{stage}.node{node}.log"
