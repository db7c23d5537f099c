"""One rank of a distributed stage; `nemo_minitron/start` calls it with the file that the runner has left."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import EnvironmentProblem, Interrupted, MinitronError
from nemo_minitron.execution.agent import a_rank_failed
from nemo_minitron.execution.nodes import RUNNER_VARIABLE
from nemo_minitron.execution.ranks import ERROR_FILE, RESULT_FILE, STATUS_FILE, load_error, save_error
from nemo_minitron.execution.runner import call_stage, log_handler
from nemo_minitron.execution.same_code import require_same
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import make_plan
from nemo_minitron.stages.context import StageContext
from nemo_minitron.system.disk import disk_errors
from nemo_minitron.system.interrupts import RELAY_FILE, StopRequest, exit_without_parent, leave_terminal
from nemo_minitron.system.progress import Progress
from nemo_minitron.system.safe_files import write_whole


def main(call_file: Path) -> int:
    """Run the stage on this rank; rank 0 leaves the result, or the error, beside the call file."""
    order = json.loads(call_file.read_text())
    exit_without_parent(int(os.environ[RUNNER_VARIABLE]))
    # The runner asks for the stop; this process only loses its terminal.
    signal.signal(signal.SIGHUP, leave_terminal)
    work, is_main = call_file.parent, os.environ.get("RANK", "0") == "0"
    try:
        require_same(order["code"])
    except EnvironmentProblem as error:
        save_error(error, work / ERROR_FILE)
        return 2
    recipe = Recipe.model_validate(order["recipe"])
    # The runner hands on what it was asked; only one rank looks at files.
    stop = StopRequest(run_dir(recipe), work / RELAY_FILE) if is_main else StopRequest()
    plan = make_plan(recipe)
    recipe, call = plan.recipe, plan.call(order["stage"])
    context = StageContext(
        name=call.name,
        recipe_name=recipe.name,
        out_dir=Path(order["out_dir"]),
        work_dir=work,
        execution=recipe.execution,
        progress=Progress(work / STATUS_FILE, silent=not is_main),
        stop=stop,
    )
    warnings.simplefilter("ignore")
    # The log is this process's standard output; on a terminal the bar has the other stream.
    logging.getLogger().handlers[:] = [log_handler(sys.stdout)]
    try:
        with stop.listening(), disk_errors(run_dir(recipe)):
            inputs = Store(run_dir(recipe)).inputs(call.inputs)
            result = call_stage(call.kind, recipe, inputs, context, call)
    except KeyboardInterrupt as error:
        if a_rank_failed():
            return 1
        told = f"Stopped in stage {call.name} by {error}; the same command goes on."
        save_error(Interrupted(told), work / ERROR_FILE)
        return 0
    except Interrupted as error:
        # All ranks end in the same way: the agent need not end any.
        if is_main:
            save_error(error, work / ERROR_FILE)
        return 0
    except MinitronError as error:
        # The main rank knows best; another speaks where nobody has.
        if is_main or load_error(work / ERROR_FILE) is None:
            save_error(error, work / ERROR_FILE)
        return 2
    if is_main:
        write_whole(work / RESULT_FILE, json.dumps(result))
    return 0
