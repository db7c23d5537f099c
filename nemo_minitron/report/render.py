"""Write the report of a run from its finished stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.artifacts.store import Store
from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import PlanError
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan, make_plan
from nemo_minitron.plan.resources.costs import estimates
from nemo_minitron.report.collect import collect
from nemo_minitron.report.markdown import render_markdown
from nemo_minitron.stages.kind import Output
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.disclosure import environment_of, masked_values, public_recipe
from nemo_minitron.system.files import write_whole


def render(
    title: str | None, stages: Mapping[str, Artifact], recipe_name: str, recipe: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Write report.json, report.md and report.html into a folder.

    Args:
        title: None: the recipe's name.
        recipe: the resolved recipe; empty if it is not known.

    Returns:
        Facts for the manifest of a report stage.
    """
    from nemo_minitron.report.html import render_html

    facts = masked_values(collect(title or recipe_name, recipe_name, stages))
    facts = masked_values(facts, environment_of(recipe))
    planned = _planned(recipe)
    for row in facts["cost"]["stages"]:
        row["planned"] = planned.get(row["stage"])
    pages = {
        "report.json": json.dumps(facts, indent=2) + "\n",
        "report.md": render_markdown(facts),
        "report.html": render_html(facts, _recipe_text(recipe)),
    }
    for name, text in pages.items():
        write_whole(folder / name, text)
    return {"recovered_share": facts["recovered_share"]}


def render_now(plan: RunPlan) -> None:
    """Render whatever has finished into the run's folder, without running anything.

    Raises:
        PlanError: nothing has finished yet.
    """
    recipe, root = plan.recipe, run_dir(plan.recipe)
    store = Store(root)
    kinds = {call.name: STAGES[call.kind] for call in plan.calls}
    calls = [call for call in plan.calls if Output.REPORT not in kinds[call.name].outputs and store.manifest(call.name)]
    if not calls:
        raise PlanError("No stage of this run has finished yet.", where=str(root), next_step="minitron run RECIPE")
    stages = {call.name: store.artifact(call.name, "small") for call in calls}
    reports = [recipe.stages[name] for name, kind in kinds.items() if Output.REPORT in kind.outputs]
    title = getattr(reports[0], "title", None) if reports else None
    render(title, stages, recipe.name, recipe.model_dump(mode="json"), root)


def _planned(recipe: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return stage -> the planner's estimates of its training; empty where there are none."""
    if not recipe:
        return {}
    # Estimates do not depend on the sources of a run, so their files are not listed again.
    found = estimates(make_plan(Recipe.model_validate(recipe), {name: {} for name in recipe["stages"]}))
    return {
        name: {"seconds": estimate.seconds, "peak_gib": estimate.memory.peak / 2**30}
        for name, estimate in found.items()
        if estimate.memory.optimizer
    }


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return the resolved recipe as YAML, without values that may be secret."""
    return yaml.safe_dump(public_recipe(recipe), sort_keys=False, allow_unicode=True) if recipe else ""
