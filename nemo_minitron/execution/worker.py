"""One rank of a distributed stage; `nemo_minitron/start` calls it with the file that the runner has left."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

from nemo_minitron.artifacts.run_paths import ERROR, RESULT, RunPaths
from nemo_minitron.artifacts.store import Store
from nemo_minitron.errors import EnvironmentProblem, Interrupted, MinitronError
from nemo_minitron.execution.call import call_stage
from nemo_minitron.execution.logs import log_handler
from nemo_minitron.execution.ranks import load_error, save_error
from nemo_minitron.execution.task import StageTask
from nemo_minitron.processes.agent import a_rank_failed
from nemo_minitron.processes.nodes import RUNNER_VARIABLE
from nemo_minitron.processes.same_code import require_same
from nemo_minitron.system.disk import disk_errors
from nemo_minitron.system.interrupts import RELAY_FILE, StopRequest, detach_terminal, exit_without_parent
from nemo_minitron.system.progress import Progress
from nemo_minitron.system.safe_files import write_whole


def main(task_file: Path) -> int:
    """Run the stage on this rank; rank 0 leaves the result, or the error, beside the task file."""
    content = json.loads(task_file.read_text())
    exit_without_parent(int(os.environ[RUNNER_VARIABLE]))
    # The runner asks for the stop; this process only loses its terminal.
    signal.signal(signal.SIGHUP, detach_terminal)
    work, is_main = task_file.parent, os.environ.get("RANK", "0") == "0"
    try:
        require_same(content["code"])
    except EnvironmentProblem as error:
        save_error(error, work / ERROR)
        return 2
    task = StageTask.load(content)
    # The runner passes requests to stop on; only one rank looks at files.
    stop = StopRequest(task.run_dir, work / RELAY_FILE) if is_main else StopRequest()
    progress = Progress(RunPaths(task.run_dir).progress(task.name), silent=not is_main)
    warnings.simplefilter("ignore")
    # The log is this process's standard output; on a terminal the bar has the other stream.
    logging.getLogger().handlers[:] = [log_handler(sys.stdout)]
    try:
        with stop.listening(), disk_errors(task.run_dir):
            inputs = Store(task.run_dir).inputs(task.inputs)
            result = call_stage(task, inputs, progress, stop)
    except KeyboardInterrupt as error:
        if a_rank_failed():
            return 1
        save_error(Interrupted(f"Stopped in stage {task.name} by {error}; the same command goes on."), work / ERROR)
        return 0
    except Interrupted as error:
        # All ranks end in the same way: the agent need not end any.
        if is_main:
            save_error(error, work / ERROR)
        return 0
    except MinitronError as error:
        # The main rank knows best; another rank's error counts if there is none yet.
        if is_main or load_error(work / ERROR) is None:
            save_error(error, work / ERROR)
        return 2
    if is_main:
        write_whole(work / RESULT, json.dumps(result))
    return 0
