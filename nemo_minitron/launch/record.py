"""Record of what was submitted: a folder per submission in `<run>/launch/`, with a list of its jobs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from nemo_minitron.artifacts.run_paths import LAUNCHES
from nemo_minitron.errors import ArtifactError
from nemo_minitron.system.files import read_json, write_whole

JOBS_FILE, RECIPE_FILE, LOCK_FILE = "jobs.json", "recipe.json", ".lock"


@dataclass(frozen=True)
class Submitted:
    """One job of a submission."""

    name: str
    stages: tuple[str, ...]
    job_ids: tuple[str, ...]
    """Several ids: the links of a chain, in order. None: no submission of this job is known."""
    log: str
    """Pattern of its log file; Slurm's %j, %A and %a stand for ids."""


@dataclass(frozen=True)
class Submission:
    """All jobs of one `minitron launch`."""

    folder: Path
    launcher: str
    time: float
    jobs: tuple[Submitted, ...] = field(default=())
    """Every planned job, recorded before the first one is submitted."""
    complete: bool = True
    """False: `launch` ended while it was submitting, so the queue may hold jobs whose ids are not recorded."""

    @property
    def job_ids(self) -> list[str]:
        return [job_id for job in self.jobs for job_id in job.job_ids]

    def write(self) -> None:
        """Replace the list in the submission's folder."""
        jobs = [asdict(job) for job in self.jobs]
        facts = {"launcher": self.launcher, "time": self.time, "complete": self.complete, "jobs": jobs}
        write_whole(self.folder / JOBS_FILE, json.dumps(facts, indent=2) + "\n")

    def with_ids(self, found: Mapping[str, Sequence[str]]) -> Submission:
        """Return a copy with more ids, by name of the job."""
        jobs = (replace(job, job_ids=(*job.job_ids, *found.get(job.name, ()))) for job in self.jobs)
        return replace(self, jobs=tuple(jobs))


@contextmanager
def launching(run: Path) -> Iterator[None]:
    """Hold the lock of `minitron launch` for this run; the run's own lock is left to its first jobs.

    Raises:
        ArtifactError: another process holds the lock.
    """
    (run / LAUNCHES).mkdir(parents=True, exist_ok=True)
    file = run / LAUNCHES / LOCK_FILE
    # O_CLOEXEC: programs started while the lock is held do not inherit it, so it ends with this process.
    try:
        number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ArtifactError(
            "The lock is a link.", where=str(file), next_step="Remove it; nemo-minitron never makes it a link."
        ) from None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ArtifactError(
            "Another `minitron launch` of this run is running.",
            where=str(file),
            next_step="Wait until it has ended; `minitron status RECIPE` shows what it has submitted.",
        ) from None
    finally:
        os.close(number)


def still_active(job_ids: Sequence[str], last: Submission) -> ArtifactError:
    """Return the error to raise if jobs of the last submission wait or run."""
    return ArtifactError(
        f"Jobs of this run are still there: {', '.join(job_ids[:8])}{' ...' if len(job_ids) > 8 else ''}.",
        where=str(last.folder),
        next_step="Watch them with `minitron status RECIPE`, or end them first with `minitron cancel RECIPE`.",
    )


def next_folder(run: Path) -> Path:
    """Return the folder of the next submission; it does not exist yet."""
    number = max((int(folder.name) for folder in _newest_first(run)), default=0) + 1
    return run / LAUNCHES / f"{number:03d}"


def newest(run: Path) -> Submission | None:
    """Return the last submission of this run."""
    for folder in _newest_first(run):
        file = folder / JOBS_FILE
        if file.is_file():
            return _read(file)
    return None


def _read(file: Path) -> Submission:
    next_step = f"Move {file.parent} away; jobs of that submission are then unknown here (`squeue` still lists them)."
    try:
        facts = read_json(file, next_step)
        jobs = tuple(
            Submitted(job["name"], tuple(job["stages"]), tuple(job["job_ids"]), job["log"]) for job in facts["jobs"]
        )
        # Older versions recorded a job only after it was submitted.
        return Submission(file.parent, facts["launcher"], facts["time"], jobs, facts.get("complete", True))
    except KeyError as error:
        raise ArtifactError(f"{file.name} lacks {error}.", where=str(file), next_step=next_step) from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file.name} is damaged: {error}", where=str(file), next_step=next_step) from error


def _newest_first(run: Path) -> list[Path]:
    """Return the folders of the submissions; others, such as a copy `002.bak`, are none."""
    found = [path for path in (run / LAUNCHES).glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)
