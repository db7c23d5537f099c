"""`minitron check`: every mistake in a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nemo_minitron import api
from nemo_minitron.cli.arguments import Overrides, RecipeFile
from nemo_minitron.cli.output import console, print_warnings
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.heap import skip_collection_at_exit

if TYPE_CHECKING:
    from nemo_minitron.plan.planner import RunPlan

STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[bool, typer.Option(help="Inspect the cluster too, as far as it is visible from here.")] = False,
) -> None:
    """Find every mistake in a recipe. Needs no GPU, no torch, no network."""
    skip_collection_at_exit()
    plan = api.load_plan(recipe, overrides, checked=False)

    from nemo_minitron.plan.checks import require_valid
    from nemo_minitron.plan.functions import functions_elsewhere
    from nemo_minitron.plan.heldout_rows import heldout_warnings
    from nemo_minitron.plan.text_amounts import text_warnings

    try:
        if cluster:
            _check_cluster(plan)
    finally:
        # The cluster's findings are printed by now; the recipe's own problems are reported in any case.
        require_valid(plan)
    stages = plan.recipe.stages
    print_warnings([*functions_elsewhere(stages), *heldout_warnings(stages), *text_warnings(plan)])
    console.say(f"{plan.recipe.name}: {len(plan.calls)} stages", "ok", "green")


def _check_cluster(plan: RunPlan) -> None:
    """Print what can be seen of the cluster from here.

    Raises:
        EnvironmentProblem: the cluster lacks something that the recipe needs.
    """
    from nemo_minitron.launch.probe import probe

    findings = probe(plan)
    for found in findings:
        console.say(found.text, found.level, STYLES[found.level])
    wrong = [found.text for found in findings if found.level == "problem"]
    if wrong:
        raise EnvironmentProblem(f"The cluster cannot take this recipe: {len(wrong)} problems, above.")
