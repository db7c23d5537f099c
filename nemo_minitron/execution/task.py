"""The task of a process: one fully planned stage, so that ranks do not plan again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.run_paths import TASK
from nemo_minitron.artifacts.types import ArtifactsByRole
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import InputNames, StageCall
from nemo_minitron.processes.gpu_environment import gpu_environment, has_nvidia_driver
from nemo_minitron.processes.nodes import Nodes
from nemo_minitron.processes.same_code import of_this_process
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.execution import Execution, Parallel
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import StageKind
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.stages.typed_inputs import typed_inputs
from nemo_minitron.system.disclosure import write_private
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.out_of_memory import memory_errors
from nemo_minitron.system.progress import Progress

SESSION_FACTS = "session"
"""Key of a distributed stage's result: on which device it ran, and with which layers. The runner moves it to the
provenance."""


@dataclass(frozen=True)
class StageTask:
    """A planned stage with its execution settings and the folders that it writes to."""

    name: str
    recipe_name: str
    params: StageParams
    inputs: InputNames
    """Input role -> stage name, or a list or dict of stage names."""
    parallel: Parallel
    execution: Execution
    run_dir: Path
    out_dir: Path
    work_dir: Path

    @property
    def kind(self) -> StageKind:
        return STAGES[self.params.kind]

    @classmethod
    def of(cls, call: StageCall, recipe: Recipe, out_dir: Path, work_dir: Path) -> StageTask:
        """Create the task for a stage of a planned recipe."""
        return cls(
            name=call.name,
            recipe_name=recipe.name,
            params=recipe.stages[call.name],
            inputs=call.inputs,
            parallel=call.parallel,
            execution=recipe.execution,
            run_dir=run_dir(recipe),
            out_dir=out_dir,
            work_dir=work_dir,
        )

    def gpu_environment(self) -> dict[str, str]:
        """Return the environment variables that the processes need if they run on GPUs, as far as they are not set."""
        device = self.execution.device
        if device == "cpu" or (device == "auto" and not has_nvidia_driver()):
            return {}
        layout = self.parallel
        return gpu_environment(
            os.environ, splits_layers=layout.tp > 1 or layout.cp > 1, num_processes=layout.world_size
        )

    @property
    def file(self) -> Path:
        return self.work_dir / TASK

    def save(self) -> None:
        """Write the task for the ranks, readable only by the user: `execution.cluster` may hold secrets."""
        content = {
            "name": self.name,
            "recipe_name": self.recipe_name,
            "params": self.params.model_dump(mode="json"),
            "inputs": self.inputs,
            "parallel": self.parallel.model_dump(mode="json"),
            "execution": self.execution.model_dump(mode="json"),
            "run_dir": str(self.run_dir),
            "out_dir": str(self.out_dir),
            "work_dir": str(self.work_dir),
            "code": of_this_process(),
        }
        write_private(self.file, json.dumps(content))

    @classmethod
    def load(cls, content: Mapping[str, Any]) -> StageTask:
        """Create the task from the content that `save` has written."""
        return cls(
            name=content["name"],
            recipe_name=content["recipe_name"],
            params=STAGES[content["params"]["kind"]].params.model_validate(content["params"]),
            inputs=content["inputs"],
            parallel=Parallel.model_validate(content["parallel"]),
            execution=Execution.model_validate(content["execution"]),
            run_dir=Path(content["run_dir"]),
            out_dir=Path(content["out_dir"]),
            work_dir=Path(content["work_dir"]),
        )


def run_task(task: StageTask, inputs: ArtifactsByRole, progress: Progress, stop: StopRequest) -> dict[str, Any]:
    """Call the stage's function in this process and return its result.

    Raises:
        MinitronError: an error of the stage.
        EnvironmentProblem: an allocation failed.
    """
    with memory_errors(f"Stage {task.name}", f"stages.{task.name}", _to_save_memory(task)):
        return _run(task, inputs, progress, stop)


def _to_save_memory(task: StageTask) -> str:
    """Return what a user can do if the stage runs out of memory."""
    again = "The same command continues."
    has_whole_model = task.kind.whole_layers or getattr(task.params, "uses_transformers", False)
    if has_whole_model or not task.kind.has_layout:
        return f"End other programs that need memory, or use a machine or GPU that has more. {again}"
    key = f"execution.parallel_by_stage.{task.kind.part_of(task.name, task.params) or task.name}"
    recompute = " or recompute: full" if task.kind.trains else ""
    return (
        f"In {key}, set a smaller micro_batch_size{recompute}, or more tp or pp; `minitron plan` shows the memory of "
        f"each part. {again}"
    )


def _run(task: StageTask, inputs: ArtifactsByRole, progress: Progress, stop: StopRequest) -> dict[str, Any]:
    execution = task.execution
    context = StageContext(task.name, task.recipe_name, task.out_dir, task.work_dir, execution, progress, stop=stop)
    function = task.kind.load_function()
    reads = typed_inputs(function, inputs)
    if not task.kind.distributed:
        return dict(function(task.params, reads, context))
    # Stages on one process run in this one; torch reads these variables when it first uses a GPU.
    os.environ.update(task.gpu_environment())
    from nemo_minitron.backends.megatron.model.layers import layers_in_use
    from nemo_minitron.backends.megatron.runtime.session import open_session

    threads = execution.threads or Nodes.here().threads_of_each(task.parallel.world_size)
    options = {"device": execution.device, "threads": threads, "deterministic": execution.deterministic}
    with open_session(task.parallel, kernels=execution.kernels, **options) as session:  # type: ignore[arg-type]
        shown = progress if session.is_main else Progress(silent=True)
        result = dict(function(task.params, reads, replace(context, progress=shown, session=session)))
        return {**result, SESSION_FACTS: {"device": session.device.type, "megatron_layers": layers_in_use()}}
