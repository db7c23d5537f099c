"""What is asked of Slurm's own programs, and what they answer."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_minitron.errors import EnvironmentProblem

TIMEOUT_S = 60.0
PATIENCE_S, RETRY_S = 300.0, 5.0
"""A controller that restarts does not answer for a while."""
NOT_ANSWERING = (
    "Unable to contact slurm controller",
    "Connection refused",
    "Socket timed out",
    "Zero Bytes",
    "Transport endpoint",
)
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
)
_FIELDS = "JobArrayID:64|,State:32|,Reason:64|,TimeUsed:32|,TimeLeft:32|,NodeList:128|,RestartCnt:16|"


@dataclass(frozen=True)
class JobState:
    """One job, or one index of an array, as Slurm sees it."""

    job_id: str
    state: str
    reason: str = ""
    used: str = ""
    left: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def is_active(self) -> bool:
        return self.state not in ENDED and self.state != "FORGOTTEN"


def require_slurm() -> None:
    """Raises EnvironmentProblem where there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise EnvironmentProblem(
            "There is no sbatch on this machine.",
            next_step="Run this on a login node of the cluster (perhaps after `module load slurm`), "
            "or look at the scripts with --dry-run.",
        )


def ask(words: Sequence[str], *, patience_s: float = 0.0, say: Callable[[str], None] = lambda _: None) -> str:
    """What a program of Slurm prints; tried again while its controller does not answer.

    Raises:
        EnvironmentProblem: it failed, in its words, or the patience is at its end.
    """
    until = time.monotonic() + patience_s
    while True:
        code, out, error = _run(words)
        if code == 0:
            return out
        silent = any(text in error for text in NOT_ANSWERING)
        if not silent or time.monotonic() + RETRY_S > until:
            raise EnvironmentProblem(
                f"{words[0]} failed: {' '.join(error.split()) or f'code {code}'}",
                next_step="Slurm's controller does not answer; try again in a few minutes." if silent else None,
            )
        say("Slurm's controller does not answer; trying again")
        time.sleep(RETRY_S)


def submit(words: Sequence[str], say: Callable[[str], None]) -> str:
    """The id of the job that this sbatch command makes."""
    answer = ask(words, patience_s=PATIENCE_S, say=say).strip()
    found = re.match(r"(\d+)", answer)
    if found is None:
        raise EnvironmentProblem(f"sbatch answered {answer!r}, which is no job id.")
    return found[1]


def states(job_ids: Sequence[str]) -> dict[str, list[JobState]]:
    """job id -> its state, or those of its array's indices; FORGOTTEN where Slurm knows it no longer."""
    found: dict[str, list[JobState]] = {job_id: [] for job_id in job_ids}
    for job_id in job_ids:
        # One by one: squeue refuses a whole list for one job that is forgotten.
        code, out, _ = _run(
            ["squeue", "--noheader", "--states=all", "--array", f"--jobs={job_id}", f"--Format={_FIELDS}"]
        )
        found[job_id] = [_state(line) for line in out.splitlines() if line.strip()] if code == 0 else []
        found[job_id] = found[job_id] or _from_accounting(job_id) or [JobState(job_id, "FORGOTTEN")]
    return found


def active(job_ids: Sequence[str]) -> list[str]:
    """Those that wait or run; of an array its indices."""
    return [state.job_id for found in states(job_ids).values() for state in found if state.is_active]


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are no error."""
    if job_ids:
        ask(["scancel", *job_ids], patience_s=TIMEOUT_S)


def _state(line: str) -> JobState:
    job_id, state, reason, used, left, nodes, restarts = (word.strip() for word in line.split("|")[:7])
    return JobState(job_id, state, "" if reason == "None" else reason, used, left, nodes, int(restarts or 0))


def _from_accounting(job_id: str) -> list[JobState]:
    """Where the site keeps accounts."""
    if shutil.which("sacct") is None:
        return []
    words = [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        f"--jobs={job_id}",
        "--format=JobID,State,Elapsed,NodeList",
    ]
    code, out, _ = _run(words)
    rows = [line.split("|") for line in out.splitlines() if line.count("|") == 3] if code == 0 else []
    return [JobState(row[0], row[1].split()[0], used=row[2], nodes=row[3]) for row in rows]


def _run(words: Sequence[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(list(words), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        return 127, "", f"there is no {words[0]} on this machine"
    except subprocess.TimeoutExpired:
        return 124, "", f"Socket timed out after {TIMEOUT_S:.0f} s"
    return done.returncode, done.stdout, done.stderr
