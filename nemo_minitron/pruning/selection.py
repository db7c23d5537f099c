"""Scores + target sizes -> which indices to keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.errors import ArtifactError, NumericsError
from nemo_minitron.families import ModelShape, target_shape
from nemo_minitron.pruning.importance import group_scores
from nemo_minitron.pruning.merge import head_partners
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.pruning.possible import require_possible
from nemo_minitron.schema.pruning import Selection

Scores = Mapping[str, Tensor]


def choose_keep(scores: Scores, source: ModelShape, params: Selection) -> PrunePlan:
    """Keep the best-scored indices of each axis, deterministically (ties go to the lower index).

    ffn: in each layer by itself; query groups and heads: in each layer, the same number of heads in every group
    that stays; hidden: one order for the whole model; layers: see `layer_removal` (2407.14679, section 2.3;
    2408.11796, section 4).

    Args:
        scores: "hidden" [D], "ffn" [L, F], "heads" [L, H], "layers.<metric>" [L], "blocks.<metric>.<length>",
            "iterative.<metric>" [L]; only those of axes that shrink are needed. Ignored for `method: random`.

    Raises:
        PlanError: the target cannot be cut out of this model.
        ArtifactError: a score that is needed is missing, or belongs to another model.
        NumericsError: a score is NaN or infinite.
    """
    require_possible(params, source)
    if params.method == "random":
        scores = random_scores(source, params)
    require_scores(scores, source, params)
    if params.ranking == "network":
        scores = _summed_over_layers(scores)
    layers = _keep_layers(scores, source, params)
    target = target_of(params, source)
    groups = {layer: _keep_groups(scores, layer, target, source) for layer in layers}
    heads = {layer: _keep_heads(scores, layer, groups[layer], target, source) for layer in layers}
    return PrunePlan(
        method=params.method,
        layers=layers,
        hidden=_keep_or_all(scores, "hidden", target.hidden_size, source.hidden_size),
        ffn={
            layer: _keep_or_all(scores, "ffn", target.ffn_hidden_size, source.ffn_hidden_size, layer)
            for layer in layers
        },
        groups=groups,
        heads=heads,
        head_merge=params.head_merge,
        merged={}
        if params.head_merge == "off"
        else {layer: head_partners(scores["heads"][layer], heads[layer], groups[layer], source) for layer in layers},
    )


def target_of(params: Selection, source: ModelShape) -> ModelShape:
    """The student's shape."""
    return target_shape(source, params.target, params.drop_layers)


def require_scores(scores: Scores, source: ModelShape, params: Selection) -> None:
    """Every score that the target needs is there, has this model's size, and holds numbers.

    Raises:
        ArtifactError, NumericsError: see `choose_keep`.
    """
    needed = {name: dims for name, dims in _dims(source, params).items() if dims}
    for name, dims in needed.items():
        if name not in scores:
            raise ArtifactError(
                f"There is no score {name!r}.",
                allowed=", ".join(sorted(scores)) or "(none)",
                next_step="Add it to the score stage: width_axes, layer_metrics, block_lengths or iterative_drops.",
            )
        if tuple(scores[name].shape) != dims:
            raise ArtifactError(
                f"Score {name!r} has shape {list(scores[name].shape)}; this model's would have {list(dims)}.",
                next_step="Score this model.",
            )
    require_finite({name: scores[name] for name in needed})


def _dims(source: ModelShape, params: Selection) -> dict[str, tuple[int, ...]]:
    """Score -> its dimensions, for the axes that shrink."""
    target, layers = target_of(params, source), source.num_layers
    needed: dict[str, tuple[int, ...]] = {}
    if target.hidden_size < source.hidden_size:
        needed["hidden"] = (source.hidden_size,)
    if target.ffn_hidden_size < source.ffn_hidden_size:
        needed["ffn"] = (layers, source.ffn_hidden_size)
    if target.num_attention_heads < source.num_attention_heads:
        needed["heads"] = (layers, source.num_attention_heads)
    drops = layers - target.num_layers
    if drops and params.drop_layers is None:
        name = layer_score(params, drops)
        needed[name] = (layers - drops + 1,) if name.startswith("blocks.") else (layers,)
    return needed


def layer_score(params: Selection, drops: int) -> str:
    """Name of the score that this many layers are chosen by."""
    metric = params.layer_metric
    return {
        "individual": f"layers.{metric}",
        "contiguous": f"blocks.{metric}.{drops}",
        "iterative": f"iterative.{metric}",
    }[params.layer_removal]


def random_scores(source: ModelShape, params: Selection) -> dict[str, Tensor]:
    """Scores that know nothing: the control for importance."""
    generator = torch.Generator().manual_seed(params.seed)
    drops = source.num_layers - target_of(params, source).num_layers
    runs = source.num_layers - drops + 1 if params.layer_removal == "contiguous" else source.num_layers
    sizes = {
        "hidden": (source.hidden_size,),
        "ffn": (source.num_layers, source.ffn_hidden_size),
        "heads": (source.num_layers, source.num_attention_heads),
        layer_score(params, drops): (runs,),
    }
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


def require_finite(scores: Scores) -> None:
    """Every score is a number."""
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise NumericsError(
                f"Score {name!r} holds NaN or infinity.",
                next_step="Run the score stage again with precision: fp32.",
            )


def top_indices(scores: Tensor, count: int) -> tuple[int, ...]:
    """Ascending indices of the `count` highest scores; equal scores go to the lower index."""
    order = torch.argsort(scores.double(), descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _summed_over_layers(scores: Scores) -> dict[str, Tensor]:
    """The same network-wide score in every layer (2407.14679, section 2.2)."""
    out = dict(scores)
    for axis in ("ffn", "heads"):
        if axis in scores:
            out[axis] = scores[axis].double().sum(0, keepdim=True).expand_as(scores[axis])
    return out


def _keep_or_all(scores: Scores, axis: str, count: int, size: int, layer: int | None = None) -> tuple[int, ...]:
    if count == size:
        return tuple(range(size))
    score = scores[axis] if layer is None else scores[axis][layer]
    return top_indices(score, count)


def _keep_groups(scores: Scores, layer: int, target: ModelShape, source: ModelShape) -> tuple[int, ...]:
    """The query groups whose heads matter most together."""
    if target.num_query_groups == source.num_query_groups:
        return tuple(range(source.num_query_groups))
    return top_indices(group_scores(scores["heads"][layer].double(), source.heads_per_group), target.num_query_groups)


def _keep_heads(
    scores: Scores, layer: int, groups: tuple[int, ...], target: ModelShape, source: ModelShape
) -> tuple[int, ...]:
    """The best heads of every group that stays, the same number in each."""
    per_group = source.heads_per_group
    keep: list[int] = []
    for group in groups:
        first = group * per_group
        if target.heads_per_group == per_group:
            keep.extend(range(first, first + per_group))
        else:
            best = top_indices(scores["heads"][layer][first : first + per_group], target.heads_per_group)
            keep.extend(first + index for index in best)
    return tuple(keep)


def _keep_layers(scores: Scores, source: ModelShape, params: Selection) -> tuple[int, ...]:
    everything = tuple(range(source.num_layers))
    if params.drop_layers is not None:
        return tuple(layer for layer in everything if layer not in params.drop_layers)
    count = params.target.num_layers
    if count is None or count == source.num_layers:
        return everything
    drops = source.num_layers - count
    layer_scores = scores[layer_score(params, drops)]
    if params.layer_removal != "contiguous":
        return top_indices(layer_scores, count)
    start = int(layer_scores.double().argmin())
    return tuple(layer for layer in everything if not start <= layer < start + drops)
