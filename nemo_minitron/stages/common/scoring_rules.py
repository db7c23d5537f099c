"""Check whether a score stage measures what a selection needs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_minitron.families import ModelShape
from nemo_minitron.families.axes import SCORED_WIDTH_AXES, chosen_by
from nemo_minitron.schema.pruning import AnyScoring, Scoring, Selection


def scoring_problems(
    key: str,
    selection: Selection,
    scores: str | None,
    scoring: AnyScoring | None,
    source: ModelShape | None,
    *,
    in_search: bool = False,
) -> Iterator[str]:
    """Yield one line for each score that the selection needs and that the score stage does not compute.

    Args:
        key: key of the stage that selects.
        scores: name of the score stage.
        scoring: params of the score stage; None if there is no such stage.
        source: shape of the model to prune.
        in_search: whether the stage is a search, which has the sizes in `grid` and the rules in `selection`.
    """
    if selection.method != "importance":
        return
    if scoring is None:
        yield f"{key}.inputs.scores: method importance needs a score stage."
        return
    for axis in SCORED_WIDTH_AXES:
        sizes = (chosen.target_key for chosen in chosen_by(axis))
        wanted = [size for size in sizes if _cuts(selection, size, source)]
        if wanted and axis.name not in scoring.width_axes:
            where = f"{key}.grid" if in_search else f"{key}.target.{wanted[0]}"
            yield f"{where}: axis {axis.name} is not scored; add it to stages.{scores}.width_axes."
    if selection.target.num_layers is None or selection.drop_layers is not None or source is None:
        return
    drops = source.num_layers - selection.target.num_layers
    if drops > 0 and isinstance(scoring, Scoring):
        yield from _layers(f"{key}.selection" if in_search else key, selection, drops, scores, scoring)
    elif drops > 0:
        own = "" if in_search else f", or list the layers in {key}.drop_layers"
        yield f"{key}.inputs.scores = {scores}: it has no scores of layers. Next: name a score stage{own}."


def _cuts(selection: Selection, size: str, source: ModelShape | None) -> bool:
    """Return whether the target has fewer of something; if the model is not known, whether the target names it."""
    wanted = getattr(selection.target, size)
    return wanted is not None and (source is None or wanted < source.sizes()[size])


def _layers(key: str, selection: Selection, drops: int, scores: str | None, scoring: Scoring) -> Iterator[str]:
    if selection.layer_metric not in scoring.layer_metrics:
        yield f"{key}.layer_metric = {selection.layer_metric}: not measured; add it to stages.{scores}.layer_metrics."
    if selection.layer_removal == "contiguous" and drops > 1 and drops not in scoring.block_lengths:
        lengths = f"stages.{scores}.block_lengths"
        yield f"{key}.layer_removal = contiguous: blocks of {drops} layers are not scored; add {drops} to {lengths}."
    if selection.layer_removal == "iterative" and drops > scoring.iterative_drops:
        least = f"stages.{scores}.iterative_drops to {drops}"
        yield f"{key}.layer_removal = iterative: {drops} layers have to be removed; set {least} or more."


def without_unused_scores(method: str, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out the role `scores` unless the selection is by importance, the only method that reads scores."""
    return inputs if method == "importance" else {role: value for role, value in inputs.items() if role != "scores"}
