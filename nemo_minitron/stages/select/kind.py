"""The kind of stage that selects the indices to keep on each axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_minitron.families import ModelShape, target_shape
from nemo_minitron.pruning.possible import impossible
from nemo_minitron.pruning.search import SEARCH_FILE
from nemo_minitron.schema.pruning import AnyScoring, SelectionRules, Target
from nemo_minitron.stages.artifacts import winner_of
from nemo_minitron.stages.common.scoring_rules import scoring_problems, without_unused_scores
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, StageKind
from nemo_minitron.stages.select.params import SelectStage


def _used_inputs(name: str, params: SelectStage, inputs: Mapping[str, Any], view: RecipeView) -> Mapping[str, Any]:
    return without_unused_scores(params.method, inputs)


def _problems(name: str, params: SelectStage, view: RecipeView) -> Iterator[str]:
    key, search = f"stages.{name}", params.inputs.search
    if search is not None:
        if params.target != Target() or params.drop_layers is not None:
            yield f"{key}: the sizes come from inputs.search = {search}. Next: remove target and drop_layers."
        yield from _as_searched(key, params, search, view)
        return
    source = view.shape(params.inputs.model)
    if params.target == Target() and params.drop_layers is None:
        yield f"{key}.target: does not reduce any size. Next: set a size, drop_layers, or inputs.search."
    problems = list(impossible(params, source)) if source is not None else []
    yield from (
        f"{key}.{where} = {value}: the model cannot be pruned to this. Allowed: {allowed}."
        for where, value, allowed in problems
    )
    if not problems:
        scoring = view.stages.get(params.inputs.scores or "")
        known = scoring if isinstance(scoring, AnyScoring) else None
        yield from scoring_problems(key, params, params.inputs.scores, known, source)


def _as_searched(key: str, params: SelectStage, search: str, view: RecipeView) -> Iterator[str]:
    """Check that the winner is cut as the candidates were; another method, as for a random control, is allowed."""
    if params.method == "importance" and params.inputs.scores is None:
        yield f"{key}.inputs.scores: method importance needs a score stage."
    stage = view.stages.get(search)
    rules, scores = getattr(stage, "selection", None), getattr(getattr(stage, "inputs", None), "scores", None)
    if not isinstance(rules, SelectionRules) or rules.method != params.method:
        return
    pairs = {field: (getattr(params, field), getattr(rules, field)) for field in SelectionRules.model_fields}
    del pairs["seed"]
    if params.method == "importance":
        pairs["inputs.scores"] = (params.inputs.scores, scores)
    else:
        del pairs["layer_metric"]
    for field, (own, searched) in pairs.items():
        if own != searched:
            there = f"stages.{search}.{field if field == 'inputs.scores' else f'selection.{field}'} is {searched}"
            yield f"{key}.{field} = {own}: {there}, by which the candidates are cut. Next: set both to the same value."


def _shape(name: str, params: SelectStage, view: RecipeView) -> ModelShape | None:
    """Return the shape of the pruned model; None if it depends on a search that has not finished."""
    source, target = view.shape(params.inputs.model), _target(params, view)
    return None if source is None or target is None else target_shape(source, target, params.drop_layers)


def _target(params: SelectStage, view: RecipeView) -> Target | None:
    search = params.inputs.search
    if search is None:
        return params.target
    found = view.published(search, SEARCH_FILE)
    return view.largest_candidate(search) if found is None else winner_of(found.parent, search)


def _reduction(name: str, params: SelectStage, view: RecipeView) -> tuple[ModelShape | None, ModelShape | None] | None:
    if params.method != "importance":
        return None
    return view.shape(params.inputs.model), _shape(name, params, view)


SELECT = StageKind(
    name="select",
    params=SelectStage,
    run="nemo_minitron.stages.select.run:select",
    version=2,
    outputs=(Output.PRUNE_PLAN,),
    inputs={"model": MODELS, "scores": (Output.SCORES,), "search": (Output.SEARCH,)},
    report="selection",
    used_inputs=_used_inputs,
    problems=_problems,
    planned_shape=_shape,
    reduction=_reduction,
)
