"""Names of all files and folders of a run. Other modules take them from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PLAN, LOCK, ACCEPTED_DRIFT = "plan.json", ".lock", "accepted_drift.json"
LOGS, SLURM_LOGS, LAUNCHES = "logs", "slurm", "launch"
"""Folders with log files, with those of Slurm jobs below it, and with one numbered folder for each launch."""
WORK, SUPERSEDED, PARTIAL, COMPARED = ".work", ".superseded", ".partial-", ".compared"
PROGRESS, TASK, RESULT, ERROR = "progress.json", "call.json", "result.json", "error.json"
"""Files in the work folder of a stage that runs on several processes."""
RESERVED = (LAUNCHES, LOGS)
"""Folder names that cannot be used as names of stages."""


@dataclass(frozen=True)
class RunPaths:
    """Paths of the files and folders of one run."""

    root: Path
    """`<run_root>/<recipe name>`."""

    @property
    def plan(self) -> Path:
        """Composed recipe with expanded searches, for jobs and the report."""
        return self.root / PLAN

    @property
    def logs(self) -> Path:
        return self.root / LOGS

    def published(self, stage: str) -> Path:
        """Return the folder with the output of a finished stage."""
        return self.root / stage

    def work(self, stage: str) -> Path:
        """Return the work folder of a stage, which survives when the stage is killed."""
        return self.root / WORK / stage

    def progress(self, stage: str) -> Path:
        """Return the file with the progress of a running stage."""
        return self.work(stage) / PROGRESS

    def log(self, stage: str) -> Path:
        """Return the file with the log output of libraries in the runner's own process."""
        return self.logs / f"{stage}.log"

    def ranks_log(self, stage: str) -> Path:
        """Return the file with the output of the ranks of a stage."""
        return self.logs / f"{stage}.ranks.log"

    def nccl_traces(self, stage: str) -> Path:
        """Return the beginning of the paths of the files that NCCL's flight recorder writes; the rank follows."""
        return self.logs / f"{stage}.nccl_trace_rank_"

    def node_log(self, stage: str, node: int) -> Path:
        """Return the file with the output of a stage on a node other than the first."""
        return self.logs / f"{stage}.node{node}.log"
