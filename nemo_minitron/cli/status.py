"""`minitron status`: in the terminal, once or as it goes on, and as a page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nemo_minitron.system.files import write_whole
from nemo_minitron.system.terminal import Screen, write

STYLES = {"finished": "green", "changed": "yellow", "to run": "cyan"}
MIN_WATCH_S = 1.0
console = Screen()


def status(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    verify: Annotated[bool, typer.Option(help="Compare the contents of every file with its sha256.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page that loads itself again.")] = None,
    watch: Annotated[float | None, typer.Option(min=MIN_WATCH_S, help="Look again every so many seconds.")] = None,
) -> None:
    """Show which stages are finished, how far a running one is, and the jobs of a cluster."""

    def look() -> dict[str, Any]:
        return _look(recipe, overrides, verify=verify)

    facts = look()
    if as_json:
        write(json.dumps(facts, indent=2))
        return
    _write_page(facts, html, watch)
    if watch is None:
        console.print(_table(facts))
        return
    with Live(_table(facts), console=console, auto_refresh=False) as live:
        while any(stage["status"] != "finished" for stage in facts["stages"].values()):
            time.sleep(watch)
            facts = look()
            _write_page(facts, html, watch)
            live.update(_table(facts), refresh=True)


def _look(recipe: Path, overrides: list[str] | None, *, verify: bool) -> dict[str, Any]:
    from nemo_minitron.cli.main import load_plan
    from nemo_minitron.launch.status import job_facts
    from nemo_minitron.plan.describe import status_facts
    from nemo_minitron.plan.folder import run_dir

    plan = load_plan(recipe, overrides, checked=False)
    return status_facts(plan, verify=verify, jobs=job_facts(run_dir(plan.recipe)))


def _table(facts: dict[str, Any]) -> Table:
    stages = facts["stages"]
    has_jobs = any(stage["job"] for stage in stages.values())
    table = Table(title=facts["name"])
    for column in ("stage", "status", "took", *(("job", "restarts") if has_jobs else ()), "result"):
        table.add_column(column)
    for name, stage in stages.items():
        words = [name, Text(stage["status"], style=STYLES.get(stage["status"], "magenta")), stage["took"]]
        if has_jobs:
            words += _job_words(stage["job"])
        table.add_row(*words, Text(stage["summary"]))
    return table


def _job_words(job: dict[str, Any] | None) -> list[str]:
    if job is None:
        return ["", ""]
    reason = f" ({job['reason']})" if job["reason"] and job["state"] == "pending" else ""
    return [f"{job['job']} {job['state']}{reason}", str(job["restarts"] or "")]


def _write_page(facts: dict[str, Any], html: Path | None, watch: float | None) -> None:
    if html is None:
        return
    from nemo_minitron.report.status_page import render_status

    write_whole(html, render_status(facts, reload_s=watch or 30.0))
