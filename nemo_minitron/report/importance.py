"""Facts on pruning for the report, read from the score and select stages: sizes, sorted importance, layer scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.families.axes import AXES, FFN, LAYERS, Axis
from nemo_minitron.pruning.plan_file import ALL, PLAN_FILE, from_ranges

SHOWN_AXES = tuple(axis for axis in AXES if axis.scored_at is not None)
CURVE_POINTS, MAP_COLUMNS = 160, 96
Scores = Mapping[str, NDArray[np.float32]]


def pruning_facts(plan_dirs: Sequence[Path], scores_dir: Path | None) -> dict[str, Any]:
    """Return the `pruning` part of the report; without scores, the parts that need them are empty.

    Sizes and kept layers are those of all rounds together; importance and layer scores are those of the last round.

    Args:
        plan_dirs: folders of the plans of all rounds, in order.
        scores_dir: folder of the scores of the last round.
    """
    plans = [json.loads((folder / PLAN_FILE).read_text(encoding="utf-8")) for folder in plan_dirs]
    first, plan = plans[0], plans[-1]
    scores, baseline = _read_scores(scores_dir)
    ffn = scores.get(FFN.name)
    return {
        "method": plan["method"],
        "rounds": len(plans),
        "num_params": {"source": first["num_params"]["source"], "target": plan["num_params"]["target"]},
        "axes": [_axis(axis, first["source"], plan, scores if len(plans) == 1 else {}) for axis in SHOWN_AXES],
        "kept_layers": _kept_layers(plans),
        "kept_scored_layers": _kept_layers([plan]),
        "importance": {
            axis.name: {"name": axis.title, **importance_curve(scores[axis.name], plan["target"][axis.target_key])}
            for axis in SHOWN_AXES
            if axis.name in scores
        },
        "ffn_map": None if ffn is None else ffn_map(ffn),
        "layer_scores": {
            name.removeprefix("layers."): [float(value) for value in scores[name]]
            for name in sorted(scores)
            if name.startswith("layers.")
        },
        "baseline_lm_loss": baseline,
    }


def _read_scores(folder: Path | None) -> tuple[Scores, float | None]:
    if folder is None:
        return {}, None
    from safetensors.numpy import load_file

    facts = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return load_file(str(folder / "scores.safetensors")), facts.get("baseline_lm_loss")


def _kept_layers(plans: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the layers that all plans keep, one after the other, by their number before the first of them."""
    kept = list(range(plans[0]["source"][LAYERS.target_key]))
    for plan in plans:
        kept = [kept[layer] for layer in _kept(plan["keep"][LAYERS.name], len(kept))]
    return kept


def _axis(axis: Axis, before: Mapping[str, int], plan: Mapping[str, Any], scores: Scores) -> dict[str, Any]:
    source, kept = before[axis.target_key], plan["target"][axis.target_key]
    share = importance_share(scores[axis.name], plan["keep"][axis.name]) if axis.name in scores else None
    return {"axis": axis.title, "source": source, "kept": kept, "share": kept / source, "importance_share": share}


def importance_share(scores: NDArray[np.float32], keep: str | Mapping[str, str]) -> float:
    """Return the share of an axis's summed importance that is kept, averaged over the kept layers.

    Args:
        scores: importance, shape [size] or [layers, size].
        keep: kept indices in the format of the plan, or {layer: kept indices} for the kept layers.
    """
    rows = {"0": scores} if scores.ndim == 1 else {str(layer): row for layer, row in enumerate(scores)}
    lists = keep if isinstance(keep, Mapping) else {layer: keep for layer in rows}
    return float(
        np.mean([_share(rows[layer], list(_kept(ranges, rows[layer].size))) for layer, ranges in lists.items()])
    )


def _share(scores: NDArray[np.float32], kept: list[int]) -> float:
    total = float(scores.sum())
    # A layer whose scores are all zero, such as a dead one, loses nothing.
    return float(scores[kept].sum()) / total if total else 1.0


def _kept(ranges: str, size: int) -> Sequence[int]:
    return range(size) if ranges == ALL else from_ranges(ranges)


def importance_curve(scores: NDArray[np.float32], kept: int) -> dict[str, Any]:
    """Return the importance in descending order, relative to the median of its layer.

    The median is used because a few neurons are a hundred times as important as the rest and dominate the mean.

    Args:
        scores: importance, shape [size] or [layers, size].

    Returns:
        size, kept, num_layers, and `rank`, `mean`, `low`, `high` (mean, minimum and maximum over layers) at no more
        than CURVE_POINTS ranks.
    """
    rows = np.atleast_2d(scores.astype(np.float64))
    descending = -np.sort(-rows, axis=1) / np.maximum(np.median(rows, axis=1, keepdims=True), 1e-30)
    size = rows.shape[1]
    ranks = np.unique(np.linspace(0, size - 1, min(size, CURVE_POINTS)).round().astype(int))
    columns = {"mean": descending.mean(0), "low": descending.min(0), "high": descending.max(0)}
    return {
        "size": size,
        "kept": kept,
        "num_layers": rows.shape[0] if scores.ndim > 1 else 1,
        "rank": [int(rank) + 1 for rank in ranks],
        **{name: [_short(value) for value in column[ranks]] for name, column in columns.items()},
    }


def ffn_map(ffn_LF: NDArray[np.float32]) -> list[list[float]]:
    """Return log10 of each layer's sorted importance, averaged over at most MAP_COLUMNS groups of adjacent ranks."""
    descending = -np.sort(-ffn_LF.astype(np.float64), axis=1)
    groups = np.array_split(descending, min(MAP_COLUMNS, descending.shape[1]), axis=1)
    columns_CL = np.array([group.mean(1) for group in groups])
    return [[_short(value) for value in row] for row in np.log10(np.maximum(columns_CL.T, 1e-30))]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
