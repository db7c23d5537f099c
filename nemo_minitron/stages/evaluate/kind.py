"""The kind of stage that evaluates a model on held-out text and lm-eval tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.evaluate.params import EvaluateStage
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, Source, StageKind, TaskUse, measured_text
from nemo_minitron.workload.heldout import heldout_batch_size
from nemo_minitron.workload.load import Load, forward_load


def _sources(params: EvaluateStage) -> Iterator[Source]:
    if params.tasks and params.tasks_source:
        yield Source("tasks_source", params.tasks_source, "files")


def _tasks(params: EvaluateStage) -> Iterator[TaskUse]:
    for number, task in enumerate(params.tasks):
        yield TaskUse(f"tasks.{number}", task, "tasks_source", params.tasks_source)


def _problems(name: str, params: EvaluateStage, view: RecipeView) -> Iterator[str]:
    """Check that labels are unique, because they name the columns of the report."""
    for other, stage in view.stages.items():
        if other == name:
            return
        if isinstance(stage, EvaluateStage) and stage.label == params.label:
            yield f"stages.{name}.label = {params.label}: stage {other} has the same label."


def _load(name: str, params: EvaluateStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape, keys = view.shape(params.inputs.model), (params.seq_len_tokens, params.precision, layout)
    if shape is None:
        return None
    found = forward_load(shape, params.num_tokens, *keys, batch_size=heldout_batch_size(params.seq_len_tokens))
    # transformers does not split a model over processes.
    return replace(found, work=replace(found.work, then_whole=params.uses_transformers))


EVALUATE = StageKind(
    name="evaluate",
    params=EvaluateStage,
    run="nemo_minitron.stages.evaluate.run:evaluate",
    outputs=(Output.EVALUATION,),
    inputs={"model": MODELS, "data": (Output.TOKENIZED_TEXT,)},
    distributed=True,
    report="evaluation",
    sources=_sources,
    tasks=_tasks,
    problems=_problems,
    heldout_uses=measured_text,
    load=_load,
)
