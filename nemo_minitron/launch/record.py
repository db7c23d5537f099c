"""What was submitted: a folder for each submission in `<run>/launch/`, with a list of its jobs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from nemo_minitron.errors import ArtifactError
from nemo_minitron.launch.answers import split_id
from nemo_minitron.system.files import read_json, write_whole

LAUNCH_DIR, JOBS_FILE, RECIPE_FILE, LOCK_FILE = "launch", "jobs.json", "recipe.json", ".lock"


@dataclass(frozen=True)
class Submitted:
    """One job of a submission."""

    name: str
    stages: tuple[str, ...]
    job_ids: tuple[str, ...]
    """More than one: the links of a chain, in order. None: it was not submitted, as far as anybody knows."""
    log: str
    """Pattern of its log, with Slurm's %j, %A and %a."""


@dataclass(frozen=True)
class Submission:
    """All jobs of one `minitron launch`."""

    folder: Path
    launcher: str
    time: float
    jobs: tuple[Submitted, ...] = field(default=())
    """All that were to be submitted, from before the first one was."""
    complete: bool = True
    """False: `launch` was ended while it submitted, so that the queue may have jobs whose ids are not here."""

    @property
    def job_ids(self) -> list[str]:
        return [job_id for job in self.jobs for job_id in job.job_ids]

    def write(self) -> None:
        """Replace the list in the submission's folder."""
        jobs = [asdict(job) for job in self.jobs]
        facts = {"launcher": self.launcher, "time": self.time, "complete": self.complete, "jobs": jobs}
        write_whole(self.folder / JOBS_FILE, json.dumps(facts, indent=2) + "\n")

    def with_ids(self, found: Mapping[str, Sequence[str]]) -> Submission:
        """With ids added to jobs, by their names; what is known already is not added again."""

        def new(job: Submitted) -> Iterator[str]:
            known = {split_id(job_id)[0] for job_id in job.job_ids}
            return (job_id for job_id in found.get(job.name, ()) if split_id(job_id)[0] not in known)

        return replace(self, jobs=tuple(replace(job, job_ids=(*job.job_ids, *new(job))) for job in self.jobs))


@contextmanager
def launching(run: Path) -> Iterator[None]:
    """Held while a `minitron launch` of this run submits; not the lock of the run, for which its first jobs wait.

    Raises:
        ArtifactError: another one holds it.
    """
    (run / LAUNCH_DIR).mkdir(parents=True, exist_ok=True)
    file = run / LAUNCH_DIR / LOCK_FILE
    # The programs that are started meanwhile do not inherit it: it ends with this process.
    try:
        number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ArtifactError(
            "The lock is a link.", where=str(file), next_step="Remove it; it was not made here."
        ) from None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ArtifactError(
            "Another `minitron launch` of this run is at work.",
            where=str(file),
            next_step="Wait until it has ended; `minitron status RECIPE` shows what it has submitted.",
        ) from None
    finally:
        os.close(number)


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


def _folders(run: Path) -> list[Path]:
    return [path for path in (run / LAUNCH_DIR).glob("[0-9]*") if path.is_dir()]
