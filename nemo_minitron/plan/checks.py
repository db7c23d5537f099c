"""Rules across sections of a recipe. Pure: returns every problem, edits nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.config.schema import (
    AdoptStage,
    DistillStage,
    EvaluateStage,
    ImportStage,
    Parallel,
    Recipe,
    ScoreStage,
    SelectStage,
    TokenizeStage,
)
from nemo_minitron.errors import PlanError
from nemo_minitron.families import ModelShape
from nemo_minitron.hf.source import ASSET, HUB, asset_path
from nemo_minitron.plan.planner import RunPlan, parallel_of
from nemo_minitron.plan.shapes import student_shape, teacher_shape
from nemo_minitron.stages.spec import STAGES


def require_valid(plan: RunPlan) -> None:
    """Raises PlanError with every problem."""
    problems = list(find_problems(plan))
    if problems:
        raise PlanError(
            f"The recipe cannot be carried out ({len(problems)}):\n" + "\n".join(f"  - {text}" for text in problems),
            where=plan.recipe.name,
        )


def find_problems(plan: RunPlan) -> Iterator[str]:
    """Every rule that the recipe breaks, as one line each."""
    recipe = plan.recipe
    for name, stage in recipe.stages.items():
        if isinstance(stage, SelectStage):
            yield from _select(name, stage, recipe)
        elif isinstance(stage, DistillStage):
            yield from _distill(name, stage, recipe)
        elif isinstance(stage, ScoreStage):
            yield from _score(name, stage, recipe)
    yield from _layouts(recipe)
    yield from _labels(recipe)
    yield from _sources(plan)


def _select(name: str, stage: SelectStage, recipe: Recipe) -> Iterator[str]:
    teacher = teacher_shape(recipe, stage.inputs.model) if stage.inputs.model in recipe.stages else None
    if teacher is not None:
        yield from _target(f"stages.{name}.target", stage, teacher)
    if stage.method == "random":
        return
    score = recipe.stages.get(stage.inputs.scores or "")
    if not isinstance(score, ScoreStage):
        yield f"stages.{name}.inputs.scores: method importance needs a score stage."
        return
    needed = {"hidden_size": "hidden", "ffn_hidden_size": "ffn", "num_attention_heads": "heads"}
    for size, axis in needed.items():
        if getattr(stage.target, size) is not None and axis not in score.width_axes:
            widths = f"stages.{stage.inputs.scores}.width_axes"
            yield f"stages.{name}.target.{size}: axis {axis} is not scored; add it to {widths}."
    by_score = stage.target.num_layers is not None and stage.drop_layers is None
    if by_score and stage.layer_metric not in score.layer_metrics:
        yield (
            f"stages.{name}.layer_metric = {stage.layer_metric}: not measured; "
            f"add it to stages.{stage.inputs.scores}.layer_metrics."
        )


def _target(key: str, stage: SelectStage, teacher: ModelShape) -> Iterator[str]:
    for size, value in stage.target:
        limit = getattr(teacher, size)
        if value is not None and value > limit:
            yield f"{key}.{size} = {value}: larger than the teacher's. Allowed: 1 to {limit}."
    heads, groups = stage.target.num_attention_heads, teacher.num_query_groups
    if heads is not None and heads % groups:
        near = ", ".join(str(n) for n in (heads // groups * groups, (heads // groups + 1) * groups) if n > 0)
        yield f"{key}.num_attention_heads = {heads}: must be a multiple of the {groups} query groups. Nearest: {near}."
    for layer in stage.drop_layers or ():
        if not 0 <= layer < teacher.num_layers:
            last = teacher.num_layers - 1
            yield f"{key.removesuffix('.target')}.drop_layers: there is no layer {layer}. Allowed: 0 to {last}."
    count = stage.target.num_layers
    if (
        stage.drop_layers is not None
        and count is not None
        and count != teacher.num_layers - len(set(stage.drop_layers))
    ):
        yield f"{key}.num_layers = {count}: dropping {len(set(stage.drop_layers))} layers leaves another number."


def _score(name: str, stage: ScoreStage, recipe: Recipe) -> Iterator[str]:
    layout = parallel_of(recipe, name)
    size = layout.dp * layout.micro_batch_size
    for key in ("num_samples", *(("lm_loss_samples",) if "lm_loss" in stage.layer_metrics else ())):
        value = getattr(stage, key)
        if value % size:
            yield f"stages.{name}.{key} = {value}: must be a multiple of dp * micro_batch_size = {size}."
        if value > stage.num_samples:
            yield f"stages.{name}.{key} = {value}: more than num_samples = {stage.num_samples}."


def _distill(name: str, stage: DistillStage, recipe: Recipe) -> Iterator[str]:
    layout = parallel_of(recipe, name)
    size = layout.dp * layout.micro_batch_size
    if stage.global_batch_size % size:
        yield (
            f"stages.{name}.global_batch_size = {stage.global_batch_size}: must be a multiple of "
            f"dp * micro_batch_size = {layout.dp} * {layout.micro_batch_size} = {size}."
        )
    if stage.min_lr > stage.lr:
        yield f"stages.{name}.min_lr = {stage.min_lr}: above lr = {stage.lr}."
    if stage.warmup_steps >= stage.num_steps:
        yield f"stages.{name}.warmup_steps = {stage.warmup_steps}: must be below num_steps = {stage.num_steps}."
    if layout.sequence_parallel and stage.seq_len_tokens % layout.tp:
        yield f"stages.{name}.seq_len_tokens = {stage.seq_len_tokens}: must be a multiple of tp = {layout.tp}."


def _layouts(recipe: Recipe) -> Iterator[str]:
    """Every model that a distributed stage loads fits its layout and sequence length."""
    for name, stage in recipe.stages.items():
        if not STAGES[stage.kind].distributed:
            continue
        layout = parallel_of(recipe, name)
        for label, shape in _models_of(recipe):
            seq_len = getattr(stage, "seq_len_tokens", 0)
            if seq_len > shape.max_position_embeddings:
                limit = shape.max_position_embeddings
                yield f"stages.{name}.seq_len_tokens = {seq_len}: the {label} was made for at most {limit}."
            yield from (f"{text} (stage {name}, {label})" for text in _layout(shape, layout))


def _models_of(recipe: Recipe) -> Iterator[tuple[str, ModelShape]]:
    for stage in recipe.stages.values():
        if isinstance(stage, SelectStage) and stage.method == "importance" and stage.inputs.model in recipe.stages:
            teacher = teacher_shape(recipe, stage.inputs.model)
            if teacher is not None:
                yield "teacher", teacher
                yield "student", student_shape(teacher, stage)


def _layout(shape: ModelShape, layout: Parallel) -> Iterator[str]:
    sizes = (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size)
    if any(size % layout.tp for size in sizes):
        allowed = [tp for tp in range(1, shape.num_query_groups + 1) if not any(size % tp for size in sizes)]
        yield (
            f"execution.parallel.tp = {layout.tp}: does not divide {sizes[0]} heads, {sizes[1]} query groups "
            f"and ffn {sizes[2]}. Allowed: {', '.join(map(str, allowed))}."
        )
    if shape.num_layers % layout.pp:
        allowed = [pp for pp in range(1, shape.num_layers + 1) if shape.num_layers % pp == 0]
        yield (
            f"execution.parallel.pp = {layout.pp}: does not divide {shape.num_layers} layers. "
            f"Allowed: {', '.join(map(str, allowed))}."
        )


def _labels(recipe: Recipe) -> Iterator[str]:
    seen: dict[str, str] = {}
    for name, stage in recipe.stages.items():
        if isinstance(stage, EvaluateStage):
            if stage.label in seen:
                yield f"stages.{name}.label = {stage.label}: stage {seen[stage.label]} has the same label."
            seen[stage.label] = name


def _sources(plan: RunPlan) -> Iterator[str]:
    """Files that a stage which still has to run would read."""
    for name, stage in plan.recipe.stages.items():
        if plan.states[name].status == "finished":
            continue
        if isinstance(stage, ImportStage):
            yield from _source(f"stages.{name}.source", stage.source, plan.recipe)
        elif isinstance(stage, AdoptStage):
            yield from _source(f"stages.{name}.path", stage.path, plan.recipe)
        elif isinstance(stage, TokenizeStage):
            for number, source in enumerate(stage.sources):
                yield from _source(f"stages.{name}.sources.{number}.source", source.source, plan.recipe)
        elif isinstance(stage, EvaluateStage) and stage.tasks and stage.tasks_source:
            yield from _source(f"stages.{name}.tasks_source", stage.tasks_source, plan.recipe)


def _source(key: str, source: str, recipe: Recipe) -> Iterator[str]:
    if source.startswith(HUB) or any(sign in source for sign in "*?["):
        return
    if source.startswith(ASSET):
        name = source.removeprefix(ASSET)
        if not asset_path(name, Path(recipe.execution.assets_dir)).exists():
            yield f"{key} = {source}: not fetched yet. Next: minitron assets fetch {name}"
    elif not Path(source).expanduser().exists():
        yield f"{key} = {source}: there is no such file or folder."
