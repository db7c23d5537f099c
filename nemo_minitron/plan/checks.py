"""Rules that span several sections of a recipe. The functions report every problem and change nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from math import lcm

from nemo_minitron.artifacts.run_paths import RESERVED
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import PlanError
from nemo_minitron.families import ModelShape
from nemo_minitron.families.axes import WIDTH_AXES
from nemo_minitron.plan.missing import missing_sources
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.plan.task_names import unknown_tasks
from nemo_minitron.plan.view import View
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.losses import Loss
from nemo_minitron.stages.registry import STAGES


def require_valid(plan: RunPlan, *, ignored: tuple[str, ...] = ()) -> None:
    """Raise PlanError that lists every problem, except those that begin with one of the texts in `ignored`."""
    _refuse(plan, [text for text in find_problems(plan) if not text.startswith(ignored)])


def require_possible(plan: RunPlan) -> None:
    """Raise PlanError if the recipe breaks a rule. Sources that are missing on this machine are allowed."""
    _refuse(plan, list(broken_rules(plan)))


def _refuse(plan: RunPlan, problems: list[str]) -> None:
    if problems:
        raise PlanError(
            f"The recipe cannot run ({len(problems)}):\n" + "\n".join(f"  - {text}" for text in problems),
            where=plan.recipe.name,
        )


def find_problems(plan: RunPlan) -> Iterator[str]:
    """Yield one line for each rule that the recipe breaks and for each source or task that is missing here."""
    yield from broken_rules(plan)
    yield from missing_sources(plan)
    yield from unknown_tasks(plan)


def broken_rules(plan: RunPlan) -> Iterator[str]:
    """Yield one line for each rule that the recipe breaks on any machine."""
    recipe = plan.recipe
    view = View(recipe)
    # The candidates of a search all report what is wrong with its keys.
    yield from dict.fromkeys(
        problem for name, stage in recipe.stages.items() for problem in STAGES[stage.kind].problems(name, stage, view)
    )
    yield from _names(recipe)
    yield from _without_layout(view)
    yield from _server_nodes(recipe)
    yield from _kernels(recipe)
    yield from _layouts(view)


def _names(recipe: Recipe) -> Iterator[str]:
    """Report layouts of unknown stages, and stages with the name of a folder that the run itself uses."""
    execution = recipe.execution
    maps: dict[str, Mapping[str, object]] = {
        "parallel_by_stage": execution.parallel_by_stage,
        "server_nodes_by_stage": execution.server_nodes_by_stage,
    }
    for key, by_stage in maps.items():
        for name in sorted(set(by_stage) - set(recipe.stages)):
            near = get_close_matches(name, recipe.stages, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Allowed: {', '.join(recipe.stages)}."
            yield f"execution.{key}.{name}: this recipe has no such stage.{hint}"
    for name in recipe.stages:
        if name in RESERVED:
            yield f"stages.{name}: the run itself uses a folder with this name. Next: rename the stage."


def _without_layout(view: View) -> Iterator[str]:
    """Report layouts of stages that have none; that of a search is for its candidates."""
    kinds = {name: STAGES[stage.kind] for name, stage in view.stages.items() if view.whole(name) == name}
    have = [name for name, kind in kinds.items() if kind.has_layout or kind.has_parts]
    for name in sorted(view.recipe.execution.parallel_by_stage):
        if name in kinds and name not in have:
            yield (
                f"execution.parallel_by_stage.{name}: a stage of kind {kinds[name].name} has no parallel layout. "
                f"Allowed: {', '.join(have)}."
            )


def _server_nodes(recipe: Recipe) -> Iterator[str]:
    """Report more nodes for servers than a stage has servers, each of which runs on one node."""
    for name, nodes in recipe.execution.server_nodes_by_stage.items():
        stage = recipe.stages.get(name)
        most = 0 if stage is None else STAGES[stage.kind].num_servers(stage)
        if stage is not None and nodes > most:
            key = f"execution.server_nodes_by_stage.{name}"
            yield f"{key} = {nodes}: the stage has {most} servers, of one node each. Allowed: at most {most}."


def _kernels(recipe: Recipe) -> Iterator[str]:
    """Report kernels for GPUs in a run on CPUs; Triton's interpreter runs them, for tests."""
    execution = recipe.execution
    if execution.device != "cpu" or execution.kernels.fused_kl != "triton" or os.environ.get("TRITON_INTERPRET") == "1":
        return
    losses = {name: getattr(stage, "loss", None) for name, stage in recipe.stages.items()}
    users = [name for name, loss in losses.items() if isinstance(loss, Loss) and loss.is_lone_forward_kl]
    if users:
        yield (
            "execution.kernels.fused_kl = triton: needs a GPU, and execution.device = cpu "
            f"(stages: {', '.join(users)}). Allowed: auto, torch, off."
        )


def refused_layout(name: str, layout: Parallel, view: View) -> list[str]:
    """Return what `check` says about a stage with this layout, and not about the same stage on one process."""
    found, otherwise = (_of_stage(name, view.with_layout(name, one)) for one in (layout, Parallel()))
    return sorted(found - otherwise)


def _of_stage(name: str, view: View) -> set[str]:
    stage = view.stages[name]
    return {*STAGES[stage.kind].problems(name, stage, view), *_layout_of(name, view)}


def _layouts(view: View) -> Iterator[str]:
    # Report a layout and a model once, even if several stages use them.
    yield from dict.fromkeys(problem for name in view.stages for problem in _layout_of(name, view))


def _layout_of(name: str, view: View) -> Iterator[str]:
    """Report each model of a distributed stage that does not fit the stage's layout or sequence length."""
    stage = view.stages[name]
    kind, layout, whole = STAGES[stage.kind], view.layout(name), view.whole(name)
    if not kind.has_layout:
        return
    lengths = {} if kind.skips_long_rows else dict(_lengths(whole, stage))
    yield from _context(whole, stage, layout, lengths)
    for label, shape in _models_of(name, stage, view):
        yield from _too_long(lengths, label, shape)
        yield from (f"{text} ({label})" for text in layout_problems(shape, layout))


def _lengths(name: str, stage: StageParams) -> Iterator[tuple[str, int]]:
    """Yield (key, tokens) for each length of sequences that a stage reads, also for a training and a repair."""
    parts = {f"{part}.": getattr(stage, part, None) for part in ("retraining", "compensation")}
    for section, params in {"": stage, **parts}.items():
        for key in ("seq_len_tokens", "max_seq_len_tokens"):
            length = getattr(params, key, None)
            if length:
                yield f"stages.{name}.{section}{key}", length


def _too_long(lengths: Mapping[str, int], label: str, shape: ModelShape) -> Iterator[str]:
    for key, length in lengths.items():
        for limit, why in _limits(shape):
            if length > limit:
                yield f"{key} = {length}: the {label} {why} at most {limit}."


def _context(name: str, stage: StageParams, layout: Parallel, lengths: Mapping[str, int]) -> Iterator[str]:
    """Report a stage that context parallelism cannot serve: it splits sequences into 2 * cp equal chunks."""
    key, cp, kind = "execution.parallel.cp", layout.cp, STAGES[stage.kind]
    if cp == 1:
        # The rules of a training have this one.
        if layout.sequence_parallel and not (kind.trains or hasattr(stage, "retraining")):
            for where, length in lengths.items():
                if length % layout.tp:
                    yield f"{where} = {length}: sequence_parallel needs a multiple of tp = {layout.tp}."
        return
    if kind.whole_sequences:
        yield (
            f"{key} = {cp}: stages.{name} needs whole sequences. Allowed: 1. "
            f"Next: set a separate layout for it, execution.parallel_by_stage.{name}."
        )
        return
    # With sequence parallelism, tp ranks split the part of the sequence that a context-parallel rank holds.
    multiple = lcm(2 * cp, cp * layout.tp if layout.sequence_parallel else 1)
    for where, length in lengths.items():
        if length % multiple:
            yield f"{where} = {length}: {key} = {cp} needs a multiple of {multiple}."


def _limits(shape: ModelShape) -> Iterator[tuple[int, str]]:
    yield shape.max_position_embeddings, "supports"
    if shape.sliding_window_tokens is not None:
        yield shape.sliding_window_tokens, "has a sliding window of"


def _models_of(name: str, stage: StageParams, view: View) -> Iterator[tuple[str, ModelShape]]:
    """Yield (name of the stage that makes the model, shape) for each model of known shape that a stage loads.

    The models of candidates have the name of their search, so that what is wrong with all of them is reported once.
    """
    inputs, own = stage.inputs, {name} if STAGES[stage.kind].loads_own_model else set[str]()
    made_by = {str(getattr(inputs, role)) for role in ("model", "teacher", "student") if hasattr(inputs, role)}
    for other in sorted(made_by | own):
        shape = view.shape(other)
        if shape is not None:
            yield view.whole(other), shape


def layout_problems(shape: ModelShape, layout: Parallel) -> Iterator[str]:
    """Yield one line for each size of the model that the layout cannot split evenly."""
    sizes = {axis.title: getattr(shape, axis.target_key) for axis in WIDTH_AXES if axis.split_by == "tensor"}
    if any(size % layout.tp for size in sizes.values()):
        tps = range(1, min(sizes.values()) + 1)
        allowed = [tp for tp in tps if not any(size % tp for size in sizes.values())]
        yield (
            f"execution.parallel.tp = {layout.tp}: does not divide all of "
            f"{', '.join(f'{size} {title}' for title, size in sizes.items())}. "
            f"Allowed: {', '.join(map(str, allowed))}."
        )
    if layout.pp > shape.num_layers:
        most = shape.num_layers
        yield f"execution.parallel.pp = {layout.pp}: more pipeline stages than layers ({most}). Allowed: 1 to {most}."
