"""The package in a notebook, a test or a benchmark: load a recipe, plan it, run it, report on it.

>>> from nemo_minitron import api
>>> recipe = api.load_recipe("toy/width", ["stages.distill.lr=1e-3"])
>>> [call.name for call in api.plan(recipe).calls][:2]
['teacher', 'data']
>>> folder = api.run(recipe, until="prune")  # doctest: +SKIP
>>> page = api.report(recipe)  # doctest: +SKIP

Every function raises `MinitronError` for an error that a user can cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.system.heap import collector_paused

# Imports are inside the functions, so that `minitron check` and `plan` start without torch.
if TYPE_CHECKING:
    from nemo_minitron.config.recipe import Recipe
    from nemo_minitron.plan.planner import RunPlan

__all__ = ["load_plan", "load_recipe", "plan", "report", "run"]


@collector_paused()
def load_recipe(file: Path | str, overrides: Sequence[str] | None = None) -> Recipe:
    """Compose and validate a recipe.

    Args:
        file: a recipe file, or the name of a recipe of the package, e.g. toy/width.
        overrides: KEY=VALUE, as on the command line.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    from nemo_minitron.config.compose import compose
    from nemo_minitron.config.explain import validate

    return validate(compose(Path(file), list(overrides or ())), where=str(file))


@collector_paused()
def plan(recipe: Recipe, *, checked: bool = True) -> RunPlan:
    """Order the stages and compare them with what the run's folder already has.

    Args:
        checked: refuse a recipe that breaks a rule or whose sources are missing.

    Raises:
        PlanError: the stages do not fit together, or `checked` found problems; it lists all of them.
    """
    from nemo_minitron.plan.checks import require_valid
    from nemo_minitron.plan.planner import make_plan

    found = make_plan(recipe)
    if checked:
        require_valid(found)
    return found


def load_plan(file: Path | str, overrides: Sequence[str] | None = None, *, checked: bool = True) -> RunPlan:
    """Load a recipe and plan it; see `load_recipe` and `plan`."""
    return plan(load_recipe(file, overrides), checked=checked)


def run(
    recipe: Recipe | RunPlan,
    *,
    rerun: Sequence[str] = (),
    accept_drift: bool = False,
    until: str | None = None,
    quiet: bool = False,
) -> Path:
    """Run the stages that have not finished, in this process and on this machine, and return the run's folder.

    Args:
        recipe: the recipe, which is planned first and refused as by `plan`; or its plan, which is used as it is.
        rerun: stages to run again, with all stages that depend on them; "changed" stands for every changed stage.
        accept_drift: use finished outputs that no longer match the recipe, and resume unfinished trainings whose rates
            or intervals have changed.
        until: run this stage and what it needs, nothing else.
        quiet: print no progress.

    Raises:
        MinitronError: the first problem; stages that had finished stay.
        Interrupted: the run was asked to stop; the same call continues it.
    """
    from nemo_minitron.execution.runner import RunOptions, run_plan
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.plan.planner import RunPlan

    planned = recipe if isinstance(recipe, RunPlan) else plan(recipe)
    run_plan(planned, RunOptions(tuple(rerun), accept_drift, until), quiet=quiet)
    return run_dir(planned.recipe)


def report(recipe: Recipe) -> Path:
    """Render report.json, report.md and report.html from the finished stages, and return the HTML file.

    Raises:
        PlanError: no stage has finished yet.
    """
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.report.render import render_now

    render_now(plan(recipe, checked=False))
    return run_dir(recipe) / "report.html"
