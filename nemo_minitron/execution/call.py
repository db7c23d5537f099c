"""Call the function of a stage, inside a Megatron session if the stage is distributed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_minitron.artifacts.types import ArtifactsByRole
from nemo_minitron.execution.task import StageTask
from nemo_minitron.processes.nodes import Nodes
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.typed_inputs import typed_inputs
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress


def call_stage(task: StageTask, inputs: ArtifactsByRole, progress: Progress, stop: StopRequest) -> dict[str, Any]:
    """Call the stage's function in this process and return its result.

    Raises:
        MinitronError: an error of the stage.
    """
    execution = task.execution
    context = StageContext(task.name, task.recipe_name, task.out_dir, task.work_dir, execution, progress, stop=stop)
    function = task.kind.load_function()
    reads = typed_inputs(function, inputs)
    if not task.kind.distributed:
        return dict(function(task.params, reads, context))
    from nemo_minitron.backends.megatron.runtime.session import open_session

    threads = execution.threads or Nodes.here().threads_of_each(task.parallel.world_size)
    with open_session(task.parallel, device=execution.device, threads=threads) as session:
        shown = progress if session.is_main else Progress(silent=True)
        return dict(function(task.params, reads, replace(context, progress=shown, session=session)))
