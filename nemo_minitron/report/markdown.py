"""Rendering report.md from report.json, and the texts and formats that all forms of the report share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_minitron.report.alignment import tables
from nemo_minitron.report.compensation import compensation_markdown
from nemo_minitron.report.search import search_markdown
from nemo_minitron.report.text import code, millions, plain, table
from nemo_minitron.system.duration import duration


def render_markdown(report: Mapping[str, Any]) -> str:
    """Render the report as a short page of tables."""
    found = ((title, text(report)) for title, text in _SECTIONS.items())
    sections = [f"## {title}\n\n{text}" for title, text in found if text.strip()]
    notes = map(plain, recipe_notes(report))
    return "\n\n".join([f"# {plain(report['title'])}", headline(report), *notes, *sections]) + "\n"


def recipe_notes(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each recipe that did not make all stages: the one on the page, and the one given."""
    made, given = (
        "; ".join(f"{stage} ({difference})" for stage, difference in report.get(key, {}).items())
        for key in ("made_otherwise", "given_otherwise")
    )
    notes = [f"Made with another recipe than that of this report: {made}."] if made else []
    if given:
        notes.append(f"This report shows the recipe of the run. The given recipe would change: {given}.")
    return notes


def headline(report: Mapping[str, Any]) -> str:
    """Return the result of the run in one sentence."""
    models = report["models"]
    if "teacher" not in models or "distilled" not in models:
        if report.get("alignment"):
            return _aligned(report["alignment"])
        return "The run has not measured both the teacher and the student yet."
    teacher, student = models["teacher"], models["distilled"]
    sizes = f"{millions(teacher['num_params'])} -> {millions(student['num_params'])} parameters"
    ratio = student["num_params"] / teacher["num_params"]
    tokens, wall_s = report["cost"].get("distill_tokens"), report["cost"].get("distill_wall_s")
    spent = f" with {tokens:,} tokens in {duration(wall_s)} of distillation" if tokens and wall_s else ""
    rounds = len(report.get("rounds", ()))
    spent += f" in {rounds} rounds" if spent and rounds > 1 else ""
    return f"{sizes} ({ratio:.0%}){_recovery(report['recovered_share'])}{spent}."


def _aligned(facts: Mapping[str, Any]) -> str:
    stages = [training["stage"] for training in (*facts["trainings"], *facts["rewards"])]
    if stages:
        return f"Aligned by NeMo-Aligner: {', '.join(stages)}."
    return f"Measured on chat rows: {', '.join(str(model['label']) for model in facts['models'])}."


def _recovery(share: float | None) -> str:
    if share is None:
        return ""
    if share < 0:
        return f"; distillation lost another {-share:.0%} of what pruning had lost"
    return f"; recovered {share:.0%} of the quality lost in pruning"


def _models(report: Mapping[str, Any]) -> str:
    models = report["models"]
    rows = [[plain(row["name"]), *(_cell(row, label) for label in models)] for row in report["comparison"]]
    text = table(["", *(plain(label) for label in models)], rows)
    return f"{text}\n\n{MARKS_NOTE}" if any(row["best"] for row in report["comparison"]) else text


MARKS_NOTE = "Bold: the best of the small models, where the gap to the next exceeds its standard error."


def _cell(row: Mapping[str, Any], label: str) -> str:
    text = str(row["text"].get(label, ""))
    return f"**{text}**" if row["best"] == label else text


def _layers(trainings: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for found in trainings:
        losses = enumerate(found["losses"])
        rows = [[str(number), f"{before:.4f}", f"{after:.4f}"] for number, (before, after) in losses]
        parts.append(f"{plain(found['stage'])}:\n\n{table(['layer', 'before', 'after'], rows)}")
    return "\n\n".join([LAYERS_NOTE, *parts])


LAYERS_NOTE = (
    "Squared error of each layer's output on held-out text, relative to the teacher's, from the teacher's own input."
)


def _validation(curves: Sequence[Mapping[str, Any]]) -> str:
    measured = [row for row in curves if "valid_loss" in row]
    if not any("valid_kl" in row for row in measured):
        rows = [[str(row["step"]), f"{row['valid_loss']:.4f}"] for row in measured]
        return table(["step", "held-out loss, nats per token"], rows)
    rows = [[str(row["step"]), f"{row['valid_loss']:.4f}", f"{row['valid_kl']:.4f}"] for row in measured]
    return table(["step", "held-out loss, nats per token", "KL to the teacher"], rows)


def curve_note(report: Mapping[str, Any]) -> str:
    """Name the stage of the curve if the student was distilled in several rounds."""
    rounds = report.get("rounds", ())
    return f"Of {rounds[-1]}, the last of {len(rounds)} rounds." if len(rounds) > 1 else ""


def pruning_note(report: Mapping[str, Any]) -> str:
    """Say to which round the facts on pruning belong if there were several."""
    pruning = report["pruning"] or {}
    if pruning.get("rounds", 1) == 1:
        return ""
    return (
        f"Sizes after all {pruning['rounds']} rounds; importance and scores are those of {pruning['stage']}, the last."
    )


def _pruning(pruning: Mapping[str, Any]) -> str:
    shares = [axis["importance_share"] for axis in pruning["axes"]]
    header = ["axis", "teacher", "student", "kept"]
    rows = [
        [plain(axis["axis"]), f"{axis['source']:,}", f"{axis['kept']:,}", f"{axis['share']:.0%}"]
        for axis in pruning["axes"]
    ]
    if any(share is not None for share in shares):
        header.append("importance kept")
        rows = [[*row, "" if share is None else f"{share:.0%}"] for row, share in zip(rows, shares, strict=True)]
    text = table(header, rows)
    dropped = dropped_layers(pruning)
    return f"{text}\n\nLayers dropped: {', '.join(map(str, dropped))}." if dropped else text


def dropped_layers(pruning: Mapping[str, Any]) -> list[int]:
    """Return the 0-based numbers of the teacher's layers that were dropped."""
    total = next(axis["source"] for axis in pruning["axes"] if axis["axis"] == "layers")
    return sorted(set(range(total)) - set(pruning["kept_layers"]))


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for sample in samples:
        lines = [f"- {plain(label)}: {plain(text) or '(stops at once)'}" for label, text in sample["texts"].items()]
        parts.append(f"**{plain(sample['prompt'])}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _alignment(facts: Mapping[str, Any]) -> str:
    parts = []
    for found in tables(facts):
        rows = [[plain(cell) for cell in row] for row in found["rows"]]
        parts.append(f"{plain(found['title'])}:\n\n{table([plain(cell) for cell in found['header']], rows)}")
    return "\n\n".join([*parts, _samples(facts["samples"])])


def _cost(cost: Mapping[str, Any]) -> str:
    rows = [
        [plain(stage["stage"]), "" if stage["tokens"] is None else f"{stage['tokens']:,}", duration(stage["wall_s"])]
        for stage in cost["stages"]
    ]
    return table(["stage", "tokens", "time"], [*rows, ["total", "", duration(cost["total_wall_s"])]])


def _data_used(uses: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [plain(use["stage"]), code(use["source"]), f"{use['weight']:g}", f"{use['tokens']:,}", f"{use['epochs']:.2f}"]
        for use in uses
    ]
    return table(["stage", "source", "weight", "tokens used", "epochs"], rows)


def _lineage(report: Mapping[str, Any]) -> str:
    rows = [[plain(row["stage"]), plain(row["kind"]), code(row["fingerprint"][:12])] for row in report["lineage"]]
    versions = ", ".join(plain(f"{name} {version}") for name, version in report["lineage"][-1]["versions"].items())
    return table(["stage", "kind", "fingerprint"], rows) + (f"\n\nMade with {versions}." if versions else "")


def _section(
    key: str, text: Callable[[Any], str], note: Callable[[Mapping[str, Any]], str] = lambda report: ""
) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that renders one part of the report; the section is empty if the run has nothing for it.

    Args:
        note: a sentence about the part, in front of it; empty: none.
    """

    def render(report: Mapping[str, Any]) -> str:
        return "\n\n".join(part for part in (plain(note(report)), text(report[key])) if part) if report.get(key) else ""

    return render


_SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Before and after": lambda report: _models(report) if report["models"] else "",
    "Layer-local distillation": _section("layers", _layers),
    "Distillation": _section("curves", _validation, curve_note),
    "Search: which shape": _section("search", search_markdown),
    "What was cut": _section("pruning", _pruning, pruning_note),
    "What least squares won back": _section("compensation", compensation_markdown),
    "Sample texts": _section("samples", _samples),
    "Alignment": _section("alignment", _alignment),
    "Cost": lambda report: _cost(report["cost"]) if report["cost"]["stages"] else "",
    "Training text": _section("data_used", _data_used),
    "Lineage": lambda report: _lineage(report) if report["lineage"] else "",
}
"""Title -> function that renders the section."""
