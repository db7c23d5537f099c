"""Scores + target sizes -> which indices to keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.config.schema import SelectStage
from nemo_minitron.errors import NumericsError
from nemo_minitron.families import ModelShape
from nemo_minitron.pruning.plan_file import PrunePlan


def choose_keep(scores: Mapping[str, Tensor], source: ModelShape, params: SelectStage) -> PrunePlan:
    """Keep the best-scored indices of each axis, deterministically (ties go to the lower index).

    Args:
        scores: "hidden" [D], "ffn" [L, F], "heads" [L, H], "layers.<metric>" [L]; only those of axes
            that shrink are needed. Ignored for `method: random`.

    Raises:
        NumericsError: a score is NaN or infinite.
    """
    target = params.target
    if params.method == "random":
        scores = random_scores(source, params.seed)
    require_finite(scores)
    layers = _keep_layers(scores, source, params)
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
    sums = layer_scores.double().unfold(0, run, 1).sum(-1)
    start = int(torch.argmin(sums))
    return tuple(layer for layer in everything if not start <= layer < start + run)
