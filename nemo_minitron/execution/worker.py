"""One rank of a distributed stage; `nemo_minitron/start` calls it with the task file of the runner."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

from nemo_minitron.artifacts.run_paths import RunPaths
from nemo_minitron.artifacts.store import Store
from nemo_minitron.errors import EnvironmentProblem, Interrupted, MinitronError
from nemo_minitron.execution.logs import log_handler
from nemo_minitron.execution.ranks import load_error, save_error
from nemo_minitron.execution.task import StageTask, run_task
from nemo_minitron.processes.agent import a_rank_failed
from nemo_minitron.processes.exchange import save_result
from nemo_minitron.processes.nodes import RUNNER_VARIABLE
from nemo_minitron.processes.same_code import require_same
from nemo_minitron.system.disk import disk_errors
from nemo_minitron.system.interrupts import RELAY_FILE, StopRequest, detach_terminal, exit_without_parent
from nemo_minitron.system.progress import Progress


def main(task_file: Path) -> int:
    """Run the stage on this rank; rank 0 writes the result or the error beside the task file."""
    content = json.loads(task_file.read_text())
    exit_without_parent(int(os.environ[RUNNER_VARIABLE]))
    # The runner forwards stop requests; on SIGHUP, this process only detaches from its terminal.
    signal.signal(signal.SIGHUP, detach_terminal)
    work, is_main = task_file.parent, os.environ.get("RANK", "0") == "0"
    try:
        require_same(content["code"])
    except EnvironmentProblem as error:
        save_error(error, work)
        return 2
    task = StageTask.load(content)
    # Only rank 0 reads the file by which the runner forwards stop requests.
    stop = StopRequest(task.run_dir, work / RELAY_FILE) if is_main else StopRequest()
    progress = Progress(RunPaths(task.run_dir).progress(task.name), silent=not is_main)
    warnings.simplefilter("ignore")
    # stdout is redirected to the log; the progress bar uses stderr if that is a terminal.
    logging.getLogger().handlers[:] = [log_handler(sys.stdout)]
    try:
        with stop.listening(), disk_errors(task.run_dir):
            inputs = Store(task.run_dir).inputs(task.inputs)
            result = run_task(task, inputs, progress, stop)
    except KeyboardInterrupt as error:
        if a_rank_failed():
            return 1
        message = f"Stopped in stage {task.name} by {error}; the same command continues."
        _save_first(Interrupted(message), work)
        return 0
    except Interrupted as error:
        # All ranks exit with code 0, so that the agent does not end the others.
        if is_main:
            _save_first(error, work)
        return 0
    except MinitronError as error:
        # The error of rank 0 takes precedence.
        if is_main:
            save_error(error, work)
        else:
            _save_first(error, work)
        return 2
    if is_main:
        save_result(result, work)
    return 0


def _save_first(error: MinitronError, work: Path) -> None:
    """Write the error unless another rank has written one. Replace an interruption, which may be its consequence."""
    written = load_error(work)
    if written is None or (isinstance(written, Interrupted) and not isinstance(error, Interrupted)):
        save_error(error, work)
