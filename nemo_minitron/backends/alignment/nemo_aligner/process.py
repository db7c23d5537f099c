"""Run one task in NeMo-Aligner's environment, show its progress, and forward stop requests to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nemo_minitron.backends.alignment.nemo_aligner.environment import (
    ENTRY,
    aligner_python,
    environment_of,
    has_gpu_kernels,
)
from nemo_minitron.backends.alignment.nemo_aligner.fork_server import Fork, ForkServer, serving
from nemo_minitron.errors import EnvironmentProblem, Interrupted, ProcessesDied
from nemo_minitron.processes import exchange
from nemo_minitron.processes.nodes import Nodes, start_everywhere
from nemo_minitron.processes.output import without_secrets
from nemo_minitron.processes.same_code import SAFE_PATH
from nemo_minitron.system.disk import disk_problem
from nemo_minitron.system.heap import environment_of_children
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Bar, Progress
from nemo_minitron.system.safe_files import open_log, write_whole

TASK_FILE = "task.json"
PROGRESS_FILE, STOP_FILE = "aligner.json", "STOP"
"""The same names as in entry/task.py, which cannot import this package."""
POLL_S, SHUTDOWN_TIMEOUT_S = 0.5, 60.0
LOST_TYPES = (
    *("OutOfMemoryError", "DistBackendError", "DistNetworkError", "DistStoreError", "AcceleratorError"),
    *("ConnectionError", "ConnectionResetError", "ConnectionAbortedError", "BrokenPipeError"),
)
LOST_TEXTS = (
    *("CUDA out of memory", "CUDA error", "NCCL error", "NCCL communicator was aborted"),
    *("Connection closed by peer", "Connection reset by peer", "Timed out waiting"),
)
"""Types and messages of errors of torch, NCCL and gloo after which a training can continue from its checkpoint."""
Started = subprocess.Popen[bytes] | Fork
"""A task that runs; its `pid` leads a process group of its own."""


def run_task(
    name: str,
    task: Mapping[str, Any],
    work_dir: Path,
    log: Path,
    progress: Progress,
    stop: StopRequest,
    *,
    num_processes: int = 1,
    threads: int | None = None,
    stage_work: Path | None = None,
    on_cpu: bool | None = None,
    variables: Mapping[str, str] | None = None,
    watch: Callable[[], None] = lambda: None,
    server: ForkServer | None = None,
) -> dict[str, Any]:
    """Run a task and return its result.

    Args:
        name: name of a task in entry/__main__.py.
        task: the task's own arguments, as JSON values.
        work_dir: folder for the task's files: its arguments, its result, and what a training needs to resume.
        log: file for the output of the processes.
        threads: threads of each process; None: see `Nodes.threads_of_each`.
        stage_work: the stage's work folder, where the other nodes of the job look for requests; None: `work_dir`.
        on_cpu: whether GPUs are hidden from the task; None: hide them if the task's Python cannot use them.
        variables: more environment variables for the task.
        watch: called regularly; the task is ended with the error that it raises.
        server: runs the task, if it needs one process; None: the task gets a process that imports NeMo itself.

    Raises:
        EnvironmentProblem: NeMo-Aligner is not installed, or the task failed.
        ProcessesDied: the processes ended without an error message.
        Interrupted: a stop was requested; a training has written a checkpoint.
    """
    script = write_task(name, task, work_dir)
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as started, stop.deferred():
        if server is not None and num_processes == 1:
            process: Started = server.start(work_dir / TASK_FILE, variables or {})
        else:
            own = _own_processes(script, num_processes, threads, stage_work or work_dir, on_cpu, variables or {}, log)
            process = started.enter_context(own)
        code = _wait(process, name, work_dir, progress, stop, watch)
    return _result(name, code, work_dir, log, stop)


@contextmanager
def fork_server(tasks: Sequence[str], log: Path, threads: int | None) -> Iterator[ForkServer]:
    """Start a server that runs the named tasks on the CPU with one start of NeMo, and end it with the block."""
    python = aligner_python()
    nodes = Nodes()
    environment = task_environment(python, threads or nodes.threads_of_each(1), on_cpu=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open_log(log) as file, without_secrets(file) as output:

        def start(command: list[str], descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
            return start_everywhere(
                command,
                environment,
                nodes,
                log.parent,
                lambda command, variables: _start(command, variables, output, descriptors),
                outside_job=True,
            )

        with serving([str(python), str(ENTRY)], tasks, start) as server:
            yield server


@contextmanager
def _own_processes(
    script: Sequence[str],
    num_processes: int,
    threads: int | None,
    stage_work: Path,
    on_cpu: bool | None,
    variables: Mapping[str, str],
    log: Path,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start processes that import NeMo and run one task; several of them on all nodes of the job."""
    python = aligner_python()
    nodes = Nodes.here() if num_processes > 1 else Nodes()
    command = nodes.command(python, num_processes, script) if num_processes > 1 else [str(python), *script]
    hidden = not has_gpu_kernels(python) if on_cpu is None else on_cpu
    environment = task_environment(python, threads or nodes.threads_of_each(num_processes), on_cpu=hidden)
    with open_log(log) as file, without_secrets(file) as output, nodes.rendezvous() as rendezvous:
        # Lightning would take a single process for one of the tasks of the surrounding Slurm job.
        yield start_everywhere(
            command,
            {**environment, **variables, **(rendezvous if num_processes > 1 else {})},
            nodes,
            stage_work,
            lambda command, variables: _start(command, variables, output),
            outside_job=True,
        )


def write_task(name: str, task: Mapping[str, Any], work_dir: Path) -> list[str]:
    """Write a task into its work folder; returns the script that runs it, with its arguments."""
    work_dir.mkdir(parents=True, exist_ok=True)
    exchange.prepare(work_dir, STOP_FILE, PROGRESS_FILE)
    write_whole(work_dir / TASK_FILE, json.dumps({**task, "task": name, "work_dir": str(work_dir)}))
    return [str(ENTRY), str(work_dir / TASK_FILE)]


def task_environment(python: Path, threads: int, *, on_cpu: bool) -> dict[str, str]:
    """Return the variables of a task, in addition to those of this process."""
    return {
        **environment_of_children(),
        **environment_of(python),
        **SAFE_PATH,
        # The task checks for CUDA and not its config: if it saw a GPU, it would use it even where NeMo cannot.
        **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONWARNINGS": "ignore",
    }


def _start(
    command: list[str], environment: dict[str, str], output: IO[bytes], descriptors: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    # A new session keeps Ctrl-C from the task: the runner gets it, and requests a checkpoint first.
    return subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True, pass_fds=descriptors
    )


def _wait(
    process: Started,
    name: str,
    work_dir: Path,
    progress: Progress,
    stop: StopRequest,
    watch: Callable[[], None],
) -> int:
    """Wait for the process and return its exit code; show a bar from the first step on, and forward a stop request."""
    bar: Bar | None = None
    with ExitStack() as shown:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                code = process.poll()  # before the progress is read for the last time
                if code != 0:  # a failed task may have failed because of what is watched
                    _watched(watch, name, stop)
                if stop.source() is not None:
                    (work_dir / STOP_FILE).touch()
                seen = _seen(work_dir)
                if seen is not None:
                    step, last = int(seen["step"]), int(seen["max_steps"])
                    bar = bar or shown.enter_context(progress.bar(name, last, "steps", done=step))
                    fields = {"loss": float(seen["loss"])} if "loss" in seen else {}
                    bar.advance(step - bar.done, **fields)
                if code is not None:
                    return code
        except BaseException:
            _end(process)
            raise
        finally:
            with suppress(ProcessLookupError):  # children of a killed process
                os.killpg(process.pid, signal.SIGKILL)


def _watched(watch: Callable[[], None], name: str, stop: StopRequest) -> None:
    """Call `watch`. After a stop request its error may be a consequence, such as servers that Slurm has ended."""
    try:
        watch()
    except EnvironmentProblem as error:
        if stop.source() is None:
            raise
        raise _interrupted(name, stop) from error


def _interrupted(name: str, stop: StopRequest) -> Interrupted:
    return Interrupted(f"Stopped in {name} as requested by {stop.source()}; the same command resumes.")


def _seen(work_dir: Path) -> dict[str, Any] | None:
    """Return the progress of the task; None before its first step."""
    try:
        seen: dict[str, Any] = json.loads((work_dir / PROGRESS_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return seen


def _end(process: Started) -> None:
    """Request the end of the task, or of the agent of its ranks; the caller kills what is left of the process group."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGINT)  # they do not get SIGTERM, see `shielded`
    with suppress(subprocess.TimeoutExpired):
        process.wait(SHUTDOWN_TIMEOUT_S)


def ending(work_dir: Path) -> tuple[str, type[EnvironmentProblem]]:
    """Return what a process has written about its failure, as the end of a sentence, and the error to raise.

    Lost connections and full memory are the end of processes for which a job of Slurm is repeated, whether or not
    Python could report them.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    error = exchange.load_error(work_dir)
    if error is None:
        return "", ProcessesDied
    reason = f": {error['type']}: {error['message']}"
    problem = disk_problem(RuntimeError(reason), work_dir)
    if problem is not None:
        raise problem
    is_lost = error["type"] in LOST_TYPES or any(text in reason for text in LOST_TEXTS)
    return reason, ProcessesDied if is_lost else EnvironmentProblem


def _result(name: str, code: int, work_dir: Path, log: Path, stop: StopRequest) -> dict[str, Any]:
    result = exchange.load_result(work_dir)
    if code == 0 and result is not None:
        if result.get("finished") is False:
            raise Interrupted(
                f"Stopped at step {result['step']} as requested by {stop.source()}; the same command resumes."
            )
        return result
    if stop.source() is not None:
        raise _interrupted(name, stop)
    reason, kind = ending(work_dir)
    raise kind(
        f"NeMo-Aligner's task {name} ended with code {code}{reason}",
        where=str(log),
        next_step="Read the log. The same command resumes from the last checkpoint.",
    )
