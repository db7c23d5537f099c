"""Run a stage on several processes: an agent on each node around `nemo_minitron.execution.worker`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from nemo_minitron import errors
from nemo_minitron.artifacts.run_paths import ERROR, LOGS, RESULT, RunPaths
from nemo_minitron.errors import Interrupted, MinitronError, ProcessesDied
from nemo_minitron.execution.task import StageTask
from nemo_minitron.processes.nodes import Nodes, deaf_to_stops, end_agent, start_everywhere
from nemo_minitron.processes.output import without_secrets
from nemo_minitron.processes.same_code import SAFE_PATH, START
from nemo_minitron.system.disclosure import environment_of, masked
from nemo_minitron.system.interrupts import RELAY_FILE, StopRequest
from nemo_minitron.system.safe_files import open_log, own_folder, write_reserved, write_whole

POLL_INTERVAL_S = 0.2
ERROR_BYTES = 8192


def run_ranks(task: StageTask, stop: StopRequest) -> dict[str, Any]:
    """The result of the stage, from rank 0.

    Raises:
        MinitronError: what a rank raised.
        ProcessesDied: the ranks ended without a word.
        Interrupted: the run was asked to stop.
    """
    work, size, by_itself = task.work_dir, task.parallel.world_size, task.kind.stops_by_itself
    for name in (RESULT, RELAY_FILE):
        (work / name).unlink(missing_ok=True)
    # Room for a message, which a full disk would not have.
    write_whole(work / ERROR, " " * ERROR_BYTES)
    task.save()
    nodes = Nodes.here()
    command = nodes.command(sys.executable, size, [str(START), "worker", str(task.file)])
    environment = {
        **SAFE_PATH,
        "OMP_NUM_THREADS": str(task.execution.threads or nodes.threads_of_each(size)),
        # torchrun handles SIGTERM and SIGHUP itself unless this says otherwise (from torch 2.9 on).
        "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGQUIT",
    }
    own_folder(task.run_dir, LOGS)
    log = RunPaths(task.run_dir).ranks_log(task.name)
    with (
        open_log(log, append=False) as file,
        without_secrets(file, environment_of({"execution": task.execution.model_dump(mode="json")})) as output,
        stop.deferred(),
        nodes.meeting() as meeting,
    ):
        start = lambda words, own: _start(words, own, output)  # noqa: E731
        process = start_everywhere(command, {**environment, **meeting}, nodes, work, start)
        code = _wait(process, work, stop, by_itself=by_itself)
    if stop.source() is not None and not by_itself:
        raise Interrupted(f"Stopped in stage {task.name} as asked by {stop.source()}; the same command goes on.")
    error = load_error(work / ERROR)
    if error is not None:
        raise error
    if code or not (work / RESULT).is_file():
        raise ProcessesDied(
            f"Stage {task.name} ended with code {code} on {size} processes.",
            where=str(log),
            next_step="Read the log; the same command goes on from the last checkpoint.",
        )
    return dict(json.loads((work / RESULT).read_text()))


def _start(command: list[str], environment: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """The agent, deaf to the signals that ask for a stop: it would end its ranks before they have saved themselves."""
    stderr = None if sys.stderr.isatty() else output
    return deaf_to_stops(lambda: subprocess.Popen(command, env=environment, stdout=output, stderr=stderr))


def _wait(process: subprocess.Popen[bytes], work: Path, stop: StopRequest, *, by_itself: bool) -> int:
    """The exit code; hands a request to stop on to the ranks."""
    told = False
    try:
        while True:
            try:
                return process.wait(POLL_INTERVAL_S)
            except subprocess.TimeoutExpired:
                reason = stop.source()
            if reason is not None and not told:
                told = True
                if by_itself:
                    write_whole(work / RELAY_FILE, reason)
                else:
                    process.send_signal(signal.SIGINT)
    except BaseException:
        end_agent(process)
        raise


def save_error(error: MinitronError, file: Path) -> None:
    """Hand a user's error from a worker to the runner, in the room that it has kept."""
    told = {key: getattr(error, key) for key in ("what", "where", "allowed", "next_step")}
    fields = {key: None if value is None else masked(value) for key, value in told.items()}
    text = json.dumps({"type": type(error).__name__, **fields})
    write_reserved(file, text.ljust(ERROR_BYTES).encode())


def load_error(file: Path) -> MinitronError | None:
    """What a worker has left; None: nothing."""
    text = file.read_text().strip() if file.is_file() else ""
    if not text:
        return None
    fields = json.loads(text)
    kind = getattr(errors, fields.pop("type"), MinitronError)
    error: MinitronError = kind(fields.pop("what"), **fields)
    return error
