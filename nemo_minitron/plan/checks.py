"""Rules across sections of a recipe. Pure: returns every problem, edits nothing."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from math import lcm

from nemo_minitron.config.schema import (
    CacheTeacherStage,
    CandidateStage,
    ChatDataStage,
    DistillStage,
    EvaluateStage,
    LearningRate,
    Optimization,
    Parallel,
    Recipe,
    Schema,
    ScoreStage,
    SearchStage,
    SelectStage,
    Target,
    TrainStage,
)
from nemo_minitron.data.chat.formats import FORMATS_OF
from nemo_minitron.errors import PlanError
from nemo_minitron.families import ModelShape
from nemo_minitron.plan.align_checks import alignment_problems
from nemo_minitron.plan.expansion import candidates_of
from nemo_minitron.plan.folder import FOLDERS_OF_A_RUN
from nemo_minitron.plan.missing import missing_sources
from nemo_minitron.plan.planner import RunPlan, parallel_of
from nemo_minitron.plan.shapes import model_shape
from nemo_minitron.plan.task_names import unknown_tasks
from nemo_minitron.pruning.possible import impossible
from nemo_minitron.stages.spec import STAGES

MOST_SAMPLES = 2**32
"""An index of so many takes some 50 GB; text for it does not exist."""


def require_valid(plan: RunPlan, *, besides: tuple[str, ...] = ()) -> None:
    """Raises PlanError with every problem, but for those that begin with a text of `besides`."""
    _refuse(plan, [text for text in find_problems(plan) if not text.startswith(besides)])


def require_possible(plan: RunPlan) -> None:
    """Raises PlanError where the recipe breaks a rule, wherever it runs; what only is not here yet may be missing."""
    _refuse(plan, list(broken_rules(plan)))


def _refuse(plan: RunPlan, problems: list[str]) -> None:
    if problems:
        raise PlanError(
            f"The recipe cannot be carried out ({len(problems)}):\n" + "\n".join(f"  - {text}" for text in problems),
            where=plan.recipe.name,
        )


def find_problems(plan: RunPlan) -> Iterator[str]:
    """Every rule that the recipe breaks, and everything that it reads and is not here, as one line each."""
    yield from broken_rules(plan)
    yield from missing_sources(plan)
    yield from unknown_tasks(plan)


def broken_rules(plan: RunPlan) -> Iterator[str]:
    """Every rule that the recipe breaks, on whatever machine, as one line each."""
    recipe = plan.recipe
    for name, stage in recipe.stages.items():
        if isinstance(stage, SelectStage):
            yield from _select(name, stage, recipe)
        elif isinstance(stage, SearchStage):
            yield from _search(name, stage, recipe)
        elif isinstance(stage, DistillStage | TrainStage):
            yield from _training(name, stage, stage.num_steps, recipe)
            if isinstance(stage, DistillStage):
                yield from _correction(f"stages.{name}", stage)
                if stage.inputs.cache is not None:
                    yield from _cached(f"stages.{name}", stage, stage.inputs.cache, recipe)
        elif isinstance(stage, ScoreStage):
            yield from _score(name, stage, recipe)
        elif isinstance(stage, ChatDataStage):
            yield from _chat_data(f"stages.{name}", stage)
        else:
            yield from alignment_problems(name, stage, recipe)
    yield from _names(recipe)
    yield from _layouts(recipe)
    yield from _labels(recipe)
    yield from _cache_sizes(recipe)


def _names(recipe: Recipe) -> Iterator[str]:
    """Names that nothing answers to, and names of folders that belong to the run itself."""
    for name in sorted(set(recipe.execution.parallel_by_stage) - set(recipe.stages)):
        near = get_close_matches(name, recipe.stages, n=1)
        meant = f" Did you mean {near[0]}?" if near else f" Allowed: {', '.join(recipe.stages)}."
        yield f"execution.parallel_by_stage.{name}: this recipe has no such stage.{meant}"
    for name in recipe.stages:
        if name in FOLDERS_OF_A_RUN:
            yield f"stages.{name}: the run keeps a folder of its own by this name. Next: call the stage something else."


def _select(name: str, stage: SelectStage, recipe: Recipe) -> Iterator[str]:
    key = f"stages.{name}"
    if stage.inputs.search is not None:
        if stage.target != Target() or stage.drop_layers is not None:
            yield f"{key}: the sizes come from inputs.search = {stage.inputs.search}; leave out target and drop_layers."
        return
    source = model_shape(recipe, stage.inputs.model)
    if stage.target == Target() and stage.drop_layers is None:
        yield f"{key}.target: nothing is made smaller; give a size, drop_layers, or inputs.search."
    problems = list(impossible(stage, source)) if source is not None else []
    yield from (
        f"{key}.{where} = {value}: cannot be cut out of the model. Allowed: {allowed}."
        for where, value, allowed in problems
    )
    if not problems:
        yield from _scored(key, stage, stage.inputs.scores, source, recipe)


def _search(name: str, stage: SearchStage, recipe: Recipe) -> Iterator[str]:
    key = f"stages.{name}"
    source = model_shape(recipe, stage.inputs.model)
    if source is None:
        yield (
            f"{key}: the candidates depend on the sizes of {stage.inputs.model}, which are not known yet. "
            f"Next: give stages.{stage.inputs.model}.architecture, the keys of its config.json."
        )
        return
    if stage.constraints.min_generate_tokens_per_s is not None and stage.measure_speed is None:
        yield f"{key}.constraints.min_generate_tokens_per_s: needs {key}.measure_speed, {{}} for its defaults."
    for number, rung in enumerate(stage.rungs):
        yield from _training(name, stage.retraining, rung.num_steps, recipe, f"{key}.rungs.{number}.num_steps")
    seen: set[str] = set()
    for candidate in candidates_of(recipe, stage):
        rules = SelectStage(kind="select", target=candidate.target, **stage.selection.model_dump())
        seen.update(_scored(key, rules, stage.inputs.scores, source, recipe))
    yield from sorted(seen)


def _scored(
    key: str, stage: SelectStage, scores: str | None, source: ModelShape | None, recipe: Recipe
) -> Iterator[str]:
    """The score stage measures what the selection needs."""
    if stage.method != "importance":
        return
    score = recipe.stages.get(scores or "")
    if not isinstance(score, ScoreStage):
        yield f"{key}.inputs.scores: method importance needs a score stage."
        return
    by_axis = {
        "hidden": ("hidden_size",),
        "ffn": ("ffn_hidden_size",),
        "heads": ("num_attention_heads", "num_query_groups"),
    }
    for axis, sizes in by_axis.items():
        wanted = [size for size in sizes if getattr(stage.target, size) is not None]
        if wanted and axis not in score.width_axes:
            yield f"{key}.target.{wanted[0]}: axis {axis} is not scored; add it to stages.{scores}.width_axes."
    if stage.target.num_layers is None or stage.drop_layers is not None or source is None:
        return
    if stage.target.num_layers < source.num_layers:
        yield from _layers_scored(key, stage, source.num_layers - stage.target.num_layers, scores, score)


def _layers_scored(key: str, stage: SelectStage, drops: int, scores: str | None, score: ScoreStage) -> Iterator[str]:
    if stage.layer_metric not in score.layer_metrics:
        yield f"{key}.layer_metric = {stage.layer_metric}: not measured; add it to stages.{scores}.layer_metrics."
    if stage.layer_removal == "contiguous" and drops not in score.block_lengths:
        lengths = f"stages.{scores}.block_lengths"
        yield f"{key}.layer_removal = contiguous: runs of {drops} layers are not scored; add {drops} to {lengths}."
    if stage.layer_removal == "iterative" and drops > score.iterative_drops:
        least = f"stages.{scores}.iterative_drops to {drops}"
        yield f"{key}.layer_removal = iterative: {drops} layers are to go; set {least} or more."


def _score(name: str, stage: ScoreStage, recipe: Recipe) -> Iterator[str]:
    layout = parallel_of(recipe, name)
    size = layout.dp * layout.micro_batch_size
    yield from _countable(f"stages.{name}.num_samples", max(stage.num_samples, stage.depth_samples))
    for key in ("num_samples", *(("depth_samples",) if stage.draws_depth_samples else ())):
        value = getattr(stage, key)
        if value % size:
            yield f"stages.{name}.{key} = {value}: must be a multiple of dp * micro_batch_size = {size}."
    for key, count in (("batch_aggregation", "num_samples"), ("sequence_aggregation", "seq_len_tokens")):
        if getattr(stage, key) == "var" and getattr(stage, count) < 2:
            yield f"stages.{name}.{key} = var: needs stages.{name}.{count} of 2 or more; one value has no variance."
    if "task" in stage.layer_metrics and stage.depth_task is None:
        yield f"stages.{name}.layer_metrics: task needs stages.{name}.depth_task, with the name of an lm-eval task."
    shape = model_shape(recipe, stage.inputs.model)
    if shape is None:
        return
    for length in (*stage.block_lengths, stage.iterative_drops):
        if length >= shape.num_layers:
            yield (
                f"stages.{name}: {length} layers cannot be removed from a model of {shape.num_layers}; "
                f"block_lengths and iterative_drops go up to {shape.num_layers - 1}."
            )


def _chat_data(key: str, stage: ChatDataStage) -> Iterator[str]:
    """The formats give the kind of rows that is asked for."""
    allowed = FORMATS_OF[stage.rows]
    for number, source in enumerate(stage.sources):
        if source.format not in ("auto", *allowed):
            yield (
                f"{key}.sources.{number}.format = {source.format}: gives no {stage.rows}. "
                f"Allowed with rows = {stage.rows}: auto, {', '.join(allowed)}."
            )


def _training(
    name: str, stage: Optimization, num_steps: int, recipe: Recipe, steps_key: str | None = None
) -> Iterator[str]:
    layout = parallel_of(recipe, name)
    key, size = f"stages.{name}", layout.dp * layout.micro_batch_size
    if steps_key is not None:
        key += ".retraining"
    if stage.global_batch_size % size:
        yield (
            f"{key}.global_batch_size = {stage.global_batch_size}: must be a multiple of "
            f"dp * micro_batch_size = {layout.dp} * {layout.micro_batch_size} = {size}."
        )
    yield from _countable(f"{steps_key or key + '.num_steps'} * global_batch_size", num_steps * stage.global_batch_size)
    yield from _learning_rate(key, stage, num_steps, steps_key or "num_steps")
    yield from _options(name, stage, layout)
    if layout.sequence_parallel and stage.seq_len_tokens % layout.tp:
        yield f"{key}.seq_len_tokens = {stage.seq_len_tokens}: must be a multiple of tp = {layout.tp}."


def _countable(what: str, count: int) -> Iterator[str]:
    """Samples are listed in memory before the first is read."""
    if count > MOST_SAMPLES:
        yield f"{what} = {count:,} samples: more than any index of samples can hold. Allowed: up to {MOST_SAMPLES:,}."


def _learning_rate(key: str, rate: LearningRate, num_steps: int, steps_key: str) -> Iterator[str]:
    if rate.min_lr > rate.lr:
        yield f"{key}.min_lr = {rate.min_lr}: above lr = {rate.lr}."
    if rate.warmup_steps >= num_steps:
        yield f"{key}.warmup_steps = {rate.warmup_steps}: must be below {steps_key} = {num_steps}."
    most = num_steps - rate.warmup_steps
    if rate.lr_schedule == "wsd" and not 0 < (rate.wsd_decay_steps or 0) <= most:
        yield f"{key}.wsd_decay_steps = {rate.wsd_decay_steps}: lr_schedule = wsd needs 1 to {most}."


def _correction(key: str, stage: DistillStage) -> Iterator[str]:
    """A teacher that goes on learning is in memory, and somebody listens to it."""
    if stage.teacher_correction is None:
        return
    yield from _learning_rate(f"{key}.teacher_correction", stage.teacher_correction, stage.num_steps, "num_steps")
    if stage.inputs.cache is not None:
        yield f"{key}.teacher_correction: a cached teacher cannot learn; use the live one (inputs.cache: null)."
    if not stage.loss.needs_teacher:
        yield f"{key}.teacher_correction: the loss has no teacher; leave it out."


def _options(name: str, stage: Optimization, layout: Parallel) -> Iterator[str]:
    """Options of a layout that do not go together."""
    key = "execution.parallel"
    if layout.overlap_param_gather and not (layout.distributed_optimizer and layout.overlap_grad_reduce):
        yield f"{key}.overlap_param_gather: needs {key}.distributed_optimizer and {key}.overlap_grad_reduce."
    loss = getattr(stage, "loss", None)
    if loss is None or loss.hidden is None:
        return
    if layout.recompute == "full":
        yield f"{key}.recompute = full: not with stages.{name}.loss.hidden; use selective."
    if layout.pp > 1 and layout.overlap_grad_reduce:
        yield f"{key}.overlap_grad_reduce: not with pp > 1 and stages.{name}.loss.hidden."


def _cached(key: str, stage: DistillStage, name: str, recipe: Recipe) -> Iterator[str]:
    """A distillation asks for what its cache has."""
    cache, loss = recipe.stages.get(name), stage.loss
    if not isinstance(cache, CacheTeacherStage):
        return
    if stage.num_steps * stage.global_batch_size > cache.num_samples:
        yield (
            f"stages.{name}.num_samples = {cache.num_samples}: {key} takes num_steps * global_batch_size = "
            f"{stage.num_steps * stage.global_batch_size} samples."
        )
    for role in ("teacher", "data"):
        asked, used = getattr(stage.inputs, role), getattr(cache.inputs, role)
        if asked != used:
            yield f"{key}.inputs.{role} = {asked}: stages.{name} was made from {used}; give both the same."
    for field in ("seq_len_tokens", "seed", "reset_attention_mask"):
        if getattr(stage, field) != getattr(cache, field):
            theirs = f"stages.{name} has {getattr(cache, field)}"
            yield f"{key}.{field} = {getattr(stage, field)}: {theirs}; give both the same."
    if loss.hidden is not None:
        yield f"{key}.loss.hidden: a cache holds no hidden states; use the live teacher (inputs.cache: null)."
    if loss.logits is None:
        yield f"{key}.inputs.cache: the loss has no logits; leave the cache out."
    elif loss.logits.sparse != cache.sparse or loss.logits.temperature != cache.temperature:
        yield (
            f"{key}.loss.logits: sparse and temperature must be those of stages.{name}: "
            f"sparse = {cache.sparse.model_dump(mode='json')}, temperature = {cache.temperature}."
        )


def _layouts(recipe: Recipe) -> Iterator[str]:
    """Every model that a distributed stage loads fits its layout and sequence length."""
    found: dict[str, None] = {}
    for name, stage in recipe.stages.items():
        if not STAGES[stage.kind].has_layout:
            continue
        layout, seq_len = parallel_of(recipe, name), _seq_len(stage)
        yield from _context(name, stage, layout, seq_len)
        for label, shape in _models_of(name, stage, recipe):
            for limit, why in _limits(shape):
                if seq_len > limit:
                    found[f"stages.{name}.seq_len_tokens = {seq_len}: the {label} {why} at most {limit}."] = None
            for text in layout_problems(shape, layout):
                # One line for each layout and model, however many stages it fails in.
                found.setdefault(f"{text} ({label})")
    yield from found


def _context(name: str, stage: Schema, layout: Parallel, seq_len: int) -> Iterator[str]:
    """Context parallelism splits sequences into 2 * cp equal chunks, for stages that can work on parts of them."""
    key, cp = "execution.parallel.cp", layout.cp
    if cp == 1:
        return
    if isinstance(stage, ScoreStage | CacheTeacherStage) or STAGES[stage.kind].starts_ranks:  # type: ignore[attr-defined]
        yield (
            f"{key} = {cp}: stages.{name} needs whole sequences. Allowed: 1. "
            f"Next: give it a layout of its own, execution.parallel_by_stage.{name}."
        )
    # With sequence parallelism tp ranks share what a context-parallel rank holds.
    elif seq_len % (multiple := lcm(2 * cp, cp * layout.tp if layout.sequence_parallel else 1)):
        yield f"stages.{name}.seq_len_tokens = {seq_len}: {key} = {cp} needs a multiple of {multiple}."


def _seq_len(stage: Schema) -> int:
    training = getattr(stage, "retraining", stage)
    return int(getattr(training, "seq_len_tokens", 0) or getattr(training, "max_seq_len_tokens", 0) or 0)


def _limits(shape: ModelShape) -> Iterator[tuple[int, str]]:
    yield shape.max_position_embeddings, "was made for"
    if shape.sliding_window_tokens is not None:
        yield shape.sliding_window_tokens, "looks back"


def _models_of(name: str, stage: Schema, recipe: Recipe) -> Iterator[tuple[str, ModelShape]]:
    """(name of the stage that made it, shape) of the models that a stage loads, where they are known."""
    inputs = stage.inputs  # type: ignore[attr-defined]
    made_by = {str(getattr(inputs, role)) for role in ("model", "teacher", "student") if hasattr(inputs, role)}
    for other in sorted(made_by | ({name} if isinstance(stage, CandidateStage) else set())):
        shape = model_shape(recipe, other)
        if shape is not None:
            yield other, shape


def layout_problems(shape: ModelShape, layout: Parallel) -> Iterator[str]:
    """Sizes of a model that a layout cannot share out."""
    sizes = (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size)
    if any(size % layout.tp for size in sizes):
        allowed = [tp for tp in range(1, shape.num_query_groups + 1) if not any(size % tp for size in sizes)]
        yield (
            f"execution.parallel.tp = {layout.tp}: does not divide {sizes[0]} heads, {sizes[1]} query groups "
            f"and ffn {sizes[2]}. Allowed: {', '.join(map(str, allowed))}."
        )
    if layout.pp > shape.num_layers:
        most = shape.num_layers
        yield f"execution.parallel.pp = {layout.pp}: more stages than the {most} layers. Allowed: 1 to {most}."


def _cache_sizes(recipe: Recipe) -> Iterator[str]:
    for name, stage in recipe.stages.items():
        if isinstance(stage, CacheTeacherStage):
            yield from _countable(f"stages.{name}.num_samples", stage.num_samples)


def _labels(recipe: Recipe) -> Iterator[str]:
    seen: dict[str, str] = {}
    for name, stage in recipe.stages.items():
        if isinstance(stage, EvaluateStage):
            if stage.label in seen:
                yield f"stages.{name}.label = {stage.label}: stage {seen[stage.label]} has the same label."
            seen[stage.label] = name
