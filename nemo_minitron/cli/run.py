"""`minitron run`: run a recipe on this machine."""

from __future__ import annotations

import time

from nemo_minitron import api
from nemo_minitron.cli.arguments import AcceptDrift, Overrides, RecipeFile, Rerun, Until
from nemo_minitron.cli.output import console, print_report_path, print_warnings
from nemo_minitron.system.duration import duration


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rerun: Rerun = None,
    accept_drift: AcceptDrift = False,
    until: Until = None,
) -> None:
    """Run the stages that have not finished. The same command continues after an interruption."""
    from nemo_minitron.launch.status import require_no_jobs
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.plan.programs import foreign_programs

    loaded = api.load_recipe(recipe, overrides)
    plan = api.plan(loaded)
    require_no_jobs(run_dir(loaded))
    print_warnings(foreign_programs(recipe, loaded))
    started_s = time.monotonic()
    folder = api.run(plan, rerun=rerun or (), accept_drift=accept_drift, until=until)
    console.say(f"in {duration(time.monotonic() - started_s)}: {folder}", "done", "green")
    print_report_path(folder / "report.html")
