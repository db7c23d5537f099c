"""Run one task in the environment of NeMo-Aligner, show how it goes, and hand on requests to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from nemo_minitron.backends.alignment.nemo_aligner.environment import (
    ENTRY,
    aligner_python,
    environment_of,
    has_gpu_kernels,
)
from nemo_minitron.errors import EnvironmentProblem, Interrupted, ProcessesDied
from nemo_minitron.processes.nodes import Nodes, start_everywhere
from nemo_minitron.processes.output import without_secrets
from nemo_minitron.processes.same_code import SAFE_PATH
from nemo_minitron.system.disk import disk_problem
from nemo_minitron.system.heap import environment_of_children
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Bar, Progress
from nemo_minitron.system.safe_files import open_log, write_whole

TASK_FILE, RESULT_FILE, ERROR_FILE = "task.json", "result.json", "error.json"
ERROR_BYTES = 8192
PROGRESS_FILE, STOP_FILE = "aligner.json", "STOP"
"""As in entry/task.py, which cannot import this package."""
POLL_S, SHUTDOWN_TIMEOUT_S = 0.5, 60.0


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
) -> dict[str, Any]:
    """The task's result.

    Args:
        name: of a task in entry/__main__.py.
        work_dir: orders and answers; what a training needs to go on.
        log: everything that the processes print.
        threads: of each process; None: see `Nodes.threads_of_each`.
        stage_work: the stage's work folder, where other nodes of the job look for orders; None: `work_dir`.
        on_cpu: whether GPUs are hidden from the task; None: where its Python cannot use them.

    Raises:
        EnvironmentProblem: no NeMo-Aligner, or the task failed.
        Interrupted: it was asked to stop, and left a checkpoint if it trains.
    """
    python = aligner_python()
    work_dir.mkdir(parents=True, exist_ok=True)
    for old in (RESULT_FILE, STOP_FILE, PROGRESS_FILE):
        (work_dir / old).unlink(missing_ok=True)
    # Room for a message, which a full disk would not have.
    write_whole(work_dir / ERROR_FILE, " " * ERROR_BYTES)
    write_whole(work_dir / TASK_FILE, json.dumps({**task, "task": name, "work_dir": str(work_dir)}))
    nodes = Nodes.here() if num_processes > 1 else Nodes()
    script = [str(ENTRY), str(work_dir / TASK_FILE)]
    command = nodes.command(python, num_processes, script) if num_processes > 1 else [str(python), *script]
    hidden = not has_gpu_kernels(python) if on_cpu is None else on_cpu
    environment = _environment(python, threads or nodes.threads_of_each(num_processes), on_cpu=hidden)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open_log(log) as file, without_secrets(file) as output, stop.deferred(), nodes.meeting() as meeting:
        # Lightning would take a single process for one of the tasks of the job around it.
        process = start_everywhere(
            command,
            {**environment, **(meeting if num_processes > 1 else {})},
            nodes,
            stage_work or work_dir,
            lambda words, own: _start(words, own, output),
            outside_job=True,
        )
        code = _wait(process, name, work_dir, progress, stop)
    return _result(name, code, work_dir, log, stop)


def _environment(python: Path, threads: int, *, on_cpu: bool) -> dict[str, str]:
    return {
        **environment_of_children(),
        **environment_of(python),
        **SAFE_PATH,
        # The task looks for CUDA, not at its config: with a GPU in sight it would run as if NeMo could use that.
        **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONWARNINGS": "ignore",
    }


def _start(command: list[str], environment: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    # In a session of its own: Ctrl-C reaches the runner, which asks for a checkpoint first.
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def _wait(process: subprocess.Popen[bytes], name: str, work_dir: Path, progress: Progress, stop: StopRequest) -> int:
    """The exit code; meanwhile a bar, from the first step on, and a request to stop is handed on."""
    bar: Bar | None = None
    with ExitStack() as shown:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                code = process.poll()  # before the last look at the progress
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
            with suppress(ProcessLookupError):  # what a killed process leaves behind
                os.killpg(process.pid, signal.SIGKILL)


def _seen(work_dir: Path) -> dict[str, Any] | None:
    """How far the task is; None before its first step."""
    try:
        seen: dict[str, Any] = json.loads((work_dir / PROGRESS_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return seen


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask; who asks kills what is left."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(SHUTDOWN_TIMEOUT_S)


def _result(name: str, code: int, work_dir: Path, log: Path, stop: StopRequest) -> dict[str, Any]:
    file = work_dir / RESULT_FILE
    if code == 0 and file.is_file():
        result: dict[str, Any] = json.loads(file.read_text())
        if result.get("finished") is False:
            raise Interrupted(
                f"Stopped at step {result['step']} as asked by {stop.source()}; the same command goes on."
            )
        return result
    if stop.source() is not None:
        raise Interrupted(f"Stopped in {name} as asked by {stop.source()}; the same command goes on.")
    reason, told = "", (work_dir / ERROR_FILE).read_text().strip()
    if told:
        error = json.loads(told)
        reason = f": {error['type']}: {error['message']}"[:600]
        problem = disk_problem(RuntimeError(reason), work_dir)
        if problem is not None:
            raise problem
    raise (EnvironmentProblem if reason else ProcessesDied)(
        f"NeMo-Aligner's {name} ended with code {code}{reason}",
        where=str(log),
        next_step="Read the log; the same command goes on from the last checkpoint.",
    )
