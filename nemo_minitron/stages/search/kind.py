"""The kinds of stage that search for a shape: the search itself and its candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_minitron.families import ModelShape, num_params, target_shape
from nemo_minitron.pruning.possible import selection_for
from nemo_minitron.pruning.repairable import repaired_sites
from nemo_minitron.pruning.search import Candidate, expanded_size
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import AnyScoring
from nemo_minitron.schema.training_rules import training_problems
from nemo_minitron.stages.common.hidden_rules import hidden_problems
from nemo_minitron.stages.common.repair_rules import (
    calibration_problems,
    merged_head_problems,
    site_problems,
    widest_input,
)
from nemo_minitron.stages.common.scoring_rules import scoring_problems, without_unused_scores
from nemo_minitron.stages.kind import MODELS, HeldoutUse, Output, RecipeView, StageKind, TextUse, trained_tokens
from nemo_minitron.stages.search.expansion import candidate_stages, points_of, search_of
from nemo_minitron.stages.search.params import CandidateStage, SearchStage
from nemo_minitron.workload.layer_by_layer import STORED, repair_load
from nemo_minitron.workload.load import Load, distillation_load


def _used_inputs(
    name: str, params: SearchStage | CandidateStage, inputs: Mapping[str, Any], view: RecipeView
) -> Mapping[str, Any]:
    return without_unused_scores(params.selection.method, inputs)


def _expand(name: str, params: SearchStage, view: RecipeView) -> Mapping[str, StageParams] | None:
    """Return a stage for each candidate and rung, and the search that reads them.

    None if the search has been expanded already or the sizes of its model are not known.
    """
    source = view.shape(params.inputs.model)
    if params.inputs.candidates or source is None:
        return None
    candidates = candidate_stages(name, params, source)
    inputs = params.inputs.model_copy(update={"candidates": tuple(candidates)})
    return {**candidates, name: params.model_copy(update={"inputs": inputs})}


def _candidates(name: str, params: SearchStage, view: RecipeView) -> list[Candidate]:
    """Return the points of the grid; an empty list if the sizes of the model are not known."""
    source = view.shape(params.inputs.model)
    return [] if source is None else points_of(name, params, source)


def _points(name: str, params: SearchStage, view: RecipeView) -> Iterator[Mapping[str, Any]]:
    for candidate in _candidates(name, params, view):
        yield {"search": name, **candidate.facts()}


def _problems(name: str, params: SearchStage, view: RecipeView) -> Iterator[str]:
    key, model = f"stages.{name}", params.inputs.model
    source = view.shape(model)
    if source is None:
        yield (
            f"{key}: the candidates depend on the sizes of {model}, which are not known yet. "
            f"Next: set stages.{model}.architecture to the keys of its config.json."
        )
        return
    if params.constraints.min_generate_tokens_per_s is not None and params.measure_speed is None:
        yield f"{key}.constraints.min_generate_tokens_per_s: needs {key}.measure_speed ({{}} means its defaults)."
    if params.retraining.loss.anchors is not None:
        yield f"{key}.retraining.loss.anchors: not supported in a search. Next: set it to null."
    yield from _too_large(f"{key}.grid", params, source)
    candidates = _candidates(name, params, view)
    yield from _repair_problems(f"{key}.compensation", params, source, candidates)
    scoring = view.stages.get(params.inputs.scores or "")
    known = scoring if isinstance(scoring, AnyScoring) else None
    teacher, loss = view.shape(params.inputs.teacher), params.retraining.loss
    seen: set[str] = set()
    for candidate in candidates:
        rules = selection_for(params.selection, candidate.target, source)
        seen.update(scoring_problems(key, rules, params.inputs.scores, known, source, in_search=True))
        seen.update(hidden_problems(f"{key}.retraining.loss", loss, teacher, candidate.shape))
    yield from sorted(seen)


def _too_large(key: str, params: SearchStage, source: ModelShape) -> Iterator[str]:
    """Check that the model has every size of the grid; a point with a larger one would not become a candidate."""
    grid, model = params.grid, params.inputs.model
    for size, most in source.sizes().items():
        for value in getattr(grid, size, ()):
            if value > most:
                yield f"{key}.{size} has {value}: above {most}, the size of {model}. Next: remove it."
    widths = [width for width in grid.hidden_size or (source.hidden_size,) if width <= source.hidden_size]
    for factor in grid.ffn_expansion:
        above = [str(width) for width in widths if expanded_size(factor, width) > source.ffn_hidden_size]
        if above:
            yield (
                f"{key}.ffn_expansion has {factor:g}: times hidden_size {', '.join(above)} it is above "
                f"{source.ffn_hidden_size}, the ffn_hidden_size of {model}. Next: remove it, or give ffn_hidden_size."
            )


def _repair_problems(
    key: str, params: SearchStage, source: ModelShape, candidates: Sequence[Candidate]
) -> Iterator[str]:
    """Check that the repair suits the widest candidate and the one with the fewest heads, and changes any of them."""
    repair, shapes = params.compensation, [candidate.shape for candidate in candidates]
    if repair is None or not shapes:
        return
    widest = max(widest_input(shape) for shape in shapes)
    yield from calibration_problems(key, repair.num_samples * repair.seq_len_tokens, widest)
    yield from site_problems(key, repair, source, shapes)
    fewest = min(shapes, key=lambda shape: shape.num_attention_heads)
    yield from merged_head_problems(key, repair, params.selection, source, fewest)


def _text_use(params: SearchStage) -> TextUse | None:
    """Return the text that the candidates are repaired by."""
    repair = params.compensation
    if repair is None:
        return None
    return TextUse(params.inputs.data, repair.num_samples * repair.seq_len_tokens, repeats_help=False)


def _heldout_uses(params: SearchStage) -> Iterator[HeldoutUse]:
    inputs, repair = params.inputs, params.compensation
    yield HeldoutUse(inputs.data, params.retraining.valid_num_tokens, "retraining.valid_num_tokens")
    if repair is not None:
        yield HeldoutUse(inputs.heldout or inputs.data, repair.heldout_tokens, "compensation.heldout_tokens")


def _candidate_problems(name: str, params: CandidateStage, view: RecipeView) -> Iterator[str]:
    """Check the training of a candidate in its layout; the keys in the messages are those of its search."""
    layout, search = view.layout(name), search_of(name, params)
    steps_key = f"stages.{search}.rungs.{params.rung - 1}.num_steps"
    yield from training_problems(search, params.retraining, params.num_steps, layout, steps_key)
    if params.compensation is not None and layout.dp != layout.world_size:
        yield f"stages.{search}.compensation: needs a layout with tp = pp = cp = 1. Next: set one, or remove the key."


def _candidate_shape(name: str, params: CandidateStage, view: RecipeView) -> ModelShape | None:
    """Return the shape of a candidate; in a later rung only for estimates, with the sizes of the largest one."""
    later = params.place is not None
    target = view.largest_candidate(search_of(name, params)) if later else params.target
    source = view.shape(params.inputs.model)
    return None if source is None or target is None else target_shape(source, target, None)


def _candidate_load(name: str, params: CandidateStage, layout: Parallel, view: RecipeView) -> Load | None:
    """Return the load of the training and, in the first rung, of the repair before it."""
    student, teacher = view.shape(name), view.shape(params.inputs.teacher)
    training = distillation_load(student, teacher, params.retraining, params.num_steps, layout)
    source, repair = view.shape(params.inputs.model), params.compensation
    if training is None or student is None or source is None or params.place is not None:
        return training
    pruned = STORED * num_params(student)
    if repair is None:
        return replace(training, work_bytes=pruned)
    found = repair_load(source, student, repair, repaired_sites(repair, source, student), layout)
    # Its work folder also has the pruned model, and the repaired one with the files of its layers.
    return replace(training, work_bytes=2 * pruned + found.work_bytes, others=(found,))


def _array(name: str, params: CandidateStage) -> str:
    """Return one name for all candidates of a rung, so that they run as one job array."""
    return f"{search_of(name, params)}_rung{params.rung}"


_INPUTS = {
    "model": MODELS,
    "teacher": (Output.MODEL,),
    "scores": (Output.SCORES,),
    "data": (Output.TOKENIZED_TEXT,),
    "check": (Output.TEACHER_CHECK,),
    "heldout": (Output.TOKENIZED_TEXT,),
}
SEARCH = StageKind(
    name="search",
    params=SearchStage,
    run="nemo_minitron.stages.search.run:search",
    outputs=(Output.SEARCH,),
    inputs={**_INPUTS, "candidates": (Output.CANDIDATE,)},
    reads_results=True,
    report="search",
    used_inputs=_used_inputs,
    expand=_expand,
    points=_points,
    problems=_problems,
    text_use=_text_use,
    heldout_uses=_heldout_uses,
)
CANDIDATE = StageKind(
    name="candidate",
    params=CandidateStage,
    run="nemo_minitron.stages.search.candidate:candidate",
    version=2,
    outputs=(Output.CANDIDATE,),
    inputs={**_INPUTS, "rivals": (Output.CANDIDATE,)},
    distributed=True,
    stops_by_itself=True,
    loads_own_model=True,
    used_inputs=_used_inputs,
    shape=_candidate_shape,
    problems=_candidate_problems,
    load=_candidate_load,
    part_of=search_of,
    array=_array,
    result_tokens=trained_tokens,
)
