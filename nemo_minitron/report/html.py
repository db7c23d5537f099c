"""Rendering report.html, one self-contained page, from the facts of the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from nemo_minitron import __version__
from nemo_minitron.report import compensation, figures, search
from nemo_minitron.report.alignment import measured_figures, tables, with_direction
from nemo_minitron.report.markdown import LAYERS_NOTE, curve_note, dropped_layers, headline, pruning_note, recipe_notes
from nemo_minitron.report.pages import page_templates
from nemo_minitron.report.text import millions
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.duration import duration

KINDS = tuple(STAGES)
"""Kinds of stages in pipeline order; others follow."""
Draw = Callable[[], str]


def render_html(report: Mapping[str, Any], recipe: str) -> str:
    """Render the page; the template and matplotlib escape all texts from data.

    Args:
        report: content of report.json.
        recipe: the resolved recipe as YAML.
    """
    from markupsafe import Markup

    environment = page_templates()
    environment.filters.update(millions=millions, duration=duration, condense=_condense)
    environment.globals.update(variable_of=_variable_of(report))
    sections = {
        name: [Markup(picture()) for picture in pictures] for name, pictures in _pictures(report).items() if pictures
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        pictures=sections,
        headline=headline(report),
        pipeline=pipeline(report["cost"]["stages"]),
        search=_search(report["search"]) if report["search"] else None,
        repair=_repair(report["compensation"]) if report.get("compensation") else None,
        alignment=report.get("alignment"),
        aligned=tables(report["alignment"]) if report.get("alignment") else [],
        dropped=dropped_layers(report["pruning"]) if report["pruning"] else [],
        layers_note=LAYERS_NOTE,
        recipe_notes=recipe_notes(report),
        curve_note=curve_note(report),
        pruning_note=pruning_note(report),
        recipe=recipe,
        version=__version__,
    )


def _variable_of(report: Mapping[str, Any]) -> Callable[[str], str]:
    """Return a function from the label of a model to the CSS variable with its color."""
    looks = figures.looks_of(_labels(report))
    return lambda label: looks[label][0]


def _labels(report: Mapping[str, Any]) -> list[str]:
    """Return the labels of all models that were measured or timed."""
    return list(dict.fromkeys([*report["models"], *(report["speed"] or {"models": ()})["models"]]))


def pipeline(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps of the pipeline, each with all stages of one kind: [{kind, count, wall_s}].

    They are in pipeline order, not by start time, because the teacher may be measured long before the student.
    """
    steps: dict[str, dict[str, Any]] = {}
    for stage in sorted(stages, key=lambda stage: KINDS.index(stage["kind"]) if stage["kind"] in KINDS else len(KINDS)):
        step = steps.setdefault(stage["kind"], {"kind": stage["kind"].replace("_", " "), "count": 0, "wall_s": 0.0})
        step["count"] += 1
        step["wall_s"] += stage["wall_s"]
    return list(steps.values())


def _pictures(report: Mapping[str, Any]) -> dict[str, list[Draw]]:
    """Return {section: figures} for which the run has data; each figure is drawn when called."""
    models, curves, speed = report["models"], report["curves"], report["speed"]
    out: dict[str, list[Draw]] = {"quality": [], "tasks": [], "recovery": [], "speed": []}
    if models:
        out["quality"] = [partial(figures.quality_bars, models), partial(figures.size_bars, models)]
    if figures.plotted_metrics(models):
        out["tasks"] = [partial(figures.task_points, models)]
    if any("valid_loss" in row for row in curves):
        out["recovery"] = [partial(figures.validation_curve, curves)]
    if any("valid_kl" in row for row in curves):
        out["recovery"].append(partial(figures.divergence_curve, curves))
    if speed:
        labels = _labels(report)
        out["speed"] = [
            partial(figures.speed_bars, speed, labels, "generate", "generation, tokens/s"),
            partial(figures.speed_bars, speed, labels, "prefill", "reading a prompt, tokens/s"),
        ]
    if report.get("alignment"):
        out["alignment"] = _alignment_pictures(report["alignment"])
    if report["search"]:
        out["search"] = [partial(search.pareto, report["search"]), partial(search.ladder, report["search"])]
    if report.get("compensation"):
        out["compensation"] = [partial(compensation.recovered_by_layer, report["compensation"])]
    return {**out, **_pruning_pictures(report["pruning"] or {})}


def _alignment_pictures(facts: Mapping[str, Any]) -> list[Draw]:
    curves = [partial(figures.loss_curve, name, rows) for name, rows in facts["curves"].items() if rows]
    measured = measured_figures(facts["models"])
    return [
        *curves,
        *(
            partial(
                figures.model_points,
                f"aligned-{number}",
                values,
                with_direction(figure),
                0.5 if figure.endswith("accuracy") else None,
            )
            for number, (figure, values) in enumerate(measured.items())
        ),
    ]


def _search(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts and the table of a search: {sentence, header, rows: [{cells, look}], notes}."""
    header, cells = search.search_table(facts)
    rungs = len(facts["rungs"])
    rows = [
        {
            "cells": row,
            "look": "winner"
            if candidate["name"] == facts["winner"]
            else "whole"
            if len(candidate["losses"]) < rungs
            else "",
        }
        for candidate, row in zip(facts["candidates"], cells, strict=True)
    ]
    return {"sentence": search.sentence(facts), "header": header, "rows": rows, "notes": search.notes(facts)}


def _repair(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sentence and the table of a repair."""
    rows = compensation.compensation_rows(facts)
    return {"sentence": compensation.SENTENCE, "header": compensation.HEADER, "rows": rows}


def _pruning_pictures(pruning: Mapping[str, Any]) -> dict[str, list[Draw]]:
    if not pruning:
        return {}
    curves = pruning["importance"]
    layers: list[Draw] = []
    if pruning["ffn_map"]:
        layers.append(partial(figures.ffn_map, pruning["ffn_map"], curves["ffn"]))
    for metric, values in pruning["layer_scores"].items():
        layers.append(
            partial(figures.layer_points, metric, values, pruning["kept_scored_layers"], pruning["baseline_lm_loss"])
        )
    return {
        "importance": [partial(figures.importance, axis, curve) for axis, curve in curves.items()],
        "layers": layers,
    }


def _condense(text: str) -> str:
    """Remove empty lines from a generated text, to save space."""
    return re.sub(r"\n\s*\n+", "\n", text.strip())
