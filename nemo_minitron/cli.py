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
from rich.console import Console
from rich.table import Table

from nemo_minitron import __version__, cli_launch
from nemo_minitron.cli_aligner import convert, env_app
from nemo_minitron.cli_bundle import bundle
from nemo_minitron.cli_chat import chat
from nemo_minitron.cli_doctor import doctor
from nemo_minitron.cli_plan import plan, print_warnings
from nemo_minitron.cli_recipes import recipes
from nemo_minitron.cli_rlhf import rlhf
from nemo_minitron.cli_show import show
from nemo_minitron.cli_status import status
from nemo_minitron.disk import disk_errors
from nemo_minitron.errors import EnvironmentProblem, Interrupted, MinitronError
from nemo_minitron.outer_job import leave_launcher, name_the_user

if TYPE_CHECKING:
    from nemo_minitron.config.schema import Recipe
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
console = Console()
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
    console.print(f"[green]ok[/green] {plan.recipe.name}: {len(plan.calls)} stages")


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
    from nemo_minitron.plan.checks import require_valid
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.plan.planner import make_plan
    from nemo_minitron.plan.programs import foreign_programs
    from nemo_minitron.stages.runner import RunOptions, run_recipe

    loaded = load_recipe(recipe, overrides)
    require_valid(make_plan(loaded))
    print_warnings(foreign_programs(recipe, loaded.execution))
    started_s = time.monotonic()
    run_recipe(loaded, RunOptions(tuple(rerun or ()), accept_drift, until))
    console.print(f"[green]done[/green] in {time.monotonic() - started_s:.0f} s: {run_dir(loaded)}")
    _print_report_path(run_dir(loaded))


@app.command()
def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Render the report again from the finished stages, and print where it is."""
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.plan.planner import make_plan
    from nemo_minitron.stages.report import render_now

    loaded = load_recipe(recipe, overrides)
    render_now(make_plan(loaded))
    _print_report_path(run_dir(loaded))


app.command()(plan)
app.command()(recipes)
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
        here = "[green]yes[/green]" if asset.is_here(assets_dir) else "no"
        table.add_row(asset.name, asset.license, here, asset.description)
    console.print(table)


@assets_app.command("fetch")
def assets_fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all when none is named.")] = None,
    assets_dir: Annotated[Path, typer.Option(help="Where to put them.")] = Path("assets"),
) -> None:
    """Fetch assets with pip, check their sha256, and unpack what is needed."""
    from nemo_minitron.assets import fetch
    from nemo_minitron.progress import Progress

    fetch(names or None, assets_dir, Progress())


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _print_report_path(folder: Path) -> None:
    file = folder / "report.html"
    if file.is_file():
        console.print(f"report: {file.resolve()}", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point: a user's error is a message and exit code 2, never a traceback."""
    _make_streams_safe()
    name_the_user()
    leave_launcher()
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
        Console(stderr=True).print(_escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(INTERRUPTED)
    except MinitronError as error:
        Console(stderr=True).print(f"[red]error:[/red] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        Console(stderr=True).print("interrupted; the same command goes on from where it was")
        sys.exit(INTERRUPTED)
    except MemoryError as error:
        print(f"error: The memory of this machine is used up{': ' if str(error) else ''}{error}.", file=sys.stderr)
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
    show = getattr(error, "show", None)
    if show is not None:
        show()
        return 2
    text = f"{' '.join(sys.argv)}\n{traceback.format_exc()}"
    log = _kept(text)
    report = f"Please report it with {log}." if log else f"Please report it with what follows.\n{text}"
    Console(stderr=True).print(
        f"[red]unexpected error:[/red] {type(error).__name__}: {_escape(str(error))}\n"
        f"  This is a bug of nemo-minitron. {_escape(report)}",
        highlight=False,
        soft_wrap=True,
    )
    return 1


def _kept(text: str) -> Path | None:
    """Where the text was written: here, or in the folder for temporary files where this one takes nothing."""
    for folder in (Path(), Path(tempfile.gettempdir())):
        with suppress(OSError):
            log = folder / "minitron-crash.log"
            log.write_text(text, encoding="utf-8", errors="backslashreplace")
            return log.absolute()
    return None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
