"""Scores + target sizes -> which indices to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nemo_minitron.config.schema import SelectStage
from nemo_minitron.errors import ArtifactError, NumericsError, PlanError
from nemo_minitron.families import ModelShape
from nemo_minitron.pruning.plan_file import PrunePlan


def choose_keep(scores: Mapping[str, Tensor], source: ModelShape, params: SelectStage) -> PrunePlan:
    """Keep the best-scored indices of each axis, deterministically (ties go to the lower index).

    ffn: in each layer by itself; heads: in each query group by itself, the same number in all, so that groups
    stay whole; hidden: one order for the whole model; layers: the lowest scores go, or the run of neighbours
    with the lowest sum (2407.14679, section 2.3; 2408.11796, section 4).

    Args:
        scores: "hidden" [D], "ffn" [L, F], "heads" [L, H], "layers.<metric>" [L]; only those of axes
            that shrink are needed. Ignored for `method: random`.

    Raises:
        PlanError: the target cannot be cut out of this model.
        ArtifactError: a score that is needed is missing, or belongs to another model.
        NumericsError: a score is NaN or infinite.
    """
    require_possible(params, source)
    if params.method == "random":
        scores = random_scores(source, params.seed)
    require_scores(scores, source, params)
    layers = _keep_layers(scores, source, params)
    target = params.target
    num_heads = target.num_attention_heads or source.num_attention_heads
    return PrunePlan(
        method=params.method,
        layers=layers,
        hidden=_keep_or_all(scores, "hidden", target.hidden_size, source.hidden_size),
        ffn={
            layer: _keep_or_all(scores, "ffn", target.ffn_hidden_size, source.ffn_hidden_size, layer)
            for layer in layers
        },
        heads={layer: _keep_heads(scores, layer, num_heads, source) for layer in layers},
    )


def require_possible(params: SelectStage, source: ModelShape) -> None:
    """The target can be cut out of this model.

    Raises:
        PlanError: naming the key that asks for too much.
    """
    problem = next(_impossible(params, source), None)
    if problem is not None:
        key, value, allowed = problem
        raise PlanError(f"{key} = {value} cannot be cut out of this model.", where="select", allowed=allowed)


def _impossible(params: SelectStage, source: ModelShape) -> Iterator[tuple[str, object, str]]:
    for key, value in params.target:
        if value is not None and value > getattr(source, key):
            yield f"target.{key}", value, f"1 to {getattr(source, key)}"
    heads = params.target.num_attention_heads
    if heads is not None and heads % source.num_query_groups:
        yield "target.num_attention_heads", heads, f"a multiple of the {source.num_query_groups} query groups"
    if params.drop_layers is None:
        return
    dropped, last = set(params.drop_layers), source.num_layers - 1
    if not dropped <= set(range(source.num_layers)) or len(dropped) == source.num_layers:
        yield "drop_layers", list(params.drop_layers), f"layers from 0 to {last}, not all of them"
    count = params.target.num_layers
    if count is not None and count != source.num_layers - len(dropped):
        yield "target.num_layers", count, f"{source.num_layers - len(dropped)}, which drop_layers leaves, or nothing"


def require_scores(scores: Mapping[str, Tensor], source: ModelShape, params: SelectStage) -> None:
    """Every score that the target needs is there, has this model's size, and holds numbers.

    Raises:
        ArtifactError, NumericsError: see `choose_keep`.
    """
    target, layers = params.target, source.num_layers
    sizes = {
        "hidden": ((source.hidden_size,), target.hidden_size, source.hidden_size),
        "ffn": ((layers, source.ffn_hidden_size), target.ffn_hidden_size, source.ffn_hidden_size),
        "heads": ((layers, source.num_attention_heads), target.num_attention_heads, source.num_attention_heads),
    }
    if params.drop_layers is None:
        sizes[f"layers.{params.layer_metric}"] = ((layers,), target.num_layers, layers)
    needed = {name: dims for name, (dims, wanted, whole) in sizes.items() if wanted not in (None, whole)}
    for name, dims in needed.items():
        if name not in scores:
            raise ArtifactError(
                f"There is no score {name!r}.",
                allowed=", ".join(sorted(scores)) or "(none)",
                next_step="Add it to the score stage: width_axes or layer_metrics.",
            )
        if tuple(scores[name].shape) != dims:
            raise ArtifactError(
                f"Score {name!r} has shape {list(scores[name].shape)}; this model's would have {list(dims)}.",
                next_step="Score this model.",
            )
    require_finite({name: scores[name] for name in needed})


def random_scores(source: ModelShape, seed: int) -> dict[str, Tensor]:
    """Scores that know nothing: the control for importance."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "hidden": (source.hidden_size,),
        "ffn": (source.num_layers, source.ffn_hidden_size),
        "heads": (source.num_layers, source.num_attention_heads),
        "layers.block_influence": (source.num_layers,),
    }
    scores = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    return {**scores, "layers.lm_loss": scores["layers.block_influence"]}


def require_finite(scores: Mapping[str, Tensor]) -> None:
    """Every score is a number."""
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise NumericsError(
                f"Score {name!r} holds NaN or infinity.",
                next_step="Run the score stage again in fp32 (stages.score.precision=fp32).",
            )


def top_indices(scores: Tensor, count: int) -> tuple[int, ...]:
    """Ascending indices of the `count` highest scores; equal scores go to the lower index."""
    order = torch.argsort(scores.double(), descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _keep_or_all(
    scores: Mapping[str, Tensor], axis: str, count: int | None, size: int, layer: int | None = None
) -> tuple[int, ...]:
    if count is None or count == size:
        return tuple(range(size))
    score = scores[axis] if layer is None else scores[axis][layer]
    return top_indices(score, count)


def _keep_heads(scores: Mapping[str, Tensor], layer: int, count: int, source: ModelShape) -> tuple[int, ...]:
    """The best heads of every query group, the same number in each: groups stay whole."""
    if count == source.num_attention_heads:
        return tuple(range(count))
    per_group = source.heads_per_group
    keep: list[int] = []
    for group, group_scores in enumerate(scores["heads"][layer].reshape(source.num_query_groups, per_group)):
        best = top_indices(group_scores, count // source.num_query_groups)
        keep.extend(group * per_group + index for index in best)
    return tuple(keep)


def _keep_layers(scores: Mapping[str, Tensor], source: ModelShape, params: SelectStage) -> tuple[int, ...]:
    everything = tuple(range(source.num_layers))
    if params.drop_layers is not None:
        return tuple(layer for layer in everything if layer not in params.drop_layers)
    count = params.target.num_layers
    if count is None or count == source.num_layers:
        return everything
    layer_scores = scores[f"layers.{params.layer_metric}"]
    if not params.drop_contiguous_layers:
        return top_indices(layer_scores, count)
    run = source.num_layers - count
    sums = layer_scores.double().unfold(0, run, 1).sum(-1).tolist()
    start = sums.index(min(sums))
    return tuple(layer for layer in everything if not start <= layer < start + run)
