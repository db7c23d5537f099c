"""Report section on alignment: trainings, measurements of the models, and their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.backends.alignment.base import CURVES_FILE, alignment_backend
from nemo_minitron.report.curves import MAX_CURVE_ROWS, thin_out
from nemo_minitron.report.rewards import reward_samples, reward_table, reward_trainings
from nemo_minitron.report.sampled_answers import sampled_answers, sampled_table
from nemo_minitron.report.sections import in_section

QUESTIONS_BY_LEVEL = 3
DIRECTIONS = {
    "preference accuracy": "higher is better, 0.5 is chance",
    "reward accuracy": "higher is better, 0.5 is the start",
    "reward margin, nats": "higher is better",
    "loss of answers": "lower is better",
    "exact match": "higher is better",
    "rules followed": "higher is better",
}
"""Figure of a model -> how to read it."""
Rows = list[dict[str, Any]]


def alignment_facts(stages: Sequence[Artifact]) -> dict[str, Any] | None:
    """Return {trainings, curves, models, ..., rewards, sampled, samples}; None if there is nothing to show."""
    trained = in_section(stages, "alignment")
    measured, rewarded = in_section(stages, "chat_evaluation"), in_section(stages, "rewards")
    if not trained and not measured and not rewarded:
        return None
    return {
        "trainings": [_training(stage) for stage in trained],
        "curves": {stage.stage: _curve(stage) for stage in trained},
        "models": _models(measured),
        "attributes": [row for stage in trained for row in _attributes(stage)],
        "lengths": [row for stage in measured for row in _lengths(stage)],
        "rewards": reward_trainings(rewarded),
        "sampled": sampled_answers(in_section(stages, "sampled_answers")),
        "samples": [
            *_samples(measured),
            *reward_samples(rewarded),
            *(sample for stage in measured for sample in _by_level(stage)),
        ],
    }


def _training(stage: Artifact) -> dict[str, Any]:
    lengths = stage.result["lengths"]["train"]
    facts = {key: stage.result[key] for key in ("method", "num_steps")}
    for key in ("first_valid_loss", "valid_loss"):
        facts[key] = (stage.result[key], stage.result.get(f"{key}_se"))
    return {"stage": stage.stage, **facts, "rows": lengths["rows"], "dropped_rows": lengths["dropped_rows"]}


def _curve(stage: Artifact) -> Rows:
    rows = [asdict(point) for point in alignment_backend().read_curve(stage.path / CURVES_FILE)]
    parts = ([row for row in rows if row[part] is not None] for part in ("train", "valid"))
    shown = {id(row): row for part in parts for row in thin_out(part, MAX_CURVE_ROWS)}
    return sorted(shown.values(), key=lambda row: int(row["step"]))


def _models(stages: Sequence[Artifact]) -> Rows:
    """Return a row for each model: evaluations with one label are one row, unless they have a figure in common."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in stages:
        found = _model(stage.result)
        row = rows.setdefault(found["label"], found)
        if row is found:
            continue
        if row.keys() & found.keys() <= {"label", "rows"}:
            both = " and ".join(one["rows"] for one in (row, found) if "rows" in one)
            row |= {**found, **({"rows": both} if both else {})}
        else:
            label = f"{found['label']} ({stage.stage})"
            rows[label] = {**found, "label": label}
    return list(rows.values())


def _model(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table: {figure: (value, standard error or None), or text}."""
    out: dict[str, Any] = {"label": result["label"]}
    if "measured_rows" in result:
        left_out = result["measured_rows"] < result["rows"]
        out["rows"] = f"{result['measured_rows']:,} of {result['rows']:,}" if left_out else f"{result['rows']:,}"
    preferences = result.get("preferences")
    if preferences:
        plain = preferences["log_probs"]
        tokens = preferences["mean_tokens"]
        out["tokens, preferred and other"] = f"{tokens['chosen']:.0f} and {tokens['rejected']:.0f}"
        out["preference accuracy"] = (plain["accuracy"], plain["accuracy_se"])
        if "against_reference" in preferences:
            gained = preferences["against_reference"]
            out["reward accuracy"] = (gained["accuracy"], gained["accuracy_se"])
            out["reward margin, nats"] = (gained["margin_nats"], gained["margin_nats_se"])
    if "conversations" in result:
        found = result["conversations"]
        out["loss of answers"] = (found["loss_nats_per_token"], found.get("loss_se"))
    if "exact_match" in result:
        out["exact match"] = (result["exact_match"]["share"], result["exact_match"]["se"])
    if "instructions" in result:
        out["rules followed"] = (result["instructions"]["prompt_strict"], result["instructions"]["prompt_strict_se"])
    if "attribute" in result:
        attribute = result["attribute"]
        out[f"rank correlation of length and {attribute['name']}"] = (attribute["rank_correlation"], attribute["se"])
    return out


def _attributes(stage: Artifact) -> Rows:
    """Return rows on the agreement of an attribute model with human ratings."""
    found = stage.result.get("agreement", {})
    return [{"stage": stage.stage, "attribute": name, **values} for name, values in found.items()]


def _samples(stages: Sequence[Artifact]) -> Rows:
    by_prompt: dict[str, dict[str, str]] = {}
    for stage in stages:
        metrics = json.loads((stage.path / "metrics.json").read_text(encoding="utf-8"))
        for sample in metrics["samples"]:
            by_prompt.setdefault(sample["prompt"], {})[metrics["label"]] = sample["text"]
    return [{"prompt": prompt, "texts": texts} for prompt, texts in by_prompt.items()]


def _lengths(stage: Artifact) -> Rows:
    """Return the mean tokens of answers by requested level of an attribute."""
    found = stage.result.get("attribute")
    return [{"label": stage.result["label"], **found}] if found else []


def _by_level(stage: Artifact) -> Rows:
    """Return questions with the answers for each requested level of the attribute."""
    found = stage.result.get("attribute")
    if not found:
        return []
    rows = [json.loads(line) for line in (stage.path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    out: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.get("level") is not None and "prompt" in row:
            out.setdefault(row["prompt"], {})[f"{found['name']} {row['level']}"] = row["answer"]
    return [{"prompt": prompt, "texts": texts} for prompt, texts in islice(out.items(), QUESTIONS_BY_LEVEL)]


def tables(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of the section as [{title, header, rows}]; all cells are text."""
    out = [_training_table(facts["trainings"])] if facts["trainings"] else []
    if facts["rewards"]:
        out.append(reward_table(facts["rewards"]))
    if facts["sampled"]:
        out.append(sampled_table(facts["sampled"]))
    if facts["models"]:
        figures = _figures(facts["models"])
        cells = [[row["label"], *(_cell(row.get(figure)) for figure in figures)] for row in facts["models"]]
        header = ["model", *map(with_direction, figures)]
        out.append({"title": "On held-out rows, ± one standard error", "header": header, "rows": cells})
    for row in facts["lengths"]:
        by_level = row["mean_tokens_by_level"]
        header = [row["name"], *by_level]
        cells = [[row["label"], *(f"{tokens:.1f}" for tokens in by_level.values())]]
        out.append({"title": f"Tokens of an answer, by requested {row['name']}", "header": header, "rows": cells})
    if facts["attributes"]:
        header = ["attribute", "rows", "squared error", "of the mean", "explained", "correlation"]
        out.append({"title": "Attribute model and human ratings", "header": header, "rows": _attribute_rows(facts)})
    return out


def with_direction(figure: str) -> str:
    """Return the name of a figure with the direction in which it is better."""
    return f"{figure} ({DIRECTIONS[figure]})" if figure in DIRECTIONS else figure


def measured_figures(models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return {figure: {label: (value, standard error)}} of the figures that at least two models have."""
    out = {
        figure: {row["label"]: row[figure] for row in models if _has_error(row.get(figure))}
        for figure in _figures(models)
        if figure in DIRECTIONS
    }
    return {figure: values for figure, values in out.items() if len(values) > 1}


def _has_error(value: Any) -> bool:
    return isinstance(value, tuple | list) and value[1] is not None


def _figures(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in models for key in row if key != "label"))


def _training_table(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            row["stage"],
            f"{row['rows']:,}",
            f"{row['num_steps']:,}",
            _cell(row["first_valid_loss"]),
            _cell(row["valid_loss"]),
        ]
        for row in trainings
    ]
    header = ["stage", "rows", "steps", "held-out loss before", "held-out loss after (lower is better)"]
    return {"title": "Trained by NeMo-Aligner", "header": header, "rows": rows}


def _attribute_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["attribute"],
            str(row["rows"]),
            _number(row["mse"]),
            _number(row["mse_of_mean"]),
            f"{row['r2_over_mean']:.0%}",
            _number(row.get("pearson")),
        ]
        for row in facts["attributes"]
    ]


def _cell(value: Any) -> str:
    """Format text, or (number, standard error or None)."""
    if value is None or isinstance(value, str):
        return value or ""
    number, error = value
    return _number(number) if error is None or number is None else f"{number:.3f} ± {error:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
