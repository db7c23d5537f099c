"""Comparison table: one row for each figure, one column for each model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from nemo_minitron.report.text import mebibytes

TEACHER = "teacher"
LABELS = (TEACHER, "distilled", "pruned", "random")
"""Labels of the first columns, in order; other labels follow."""
PLAIN_ACCURACY = ("arc_easy", "sciq", "boolq", "winogrande")
"""Tasks compared by plain accuracy although lm-eval also has a length-normalized one, as in papers on small models.
The list is fixed before any model is measured, so that it favors no model."""
Row = dict[str, Any]
"""{name, text: {label: formatted value}, best and worst: label of the best or worst small model, or None}."""
_BITS = {"float32": 32, "float64": 64}


def ordered(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the labels of the models in the order of the columns."""
    return [label for label in LABELS if label in models] + [label for label in models if label not in LABELS]


def comparison(models: Mapping[str, Mapping[str, Any]], speed: Mapping[str, Any] | None) -> list[Row]:
    """Return the rows of the table: sizes, quality, tasks, speed.

    Args:
        models: label -> metrics of the evaluate stage.
        speed: content of speed.json.
    """
    rows = [
        _row("parameters", models, lambda model: model["num_params"], "{:,}"),
        _row("bits per byte", models, lambda model: model["bits_per_byte"], "{:.3f}", better=min),
        _row("perplexity", models, lambda model: model["perplexity"], "{:,.1f}", better=min),
    ]
    metrics = task_metrics(models)
    rows += [_task_row(task, metric, models) for task, metric in metrics.items()]
    averaged = {task: metric for task, metric in metrics.items() if not is_lower_better(task, metric, models)}
    if len(averaged) > 1:
        means = {label: mean_of_tasks(model, averaged) for label, model in models.items()}
        rows.append(_scores_row("mean of the tasks", means, max))
    rows.append(_checkpoint_row(models))
    measured = {label: rates for label, rates in (speed or {}).get("models", {}).items() if label in models}
    if measured:
        rows.append(_row("generation, tokens/s", measured, lambda rates: rates["generate_tokens_per_s"], "{:,.1f}"))
        rows.append(_row("prefill, tokens/s", measured, lambda rates: rates["prefill_tokens_per_s"], "{:,.0f}"))
    return rows


def task_metrics(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return task -> the metric that is the task's score in tables, figures and model cards.

    Tasks without any score, such as groups of lm-eval, are left out.
    """
    tasks = dict.fromkeys(task for model in models.values() for task in model["tasks"])
    metrics = {task: main_metric(task, models) for task in tasks}
    return {task: metric for task, metric in metrics.items() if metric is not None}


def main_metric(task: str, models: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the metric for comparing a task: the first that all models with a score of it have, or else any of them.

    None: no model has a score of the task.
    """
    taken = [model["tasks"][task] for model in models.values() if model["tasks"].get(task)]
    wanted = ("acc", "acc_norm") if task in PLAIN_ACCURACY else ("acc_norm", "acc")
    others = dict.fromkeys(key for scores in taken for key in scores if "stderr" not in key)
    found = [key for key in dict.fromkeys((*wanted, *others)) if key in others]
    return next((key for key in found if all(key in scores for scores in taken)), next(iter(found), None))


def score_of(task: str, model: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """Return (score, standard error or 0) of a model on a task, or None if it was not measured."""
    scores = model["tasks"].get(task, {})
    if metric not in scores:
        return None
    name, _, kind = metric.partition(",")
    error = scores.get(f"{name}_stderr,{kind}" if kind else f"{name}_stderr", 0.0)
    return float(scores[metric]), float(error)


def score_text(score: tuple[float, float] | None) -> str:
    """Format a score with its standard error; empty if it was not measured."""
    if score is None:
        return ""
    value, error = score
    return f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"


def is_lower_better(task: str, metric: str, models: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a lower value of a task's metric is better, as for perplexities."""
    return any(metric in model.get("tasks_lower_is_better", {}).get(task, ()) for model in models.values())


def mean_of_tasks(model: Mapping[str, Any], metrics: Mapping[str, str]) -> tuple[float, float] | None:
    """Return (mean over tasks, its standard error), or None if the model was not evaluated on all of them."""
    found = [score_of(task, model, metric) for task, metric in metrics.items()]
    scores = [pair for pair in found if pair is not None]
    if not scores or len(scores) < len(found):
        return None
    error = math.sqrt(sum(error**2 for _, error in scores)) / len(scores)
    return sum(score for score, _ in scores) / len(scores), error


def _row(
    name: str,
    models: Mapping[str, Any],
    value: Callable[[Mapping[str, Any]], float],
    form: str,
    better: Callable[..., Any] | None = None,
) -> Row:
    values = {label: value(model) for label, model in models.items()}
    text = {label: form.format(number) for label, number in values.items()}
    return {"name": name, "text": text, **_extremes({label: (v, 0.0) for label, v in values.items()}, better)}


def _task_row(task: str, metric: str, models: Mapping[str, Mapping[str, Any]]) -> Row:
    scores = {label: score_of(task, model, metric) for label, model in models.items()}
    return _scores_row(f"{task} ({metric})", scores, min if is_lower_better(task, metric, models) else max)


def _scores_row(name: str, scores: Mapping[str, tuple[float, float] | None], better: Callable[..., Any]) -> Row:
    known = {label: pair for label, pair in scores.items() if pair is not None}
    text = {label: score_text(pair) for label, pair in known.items()}
    return {"name": name, "text": text, **_extremes(known, better)}


def _checkpoint_row(models: Mapping[str, Mapping[str, Any]]) -> Row:
    """Return the row of sizes on disk with bits per number, because a smaller type alone makes a file smaller, too."""
    text = {}
    for label, model in models.items():
        bits = _BITS.get(model.get("dtype", ""), 16)
        text[label] = mebibytes(model["checkpoint_bytes"]) + (f" ({bits}-bit)" if "dtype" in model else "")
    return {"name": "checkpoint, MiB", "text": text, "best": None, "worst": None}


def _extremes(scores: Mapping[str, tuple[float, float]], better: Callable[..., Any] | None) -> dict[str, str | None]:
    """Return the best and worst of the small models; None if the gap to the next is within its standard error."""
    small = {label: pair for label, pair in scores.items() if label != TEACHER}
    if better is None or len(small) < 2:
        return {"best": None, "worst": None}
    ranking = sorted(small, key=lambda label: small[label][0], reverse=better is max)
    clear = [_is_clear(small[a], small[b]) for a, b in ((ranking[0], ranking[1]), (ranking[-2], ranking[-1]))]
    return {"best": ranking[0] if clear[0] else None, "worst": ranking[-1] if clear[1] else None}


def _is_clear(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return abs(one[0] - other[0]) > math.hypot(one[1], other[1])
