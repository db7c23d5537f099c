"""report.html: one self-contained page from report.json and the scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron import __version__
from nemo_minitron.report import figures
from nemo_minitron.report.markdown import headline, millions

TEMPLATES = Path(__file__).parent / "templates"
PICTURES = ("quality", "tasks", "recovery", "time", "importance", "ffn", "layers")
"""Names that the template knows; those without data stay empty."""


def render_html(
    report: Mapping[str, Any], scores_file: Path | None, plan: Mapping[str, Any] | None, recipe: str
) -> str:
    """The page; everything that comes from data is escaped by the template.

    Args:
        scores_file: scores.safetensors, for the pictures of the pruning.
        plan: content of prune_plan.json.
        recipe: the resolved recipe as YAML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["millions"] = millions
    environment.filters["condense"] = lambda text: re.sub(r"\n\s*\n+", "\n", text.strip())
    environment.globals["color_of"] = lambda label: figures.color_of(label, list(report["models"]))
    drawn = draw(report, scores_file, plan)
    pictures = {name: Markup(drawn.get(name, "")) for name in PICTURES}
    page = environment.get_template("report.html.j2")
    return page.render(report=report, pictures=pictures, headline=headline(report), recipe=recipe, version=__version__)


def draw(report: Mapping[str, Any], scores_file: Path | None, plan: Mapping[str, Any] | None) -> dict[str, str]:
    """Every picture that the run has data for."""
    models = report["models"]
    pictures: dict[str, Callable[[], str]] = {}
    if models:
        pictures["quality"] = lambda: figures.quality_bars(models)
    if any(model["tasks"] for model in models.values()):
        pictures["tasks"] = lambda: figures.task_points(models)
    if any("valid_kl" in row for row in report["curves"]):
        pictures["recovery"] = lambda: figures.recovery(report["curves"])
    if report["cost"]["stages"]:
        pictures["time"] = lambda: figures.time_bars(report["cost"]["stages"])
    drawn = {name: picture() for name, picture in pictures.items()}
    if scores_file is not None and plan is not None:
        drawn.update(_draw_pruning(scores_file, plan, report["pruning"]["kept_layers"]))
    return drawn


def _draw_pruning(scores_file: Path, plan: Mapping[str, Any], kept_layers: list[int]) -> dict[str, str]:
    from safetensors.numpy import load_file

    scores = load_file(str(scores_file))
    target = plan["target"]
    kept = {
        "hidden": target["hidden_size"],
        "ffn": target["ffn_hidden_size"],
        "heads": target["num_attention_heads"],
    }
    drawn = {}
    if any(axis in scores for axis in kept):
        drawn["importance"] = figures.importance_curves(scores, kept)
    if "ffn" in scores:
        drawn["ffn"] = figures.ffn_map(scores["ffn"], kept["ffn"])
    if any(name.startswith("layers.") for name in scores):
        drawn["layers"] = figures.layer_bars(scores, kept_layers)
    return drawn
