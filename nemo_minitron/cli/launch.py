"""`minitron launch`, `logs`, `cancel`, and `stage`, which the jobs call."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nemo_minitron.cli.plan import print_warnings
from nemo_minitron.errors import ConfigError, EnvironmentProblem, Interrupted, MinitronError, ProcessesDied
from nemo_minitron.system.disclosure import masked
from nemo_minitron.system.terminal import Screen, write

if TYPE_CHECKING:
    from nemo_minitron.config.recipe import Recipe
    from nemo_minitron.execution.runner import RunOptions
    from nemo_minitron.launch.record import Submission
    from nemo_minitron.plan.planner import RunPlan

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
console = Screen()


def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print every command and script; submit nothing.")] = False,
    rerun: Annotated[list[str] | None, typer.Option(help="As of `run`.")] = None,
    accept_drift: Annotated[bool, typer.Option(help="As of `run`.")] = False,
    until: Annotated[str | None, typer.Option(help="As of `run`.")] = None,
) -> None:
    """Bring a recipe to a cluster (`launcher=slurm cluster=NAME`), or run it here, in its containers."""
    from nemo_minitron.cli.main import load_recipe
    from nemo_minitron.execution.runner import RunOptions
    from nemo_minitron.plan.checks import require_possible, require_valid
    from nemo_minitron.plan.planner import make_plan
    from nemo_minitron.plan.programs import foreign_programs

    loaded = load_recipe(recipe, overrides)
    plan = make_plan(loaded)
    (require_possible if dry_run else require_valid)(plan)
    if dry_run:
        _print_missing(plan)
    else:
        print_warnings(foreign_programs(recipe, loaded.execution))
    options = RunOptions(tuple(rerun or ()), accept_drift, until)
    if loaded.execution.launcher == "slurm":
        _to_slurm(loaded, options, dry_run=dry_run)
    else:
        _here(loaded, options, dry_run=dry_run)


def _print_missing(plan: RunPlan) -> None:
    """What is not on this machine, on stderr: stdout has the scripts."""
    from nemo_minitron.cli.plan import missing_for_launch
    from nemo_minitron.plan.missing import missing_sources

    screen = Screen(stderr=True)
    for text in (*missing_sources(plan), *missing_for_launch(plan)):
        screen.say(text, "missing here", "yellow")


def stage(
    recipe_json: Annotated[Path, typer.Argument(help="The composed recipe of a submission.")],
    name: Annotated[str, typer.Argument(help="The stage.")],
) -> None:
    """Run one stage of a composed recipe: what the jobs of `launch` call on every node."""
    from nemo_minitron.execution.job import run_in_job

    failed = os.environ.get("MINITRON_FAILED_FILE")
    try:
        run_in_job(_composed(recipe_json), name)
    except (Interrupted, ProcessesDied):
        raise
    except MinitronError as error:
        # The script of the job finds it, and does not try again what a person must repair.
        if failed:
            Path(failed).write_text(f"{masked(str(error))}\n")
        raise


def logs(
    recipe: RecipeFile,
    name: Annotated[str, typer.Argument(metavar="STAGE", help="The stage.")],
    overrides: Overrides = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 40,
) -> None:
    """Print the last lines of every log of a stage."""
    from nemo_minitron.cli.main import load_recipe
    from nemo_minitron.launch.logs import logs_of, tail
    from nemo_minitron.plan.folder import run_dir

    run = run_dir(load_recipe(recipe, overrides))
    found = logs_of(run, name)
    if not found:
        raise EnvironmentProblem(f"Stage {name} has no log yet.", where=str(run / "logs"))
    for file in found:
        console.say("", str(file), "bold")
        for line in tail(file, lines):
            write(masked(line))


def cancel(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Cancel the jobs of the last submission; what they have saved stays, and `launch` goes on from it."""
    from nemo_minitron.cli.main import load_recipe
    from nemo_minitron.launch import record, slurm
    from nemo_minitron.launch.submit import last_submission
    from nemo_minitron.plan.folder import run_dir

    run = run_dir(load_recipe(recipe, overrides))
    if record.newest(run) is None:
        console.say("nothing was submitted")
        return
    with record.launching(run):
        last = last_submission(run)
        active = slurm.active(last.job_ids) if last else []
        slurm.cancel(active)
    console.say(f"cancelled {', '.join(active)}" if active else "no job was left")


def check_cluster(loaded: Recipe) -> None:
    """Print what can be seen of the cluster from here.

    Raises:
        EnvironmentProblem: something that the recipe needs is not there.
    """
    from nemo_minitron.launch.probe import probe

    findings = probe(loaded)
    styles = {"ok": "green", "warning": "yellow", "problem": "red"}
    for found in findings:
        console.say(found.text, found.level, styles[found.level])
    wrong = [found.text for found in findings if found.level == "problem"]
    if wrong:
        raise EnvironmentProblem(f"The cluster cannot take this recipe: {len(wrong)} problems, above.")


def _to_slurm(loaded: Recipe, options: RunOptions, *, dry_run: bool) -> None:
    from nemo_minitron.launch import submit

    if dry_run:
        for command, text in submit.dry_run(loaded, options):
            write(f"# {shlex.join(command)}" if "\n" not in "".join(command) else f"# {command!r}")
            write(text)
        return
    done = submit.launch(loaded, options, console.say)
    if done is None:
        console.say("nothing was submitted", "all stages have finished;", "green")
        return
    _print_submission(done)


def _print_submission(done: Submission) -> None:
    table = Table(title=f"submitted, {done.folder}")
    for column in ("job", "stages", "Slurm's id"):
        table.add_column(column)
    for job in done.jobs:
        stages = job.stages[0] if len(job.stages) == 1 else f"{len(job.stages)}: {job.stages[0]} ..."
        table.add_row(job.name, stages, ", ".join(job.job_ids))
    console.print(table)
    console.say("watch: minitron status RECIPE     end: minitron cancel RECIPE")


def _here(loaded: Recipe, options: RunOptions, *, dry_run: bool) -> None:
    from nemo_minitron.execution.runner import run_recipe
    from nemo_minitron.launch import local

    if local.uses_containers(loaded):
        if dry_run:
            for _, command in local.dry_run(loaded, options):
                write(shlex.join(command))
        else:
            local.launch(loaded, options)
    elif dry_run:
        write(shlex.join(["minitron", "run", *(word for word in sys.argv[2:] if word != "--dry-run")]))
    else:
        run_recipe(loaded, options)


def _composed(file: Path) -> Recipe:
    from pydantic import ValidationError

    from nemo_minitron.config.recipe import Recipe

    try:
        return Recipe.model_validate(json.loads(file.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"There is no {file}.", next_step="Submit again with `minitron launch`.") from None
    except (ValidationError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"This is no composed recipe of this version: {str(error).splitlines()[0]}",
            where=str(file),
            next_step="Submit again with `minitron launch`.",
        ) from None
