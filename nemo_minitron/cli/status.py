"""`minitron status`: the state of every stage, in the terminal, repeatedly, or as a page."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nemo_minitron import api
from nemo_minitron.cli.arguments import Overrides, RecipeFile, expanded
from nemo_minitron.cli.output import STATUS_STYLES, console
from nemo_minitron.system.disclosure import environment_of
from nemo_minitron.system.files import write_whole
from nemo_minitron.system.terminal import write

MIN_WATCH_S = 1.0


def status(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the status as JSON; with --watch, a line each time.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Compare the contents of every file with its sha256.")] = False,
    html: Annotated[Path | None, typer.Option(callback=expanded, help="Write a page that reloads itself.")] = None,
    watch: Annotated[
        float | None,
        typer.Option(min=MIN_WATCH_S, help="Repeat at this interval in seconds."),
    ] = None,
) -> None:
    """Show which stages have finished, the progress of those that run, and their jobs on a cluster."""

    def current() -> dict[str, Any]:
        facts, environment = _status(recipe, overrides, verify=verify)
        if html is not None:
            _write_page(facts, html, watch, environment)
        return facts

    facts = current()
    if watch is None:
        write(json.dumps(facts, indent=2)) if as_json else console.print(_table(facts))
        return
    with nullcontext() if as_json else Live(_table(facts), console=console, auto_refresh=False) as live:
        while True:
            if live is None:
                write(json.dumps(facts))
            else:
                live.update(_table(facts), refresh=True)
            if all(stage["status"] == "finished" for stage in facts["stages"].values()):
                return
            time.sleep(watch)
            facts = current()


def _status(recipe: Path, overrides: list[str] | None, *, verify: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the state of every stage, and the environment that the recipe sets for its jobs."""
    from nemo_minitron.launch.status import job_facts
    from nemo_minitron.plan.describe import status_facts
    from nemo_minitron.plan.folder import run_dir

    plan = api.load_plan(recipe, overrides, checked=False)
    facts = status_facts(plan, verify=verify, jobs=job_facts(run_dir(plan.recipe)))
    return facts, environment_of(plan.recipe.model_dump(mode="json"))


def _table(facts: dict[str, Any]) -> Table:
    stages = facts["stages"]
    has_jobs = any(stage["job"] for stage in stages.values())
    table = Table(title=facts["name"])
    for column in ("stage", "status", "took", *(("job", "restarts") if has_jobs else ()), "result"):
        table.add_column(column)
    for name, stage in stages.items():
        cells = [name, Text(stage["status"], style=STATUS_STYLES.get(stage["status"], "magenta")), stage["took"]]
        if has_jobs:
            cells += _job_cells(stage["job"])
        table.add_row(*cells, Text(stage["summary"]))
    return table


def _job_cells(job: dict[str, Any] | None) -> list[str]:
    if job is None:
        return ["", ""]
    reason = f" ({job['reason']})" if job["reason"] and job["state"] == "pending" else ""
    return [f"{job['job']} {job['state']}{reason}", str(job["restarts"] or "")]


def _write_page(facts: dict[str, Any], html: Path, watch: float | None, environment: dict[str, str]) -> None:
    from nemo_minitron.report.status_page import render_status

    write_whole(html, render_status(facts, reload_s=watch or 30.0, environment=environment))
