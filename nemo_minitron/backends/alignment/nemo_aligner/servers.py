"""Servers in NeMo-Aligner's environment that a training calls: start, readiness, watching and end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.nemo_aligner.environment import aligner_python
from nemo_minitron.backends.alignment.nemo_aligner.process import ending, task_environment, write_task
from nemo_minitron.errors import EnvironmentProblem, Interrupted, MinitronError
from nemo_minitron.processes.nodes import RUNNER_VARIABLE, shielded
from nemo_minitron.processes.output import without_secrets
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.outer_job import without_outer_job
from nemo_minitron.system.safe_files import open_log

SOCKETS_VARIABLE = "MINITRON_SOCKETS"
"""Names the folder of the sockets; the same as in entry/triton_socket.py, which cannot import this package."""
READY_FILE = "ready"
POLL_S, READY_TIMEOUT_S, GRACE_S = 0.2, 600.0, 5.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class ServerTask:
    """A server: a task of entry/__main__.py that runs until it is ended."""

    name: str
    number: int
    """Name of its socket, and the port that clients connect to."""
    task: Mapping[str, Any]
    work_dir: Path


@dataclass(frozen=True)
class Running:
    """Servers that accept requests."""

    variables: Mapping[str, str]
    """Environment variables with which clients find them."""
    watch: Callable[[], None]
    """Raises EnvironmentProblem if one of them has ended."""


def changed_variables(*, on_cpu: bool) -> dict[str, str | None]:
    """Return the values in this process of the variables that a server gets with other ones; None: not set."""
    return {name: os.environ.get(name) for name in task_environment(aligner_python(), 1, on_cpu=on_cpu)}


@contextmanager
def running(servers: Sequence[ServerTask], threads: int, stop: StopRequest, *, on_cpu: bool) -> Iterator[Running]:
    """Start the servers, wait until all are ready, and end them with everything that they started.

    Raises:
        EnvironmentProblem: a server ended, or was not ready in READY_TIMEOUT_S, or the disk is full.
        ProcessesDied: a server ended without an error message.
    """
    with _sockets_folder() as folder, ExitStack() as stack:
        variables = {SOCKETS_VARIABLE: str(folder)}
        started = [
            (server, stack.enter_context(_process(server, variables, threads, on_cpu=on_cpu))) for server in servers
        ]

        def watch() -> None:
            for server, process in started:
                if process.poll() is not None:
                    raise _ended(server, process)

        _wait_until_ready(started, watch, stop)
        yield Running(variables, watch)


@contextmanager
def _sockets_folder() -> Iterator[Path]:
    """Create a folder that only this user can open; its path is short, because that of a socket is limited."""
    folder = Path(tempfile.mkdtemp(prefix="minitron-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _process(
    server: ServerTask, variables: Mapping[str, str], threads: int, *, on_cpu: bool
) -> Iterator[subprocess.Popen[bytes]]:
    python = aligner_python()
    (server.work_dir / READY_FILE).unlink(missing_ok=True)
    task = {**server.task, "number": server.number, "ready_file": READY_FILE}
    command = [str(python), "-u", *write_task(server.name, task, server.work_dir)]
    environment = {
        **without_outer_job(os.environ),
        **task_environment(python, threads, on_cpu=on_cpu),
        **variables,
        RUNNER_VARIABLE: str(os.getpid()),
    }
    with open_log(_log(server)) as file, without_secrets(file) as output:
        with shielded():
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group, and remove the shared memory that PyTriton names after the process."""
    until = time.monotonic() + GRACE_S
    process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)  # Triton does not get SIGTERM, see `shielded`
        while time.monotonic() < until:  # Triton and its Python end later, and remove their files
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(POLL_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for file in SHARED_MEMORY.glob(f"pytrtion{process.pid}-*"):
        file.unlink(missing_ok=True)


def _wait_until_ready(
    started: Sequence[tuple[ServerTask, subprocess.Popen[bytes]]], watch: Callable[[], None], stop: StopRequest
) -> None:
    until = time.monotonic() + READY_TIMEOUT_S
    waiting = [server for server, _ in started]
    while waiting:
        if stop.source() is not None:
            raise Interrupted(f"Stopped before the first step as requested by {stop.source()}.")
        watch()
        if time.monotonic() > until:
            raise EnvironmentProblem(
                f"The {waiting[0].name} did not become ready in {READY_TIMEOUT_S:.0f} s.", where=str(_log(waiting[0]))
            )
        time.sleep(POLL_S)
        waiting = [server for server in waiting if not (server.work_dir / READY_FILE).exists()]


def _ended(server: ServerTask, process: subprocess.Popen[bytes]) -> MinitronError:
    try:
        reason, kind = ending(server.work_dir)
    except EnvironmentProblem as full:
        return full
    return kind(
        f"The {server.name} ended with code {process.poll()} while the training needed it{reason}",
        where=str(_log(server)),
        next_step="Read the log. The same command resumes from the last checkpoint.",
    )


def _log(server: ServerTask) -> Path:
    return server.work_dir / "log.txt"
