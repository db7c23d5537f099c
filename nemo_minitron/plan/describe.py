"""Plans and stage states as JSON-compatible dicts, for tables and for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_minitron.artifacts.store import Store
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.plan.shapes import shape_facts
from nemo_minitron.plan.view import View
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.duration import duration

_SUMMARY_KEYS = (
    "num_params",
    "bits_per_byte",
    "loss_nats_per_token",
    "final_valid_loss",
    "train_num_tokens",
    "train_rows",
    "valid_rows",
)


def plan_facts(plan: RunPlan) -> dict[str, Any]:
    """Describe the plan: its name, teacher and student sizes, and the stages in order with state and fingerprint."""
    teacher, student = _models(plan)
    return {
        "name": plan.recipe.name,
        "run_dir": str(run_dir(plan.recipe)),
        "teacher": teacher,
        "student": student,
        "candidates": _candidates(plan),
        "stages": [
            {
                "name": call.name,
                "kind": call.kind,
                "status": plan.states[call.name].status,
                "reason": plan.states[call.name].reason,
                "inputs": call.inputs,
                "params": call.params,
                "parallel": call.parallel.model_dump(),
                "processes": call.parallel.world_size,
                "fingerprint": call.fingerprint,
            }
            for call in plan.calls
        ],
    }


def _models(plan: RunPlan) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the sizes of the first teacher and of the last student in a chain of prunings by importance."""
    view = View(plan.recipe)
    found = [STAGES[call.kind].reduction(call.name, view.stages[call.name], view) for call in plan.calls]
    chosen = [shapes for shapes in found if shapes is not None]
    if not chosen:
        return None, None
    teacher, student = chosen[0][0], chosen[-1][1]
    facts = None if teacher is None else shape_facts(teacher)
    if facts is None or student is None:
        return facts, None
    sizes = shape_facts(student)
    return facts, {**sizes, "share": sizes["num_params"] / facts["num_params"]}


def _candidates(plan: RunPlan) -> list[dict[str, Any]]:
    """List the grid points of every search, with their sizes and estimated costs."""
    view = View(plan.recipe)
    return [
        dict(point) for name, stage in view.stages.items() for point in STAGES[stage.kind].points(name, stage, view)
    ]


def status_facts(
    plan: RunPlan, *, verify: bool, jobs: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> dict[str, Any]:
    """Describe the state of each stage, with the progress of a running one.

    Args:
        jobs: stage name -> state of its job as the scheduler reports it.

    Raises:
        ArtifactError: with `verify`, a file differs from the one that was published.
    """
    store = Store(run_dir(plan.recipe))
    return {
        "name": plan.recipe.name,
        "run_dir": str(store.root),
        "stages": {
            call.name: {**_stage_facts(call.name, plan, store, verify), "job": jobs.get(call.name)}
            for call in plan.calls
        },
    }


def _stage_facts(name: str, plan: RunPlan, store: Store, verify: bool) -> dict[str, Any]:
    state, manifest = plan.states[name], store.manifest(name)
    facts: dict[str, Any] = {"status": state.status, "reason": state.reason, "took": "", "summary": state.reason}
    facts |= {"running": False, "eta": ""}
    if manifest is not None:
        store.verify(name, manifest, "all" if verify else "sizes")
        facts["wall_s"] = manifest.provenance.get("wall_s")
        facts["took"] = duration(facts["wall_s"]) if _is_number(facts["wall_s"]) else ""
        facts["summary"] = ", ".join(
            _show(key, manifest.result[key]) for key in _SUMMARY_KEYS if key in manifest.result
        )
    running = _progress(store.paths.progress(name)) if manifest is None else None
    if running is not None:
        fields = " ".join(f"{key} {value}" for key, value in running["fields"].items())
        facts["status"] = f"{running['done']}/{running['total']} {running['unit']}"
        facts["running"] = True
        facts["eta"] = duration(running["eta_s"]) if running["eta_s"] is not None else ""
        facts["summary"] = f"{fields} {facts['eta'] and 'left ' + facts['eta']}".strip()
    return facts


def _progress(file: Path) -> dict[str, Any] | None:
    """Read the progress file of a running stage; return None if it is missing or invalid."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    keys = {"done", "total", "unit", "eta_s", "fields"}
    if not isinstance(found, dict) or not keys <= found.keys() or not isinstance(found["fields"], dict):
        return None
    return found if found["eta_s"] is None or _is_number(found["eta_s"]) else None


def _is_number(value: Any) -> bool:
    """Return whether the value is a finite number that can be formatted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _show(key: str, value: Any) -> str:
    if not _is_number(value):
        return f"{key} {value}"
    return f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}"
