"""Execution of a stage on several processes: an agent on each node starts `nemo_minitron.execution.worker`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from nemo_minitron import errors
from nemo_minitron.artifacts.manifest import installed_version
from nemo_minitron.artifacts.run_paths import LOGS, RunPaths
from nemo_minitron.errors import Interrupted, MinitronError, ProcessesDied
from nemo_minitron.execution.task import StageTask
from nemo_minitron.processes import exchange
from nemo_minitron.processes.nodes import Nodes, end_agent, start_agent, start_everywhere
from nemo_minitron.processes.output import without_secrets
from nemo_minitron.processes.same_code import SAFE_PATH, START
from nemo_minitron.system.disclosure import environment_of, masked
from nemo_minitron.system.interrupts import RELAY_FILE, StopRequest
from nemo_minitron.system.safe_files import open_log, own_folder, write_whole

POLL_INTERVAL_S = 0.2
MAX_COMPILE_THREADS, NUM_TRACED_OPERATIONS = 4, 2000
"""Compilers of each rank, and collective operations that NCCL's flight recorder keeps."""


def run_ranks(task: StageTask, stop: StopRequest) -> dict[str, Any]:
    """Run the stage on its ranks and return the result of rank 0.

    Raises:
        MinitronError: an error of a rank.
        ProcessesDied: the ranks exited without a result or an error message.
        Interrupted: a stop was requested.
    """
    work, size, by_itself = task.work_dir, task.parallel.world_size, task.kind.stops_by_itself
    exchange.prepare(work, RELAY_FILE)
    task.save()
    nodes = Nodes.here()
    command = nodes.command(sys.executable, size, [str(START), "worker", str(task.file)])
    threads = task.execution.threads or nodes.threads_of_each(size)
    environment = {
        **SAFE_PATH,
        **task.gpu_environment(),
        **_defaults(threads, RunPaths(task.run_dir).nccl_traces(task.name)),
        "OMP_NUM_THREADS": str(threads),
        # Without this setting, torchrun handles SIGTERM and SIGHUP itself (from torch 2.9 on).
        "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGQUIT",
    }
    own_folder(task.run_dir, LOGS)
    log = RunPaths(task.run_dir).ranks_log(task.name)
    with (
        open_log(log, append=False) as file,
        without_secrets(file, environment_of({"execution": task.execution.model_dump(mode="json")})) as output,
        stop.deferred(),
        nodes.rendezvous() as rendezvous,
    ):
        start = partial(start_agent, stdout=output, stderr=None if sys.stderr.isatty() else output)
        process = start_everywhere(command, {**environment, **rendezvous}, nodes, work, start)
        code = _wait(process, work, stop, by_itself=by_itself)
    result = exchange.load_result(work)
    if result is not None and not code:
        return result
    reason, error = stop.source(), error_of_ranks(work, code, stop)
    # An error that only the user can repair counts even if a stop was requested meanwhile.
    if reason is not None and not by_itself and (error is None or isinstance(error, Interrupted)):
        raise Interrupted(f"Stopped in stage {task.name} as requested by {reason}; the same command continues.")
    if error is not None:
        raise error
    raise ProcessesDied(
        f"The {size} processes of stage {task.name} exited with code {code}.",
        where=str(log),
        next_step="Read the log. The same command resumes from the last checkpoint.",
    )


def _defaults(threads: int, traces: Path) -> dict[str, str]:
    """Return the environment variables that the user has not set and whose own defaults do not suit several ranks.

    Args:
        threads: CPU threads of each rank.
        traces: NCCL's flight recorder writes files that begin with this path and end with the rank.
    """
    names = {
        # By default each rank starts up to 32 compilers at the first step.
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(threads, MAX_COMPILE_THREADS)),
        # After a timeout, each rank writes its last collective operations.
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    size_name, file_name = _flight_recorder(installed_version("torch"))
    names |= {size_name: str(NUM_TRACED_OPERATIONS), file_name: str(traces)}
    return {name: value for name, value in names.items() if name not in os.environ}


def _flight_recorder(torch_version: str | None) -> tuple[str, str]:
    """Return the variables for the recorder's size and its files; torch 2.9 renamed both, and warns of the old ones.

    All versions read the old names, which are returned if the version is unknown.
    """
    if torch_version is not None and tuple(int(part) for part in torch_version.split(".")[:2]) >= (2, 9):
        return "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"
    return "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def _wait(process: subprocess.Popen[bytes], work: Path, stop: StopRequest, *, by_itself: bool) -> int:
    """Forward a stop request to the ranks, and return the exit code of the agent."""
    forwarded = False
    try:
        while True:
            try:
                return process.wait(POLL_INTERVAL_S)
            except subprocess.TimeoutExpired:
                reason = stop.source()
            if reason is not None and not forwarded:
                forwarded = True
                if by_itself:
                    write_whole(work / RELAY_FILE, reason)
                else:
                    process.send_signal(signal.SIGINT)
    except BaseException:
        end_agent(process)
        raise


def save_error(error: MinitronError, work: Path) -> None:
    """Write an error that a user can cause, for the runner, without secrets."""
    values = {key: getattr(error, key) for key in ("what", "where", "allowed", "next_step")}
    fields = {key: None if value is None else masked(value) for key, value in values.items()}
    exchange.save_error({"type": type(error).__name__, **fields}, work)


def error_of_ranks(work: Path, code: int, stop: StopRequest) -> MinitronError | None:
    """Return the error that a rank has written, or None. An interruption that nobody requested is not an error.

    If one rank crashes, torchrun and ft_launcher end the others with SIGTERM, as Slurm does when it preempts a job.

    Args:
        code: exit code of the agent.
    """
    error = load_error(work)
    return None if isinstance(error, Interrupted) and code and stop.source() is None else error


def load_error(work: Path) -> MinitronError | None:
    """Return the error that a rank has written, or None."""
    fields = exchange.load_error(work)
    if fields is None:
        return None
    kind = getattr(errors, fields.pop("type"), MinitronError)
    error: MinitronError = kind(fields.pop("what"), **fields)
    return error
