"""`minitron report`: render the report again."""

from __future__ import annotations

from nemo_minitron import api
from nemo_minitron.cli.arguments import Overrides, RecipeFile
from nemo_minitron.cli.output import print_report_path, print_warnings


def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Render the report again from the finished stages, and print its path."""
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.report.render import render_now

    plan = api.load_plan(recipe, overrides, checked=False)
    print_warnings(render_now(plan))
    print_report_path(run_dir(plan.recipe) / "report.html")
