"""report.md from report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars and line breaks in cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as a short page of tables."""
    sections = [f"# {report['title']}", headline(report)]
    if report["models"]:
        sections.append("## Before and after\n\n" + _models(report))
    if report["pruning"]:
        sections.append("## What was cut\n\n" + _pruning(report["pruning"]))
    if report["cost"]["stages"]:
        sections.append("## Cost\n\n" + _cost(report["cost"]))
    return "\n\n".join(sections) + "\n"


def headline(report: Mapping[str, Any]) -> str:
    """The whole result in one or two sentences."""
    models, share = report["models"], report["recovered_share"]
    if "teacher" not in models or "distilled" not in models:
        return "The run has not measured both the teacher and the student yet."
    teacher, student = models["teacher"], models["distilled"]
    sizes = f"{millions(teacher['num_params'])} -> {millions(student['num_params'])} parameters"
    ratio = student["num_params"] / teacher["num_params"]
    won = f"; {share:.0%} of the quality lost in pruning won back" if share is not None else ""
    tokens, wall_s = report["cost"].get("distill_tokens"), report["cost"].get("distill_wall_s")
    spent = f" with {tokens:,} tokens in {wall_s / 60:.1f} minutes of distillation" if tokens and wall_s else ""
    return f"{sizes} ({ratio:.0%}){won}{spent}."


def millions(count: float) -> str:
    """134.5M, 8.03B."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _models(report: Mapping[str, Any]) -> str:
    models = report["models"]
    rows = [[row["name"], *(row["text"].get(label, "") for label in models)] for row in report["comparison"]]
    return table(["", *models], rows)


def _pruning(pruning: Mapping[str, Any]) -> str:
    rows = [[axis["axis"], str(axis["source"]), str(axis["kept"]), f"{axis['share']:.0%}"] for axis in pruning["axes"]]
    return table(["axis", "teacher", "student", "kept"], rows)


def _cost(cost: Mapping[str, Any]) -> str:
    rows = [[stage["stage"], f"{stage['wall_s']:.0f}"] for stage in cost["stages"]]
    return table(["stage", "seconds"], [*rows, ["total", f"{cost['total_wall_s']:.0f}"]])
