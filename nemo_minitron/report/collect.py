"""Collecting the facts of the report from finished stages. This only reads artifacts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.evaluation.metrics import recovered_share
from nemo_minitron.report.alignment import alignment_facts
from nemo_minitron.report.comparison import comparison, ordered
from nemo_minitron.report.compensation import compensation_facts
from nemo_minitron.report.curves import MAX_CURVE_ROWS, thin_out
from nemo_minitron.report.importance import pruning_facts
from nemo_minitron.report.lineage import line_of
from nemo_minitron.report.sections import in_section
from nemo_minitron.stages.kind import Output
from nemo_minitron.stages.registry import STAGES

SCHEMA = 1


def collect(title: str, recipe_name: str, stages: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return the content of report.json: sizes, quality and cost. Parts whose stage is missing are empty or None."""
    in_order = sorted(stages.values(), key=lambda stage: str(stage.provenance.get("started", "")))
    found = {str(stage.result["label"]): _model(stage) for stage in in_section(in_order, "evaluation")}
    models = {label: found[label] for label in ordered(found)}
    line = _line(stages, in_order)
    speed, data = _first(in_order, "speed"), _data(stages, line)
    distillations = in_section(line, "distillation")
    return {
        "schema": SCHEMA,
        "title": title,
        "recipe": recipe_name,
        "models": models,
        "recovered_share": _recovered(models),
        "comparison": comparison(models, speed.result if speed else None),
        "search": _search(stages),
        "pruning": _pruning(stages, in_order, line),
        "compensation": compensation_facts(_last(line, "compensation") or _first(in_order, "compensation")),
        "rounds": [stage.stage for stage in distillations],
        "curves": _curves(distillations[-1]) if distillations else [],
        "layers": _layers(in_order),
        "speed": dict(speed.result) if speed else None,
        "data": dict(data.result) if data else None,
        "data_used": _data_used(in_order),
        "cost": _cost(in_order, distillations),
        "samples": _samples(in_order),
        "alignment": alignment_facts(in_order),
        "lineage": [_lineage(stage) for stage in in_order],
    }


def _first(stages: Sequence[Artifact], section: str) -> Artifact | None:
    return next(iter(in_section(stages, section)), None)


def _last(stages: Sequence[Artifact], section: str) -> Artifact | None:
    return next(iter(in_section(stages, section)[::-1]), None)


def _line(stages: Mapping[str, Artifact], in_order: Sequence[Artifact]) -> list[Artifact]:
    """Return the stages that made the student, the oldest first.

    The student is the model that is measured as `distilled`, or else the exported one, or else the one distilled last.
    """
    models = [stage.inputs.get("model") for stage in in_section(in_order, "evaluation") if _label(stage) == "distilled"]
    models += [stage.inputs.get("model") for stage in in_order if _exports(stage)]
    models += [stage.stage for stage in in_section(in_order, "distillation")[-1:]]
    lines = (line_of(model, stages) for model in models)
    return next((line for line in lines if line), [])


def _label(stage: Artifact) -> str:
    return str(stage.result["label"])


def _exports(stage: Artifact) -> bool:
    return stage.kind in STAGES and Output.EXPORTED_MODEL in STAGES[stage.kind].outputs


def _data(stages: Mapping[str, Artifact], line: Sequence[Artifact]) -> Artifact | None:
    """Return the text of the student's last training, or else the first text of the recipe."""
    named = [str(stage.inputs.get("data")) for stage in in_section(line, "distillation", "training")[::-1]]
    found = [stages[name] for name in named if name in stages]
    return found[0] if found else _first(list(stages.values()), "data")


def _model(stage: Artifact) -> dict[str, Any]:
    return {key: value for key, value in stage.result.items() if key != "samples"}


def _recovered(models: Mapping[str, Mapping[str, Any]]) -> float | None:
    if not {"teacher", "pruned", "distilled"} <= models.keys():
        return None
    teacher, pruned, distilled = (models[label]["bits_per_byte"] for label in ("teacher", "pruned", "distilled"))
    return recovered_share(teacher, pruned, distilled)


def _pruning(
    stages: Mapping[str, Artifact], in_order: Sequence[Artifact], line: Sequence[Artifact]
) -> dict[str, Any] | None:
    """Return facts of the student's pruning plans, or else of the first plan made from scores.

    Plans of the random control have no scores.
    """
    named = dict.fromkeys(str(stage.inputs.get("plan")) for stage in line)
    plans = in_section([stages[name] for name in named if name in stages], "selection")
    if not plans:
        every = in_section(in_order, "selection")
        plans = [plan for plan in every if plan.result.get("method") == "importance"][:1] or every[:1]
    if not plans:
        return None
    score = _importance(plans[-1], stages, in_order)
    facts = pruning_facts([plan.path for plan in plans], score.path if score else None)
    return {"stage": plans[-1].stage, **facts}


def _importance(plan: Artifact, stages: Mapping[str, Artifact], in_order: Sequence[Artifact]) -> Artifact | None:
    """Return the stage with the importance by which a plan was made, or for a control the first of the run.

    None if the plan was made from ranks: their sums and curves depend on sizes alone.
    """
    named = stages.get(plan.inputs.get("scores", ""))
    return _first(in_order if named is None else [named], "scores")


def _search(stages: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """Return the facts of the first search in the order of the plan, not by start time."""
    search = _first(list(stages.values()), "search")
    return json.loads((search.path / "search.json").read_text(encoding="utf-8")) if search else None


def _curves(distillation: Artifact) -> list[dict[str, Any]]:
    """Return rows of a distillation's curves: training {step, train_loss, tokens, ...} or {step, valid_loss, ...}.

    The latter have valid_kl and valid_teacher_loss if the teacher was in memory or its cache covers the held-out text.
    """
    file = distillation.path / "curves.jsonl"
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    training = thin_out([row for row in rows if "train_loss" in row], MAX_CURVE_ROWS)
    validation = thin_out([row for row in rows if "valid_loss" in row], MAX_CURVE_ROWS)
    return sorted([*training, *validation], key=lambda row: int(row["step"]))


def _layers(stages: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return {stage, losses} of each layer-local distillation; losses are (before, after) of each layer."""
    return [
        {
            "stage": stage.stage,
            "losses": list(zip(stage.result["initial_layer_losses"], stage.result["final_layer_losses"], strict=True)),
        }
        for stage in in_section(stages, "training")
        if "final_layer_losses" in stage.result
    ]


def _data_used(stages: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return rows {stage, source, weight, tokens, epochs} of the trainings, without the candidates of a search."""
    trained = in_section(stages, "training", "distillation")
    return [{"stage": stage.stage, **use} for stage in trained for use in stage.result.get("data_used", ())]


def _cost(stages: Sequence[Artifact], distillations: Sequence[Artifact]) -> dict[str, Any]:
    rows = [
        {
            "stage": stage.stage,
            "kind": stage.kind,
            "wall_s": _wall_s(stage),
            "tokens": _tokens(stage),
            "peak_memory_gib": stage.result.get("peak_memory_gib"),
            "planned": None,
        }
        for stage in stages
    ]
    tokens = [stage.result["tokens"] for stage in distillations if "tokens" in stage.result]
    return {
        "stages": rows,
        "total_wall_s": math.fsum(_wall_s(stage) for stage in stages),
        "distill_tokens": sum(tokens) if tokens else None,
        "distill_wall_s": math.fsum(map(_wall_s, distillations)) if distillations else None,
    }


def _wall_s(stage: Artifact) -> float:
    return float(stage.provenance.get("wall_s", 0.0))


def _tokens(stage: Artifact) -> int | None:
    """Return the number of tokens that a stage processed, or None if it does not report it."""
    found = STAGES[stage.kind].result_tokens(stage.result) if stage.kind in STAGES else None
    return None if found is None else int(found)


def _samples(stages: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return [{prompt, texts: {label: continuation}}]."""
    by_prompt: dict[str, dict[str, str]] = {}
    for stage in in_section(stages, "evaluation"):
        metrics = json.loads((stage.path / "metrics.json").read_text(encoding="utf-8"))
        for sample in metrics["samples"]:
            by_prompt.setdefault(sample["prompt"], {})[metrics["label"]] = sample["text"]
    return [{"prompt": prompt, "texts": texts} for prompt, texts in by_prompt.items()]


def _lineage(stage: Artifact) -> dict[str, Any]:
    """Return the provenance of a stage without host, user and paths."""
    facts = stage.provenance
    return {
        "stage": stage.stage,
        "kind": stage.kind,
        "fingerprint": stage.fingerprint,
        "started": facts.get("started"),
        "wall_s": facts.get("wall_s"),
        "git_commit": facts.get("git_commit"),
        "versions": _versions(facts),
    }


def _versions(facts: Mapping[str, Any]) -> dict[str, str]:
    own = {key.replace("_", "-"): facts[key] for key in ("nemo_minitron", "python") if key in facts}
    return {**own, **facts.get("versions", {})}
