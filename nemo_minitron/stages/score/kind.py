"""The kind of stage that scores the importance of every axis."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training_rules import sample_count_problems
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, Result, Source, StageKind, TaskUse
from nemo_minitron.stages.score.params import ScoreStage
from nemo_minitron.workload.load import Load
from nemo_minitron.workload.scoring import scoring_load


def _sources(params: ScoreStage) -> Iterator[Source]:
    if params.depth_task is not None and params.depth_task.source:
        yield Source("depth_task.source", params.depth_task.source, "files")


def _tasks(params: ScoreStage) -> Iterator[TaskUse]:
    task = params.depth_task
    if task is not None:
        runs = "task" in params.layer_metrics
        yield TaskUse("depth_task.name", task.name, "depth_task.source", task.source, runs=runs)


def _unread(params: ScoreStage) -> Iterator[tuple[str, str]]:
    """Yield (key, what reads it) for each key that has no effect beside the other keys."""
    aggregating = "method = activation and taylor"
    axes: set[str] = set() if params.method == "wanda" else set(params.width_axes)
    if not axes:
        yield from ((key, f"{aggregating}, for width_axes,") for key in ("batch_aggregation", "sequence_aggregation"))
    if not axes & {"ffn", "heads"}:
        yield "convention", f"{aggregating}, for the axes ffn and heads,"
    if "ffn" not in axes:
        yield "neuron_score", f"{aggregating}, for the axis ffn,"
    if not params.layer_metrics:
        yield from ((key, "layer_metrics") for key in ("block_lengths", "iterative_drops"))
    if "task" not in params.layer_metrics:
        yield "depth_task", "layer_metrics with task"


def _unread_problems(name: str, params: ScoreStage) -> Iterator[str]:
    keys = params.model_dump(mode="json")
    for key, reader in _unread(params):
        if getattr(params, key) != ScoreStage.model_fields[key].default:
            yield f"stages.{name}.{key} = {keys[key]}: read by {reader} only. Next: leave it out."


def _problems(name: str, params: ScoreStage, view: RecipeView) -> Iterator[str]:
    layout = view.layout(name)
    size, unread = layout.dp * layout.micro_batch_size, dict(_unread(params))
    yield from _unread_problems(name, params)
    yield from sample_count_problems(f"stages.{name}.num_samples", max(params.num_samples, params.depth_samples))
    for key in ("num_samples", *(("depth_samples",) if params.draws_depth_samples else ())):
        value = getattr(params, key)
        if value % size:
            yield f"stages.{name}.{key} = {value}: must be a multiple of dp * micro_batch_size = {size}."
    for key, count in (("batch_aggregation", "num_samples"), ("sequence_aggregation", "seq_len_tokens")):
        if key not in unread and getattr(params, key) == "var" and getattr(params, count) < 2:
            yield f"stages.{name}.{key} = var: needs stages.{name}.{count} >= 2; one value has no variance."
    if "task" in params.layer_metrics and params.depth_task is None:
        yield f"stages.{name}.layer_metrics: task needs stages.{name}.depth_task, with the name of an lm-eval task."
    shape = view.shape(params.inputs.model)
    if shape is None:
        return
    for length in (*params.block_lengths, params.iterative_drops):
        if length >= shape.num_layers:
            yield (
                f"stages.{name}: {length} layers cannot be removed from a model with {shape.num_layers}. "
                f"Allowed: block_lengths and iterative_drops up to {shape.num_layers - 1}."
            )


def _load(name: str, params: ScoreStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape = view.shape(params.inputs.model)
    return None if shape is None else scoring_load(shape, params, layout)


def _result_tokens(result: Result) -> int:
    return int(result["num_samples"]) * int(result["seq_len_tokens"])


SCORE = StageKind(
    name="score",
    params=ScoreStage,
    run="nemo_minitron.stages.score.run:score",
    version=2,
    outputs=(Output.SCORES,),
    inputs={"model": MODELS, "data": (Output.TOKENIZED_TEXT,)},
    distributed=True,
    whole_sequences=True,
    report="scores",
    sources=_sources,
    tasks=_tasks,
    problems=_problems,
    load=_load,
    result_tokens=_result_tokens,
)
