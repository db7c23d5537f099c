"""What was submitted: a folder for each submission in `<run>/launch/`, with a list of its jobs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_minitron.errors import ArtifactError
from nemo_minitron.files import read_json, write_whole

LAUNCH_DIR, JOBS_FILE, RECIPE_FILE = "launch", "jobs.json", "recipe.json"


@dataclass(frozen=True)
class Submitted:
    """One job of a submission."""

    name: str
    stages: tuple[str, ...]
    job_ids: tuple[str, ...]
    """More than one: the links of a chain, in order."""
    log: str
    """Pattern of its log, with Slurm's %j, %A and %a."""


@dataclass(frozen=True)
class Submission:
    """All jobs of one `minitron launch`."""

    folder: Path
    launcher: str
    time: float
    jobs: tuple[Submitted, ...] = field(default=())

    @property
    def job_ids(self) -> list[str]:
        return [job_id for job in self.jobs for job_id in job.job_ids]

    def write(self) -> None:
        """Replace the list in the submission's folder."""
        facts = {"launcher": self.launcher, "time": self.time, "jobs": [asdict(job) for job in self.jobs]}
        write_whole(self.folder / JOBS_FILE, json.dumps(facts, indent=2) + "\n")


def next_folder(run: Path) -> Path:
    """Where the next submission goes; not there yet."""
    number = max((int(folder.name) for folder in _folders(run)), default=0) + 1
    return run / LAUNCH_DIR / f"{number:03d}"


def newest(run: Path) -> Submission | None:
    """The last submission of this run."""
    for folder in sorted(_folders(run), reverse=True):
        file = folder / JOBS_FILE
        if file.is_file():
            return _read(file)
    return None


def _read(file: Path) -> Submission:
    next_step = f"Move {file.parent} away; jobs of that submission are then unknown here (`squeue` still has them)."
    facts = read_json(file, next_step)
    try:
        jobs = tuple(
            Submitted(job["name"], tuple(job["stages"]), tuple(job["job_ids"]), job["log"]) for job in facts["jobs"]
        )
        return Submission(file.parent, facts["launcher"], facts["time"], jobs)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{file.name} lacks {error}.", where=str(file), next_step=next_step) from error


def _folders(run: Path) -> list[Path]:
    return [path for path in (run / LAUNCH_DIR).glob("[0-9]*") if path.is_dir()]
