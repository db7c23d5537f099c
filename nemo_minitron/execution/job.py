"""Execution of a stage inside a job: the first node runs it, the other nodes start the processes it requests."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from nemo_minitron.artifacts.run_paths import LOGS
from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ArtifactError, ProcessesDied
from nemo_minitron.execution.ranks import error_of_ranks
from nemo_minitron.execution.runner import run_single
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.processes.nodes import Nodes, release_nodes, serve_requests
from nemo_minitron.processes.output import without_secrets
from nemo_minitron.system.disclosure import environment_of, masked
from nemo_minitron.system.interrupts import StopRequest, stop_file_of_job
from nemo_minitron.system.safe_files import open_log, own_folder, write_whole

LOCK_TIMEOUT_S = 150.0
"""How long to wait for the lock of a lost node, which the file system releases with a delay."""


def run_in_job(recipe: Recipe, stage: str) -> None:
    """Run the stage until it is `finished`, together with the other nodes of this job.

    Raises:
        MinitronError: on the first node, as `run_single`; on other nodes the error of a rank, or ProcessesDied.
    """
    nodes, store = Nodes.here(), Store(run_dir(recipe))
    if nodes.rank == 0:
        try:
            run_single(recipe, stage, patience_s=LOCK_TIMEOUT_S)
        finally:
            with suppress(ArtifactError):  # if another user owns the folder, the other nodes have refused it as well
                release_nodes(nodes, store.own_work(stage))
        return
    stop = StopRequest(store.root, stop_file_of_job())
    own_folder(store.root, LOGS)
    log_file = store.paths.node_log(stage, nodes.rank)
    with (
        stop.listening(),
        stop.deferred(),  # the runner of the first node decides the end
        open_log(log_file) as log,
        without_secrets(log, environment_of(recipe.model_dump(mode="json"))) as output,
    ):
        code = serve_requests(nodes, store.own_work(stage), lambda: store.manifest(stage) is not None, output)
    if code:
        # The end of this node can end the first one before its runner has read the error.
        error = error_of_ranks(store.work(stage), code, stop)
        if error is None:
            error = ProcessesDied(
                f"The processes of stage {stage} on this node exited with code {code}.", where=str(log_file)
            )
            if stop.source() is None:
                # The end of this node ends the others as a preemption does. This file tells them apart.
                write_for_script("MINITRON_DIED_FILE", error)
        raise error


def write_for_script(variable: str, error: BaseException) -> None:
    """Write the error to the file that an environment variable names, if the script of the job has set it."""
    name = os.environ.get(variable)
    if name:
        write_whole(Path(name), f"{masked(str(error))}\n")
