"""From scores and target sizes to the indices to keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.errors import ArtifactError, NumericsError
from nemo_minitron.families import ModelShape, target_shape
from nemo_minitron.families.axes import GROUPS, HEADS, SCORED_WIDTH_AXES, Axis, content_of, holder_of
from nemo_minitron.families.registry import axes_of, width_axes
from nemo_minitron.pruning.importance import group_scores
from nemo_minitron.pruning.merge import head_partners
from nemo_minitron.pruning.plan_file import OFF, Indices, PrunePlan
from nemo_minitron.pruning.possible import require_possible
from nemo_minitron.schema.pruning import Selection

Scores = Mapping[str, Tensor]
Kept = dict[str, Indices]
"""Axis -> kept indices of one layer."""


def choose_keep(scores: Scores, source: ModelShape, selection: Selection) -> PrunePlan:
    """Keep the indices of each axis with the highest scores; ties are won by the lower index.

    Neurons are chosen in each layer separately. Query groups and heads are too, with the same number of heads in each
    group that stays. Hidden channels have one order for the whole model. For layers see `layer_removal` (2407.14679,
    section 2.3; 2408.11796, section 4).

    Args:
        scores: "hidden" [D], "ffn" [L, F], "heads" [L, H], "layers.<metric>" [L], "blocks.<metric>.<length>",
            "iterative.<metric>" [L]; only the scores of axes that shrink are needed. Ignored for `method: random`.

    Raises:
        PlanError: the target cannot be cut out of this model.
        ArtifactError: a score that is needed is missing, or belongs to another model.
        NumericsError: a score is NaN or infinite.
    """
    require_possible(selection, source)
    if selection.method == "random":
        scores = random_scores(source, selection)
    require_scores(scores, source, selection)
    if selection.ranking == "network":
        scores = _summed_over_layers(scores)
    target, axes = target_of(selection, source), width_axes(source)
    layers = _keep_layers(scores, source, selection)
    by_layer = {layer: _keep_in_layer(scores, layer, target, source) for layer in layers}
    return PrunePlan(
        method=selection.method,
        layers=layers,
        shared={axis.name: _best(axis, scores, None, target, source) for axis in axes if not axis.per_layer},
        by_layer={
            axis.name: {layer: kept[axis.name] for layer, kept in by_layer.items() if axis.name in kept}
            for axis in axes
            if axis.per_layer
        },
        head_merge=selection.head_merge,
        merged={} if selection.head_merge == OFF else _head_partners(scores, by_layer, source),
    )


def target_of(selection: Selection, source: ModelShape) -> ModelShape:
    """Return the shape of the student."""
    return target_shape(source, selection.target, selection.drop_layers)


def require_scores(scores: Scores, source: ModelShape, selection: Selection) -> None:
    """Require each score that the target needs, with the size of this model and finite values.

    Raises:
        ArtifactError, NumericsError: see `choose_keep`.
    """
    needed = {name: dims for name, dims in _dims(source, selection).items() if dims}
    for name, dims in needed.items():
        if name not in scores:
            raise ArtifactError(
                f"There is no score {name!r}.",
                allowed=", ".join(sorted(scores)) or "(none)",
                next_step="Add it to width_axes, layer_metrics, block_lengths or iterative_drops.",
            )
        if tuple(scores[name].shape) != dims:
            raise ArtifactError(
                f"Score {name!r} has shape {list(scores[name].shape)}; this model's would have {list(dims)}.",
                next_step="Score this model.",
            )
    require_finite({name: scores[name] for name in needed})


def score_dims(axis: Axis, source: ModelShape) -> tuple[int, ...]:
    """Return the dimensions of a width score: [size], or [layers, size]."""
    size = getattr(source, axis.target_key)
    return (source.num_layers, size) if axis.per_layer else (size,)


def _dims(source: ModelShape, selection: Selection) -> dict[str, tuple[int, ...]]:
    """Return the dimensions of each score of an axis that shrinks."""
    target = target_of(selection, source)
    shrinking = (axis for axis in SCORED_WIDTH_AXES if _size(axis, target) < _size(axis, source))
    needed = {axis.name: score_dims(axis, source) for axis in shrinking}
    drops = source.num_layers - target.num_layers
    if drops and selection.drop_layers is None:
        name = layer_score(selection, drops)
        needed[name] = (source.num_layers - drops + 1,) if name.startswith("blocks.") else (source.num_layers,)
    return needed


def layer_score(selection: Selection, drops: int) -> str:
    """Return the name of the score by which `drops` layers are chosen."""
    metric = selection.layer_metric
    return {
        "individual": f"layers.{metric}",
        "contiguous": f"blocks.{metric}.{drops}" if drops > 1 else f"layers.{metric}",
        "iterative": f"iterative.{metric}",
    }[selection.layer_removal]


def random_scores(source: ModelShape, selection: Selection) -> dict[str, Tensor]:
    """Draw random scores: the control for importance."""
    generator = torch.Generator().manual_seed(selection.seed)
    drops = source.num_layers - target_of(selection, source).num_layers
    runs = source.num_layers - drops + 1 if selection.layer_removal == "contiguous" else source.num_layers
    sizes = {axis.name: score_dims(axis, source) for axis in SCORED_WIDTH_AXES}
    sizes[layer_score(selection, drops)] = (runs,)
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


def require_finite(scores: Scores) -> None:
    """Require finite scores.

    Raises:
        NumericsError: a score is NaN or infinite.
    """
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise NumericsError(
                f"Score {name!r} contains NaN or infinity.",
                next_step="Score with precision: fp32.",
            )


def top_indices(scores: Tensor, count: int) -> Indices:
    """Return the ascending indices of the `count` highest scores; the lower index wins a tie."""
    order = torch.argsort(scores.double(), descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _summed_over_layers(scores: Scores) -> dict[str, Tensor]:
    """Give each layer the same score, the sum over all layers (2407.14679, section 2.2)."""
    out = dict(scores)
    for axis in SCORED_WIDTH_AXES:
        if axis.per_layer and axis.name in scores:
            score = scores[axis.name]
            out[axis.name] = score.double().sum(0, keepdim=True).expand_as(score)
    return out


def _size(axis: Axis, shape: ModelShape) -> int:
    return int(getattr(shape, axis.target_key))


def _keep_in_layer(scores: Scores, layer: int, target: ModelShape, source: ModelShape) -> Kept:
    """Choose the indices of each axis inside a layer."""
    kept: Kept = {}
    for axis in axes_of(source, layer):
        holder = holder_of(axis)
        kept[axis.name] = (
            _best(axis, scores, layer, target, source)
            if holder is None
            else _best_in_each(axis, holder, scores, layer, kept[holder.name], target, source)
        )
    return kept


def _best(axis: Axis, scores: Scores, layer: int | None, target: ModelShape, source: ModelShape) -> Indices:
    count, size = _size(axis, target), _size(axis, source)
    return tuple(range(size)) if count == size else top_indices(_score(axis, scores, layer, source), count)


def _score(axis: Axis, scores: Scores, layer: int | None, source: ModelShape) -> Tensor:
    """Score [size] of an axis; one without a score of its own gets the norms of the scores inside its indices."""
    content = content_of(axis)
    if axis.scored_at is not None or content is None:
        return scores[axis.name] if layer is None else scores[axis.name][layer]
    inside = _score(content, scores, layer, source)
    return group_scores(inside.double(), _size(content, source) // _size(axis, source))


def _best_in_each(
    axis: Axis,
    holder: Axis,
    scores: Scores,
    layer: int,
    kept: Indices,
    target: ModelShape,
    source: ModelShape,
) -> Indices:
    """Choose the same number of indices in each kept index of the axis around them, as heads in query groups."""
    per_holder = _size(axis, source) // _size(holder, source)
    count = _size(axis, target) // _size(holder, target)
    out: list[int] = []
    for index in kept:
        first = index * per_holder
        if count == per_holder:
            out.extend(range(first, first + per_holder))
        else:
            best = top_indices(_score(axis, scores, layer, source)[first : first + per_holder], count)
            out.extend(first + place for place in best)
    return tuple(out)


def _head_partners(scores: Scores, by_layer: Mapping[int, Kept], source: ModelShape) -> dict[int, dict[int, int]]:
    return {
        layer: head_partners(scores[HEADS.name][layer], kept[HEADS.name], kept[GROUPS.name], source)
        for layer, kept in by_layer.items()
    }


def _keep_layers(scores: Scores, source: ModelShape, selection: Selection) -> Indices:
    everything = tuple(range(source.num_layers))
    if selection.drop_layers is not None:
        return tuple(layer for layer in everything if layer not in selection.drop_layers)
    count = target_of(selection, source).num_layers
    if count == source.num_layers:
        return everything
    drops = source.num_layers - count
    layer_scores = scores[layer_score(selection, drops)]
    if selection.layer_removal != "contiguous":
        return top_indices(layer_scores, count)
    start = int(layer_scores.double().argmin())
    return tuple(layer for layer in everything if not start <= layer < start + drops)
