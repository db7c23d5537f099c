"""Rules across sections of a recipe. Pure: returns every problem, edits nothing."""

from __future__ import annotations

from collections.abc import Iterator
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
from nemo_minitron.stages.kind import StageKind
from nemo_minitron.stages.registry import STAGES


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
    view = View(recipe)
    for name, stage in recipe.stages.items():
        yield from STAGES[stage.kind].problems(name, stage, view)
    yield from _names(recipe)
    yield from _layouts(view)


def _names(recipe: Recipe) -> Iterator[str]:
    """Names that nothing answers to, and names of folders that belong to the run itself."""
    for name in sorted(set(recipe.execution.parallel_by_stage) - set(recipe.stages)):
        near = get_close_matches(name, recipe.stages, n=1)
        meant = f" Did you mean {near[0]}?" if near else f" Allowed: {', '.join(recipe.stages)}."
        yield f"execution.parallel_by_stage.{name}: this recipe has no such stage.{meant}"
    for name in recipe.stages:
        if name in RESERVED:
            yield f"stages.{name}: the run keeps a folder of its own by this name. Next: call the stage something else."


def _layouts(view: View) -> Iterator[str]:
    """Every model that a distributed stage loads fits its layout and sequence length."""
    found: dict[str, None] = {}
    for name, stage in view.stages.items():
        if not STAGES[stage.kind].has_layout:
            continue
        layout, seq_len = view.layout(name), _seq_len(stage)
        yield from _context(name, STAGES[stage.kind], layout, seq_len)
        for label, shape in _models_of(name, stage, view):
            for limit, why in _limits(shape):
                if seq_len > limit:
                    found[f"stages.{name}.seq_len_tokens = {seq_len}: the {label} {why} at most {limit}."] = None
            for text in layout_problems(shape, layout):
                # One line for each layout and model, however many stages it fails in.
                found.setdefault(f"{text} ({label})")
    yield from found


def _context(name: str, kind: StageKind, layout: Parallel, seq_len: int) -> Iterator[str]:
    """Context parallelism splits sequences into 2 * cp equal chunks, for stages that can work on parts of them."""
    key, cp = "execution.parallel.cp", layout.cp
    if cp == 1:
        return
    if kind.whole_sequences:
        yield (
            f"{key} = {cp}: stages.{name} needs whole sequences. Allowed: 1. "
            f"Next: give it a layout of its own, execution.parallel_by_stage.{name}."
        )
    # With sequence parallelism tp ranks share what a context-parallel rank holds.
    elif seq_len % (multiple := lcm(2 * cp, cp * layout.tp if layout.sequence_parallel else 1)):
        yield f"stages.{name}.seq_len_tokens = {seq_len}: {key} = {cp} needs a multiple of {multiple}."


def _seq_len(stage: StageParams) -> int:
    training = getattr(stage, "retraining", stage)
    return int(getattr(training, "seq_len_tokens", 0) or getattr(training, "max_seq_len_tokens", 0) or 0)


def _limits(shape: ModelShape) -> Iterator[tuple[int, str]]:
    yield shape.max_position_embeddings, "was made for"
    if shape.sliding_window_tokens is not None:
        yield shape.sliding_window_tokens, "looks back"


def _models_of(name: str, stage: StageParams, view: View) -> Iterator[tuple[str, ModelShape]]:
    """(name of the stage that made it, shape) of the models that a stage loads, where they are known."""
    inputs, own = stage.inputs, {name} if STAGES[stage.kind].loads_own_model else set[str]()
    made_by = {str(getattr(inputs, role)) for role in ("model", "teacher", "student") if hasattr(inputs, role)}
    for other in sorted(made_by | own):
        shape = view.shape(other)
        if shape is not None:
            yield other, shape


def layout_problems(shape: ModelShape, layout: Parallel) -> Iterator[str]:
    """Sizes of a model that a layout cannot share out."""
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
        yield f"execution.parallel.pp = {layout.pp}: more stages than the {most} layers. Allowed: 1 to {most}."
