"""Calls of Slurm's programs. `answers` parses their output."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.launch.base import FORGOTTEN, UNKNOWN, JobState, Log
from nemo_minitron.launch.slurm.answers import (
    accounted_states,
    job_states,
    lines_of,
    queued_commands,
    split_id,
    submitted_ids,
    with_cluster,
)
from nemo_minitron.system.outer_job import for_slurm

TIMEOUT_S = 60.0
PATIENCE_S, RETRY_S = 300.0, 5.0
"""A controller that restarts does not answer for a while, so calls are repeated for PATIENCE_S seconds."""
NOT_ANSWERING = (
    "Unable to contact slurm controller",
    "Unable to connect to",
    "Connection refused",
    "Connection reset",
    "Connection timed out",
    "Socket timed out",
    "Zero Bytes",
    "Transport endpoint",
    "Communication connection failure",
    "standby mode",
    "temporarily unable",
    "Resource temporarily unavailable",
    "Unable to establish controller",
    "Message receive failure",
    "No route to host",
)
NO_SUCH_JOB = "Invalid job id"
HAS_ENDED = (NO_SUCH_JOB, "already completing or completed", "Job/step already")
"""Messages of scancel for jobs that have ended."""
_FIELDS = "JobArrayID:64|,State:32|,Reason:64|,TimeUsed:32|,TimeLeft:32|,NodeList:128|,RestartCnt:16|"
_QUEUE = ("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%F|%o")
_NONE: frozenset[str] = frozenset()


def require_slurm() -> None:
    """Require sbatch on this machine.

    Raises:
        EnvironmentProblem: it is not there.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentProblem(
            "There is no sbatch on this machine.",
            next_step="Run this on a login node of the cluster (perhaps after `module load slurm`), "
            "or print the scripts with --dry-run.",
        )


def query(words: Sequence[str], *, patience_s: float = 0.0) -> str:
    """Return what a program of Slurm prints; repeat the call while the controller does not answer.

    Raises:
        EnvironmentProblem: the program failed, or `patience_s` has passed.
    """
    until = time.monotonic() + patience_s
    while True:
        code, out, error = _run(words)
        if code == 0:
            return out
        if not _waited_to_retry(error, until):
            raise _failure(words[0], code, error)


def _waited_to_retry(error: str, until: float, log: Log = lambda _: None) -> bool:
    """Wait before the next call. False, at once: the error is not the controller's silence, or the time has passed."""
    if not _is_silent(error) or time.monotonic() + RETRY_S > until:
        return False
    log("Slurm's controller does not answer; trying again")
    time.sleep(RETRY_S)
    return True


def submit(words: Sequence[str], log: Log, known: Collection[str] = _NONE) -> str:
    """Run an sbatch command, whose last word is the script, and return the id of its job.

    Args:
        known: ids of other jobs of the same script.

    Raises:
        EnvironmentProblem: sbatch refuses, or prints no id; a job that it has created nevertheless is canceled. Or its
            answer was lost and the queue cannot be read, so that a job may exist.
    """
    until = time.monotonic() + PATIENCE_S
    script = words[-1]
    while True:
        code, out, error = _run(words)
        if code == 0:
            return _id_in(out, script, known)
        if not _waited_to_retry(error, until, log):
            raise _failure(words[0], code, error)
        # The controller may have taken the job although its answer was lost: a second job would do the work twice.
        queued = _queued(script, known)
        while queued is None and _waited_to_retry(error, until, log):
            queued = _queued(script, known)
        if queued is None:
            raise EnvironmentProblem(
                "The answer of sbatch was lost, and squeue does not say whether the job was created.",
                where=script,
                next_step="When `squeue --me` works again, end what was created with `minitron cancel RECIPE`, "
                "and launch again.",
            )
        if queued:
            return queued[-1]


def _id_in(answer: str, script: str, known: Collection[str]) -> str:
    """Return the id that sbatch printed; compare with the queue if it printed more than that."""
    ids = [job_id for job_id in submitted_ids(answer) if job_id not in known]
    if ids and len(lines_of(answer)) == 1:
        return ids[0]
    queued = _queued(script, known) or []
    if ids:
        # A line of a banner can look like an id, and the id can be printed in another form.
        confirmed = [job_id for job_id in ids if split_id(job_id)[0] in queued]
        return (confirmed or (queued if len(queued) == 1 else ids))[-1]
    raise EnvironmentProblem(
        f"sbatch answered {answer.strip()[:400]!r}, which has no line with a job id alone.",
        where=script,
        allowed="NUMBER or NUMBER;CLUSTER, as sbatch --parsable prints",
        next_step=_cancel_unreported(queued),
    )


def _cancel_unreported(queued: Sequence[str]) -> str:
    """Cancel jobs whose ids sbatch did not print, and return what is left for the user to do."""
    if not queued:
        return "Check with `squeue --me` whether the job was created, and end it with scancel."
    named = ", ".join(queued)
    try:
        cancel(queued)
    except EnvironmentProblem as error:
        return f"Its job {named} was found in the queue: end it with scancel ({error.what})"
    return f"Its job {named} was found in the queue and canceled. Make sbatch print the id on a line of its own."


def queued_scripts(folder: Path) -> dict[str, list[str]]:
    """Map each script in a folder, by its name without suffix, to the numbers of this user's jobs that run it.

    Raises:
        EnvironmentProblem: squeue does not answer.
    """
    found: dict[str, list[str]] = {}
    for number, command in queued_commands(query(_QUEUE, patience_s=TIMEOUT_S)):
        if Path(command).parent == folder:
            found.setdefault(Path(command).stem, []).append(number)
    return {name: sorted(set(numbers), key=int) for name, numbers in found.items()}


def _queued(script: str, known: Collection[str]) -> list[str] | None:
    """Return the numbers of this user's jobs that run the script; None where squeue does not answer."""
    code, out, _ = _run(_QUEUE)
    if code:
        return None
    numbers = {split_id(job_id)[0] for job_id in known}
    found = {number for number, command in queued_commands(out) if command == script}
    return sorted(found - numbers, key=int)


def states(job_ids: Sequence[str]) -> dict[str, list[JobState]]:
    """Map each job id to its state, or to the states of the tasks of its array.

    The state is FORGOTTEN where Slurm no longer knows the job, and UNKNOWN where it does not answer.
    """
    found: dict[str, list[JobState]] = {}
    failed: str | None = None
    for job_id in job_ids:
        # One call per job: squeue refuses a whole list for one forgotten job. After a failure, skip the others.
        found[job_id] = _states_of(job_id) if failed is None else [JobState(split_id(job_id)[0], UNKNOWN, failed)]
        failed = found[job_id][0].reason if found[job_id][0].state == UNKNOWN else None
    return found


def _states_of(job_id: str) -> list[JobState]:
    number, cluster = split_id(job_id)
    where = [f"--clusters={cluster}"] if cluster else []
    words = ["squeue", "--noheader", "--states=all", "--array", f"--jobs={number}", f"--Format={_FIELDS}"]
    code, out, error = _run([*words, *where])
    seen = job_states(out, number) if code == 0 else []
    if seen:
        return seen
    accounted = _from_accounting(number, where)
    if NO_SUCH_JOB in error or (code == 0 and not _is_silent(error) and number not in out):
        # The controller has forgotten the job. The accounts may still list a job as running that was lost in a crash.
        ended = [state for state in accounted if not state.is_active]
        return ended or [JobState(number, FORGOTTEN)]
    return accounted or [JobState(number, UNKNOWN, _failure("squeue", code, error or out).what)]


def active(job_ids: Sequence[str], *, patience_s: float = TIMEOUT_S) -> list[str]:
    """Return the ids of the jobs, or tasks of arrays, that wait or run.

    Raises:
        EnvironmentProblem: Slurm does not answer.
    """
    until = time.monotonic() + patience_s
    while True:
        seen = [(split_id(job_id)[1], state) for job_id, found in states(job_ids).items() for state in found]
        unknown = next((state for _, state in seen if state.state == UNKNOWN), None)
        if unknown is None:
            return [with_cluster(state.job_id, cluster) for cluster, state in seen if state.is_active]
        if not _waited_to_retry(unknown.reason, until):
            raise EnvironmentProblem(
                f"Slurm does not say whether job {unknown.job_id} is still there: {unknown.reason}",
                next_step="Try again when `squeue` works here.",
            )


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; jobs that have ended are no error.

    Raises:
        EnvironmentProblem: scancel failed.
    """
    by_cluster: dict[str | None, list[str]] = {}
    for job_id in job_ids:
        number, cluster = split_id(job_id)
        by_cluster.setdefault(cluster, []).append(number)
    for cluster, numbers in by_cluster.items():
        words = ["scancel", *([f"--clusters={cluster}"] if cluster else []), *numbers]
        until = time.monotonic() + TIMEOUT_S
        while True:
            code, _, error = _run(words)
            lines = lines_of(error)
            if code == 0 or (lines and all(any(text in line for text in HAS_ENDED) for line in lines)):
                break
            if not _waited_to_retry(error, until):
                raise _failure(words[0], code, error)


def _from_accounting(number: str, where: Sequence[str]) -> list[JobState]:
    """Return the states that sacct knows, where the site keeps accounts."""
    if shutil.which("sacct") is None:
        return []
    words = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}"]
    code, out, _ = _run([*words, "--format=JobID,State,Elapsed,NodeList", *where])
    return accounted_states(out, number) if code == 0 else []


def _is_silent(error: str) -> bool:
    """Return whether the error means that the controller does not answer."""
    return any(text.lower() in error.lower() for text in NOT_ANSWERING)


def _failure(program: str, code: int, error: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{program} failed: {' '.join(error.split())[:1000] or f'code {code}'}",
        next_step="Slurm's controller does not answer; try again in a few minutes." if _is_silent(error) else None,
    )


def _run(words: Sequence[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr; bytes that are not UTF-8 are replaced."""
    try:
        done = subprocess.run(
            list(words),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
            env=for_slurm(os.environ, exported=words[0] == "sbatch"),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return 127, "", f"there is no {words[0]} on this machine"
    except OSError as error:
        return 126, "", f"{words[0]} cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return 124, "", f"Socket timed out after {TIMEOUT_S:.0f} s"
    return done.returncode, done.stdout, done.stderr
