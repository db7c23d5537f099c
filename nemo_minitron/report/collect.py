"""Finished stages -> the facts of the report. Pure: reads artifacts, writes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.evaluation.metrics import recovered_share
from nemo_minitron.pruning.plan_file import PLAN_FILE, from_ranges

LABELS = ("teacher", "distilled", "pruned", "random")
"""Order of the columns; other labels follow."""
HIGHER_IS_BETTER = ("acc", "acc_norm")
_AXES = {
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "attention heads",
    "num_layers": "layers",
}


def collect(title: str, recipe_name: str, stages: Mapping[str, Artifact]) -> dict[str, Any]:
    """report.json: what was cut, what it did, what it cost. Parts whose stage is missing are empty."""
    models = _models(stages)
    loss = {label: model["bits_per_byte"] for label, model in models.items()}
    known = all(label in loss for label in ("teacher", "pruned", "distilled"))
    return {
        "schema": 1,
        "title": title,
        "recipe": recipe_name,
        "models": models,
        "recovered_share": recovered_share(loss["teacher"], loss["pruned"], loss["distilled"]) if known else None,
        "comparison": comparison(models, _first(stages, "speed")),
        "pruning": _pruning(stages),
        "curves": _curves(stages),
        "speed": dict(speed.result) if (speed := _first(stages, "speed")) else None,
        "data": dict(data.result) if (data := _first(stages, "tokenize")) else None,
        "cost": _cost(stages),
        "samples": _samples(stages),
        "lineage": [_lineage(stage) for stage in stages.values()],
    }


def _of_kind(stages: Mapping[str, Artifact], kind: str) -> list[Artifact]:
    return [stage for stage in stages.values() if stage.kind == kind]


def _first(stages: Mapping[str, Artifact], kind: str) -> Artifact | None:
    return next(iter(_of_kind(stages, kind)), None)


def _models(stages: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    found = {stage.result["label"]: dict(stage.result) for stage in _of_kind(stages, "evaluate")}
    ordered = [label for label in LABELS if label in found] + [label for label in found if label not in LABELS]
    return {label: found[label] for label in ordered}


def comparison(models: Mapping[str, Mapping[str, Any]], speed: Artifact | None) -> list[dict[str, Any]]:
    """Rows of the before/after table: {name, text: label -> shown value, best: label of the best pruned model}."""
    rows = [
        _row("parameters", models, lambda m: m["num_params"], "{:,}"),
        _row("bits per byte", models, lambda m: m["bits_per_byte"], "{:.3f}", best=min),
        _row("perplexity", models, lambda m: m["perplexity"], "{:.1f}", best=min),
    ]
    tasks = dict.fromkeys(task for model in models.values() for task in model["tasks"])
    for task in tasks:
        metric = "acc_norm" if all("acc_norm" in m["tasks"].get(task, {}) for m in models.values()) else "acc"
        rows.append(_task_row(task, metric, models))
    rows.append(_row("checkpoint, MiB", models, lambda m: m["checkpoint_bytes"] / 2**20, "{:.0f}"))
    if speed is not None:
        measured = {label: speed.result["models"][label] for label in models if label in speed.result["models"]}
        rows.append(_row("generation, tokens/s", measured, lambda m: m["generate_tokens_per_s"], "{:.1f}"))
        rows.append(_row("prefill, tokens/s", measured, lambda m: m["prefill_tokens_per_s"], "{:.0f}"))
    return rows


def _row(name: str, models: Mapping[str, Any], value: Any, form: str, best: Any = None) -> dict[str, Any]:
    values = {label: value(model) for label, model in models.items()}
    small = {label: number for label, number in values.items() if label != "teacher"}
    winner = best(small, key=small.get) if best and len(small) > 1 else None
    return {"name": name, "text": {label: form.format(number) for label, number in values.items()}, "best": winner}


def _task_row(task: str, metric: str, models: Mapping[str, Any]) -> dict[str, Any]:
    scores = {label: model["tasks"].get(task, {}) for label, model in models.items()}
    row = _row(f"{task} ({metric})", scores, lambda s: s.get(metric, float("nan")), "{:.3f}", best=max)
    for label, score in scores.items():
        if f"{metric}_stderr" in score:
            row["text"][label] += f" ± {score[f'{metric}_stderr']:.3f}"
    return row


def _pruning(stages: Mapping[str, Artifact]) -> dict[str, Any] | None:
    chosen = [stage for stage in _of_kind(stages, "select") if stage.result.get("method") == "importance"]
    if not chosen:
        return None
    plan = json.loads((chosen[0].path / PLAN_FILE).read_text())
    axes = [
        {"axis": name, "source": source, "kept": plan["target"][size], "share": plan["target"][size] / source}
        for size, name in _AXES.items()
        for source in [plan["source"][size]]
    ]
    kept = from_ranges(plan["keep"]["layers"])
    return {"axes": axes, "kept_layers": list(kept), "num_params": plan["num_params"], "stage": chosen[0].stage}


def _curves(stages: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    distill = _first(stages, "distill")
    file = distill.path / "curves.jsonl" if distill else None
    return [json.loads(line) for line in file.read_text().splitlines()] if file and file.is_file() else []


def _cost(stages: Mapping[str, Artifact]) -> dict[str, Any]:
    rows = [
        {"stage": stage.stage, "kind": stage.kind, "wall_s": float(stage.provenance.get("wall_s", 0.0))}
        for stage in stages.values()
    ]
    distill = _first(stages, "distill")
    return {
        "stages": rows,
        "total_wall_s": sum(row["wall_s"] for row in rows),
        "distill_tokens": distill.result.get("tokens") if distill else None,
        "distill_wall_s": distill.result.get("wall_s") if distill else None,
    }


def _samples(stages: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """[{prompt, texts: label -> continuation}]."""
    by_prompt: dict[str, dict[str, str]] = {}
    for stage in _of_kind(stages, "evaluate"):
        metrics = json.loads((stage.path / "metrics.json").read_text())
        for sample in metrics["samples"]:
            by_prompt.setdefault(sample["prompt"], {})[metrics["label"]] = sample["text"]
    return [{"prompt": prompt, "texts": texts} for prompt, texts in by_prompt.items()]


def _lineage(stage: Artifact) -> dict[str, Any]:
    facts = stage.provenance
    return {
        "stage": stage.stage,
        "kind": stage.kind,
        "fingerprint": stage.fingerprint,
        "started": facts.get("started"),
        "versions": facts.get("versions", {}),
        "git_commit": facts.get("git_commit"),
    }


def load_scores(stages: Mapping[str, Artifact]) -> tuple[Path | None, dict[str, Any] | None]:
    """(scores.safetensors, prune plan) for the pictures."""
    score = _first(stages, "score")
    chosen = [stage for stage in _of_kind(stages, "select") if stage.result.get("method") == "importance"]
    plan = json.loads((chosen[0].path / PLAN_FILE).read_text()) if chosen else None
    return (score.path / "scores.safetensors" if score else None), plan
