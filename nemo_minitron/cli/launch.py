"""`minitron launch`: bring a recipe to a cluster."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nemo_minitron import api
from nemo_minitron.cli.arguments import AcceptDrift, Overrides, RecipeFile, Rerun, Until
from nemo_minitron.cli.output import console, print_warnings
from nemo_minitron.system.terminal import Screen, write

if TYPE_CHECKING:
    from nemo_minitron.launch.base import Step
    from nemo_minitron.launch.record import Submission
    from nemo_minitron.plan.planner import RunPlan


def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print every command and script; submit nothing.")] = False,
    rerun: Rerun = None,
    accept_drift: AcceptDrift = False,
    until: Until = None,
) -> None:
    """Submit a recipe to a cluster (`launcher=slurm cluster=NAME`), or run it here, in its containers."""
    from nemo_minitron.execution.runner import RunOptions
    from nemo_minitron.launch import registry
    from nemo_minitron.plan.checks import require_possible, require_valid
    from nemo_minitron.plan.programs import foreign_programs

    loaded = api.load_recipe(recipe, overrides)
    plan = api.plan(loaded, checked=False)
    options = RunOptions(tuple(rerun or ()), accept_drift, until)
    if dry_run:
        require_possible(plan)
        _print_missing(plan)
        typed = [word for word in sys.argv[2:] if word != "--dry-run"]
        _print_steps(registry.of_recipe(loaded).render(plan, options, typed))
        return
    require_valid(plan)
    print_warnings(foreign_programs(recipe, loaded))
    done = registry.of_recipe(loaded).submit(plan, options, console.say)
    if done is None:
        console.say("nothing was submitted", "all stages have finished;", "green")
    elif done.jobs:
        _print_submission(done)


def _print_missing(plan: RunPlan) -> None:
    """Print what is not on this machine to stderr, because stdout has the scripts."""
    from nemo_minitron.launch.probe import missing_here
    from nemo_minitron.plan.missing import missing_sources

    screen = Screen(stderr=True)
    for text in (*missing_sources(plan), *missing_here(plan)):
        screen.say(text, "missing here", "yellow")


def _print_steps(steps: list[Step]) -> None:
    for step in steps:
        if step.script is None:
            write(shlex.join(step.command))
            continue
        # A line break in the command would end the comment.
        write(f"# {shlex.join(step.command)}" if "\n" not in "".join(step.command) else f"# {list(step.command)!r}")
        write(step.script)


def _print_submission(done: Submission) -> None:
    table = Table(title=f"submitted, {done.folder}")
    for column in ("job", "stages", "job id"):
        table.add_column(column)
    for job in done.jobs:
        stages = job.stages[0] if len(job.stages) == 1 else f"{len(job.stages)}: {job.stages[0]} ..."
        table.add_row(job.name, stages, ", ".join(job.job_ids))
    console.print(table)
    console.say("watch: minitron status RECIPE     end: minitron cancel RECIPE")
