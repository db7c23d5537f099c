"""The `minitron` command."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from nemo_minitron import __version__
from nemo_minitron.cli import launch as cli_launch
from nemo_minitron.cli.aligner import convert, env_app
from nemo_minitron.cli.bundle import bundle
from nemo_minitron.cli.chat import chat
from nemo_minitron.cli.doctor import doctor
from nemo_minitron.cli.plan import plan, print_warnings
from nemo_minitron.cli.recipes import recipes, schema
from nemo_minitron.cli.rlhf import rlhf
from nemo_minitron.cli.show import show
from nemo_minitron.cli.status import status
from nemo_minitron.errors import EnvironmentProblem, Interrupted, MinitronError
from nemo_minitron.system.disclosure import masked, masked_command
from nemo_minitron.system.disk import disk_errors
from nemo_minitron.system.outer_job import ensure_user_name, unset_launcher_variables
from nemo_minitron.system.terminal import Screen

if TYPE_CHECKING:
    from nemo_minitron.config.recipe import Recipe
    from nemo_minitron.plan.planner import RunPlan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Make a small language model out of a big one: prune, distill, report.

Example: `minitron run recipes/smollm2_135m/width.yaml stages.distill.lr=1e-4 execution.parallel.tp=3`""",
)
assets_app = typer.Typer(no_args_is_help=True, help="Models and texts that recipes name as `asset:NAME`.")
app.add_typer(assets_app, name="assets")
app.add_typer(env_app, name="env")

RecipeFile = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="A recipe YAML, or the name of one of `minitron recipes`, e.g. toy/width."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of any key of the recipe.")
]
console = Screen()
INTERRUPTED = 130
PIPE_CLOSED = 141
"""What shells say of a program that SIGPIPE has ended."""


def load_recipe(file: Path, overrides: list[str] | None) -> Recipe:
    """Compose and validate."""
    from nemo_minitron.config.compose import compose
    from nemo_minitron.config.explain import validate

    return validate(compose(file, overrides or []), where=str(file))


def load_plan(file: Path, overrides: list[str] | None, *, checked: bool = True) -> RunPlan:
    """Plan a recipe; with `checked`, refuse one that breaks a rule."""
    from nemo_minitron.plan.checks import require_valid
    from nemo_minitron.plan.planner import make_plan

    plan = make_plan(load_recipe(file, overrides))
    if checked:
        require_valid(plan)
    return plan


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[bool, typer.Option(help="Look at the cluster too, from here.")] = False,
) -> None:
    """Find every mistake in a recipe. Needs no GPU, no torch, no network."""
    from nemo_minitron.plan.checks import require_valid
    from nemo_minitron.plan.epochs import epoch_warnings

    plan = load_plan(recipe, overrides, checked=False)
    try:
        if cluster:
            cli_launch.check_cluster(plan.recipe)
    finally:
        # What the cluster lacks is on the screen; the recipe's own problems are said in any case.
        require_valid(plan)
    print_warnings(list(epoch_warnings(plan)))
    console.say(f"{plan.recipe.name}: {len(plan.calls)} stages", "ok", "green")


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rerun: Annotated[
        list[str] | None,
        typer.Option(help="Make this stage again, and all that follows from it; `changed`: every changed stage."),
    ] = None,
    accept_drift: Annotated[bool, typer.Option(help="Use finished outputs that no longer match the recipe.")] = False,
    until: Annotated[str | None, typer.Option(help="Run this stage and what it needs, nothing else.")] = None,
) -> None:
    """Run the stages that are not finished. The same command goes on after an interruption."""
    from nemo_minitron.execution.runner import RunOptions, run_recipe
    from nemo_minitron.plan.checks import require_valid
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.plan.planner import make_plan
    from nemo_minitron.plan.programs import foreign_programs

    loaded = load_recipe(recipe, overrides)
    require_valid(make_plan(loaded))
    print_warnings(foreign_programs(recipe, loaded.execution))
    started_s = time.monotonic()
    run_recipe(loaded, RunOptions(tuple(rerun or ()), accept_drift, until))
    console.say(f"in {time.monotonic() - started_s:.0f} s: {run_dir(loaded)}", "done", "green")
    _print_report_path(run_dir(loaded))


@app.command()
def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Render the report again from the finished stages, and print where it is."""
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.plan.planner import make_plan
    from nemo_minitron.stages.report.run import render_now

    loaded = load_recipe(recipe, overrides)
    render_now(make_plan(loaded))
    _print_report_path(run_dir(loaded))


app.command()(plan)
app.command()(recipes)
app.command()(schema)
app.command()(doctor)
app.command()(status)
app.command()(cli_launch.launch)
app.command()(cli_launch.logs)
app.command()(cli_launch.cancel)
app.command(hidden=True)(cli_launch.stage)
app.command()(show)
app.command()(convert)
app.command()(bundle)
app.command()(chat)
app.command()(rlhf)


@assets_app.command("list")
def assets_list(assets_dir: Annotated[Path, typer.Option(help="Where assets are kept.")] = Path("assets")) -> None:
    """Show the assets, their licences, and which are here."""
    from nemo_minitron.assets import list_assets

    table = Table()
    for column in ("asset", "licence", "here", "what"):
        table.add_column(column)
    for asset in list_assets():
        here = Text("yes", "green") if asset.is_here(assets_dir) else "no"
        table.add_row(asset.name, asset.license, here, asset.description)
    console.print(table)


@assets_app.command("fetch")
def assets_fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all when none is named.")] = None,
    assets_dir: Annotated[Path, typer.Option(help="Where to put them.")] = Path("assets"),
) -> None:
    """Fetch assets with pip, check their sha256, and unpack what is needed."""
    from nemo_minitron.assets import fetch
    from nemo_minitron.system.progress import Progress

    fetch(names or None, assets_dir, Progress())


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _print_report_path(folder: Path) -> None:
    file = folder / "report.html"
    if file.is_file():
        console.say(f"report: {file.resolve()}")


def main() -> None:
    """Entry point: a user's error is a message and exit code 2, never a traceback."""
    _make_streams_safe()
    ensure_user_name()
    unset_launcher_variables()
    try:
        # Outside standalone mode an exit, an interrupt (130) among them, comes back as a number.
        with disk_errors(_working_folder()):
            code = app(standalone_mode=False)
            sys.stdout.flush()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except BrokenPipeError:
        _forget_stdout()
        sys.exit(PIPE_CLOSED)
    except Interrupted as error:
        Screen(stderr=True).say(error)
        sys.exit(INTERRUPTED)
    except MinitronError as error:
        Screen(stderr=True).say(error, "error:", "red")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        Screen(stderr=True).say("interrupted; the same command goes on from where it was")
        sys.exit(INTERRUPTED)
    except MemoryError as error:
        told = f"The memory of this machine is used up{': ' if str(error) else ''}{error}."
        Screen(stderr=True).say(told, "error:", "red")
        sys.exit(2)
    except Exception as error:
        sys.exit(_unexpected(error))


def _make_streams_safe() -> None:
    """Any text can be printed: streams that were closed swallow it, and what an encoding lacks is written as escapes.

    A program that is started without open streams has None in their place.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise EnvironmentProblem(
            "The folder in which this was started has been deleted.", next_step="Change to another folder (cd)."
        ) from None


def _forget_stdout() -> None:
    """Nobody reads it any more: `minitron plan ... | head`. Python would complain when it flushes it at the end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: Exception) -> int:
    """Usage errors in the parser's words; our own bugs with a traceback in a file."""
    words = getattr(error, "format_message", None)
    if words is not None:
        _say_usage(error, words())
        return 2
    text = masked(f"{' '.join(masked_command(sys.argv))}\n{traceback.format_exc()}")
    log = _kept(text)
    report = f"Please report it with {log}." if log else f"Please report it with what follows.\n{text}"
    told = f"{type(error).__name__}: {error}\n  This is a bug of nemo-minitron. {report}"
    Screen(stderr=True).say(told, "unexpected error:", "red")
    return 1


def _say_usage(error: Exception, words: str) -> None:
    """Not by the parser's own `show`, which takes what was typed for markup."""
    screen, context = Screen(stderr=True), getattr(error, "ctx", None)
    if context is not None:
        screen.say(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.")
    screen.say(words, "error:", "red")


def _kept(text: str) -> Path | None:
    """Where the text was written: here, or in the folder for temporary files where this one takes nothing.

    For this user alone, under a name that nobody can have taken.
    """
    for folder in (Path(), Path(tempfile.gettempdir())):
        with suppress(OSError):
            number, name = tempfile.mkstemp(prefix="minitron-crash-", suffix=".log", dir=folder)
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as log:
                log.write(text)
            return Path(name).absolute()
    return None
