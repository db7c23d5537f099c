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
from nemo_minitron.errors import MinitronError, PlanError
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan, make_plan
from nemo_minitron.plan.resources.costs import estimates
from nemo_minitron.report.collect import collect
from nemo_minitron.report.markdown import recipe_notes, render_markdown
from nemo_minitron.stages.kind import Output
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.disclosure import environment_of, masked_values, public_recipe
from nemo_minitron.system.files import write_whole


def render(
    title: str | None,
    stages: Mapping[str, Artifact],
    recipe_name: str,
    recipe: Mapping[str, Any],
    folder: Path,
    given: RunPlan | None = None,
) -> dict[str, Any]:
    """Write report.json, report.md and report.html into a folder.

    Args:
        title: None: the recipe's name.
        recipe: the resolved recipe; empty if it is not known.
        given: plan of the recipe that the user named, if it is another one.

    Returns:
        Facts for the manifest of a report stage.
    """
    from nemo_minitron.report.html import render_html

    plan = _plan_of(recipe) if recipe else None
    facts = collect(title or recipe_name, recipe_name, stages)
    facts["made_otherwise"] = made_otherwise(plan, stages) if plan else {}
    facts["given_otherwise"] = made_otherwise(given, stages) if given else {}
    facts = masked_values(facts, environment_of(recipe))
    planned = _planned(plan) if plan else {}
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


def render_now(plan: RunPlan) -> list[str]:
    """Render whatever has finished into the run's folder, without running anything.

    If stages were made with another recipe than the given one, the report shows the recipe of the last run.

    Returns:
        Warnings about the stages that were made with another recipe.

    Raises:
        PlanError: nothing has finished yet.
    """
    store = Store(run_dir(plan.recipe))
    stages = _finished(plan, store)
    if not stages:
        raise PlanError(
            "No stage of this run has finished yet.", where=str(store.root), next_step="minitron run RECIPE"
        )
    differs = made_otherwise(plan, stages)
    shown = _plan_of_last_run(plan, store, differs) if differs else plan
    recipe = shown.recipe
    reports = [recipe.stages[call.name] for call in shown.calls if Output.REPORT in STAGES[call.kind].outputs]
    title = getattr(reports[0], "title", None) if reports else None
    given = None if shown is plan else plan
    render(title, _finished(shown, store), recipe.name, recipe.model_dump(mode="json"), store.root, given)
    return recipe_notes({"made_otherwise": {} if given else differs, "given_otherwise": differs if given else {}})


def _finished(plan: RunPlan, store: Store) -> dict[str, Artifact]:
    """Return the finished stages of a plan, without its reports."""
    calls = [call for call in plan.calls if Output.REPORT not in STAGES[call.kind].outputs]
    return {call.name: store.artifact(call.name, "small") for call in calls if store.manifest(call.name)}


def made_otherwise(plan: RunPlan, stages: Mapping[str, Artifact]) -> dict[str, str]:
    """Return stage -> difference, for the finished stages that were not made with the recipe of a plan."""
    return {
        call.name: plan.states[call.name].reason
        for call in plan.calls
        if call.name in stages and stages[call.name].fingerprint != call.fingerprint
    }


def _plan_of_last_run(plan: RunPlan, store: Store, differs: Mapping[str, str]) -> RunPlan:
    """Return the plan of the last run in the same folder if it made more of the finished stages, else the given one."""
    given = plan.recipe
    try:
        last = Recipe.model_validate(json.loads(store.paths.plan.read_text(encoding="utf-8")))
        # The run may have been moved since then.
        execution = last.execution.model_copy(update={"run_root": given.execution.run_root})
        found = _plan_of(last.model_copy(update={"name": given.name, "execution": execution}).model_dump(mode="json"))
    except (OSError, ValueError, MinitronError):  # written by another version, or stages have gone
        return plan
    return found if len(made_otherwise(found, _finished(found, store))) < len(differs) else plan


def _plan_of(recipe: Mapping[str, Any]) -> RunPlan:
    """Plan a resolved recipe without listing the files of its sources again."""
    loaded = Recipe.model_validate(recipe)
    store = Store(run_dir(loaded))
    manifests = {name: store.manifest(name) for name in loaded.stages}
    return make_plan(
        loaded, {name: found.payload.get("sources", {}) if found else {} for name, found in manifests.items()}
    )


def _planned(plan: RunPlan) -> dict[str, dict[str, float]]:
    """Return stage -> the planner's estimates of its training; empty where there are none."""
    return {
        name: {"seconds": estimate.seconds, "peak_gib": estimate.memory.peak / 2**30}
        for name, estimate in estimates(plan).items()
        if estimate.memory.optimizer and not estimate.is_bound
    }


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return the resolved recipe as YAML, without values that may be secret."""
    return yaml.safe_dump(public_recipe(recipe), sort_keys=False, allow_unicode=True) if recipe else ""
